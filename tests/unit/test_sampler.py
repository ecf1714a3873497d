"""Which tokens are drawn, and how often."""

import numpy as np
import pytest
import torch
from scipy import stats

from engine.request import SamplingParams
from engine.sampling.sampler import sample
from engine.sampling.table import SMALL_VOCABULARY
from tests.sampling_reference import edited_logits, make_batch, make_request, probabilities

VOCAB_SIZE = 300
PROMPT, OUTPUT = (0, 1, 1, 2, 7), (2, 3, 3, 3, 4)
LOGITS = np.random.default_rng(5).normal(-6, 1.5, VOCAB_SIZE).astype(np.float32)
LOGITS[:8] = (-0.5, 1.0, 0.5, 2.0, 1.5, -3.5, 1.0, -0.25)
TIED = np.round(LOGITS)
UNLIKELY = np.full(SMALL_VOCABULARY, -8.0, np.float32)
"""Behind others, these make a vocabulary so large that it is never listed in order."""

CASES = {
    "plain": {},
    "cold": {"temperature": 0.4},
    "hot": {"temperature": 2.5},
    "top_k": {"top_k": 5},
    "top_k 1": {"top_k": 1},
    "top_k past the vocabulary": {"top_k": 10**9},
    "large top_k": {"top_k": 290, "temperature": 20.0},
    "top_p": {"top_p": 0.7},
    "top_p of next to nothing": {"top_p": 1e-9},
    "min_p": {"min_p": 0.2},
    "min_p 1": {"min_p": 1.0},
    "top_k and top_p": {"top_k": 12, "top_p": 0.6},
    "top_p and min_p": {"top_p": 0.9, "min_p": 0.15},
    "all of them": {"temperature": 1.7, "top_k": 20, "top_p": 0.9, "min_p": 0.1},
    "repetition": {"repetition_penalty": 1.8},
    "repetition reward": {"repetition_penalty": 0.6},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.7},
    "frequency reward": {"frequency_penalty": -0.7},
    "logit_bias": {"logit_bias": {3: -100.0, 5: 4.0, 299: 3.0}},
    "allowed tokens": {"allowed_token_ids": (0, 3, 5, 31, 32, 299)},
    "bad words": {"bad_word_ids": ((3, 4, 1), (3, 1, 2), (4, 3), (0,), (7, 2, 3, 3, 3, 4, 6))},
    "everything": {
        "temperature": 1.3,
        "top_k": 9,
        "top_p": 0.95,
        "min_p": 0.05,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "logit_bias": {5: 4.0, 3: 1.0},
        "allowed_token_ids": tuple(range(1, 290)),
        "bad_word_ids": ((3, 4, 1), (2,)),
    },
}

KINDS = [
    {"temperature": 0},
    *(CASES[name] for name in ("plain", "min_p", "top_p", "all of them", "everything")),
    {"top_k": 600},
]
"""At least one for each way to draw."""


def draw(logits, requests, vocab_size=VOCAB_SIZE):
    """Tokens of the requests, which all see the same logits."""
    rows = torch.as_tensor(logits)[None].repeat(len(requests), 1)
    return sample(rows, make_batch(requests, vocab_size)).token_ids.numpy()


def check_distribution(logits, params: dict, count=1000, banned=(), **kwargs):
    requests = [make_request(SamplingParams(seed=i, **params), PROMPT, OUTPUT, **kwargs) for i in range(count)]
    expected = probabilities(edited_logits(logits, requests[0].params, PROMPT, OUTPUT, banned), requests[0].params)
    counts = np.bincount(draw(logits, requests, len(logits)), minlength=len(logits))
    assert counts[expected == 0].sum() == 0
    common = expected * count >= 5
    seen = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum()) * count
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    assert len(seen) == 1 or stats.chisquare(seen, wanted * seen.sum() / wanted.sum()).pvalue > 1e-3


@pytest.mark.parametrize("logits", [LOGITS, TIED], ids=["distinct", "tied"])
@pytest.mark.parametrize("params", CASES.values(), ids=CASES.keys())
def test_distribution(params, logits):
    check_distribution(logits, params)


def test_distribution_under_min_tokens():
    stops = (1, 3)
    check_distribution(LOGITS, {"min_tokens": 6, "top_k": 4, "logit_bias": {3: 2.0}}, banned=stops, eos=stops)


@pytest.mark.parametrize(
    "params",
    [
        {"top_p": 0.7},
        {"top_p": 0.9, "min_p": 0.05, "frequency_penalty": 0.7},
        {"top_k": 600, "top_p": 0.4, "temperature": 3.0},
        {"top_k": 9, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)
def test_distribution_over_a_large_vocabulary(params):
    logits = np.concatenate((TIED, UNLIKELY))
    check_distribution(logits, params, count=300)


@pytest.mark.parametrize("logits", [[0, 2, 2, -1e9], [0, 2, 2, 1]], ids=["among larger", "among equals"])
def test_top_p_keeps_the_smallest_set_that_reaches_it(logits):
    """Two equal tokens share all there is, and one of them is half of it."""
    requests = [make_request(SamplingParams(seed=i, temperature=0.01, top_k=3, top_p=0.5)) for i in range(20)]
    assert (draw(np.array(logits, np.float32), requests, 4) == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_is_the_lowest_of_the_largest(dtype):
    random = np.random.default_rng(1)
    rows = torch.from_numpy(random.integers(0, 6, (200, VOCAB_SIZE))).to(dtype)
    rows[7, :] = 0
    rows[8, :] = -0.0
    rows[8, 3] = 0.0
    plain = [make_request(SamplingParams(temperature=0)) for _ in rows]
    biased = [make_request(SamplingParams(temperature=0, logit_bias={0: 0.0}, top_p=0.5, top_k=3)) for _ in rows]
    expected = rows.float().numpy().argmax(1)
    for requests in (plain, biased):
        assert (sample(rows, make_batch(requests, VOCAB_SIZE)).token_ids.numpy() == expected).all()


def test_greedy_of_edited_logits():
    params = SamplingParams(temperature=0, presence_penalty=2.0, frequency_penalty=0.5, logit_bias={9: 0.25})
    expected = edited_logits(LOGITS, params, PROMPT, OUTPUT).argmax()
    assert draw(LOGITS, [make_request(params, PROMPT, OUTPUT)]) == expected != LOGITS.argmax()


def test_repetition_penalty_moves_logits_of_either_sign_down():
    request = make_request(SamplingParams(temperature=0, repetition_penalty=2.0), PROMPT)
    assert draw(np.array([2.0, 1.0, 1.0, 1.5, 0.0], np.float32), [request], 5) == 3
    assert draw(np.array([-1.0, -9.0, -9.0, -1.5, -9.0], np.float32), [request], 5) == 3


@pytest.mark.parametrize("params", [*KINDS, {"temperature": 100.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_is_never_sampled(params, dtype):
    logits = torch.full((384,), 100.0, dtype=dtype)
    logits[:VOCAB_SIZE] = -1e4
    requests = [make_request(SamplingParams(seed=i, **params), PROMPT, OUTPUT) for i in range(20)]
    assert draw(logits, requests).max() < VOCAB_SIZE


@pytest.mark.parametrize("vocab_size", [1, 2, 127, 128, 129, 257])
@pytest.mark.parametrize("params", [{"temperature": 0}, {}, {"top_p": 0.9}, {"top_k": 100}, {"min_p": 0.5}], ids=str)
def test_any_vocabulary_size(vocab_size, params):
    logits = np.zeros(vocab_size, np.float32)
    logits[-1] = 30.0
    requests = [make_request(SamplingParams(seed=i, **params)) for i in range(3)]
    assert (draw(logits, requests, vocab_size) == vocab_size - 1).all()


@pytest.mark.parametrize("rest", [{}, {"top_k": 50}, {"top_p": 0.99}], ids=str)
def test_extreme_temperatures(rest):
    cold = [make_request(SamplingParams(seed=i, temperature=1e-5, **rest)) for i in range(50)]
    assert (draw(LOGITS, cold) == LOGITS.argmax()).all()
    coldest = [make_request(SamplingParams(seed=i, temperature=1e-300, **rest)) for i in range(50)]
    assert (draw(LOGITS, coldest) == LOGITS.argmax()).all()
    hot = [make_request(SamplingParams(seed=i, temperature=100.0, **rest)) for i in range(500)]
    assert len(set(draw(LOGITS, hot))) >= 45


@pytest.mark.parametrize("penalty", [1e-300, 1e-30, 100.0])
@pytest.mark.parametrize("rest", [{}, {"top_k": 50}, {"top_p": 0.99}, {"temperature": 0}], ids=str)
def test_extreme_repetition_penalty(penalty, rest):
    logits = np.array([0.0, 1e30, 2e30, -1e30], np.float32)
    params = SamplingParams(seed=1, repetition_penalty=penalty, **rest)
    assert draw(logits, [make_request(params, (0, 1, 3))], 4) == (1 if penalty < 1 else 2)


@pytest.mark.parametrize("params", KINDS, ids=str)
def test_everything_banned_is_no_crash(params):
    logits = torch.from_numpy(np.concatenate((LOGITS, UNLIKELY))).repeat(2, 1)
    everything = range(logits.shape[1])
    requests = [make_request(SamplingParams(**params | {"min_tokens": 9, "seed": i}), eos=everything) for i in range(2)]
    sampled = sample(logits, make_batch(requests, logits.shape[1]))
    assert sampled.is_finite.all()
    assert ((sampled.token_ids >= 0) & (sampled.token_ids < logits.shape[1])).all()


BAD_ROWS = {"one NaN": (17, np.nan), "all NaN": (slice(None), np.nan), "one inf": (17, np.inf)}
BAD_ROWS |= {"all inf": (slice(None), np.inf), "all -inf": (slice(None), -np.inf)}


@pytest.mark.parametrize("where", BAD_ROWS.values(), ids=BAD_ROWS.keys())
@pytest.mark.parametrize("params", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bad_row_stays_alone(params, where, dtype):
    requests = [make_request(SamplingParams(seed=i, logprobs=2, **params), PROMPT, OUTPUT) for i in range(3)]
    rows = torch.from_numpy(np.concatenate((LOGITS, UNLIKELY))).repeat(3, 1).to(dtype)
    batch = make_batch(requests, rows.shape[1])
    healthy = sample(rows, batch)
    rows[1][where[0]] = where[1]
    sampled = sample(rows, batch)
    assert sampled.is_finite.tolist() == [True, False, True]
    assert 0 <= sampled.token_ids[1] < rows.shape[1]
    for row in (0, 2):
        assert sampled.token_ids[row] == healthy.token_ids[row]
        assert batch.token_logprobs(sampled)[row] == batch.token_logprobs(healthy)[row]


@pytest.mark.parametrize("vocab_size", [VOCAB_SIZE, SMALL_VOCABULARY + 300])
def test_impossible_tokens_do_not_make_a_row_bad(vocab_size):
    rows = torch.full((1, vocab_size), -torch.inf)
    rows[0, 211] = -3.0
    for params in KINDS:
        sampled = sample(rows, make_batch([make_request(SamplingParams(**params))], vocab_size))
        assert sampled.token_ids.tolist() == [211]
        assert sampled.is_finite.all()


@pytest.mark.parametrize("params", KINDS, ids=str)
def test_logits_are_left_as_they_are(params):
    logits = torch.randn(2, SMALL_VOCABULARY + 300)
    before = logits.clone()
    requests = [make_request(SamplingParams(logprobs=1, **params), PROMPT, OUTPUT)] * 2
    sample(logits, make_batch(requests, SMALL_VOCABULARY + 200))
    assert torch.equal(logits, before)


def test_wrong_shapes():
    batch = make_batch([make_request(SamplingParams())], VOCAB_SIZE)
    with pytest.raises(ValueError, match=r"logits are \[2, 300\], expected \[1, 300 or more\]"):
        sample(torch.zeros(2, VOCAB_SIZE), batch)
    with pytest.raises(ValueError, match="299"):
        sample(torch.zeros(1, 299), batch)
