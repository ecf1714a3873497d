"""Guesses never change what is generated, only in how many steps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import LLM, SamplingParams
from engine.speculation import LONGEST_MATCH, SHORTEST_MATCH, look_up
from tests.tiny_models import make_tiny_qwen3

FIELDS = {"kv_cache_memory": 2**21, "block_size": 4, "max_num_seqs": 8, "dtype": "float32", "device": "cpu"}
REPEATING = [5, 6, 7, 8, 9, 10, 11, 12] * 5
PROMPTS = [REPEATING, [40, 41, 42] * 9, list(range(100, 140)), [3, 3, 3, 3, 3, 3], [9]]
CASES = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.7, "seed": 11, "logit_bias": {7: 6.0, 8: 6.0}},
    "narrow": {"temperature": 1.0, "seed": 3, "top_k": 3, "top_p": 0.8},
    "penalties": {
        "temperature": 0.5,
        "seed": 5,
        "logit_bias": {7: 6.0, 8: 6.0},
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
    },
    "logprobs": {"temperature": 0, "logprobs": 2, "prompt_logprobs": 1},
    "bias and bad words": {"temperature": 0, "logit_bias": {7: 3.0}, "bad_word_ids": ((8, 9), (12,))},
}


def slow_look_up(token_ids: list[int], num_guesses: int) -> list[int]:
    for length in range(LONGEST_MATCH, SHORTEST_MATCH - 1, -1):
        for place in range(len(token_ids) - length - 1, -1, -1):
            if token_ids[place : place + length] == token_ids[-length:]:
                return token_ids[place + length : place + length + num_guesses]
    return []


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 6))
def test_it_finds_the_latest_repetition(token_ids, num_guesses):
    assert look_up(token_ids, num_guesses) == slow_look_up(token_ids, num_guesses)


def test_bytes_of_two_tokens_are_no_token():
    assert look_up([256, 1, 65536, 256, 1, 0, 1], 3) == []


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    # Small weights: a random model then repeats itself, as text does.
    make_tiny_qwen3(folder, initializer_range=0.06)
    return str(folder)


def outcomes(path: str, params: SamplingParams, **fields: object) -> tuple[list, dict]:
    llm = LLM(path, **(FIELDS | fields))
    found = [
        (
            done.token_ids,
            done.finish_reason,
            done.stop_reason,
            done.logprobs and [entry.top_token_ids for entry in done.logprobs],
        )
        for done in llm.generate(PROMPTS, params)
    ]
    stats = llm.engine.stats()
    assert (stats.num_running, stats.num_owned_blocks) == (0, 0)
    return found, {"steps": stats.num_steps, "guessed": stats.num_guessed_tokens, "right": stats.num_right_guesses}


@pytest.mark.parametrize(("case", "num_guesses"), [*((name, 5) for name in CASES), ("greedy", 1)])
def test_tokens_are_the_same(path, case, num_guesses):
    params = SamplingParams(max_tokens=30, ignore_eos=True, **CASES[case])
    expected, plain = outcomes(path, params)
    found, stats = outcomes(path, params, num_speculative_tokens=num_guesses)
    assert found == expected
    assert plain["guessed"] == 0 and stats["guessed"] > 0


def test_right_guesses_save_steps(path):
    params = SamplingParams(max_tokens=60, ignore_eos=True, temperature=0, logit_bias={7: 50.0})
    expected, plain = outcomes(path, params)
    found, stats = outcomes(path, params, num_speculative_tokens=4)
    assert found == expected
    assert stats["right"] > 40 and stats["steps"] < 0.6 * plain["steps"]


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 7])
def test_an_end_among_right_guesses_is_the_end(path, max_tokens):
    """Whether it is the limit or a stop token."""
    biased = {"temperature": 0, "logit_bias": {7: 50.0}}
    limited = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **biased)
    assert outcomes(path, limited, num_speculative_tokens=5)[0] == outcomes(path, limited)[0]
    stopped = SamplingParams(max_tokens=30, stop_token_ids=(7,), min_tokens=max_tokens, ignore_eos=True, **biased)
    assert outcomes(path, stopped, num_speculative_tokens=5)[0] == outcomes(path, stopped)[0]


def test_without_room_for_guesses_there_are_none(path):
    """Blocks run out, requests are preempted, steps have few tokens: the same text still."""
    params = SamplingParams(max_tokens=30, ignore_eos=True, temperature=0)
    expected, _ = outcomes(path, params)
    bytes_per_token = 2 * 3 * 2 * 16 * 4
    for fields in ({"max_num_batched_tokens": 6}, {"kv_cache_memory": bytes_per_token * 80, "max_model_len": 72}):
        assert outcomes(path, params, num_speculative_tokens=5, **fields)[0] == expected


def test_cached_blocks_of_guessed_tokens_are_right(path):
    """A second request finds the blocks of the first, guesses included."""
    params = SamplingParams(max_tokens=40, ignore_eos=True, temperature=0)
    llm = LLM(path, num_speculative_tokens=5, **FIELDS)
    [first] = llm.generate([REPEATING], params)
    longer = REPEATING + first.token_ids
    [again] = llm.generate([longer], params)
    assert again.num_cached_tokens >= len(longer) - 8
    [expected] = LLM(path, **FIELDS).generate([longer], params)
    assert again.token_ids == expected.token_ids
