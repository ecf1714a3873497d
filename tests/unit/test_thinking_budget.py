"""Reasoning that goes on for too long is closed, and nothing else is touched."""

from typing import Any

import numpy as np
import pytest
import torch

from engine import LLM, SamplingParams
from engine.errors import RequestError
from engine.request import ThinkingBudget
from tests.sampling_reference import make_request
from tests.unit.test_sampling_table import logits_with, next_token, table_of

OPENING, CLOSING, BREAK = 20, 21, 22


def budget(num_tokens: int, is_open: bool = False) -> ThinkingBudget:
    return ThinkingBudget(
        num_tokens=num_tokens,
        closing_ids=(BREAK, CLOSING),
        opening_id=OPENING,
        closing_id=CLOSING,
        is_open=is_open,
    )


def tokens_at(positions: list[int], tokens: list[int], thinking: ThinkingBudget, **rest: Any) -> list[int]:
    """What comes at some positions of a sequence, with a prompt of two tokens, where the model wants token 7."""
    params = SamplingParams(thinking=thinking, seed=0, **rest)
    table = table_of(make_request(params, prompt=tokens[:2]), make_request(SamplingParams(temperature=0)))
    history = np.zeros((8, 64), np.int32)
    history[0, : len(tokens)] = tokens
    logits = logits_with({7: 90.0})
    assert next_token(table, logits, positions[0], history, slot=1) == 7
    found = [next_token(table, logits, position, history) for position in positions]
    device_history = torch.from_numpy(history)
    assert [next_token(table, logits, position, device_history) for position in positions] == found
    return found


@pytest.mark.parametrize(
    "rest",
    [{"temperature": 0}, {"top_k": 2}, {"top_p": 0.9}, {}, {"allowed_token_ids": (7,)}, {"bad_word_ids": ((21,),)}],
    ids=str,
)
def test_an_open_block_is_closed(rest: dict[str, Any]):
    output = [OPENING, 5, 5, BREAK, CLOSING, 5]
    assert tokens_at([4, 5, 6, 7], [1, 2, *output], budget(3), **rest) == [7, BREAK, CLOSING, 7]


@pytest.mark.parametrize(
    ("tokens", "is_open", "expected"),
    [
        ([1, 2, 5, 5, 5], False, [7, 7]),  # it never thought
        ([1, 2, OPENING, 5, CLOSING], False, [7, 7]),  # it is done thinking
        ([OPENING, CLOSING, 5, 5, 5], False, [7, 7]),  # the prompt's tags are other turns'
        ([1, OPENING, 5, 5, 5], True, [BREAK, CLOSING]),
        ([1, OPENING, 5, 5, CLOSING], True, [7, 7]),
        ([OPENING, CLOSING, 5, OPENING, 5], False, [BREAK, CLOSING]),
    ],
)
def test_what_counts_as_open(tokens: list[int], is_open: bool, expected: list[int]):
    assert tokens_at([5, 6], [*tokens, BREAK], budget(3, is_open), temperature=0) == expected


def test_a_budget_of_nothing():
    assert tokens_at([2, 3, 4], [1, OPENING, BREAK, CLOSING], budget(0, True), temperature=0) == [BREAK, CLOSING, 7]


def test_plain_steps_stay_plain():
    """So that decode graphs draw all tokens but the forced ones."""
    table = table_of(make_request(SamplingParams(thinking=budget(3)), prompt=[1, 2]))
    plain = [table.plain_settings(np.array([0]), np.array([position])) is not None for position in range(2, 9)]
    assert plain == [True, True, True, False, False, True, True]


@pytest.mark.parametrize("fields", [{"num_tokens": -1}, {"closing_ids": ()}])
def test_budgets_that_make_no_sense(fields: dict[str, Any]):
    values = {"num_tokens": 1, "closing_ids": (1,), "opening_id": 2, "closing_id": 3, "is_open": False} | fields
    with pytest.raises(RequestError, match="thinking"):
        SamplingParams(thinking=ThinkingBudget(**values))


@pytest.mark.parametrize("overlap", [False, True])
def test_the_model_goes_on_after_what_was_put_into_its_mouth(overlap: bool):
    llm = LLM("demo", kv_cache_memory=16 * 2**20, num_threads=1, show_progress=False, overlap_steps=overlap)
    tokenizer = llm.engine.tokenizer
    opening, closing = tokenizer.token_to_id("<think>"), tokenizer.token_to_id("</think>")
    prompt = tokenizer.encode_chat([{"role": "user", "content": "What is 12 + 3?"}])
    thinking = ThinkingBudget(
        num_tokens=4,
        closing_ids=(*tokenizer.encode("\n"), closing),
        opening_id=opening,
        closing_id=closing,
        is_open=False,
    )
    free, short = (
        llm.generate([prompt], SamplingParams(temperature=0, max_tokens=64, thinking=each))[0]
        for each in (None, thinking)
    )
    assert free.token_ids[0] == opening and free.token_ids.index(closing) > 5
    assert short.token_ids[:4] == free.token_ids[:4]
    assert short.token_ids[4:6] == list(thinking.closing_ids)
    continued = llm.generate([prompt + short.token_ids[:6]], SamplingParams(temperature=0, max_tokens=58))[0]
    assert short.token_ids[6:] == continued.token_ids
