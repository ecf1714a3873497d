"""Parameters kept by slot, and what they do to the logits over time."""

import numpy as np
import pytest
import torch

from engine.errors import CheckpointError, RequestError
from engine.request import SamplingParams
from engine.sampling.batch import Method
from engine.sampling.sampler import sample
from engine.sampling.table import SamplingTable
from tests.sampling_reference import make_request

VOCAB_SIZE = 200
CPU = torch.device("cpu")
NO_HISTORY = np.zeros((8, 64), np.int32)


def table_of(*requests, vocab_size=VOCAB_SIZE) -> SamplingTable:
    table = SamplingTable(8, vocab_size, CPU)
    for slot, request in enumerate(requests):
        table.set_row(slot, request)
    return table


def next_token(table, logits, position, history=NO_HISTORY, slot=0) -> int:
    batch = table.gather(np.array([slot]), np.array([position]), history)
    return int(sample(logits[None], batch).token_ids)


def logits_with(best: dict[int, float]) -> torch.Tensor:
    logits = torch.zeros(VOCAB_SIZE + 56)
    for token_id, value in best.items():
        logits[token_id] = value
    return logits


@pytest.mark.parametrize("rest", [{"temperature": 0}, {"top_k": 2}, {"top_p": 0.9}, {}], ids=str)
def test_min_tokens_bans_what_ends_the_request(rest):
    logits = logits_with({7: 90.0, 8: 80.0, 9: 60.0})
    params = SamplingParams(min_tokens=2, stop_token_ids=(8, 10**9), seed=0, **rest)
    table = table_of(make_request(params, prompt=[1, 2, 3], eos=(7,)))
    assert [next_token(table, logits, position) for position in (3, 4, 5, 6)] == [9, 9, 7, 7]


def test_ignored_eos_is_not_banned():
    params = SamplingParams(min_tokens=2, stop_token_ids=(8,), ignore_eos=True, temperature=0)
    table = table_of(make_request(params, eos=(7,)))
    assert next_token(table, logits_with({7: 2.0, 8: 3.0}), 1) == 7


def test_ban_and_bias_of_one_token_add_up_to_a_ban():
    params = SamplingParams(min_tokens=1, logit_bias={7: 100.0, 5: 3.0}, temperature=0)
    table = table_of(make_request(params, eos=(7,)))
    assert [next_token(table, logits_with({7: 9.0}), position) for position in (1, 2)] == [5, 7]


@pytest.mark.parametrize("rest", [{"temperature": 0}, {"top_k": 2}, {"top_p": 0.9}, {}], ids=str)
def test_a_word_is_bad_where_the_output_ends_with_its_beginning(rest):
    """Tokens of the prompt begin no word, and neither do those past the position."""
    logits = logits_with({7: 90.0, 8: 60.0})
    words = ((4, 5, 7), (9, 9, 9, 9, 7))
    table = table_of(make_request(SamplingParams(bad_word_ids=words, seed=0, **rest), prompt=[4, 9, 9]))
    history = np.zeros((8, 64), np.int32)
    history[0, :9] = (4, 9, 9, 9, 9, 4, 5, 4, 4)
    for tokens in (history, torch.from_numpy(history)):
        found = [next_token(table, logits, position, tokens) for position in range(3, 9)]
        assert found == [7, 7, 7, 7, 8, 7]


@pytest.mark.parametrize("rest", [{"temperature": 0}, {"top_k": 2}, {"top_p": 0.9}, {}], ids=str)
def test_bad_words_yield_where_nothing_else_is_allowed(rest):
    params = SamplingParams(allowed_token_ids=(5, 6), bad_word_ids=((5,), (6,), (6,)), seed=0, **rest)
    table = table_of(make_request(params))
    assert {next_token(table, logits_with({7: 9.0, 6: 3.0}), position) for position in range(1, 20)} <= {5, 6}


def test_allowed_tokens_are_the_only_ones_but_those_that_end_too_early():
    params = SamplingParams(allowed_token_ids=(0, 31, 32, 199), min_tokens=1, temperature=0)
    table = table_of(make_request(params, eos=(199,)))
    logits = logits_with({199: 9.0, 32: 8.0, 33: 70.0, 200: 80.0})
    assert [next_token(table, logits, position) for position in (1, 2)] == [32, 199]


@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE, 10**12])
@pytest.mark.parametrize("param", ["logit_bias", "allowed_token_ids", "bad_words", "logprob_token_ids"])
def test_unknown_tokens(token_id, param):
    table = table_of(make_request(SamplingParams(temperature=0)))
    fields = {
        "logit_bias": {"logit_bias": {token_id: 1.0}},
        "allowed_token_ids": {"allowed_token_ids": (1, token_id)},
        "bad_words": {"bad_word_ids": ((1,), (2, token_id))},
        "logprob_token_ids": {"logprobs": 0, "logprob_token_ids": (2, token_id)},
    }
    request = make_request(SamplingParams(**fields[param]))
    for refuse in (lambda: table.check(request.params), lambda: table.set_row(0, request)):
        with pytest.raises(RequestError, match=f"{param} names token {token_id}, expected 0 to 199") as raised:
            refuse()
        assert raised.value.param == param
    assert next_token(table, logits_with({3: 1.0}), 1) == 3


def test_slot_forgets_the_request_before():
    everything = SamplingParams(
        temperature=50.0, top_k=9, min_tokens=9, logit_bias={3: -100.0}, frequency_penalty=2.0, logprobs=4,
        allowed_token_ids=(9,), bad_word_ids=((3,),), logprob_token_ids=(3, 9),
    )  # fmt: skip
    table = table_of(make_request(everything, eos=(3,)))
    table.set_row(0, make_request(SamplingParams(temperature=0)))
    batch = table.gather(np.array([0]), np.array([1]), NO_HISTORY)
    assert batch.groups == ()
    assert len(batch.logprob_rows) == 0
    assert next_token(table, logits_with({3: 1.0}), 1) == 3


def test_penalties_read_the_history_up_to_the_position():
    logits = logits_with({4: 2.0, 6: 1.5})
    table = table_of(make_request(SamplingParams(temperature=0, presence_penalty=1.0), prompt=[4, 4]))
    history = np.zeros((8, 64), np.int32)
    history[0, :4] = (4, 4, 4, 6)
    for tokens in (history, torch.from_numpy(history)):
        assert [next_token(table, logits, position, tokens) for position in (2, 3, 4)] == [4, 6, 4]


def test_history_is_copied():
    table = table_of(make_request(SamplingParams(temperature=0, repetition_penalty=2.0), prompt=[4]))
    history = np.full((8, 64), 4, np.int32)
    batch = table.gather(np.array([0]), np.array([1]), history)
    history[:] = 6
    assert sample(logits_with({4: 2.0, 6: 1.5})[None], batch).token_ids.tolist() == [6]


def test_history_with_ids_that_do_not_exist():
    logits = logits_with({0: 2.0, 6: 1.5})
    table = table_of(make_request(SamplingParams(temperature=0, repetition_penalty=2.0), prompt=[4, 4, 4]))
    history = np.zeros((8, 64), np.int32)
    history[0, :3] = (-1, VOCAB_SIZE, 2**31 - 1)
    assert next_token(table, logits, 3, history) == 0
    history[0, 1] = 0
    assert next_token(table, logits, 3, history) == 6


def test_long_and_short_histories_together():
    logits = logits_with({4: 2.0, 6: 1.5}).expand(3, -1)
    params = SamplingParams(temperature=0, frequency_penalty=0.375)
    table = table_of(*(make_request(params, prompt=[1]) for _ in range(3)))
    history = np.full((8, 64), 4, np.int32)
    batch = table.gather(np.arange(3), np.array([2, 3, 63]), history)
    assert sample(logits, batch).token_ids.tolist() == [4, 6, 6]


def test_groups():
    params = [{"temperature": 0}, {}, {"top_p": 0.5}, {"top_k": 40}, {"top_k": 5}, {"top_k": 5000}, {"top_k": 10**9}]
    requests = [make_request(SamplingParams(**one)) for one in params]
    batch = table_of(*requests, vocab_size=151_669).gather(np.arange(7), np.ones(7, np.int64), NO_HISTORY)
    rows = {group.method: group.rows.tolist() for group in batch.groups}
    assert rows == {Method.WHOLE: [1, 6], Method.NUCLEUS: [2], Method.TOP_K: [3, 4], Method.LARGE_TOP_K: [5]}
    assert [group.num_candidates for group in batch.groups] == [0, 0, 64, 0]
    small = table_of(*requests).gather(np.arange(7), np.ones(7, np.int64), NO_HISTORY)
    assert {group.method for group in small.groups} == {Method.WHOLE, Method.TOP_K}


def test_whole_batch_needs_no_row_index():
    table = table_of(*(make_request(SamplingParams(top_k=5, logprobs=1)) for _ in range(3)))
    batch = table.gather(np.array([2, 0, 1]), np.array([1, 5, 3]), NO_HISTORY)
    assert [group.rows for group in batch.groups] == [None]
    assert batch.logprob_index is None


def test_empty_batch():
    batch = table_of().gather(np.zeros(0, np.int64), np.zeros(0, np.int64), NO_HISTORY)
    sampled = sample(torch.zeros(0, VOCAB_SIZE), batch)
    assert sampled.token_ids.shape == sampled.is_finite.shape == (0,)
    assert batch.token_logprobs(sampled) == []


def test_plain_rows_are_as_the_kernel_wants_them():
    greedy = SamplingParams(temperature=0, top_k=3)
    drawn = SamplingParams(temperature=0.5, top_k=9, top_p=0.8, min_p=0.5, seed=1)
    table = table_of(*map(make_request, [greedy, drawn, SamplingParams()]))
    settings = table.plain_settings(np.array([0, 1, 2, 1]), np.array([5, 5, 5, 6]))
    assert settings[:, 0].tolist() == [0, 0.5, 1, 0.5]
    assert settings[1, 1:4].tolist() == [9, 0.8, np.log(0.5)]
    assert settings[2, 1:4].tolist() == [VOCAB_SIZE, 1, -np.inf]
    assert settings[1, 4] != settings[3, 4] and (settings[:, 4] > 0).all() and (settings[:, 4] < 1).all()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(presence_penalty=0.1),
        SamplingParams(logit_bias={3: 1.0}),
        SamplingParams(allowed_token_ids=(3,)),
        SamplingParams(bad_word_ids=((3,),)),
        SamplingParams(logprobs=0),
    ],
    ids=str,
)
def test_one_row_that_is_not_plain_makes_the_step_so(params):
    table = table_of(make_request(SamplingParams()), make_request(params))
    assert table.plain_settings(np.array([0, 1]), np.array([5, 5])) is None
    assert table.plain_settings(np.array([0]), np.array([5])) is not None


def test_rows_are_plain_once_min_tokens_are_reached():
    table = table_of(make_request(SamplingParams(min_tokens=2), eos=(7,)))
    assert [table.plain_settings(np.array([0]), np.array([n])) is None for n in (1, 2, 3)] == [True, True, False]


def test_vocabularies_too_large_for_exact_sums():
    with pytest.raises(CheckpointError, match="262,145 tokens, expected at most 262,144"):
        SamplingTable(1, 2**18 + 1, CPU)
