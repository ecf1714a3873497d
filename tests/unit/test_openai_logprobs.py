"""Log-probabilities in OpenAI's shapes."""

import math

from hypothesis import given
from hypothesis import strategies as st

from engine.request import TokenLogprobs
from engine.tokenizer import Tokenizer
from engine.weights.hub import resolve_model
from serve_app.openai.logprobs import CompletionLogprobs, chat_logprobs, prompt_logprobs, token_name

TOKENIZER = Tokenizer.from_dir(resolve_model("demo"))
TOKEN_IDS = st.lists(st.integers(0, TOKENIZER.vocab_size - 1), min_size=1, max_size=16)


def scores(token_ids: list[int]) -> list[TokenLogprobs]:
    return [TokenLogprobs(token_id, -0.5, 2, [1, token_id], [-0.25, -0.5]) for token_id in token_ids]


@given(TOKEN_IDS, st.integers(0, 16))
def test_offsets_point_into_the_text(token_ids: list[int], cut: int):
    made = CompletionLogprobs(TOKENIZER, skip_special_tokens=False)
    parts = [made.add_prompt(token_ids[0], scores(token_ids[1:])), made.add(scores(token_ids[:cut]))]
    text = TOKENIZER.decode(token_ids, skip_special_tokens=False)
    text += TOKENIZER.decode(token_ids[:cut], skip_special_tokens=False)
    names = [name for part in parts for name in part["tokens"]]
    offsets = [offset for part in parts for offset in part["text_offset"]]
    assert offsets == sorted(offsets) and offsets[0] >= 0 and offsets[-1] <= len(text)
    previous_was_whole = True
    for name, offset in zip(names, offsets, strict=True):
        if previous_was_whole and not name.startswith("bytes:"):
            assert text[offset : offset + len(name)] == name
        previous_was_whole = not name.startswith("bytes:")


def test_different_tokens_have_different_names():
    names = [token_name(TOKENIZER, token_id) for token_id in range(TOKENIZER.vocab_size)]
    assert len(set(names)) == len(names)
    assert sum(name.startswith("bytes:\\x") for name in names) >= 128


@given(TOKEN_IDS)
def test_a_token_is_among_its_own_top_with_the_same_number(token_ids: list[int]):
    found = CompletionLogprobs(TOKENIZER, skip_special_tokens=True).add(scores(token_ids))
    for name, logprob, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        assert top[name] == logprob


def test_an_echoed_prompt_has_no_score_for_its_first_token():
    found = CompletionLogprobs(TOKENIZER, skip_special_tokens=True).add_prompt(5, scores([6, 7]))
    assert found["token_logprobs"] == [None, -0.5, -0.5] and found["top_logprobs"][0] is None
    assert found["text_offset"][0] == 0 and len(found["tokens"]) == 3


@given(TOKEN_IDS)
def test_a_chats_bytes_are_those_of_its_tokens(token_ids: list[int]):
    content = chat_logprobs(scores(token_ids), TOKENIZER)["content"]
    assert [bytes(item["bytes"]) for item in content] == [TOKENIZER.token_bytes(token_id) for token_id in token_ids]
    assert all(item["token"] == bytes(item["bytes"]).decode(errors="replace") for item in content)
    assert all([top["logprob"] for top in item["top_logprobs"]] == [-0.25, -0.5] for item in content)


def test_what_cannot_be_is_a_number_that_json_can_write():
    impossible = TokenLogprobs(5, -math.inf, 9, [6], [-math.inf])
    [item] = chat_logprobs([impossible], TOKENIZER)["content"]
    assert item["logprob"] == item["top_logprobs"][0]["logprob"] == -9999.0
    assert prompt_logprobs([impossible], TOKENIZER)[1]["5"]["logprob"] == -9999.0


def test_prompt_logprobs_are_by_token_id_with_ranks():
    entries = prompt_logprobs([TokenLogprobs(7, -3.0, 12, [5, 6], [-0.1, -0.2])], TOKENIZER)
    assert entries[0] is None
    assert {key: (value["rank"], value["logprob"]) for key, value in entries[1].items()} == {
        "5": (1, -0.1), "6": (2, -0.2), "7": (12, -3.0),
    }  # fmt: skip
