"""Drawing tokens under the interpreter: against its reference, and against the engine's sampler."""

import math

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

import engine.sampling.table
import kernels.backend
from engine.request import SamplingParams
from engine.sampling.batch import Method
from engine.sampling.sampler import sample
from kernels import sample as module
from kernels.sample import MAX_VOCAB, sample_tokens, sample_tokens_reference
from tests.kernels import DTYPES, padded_rows, poisoned_memory
from tests.sampling_reference import make_batch, make_request, probabilities

pytestmark = [  # the interpreter's numpy; a GPU says nothing of infinities
    pytest.mark.filterwarnings("ignore:overflow encountered in divide"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in subtract"),
]
OFF = (1.0, 0, 1.0, -math.inf)
"""Temperature, top_k, top_p and log(min_p) of plain sampling."""
MIXED = [
    (0.0, 20, 0.9, -1.0),
    OFF,
    (1.5, 0, 1.0, -2.0),
    (0.6, 20, 0.95, -math.inf),
    (1.0, 3, 1.0, -0.5),
    (1.3, 7, 0.7, -1.5),
    (1.0, 0, 0.8, -math.inf),
    (2.0, 0, 0.99, -3.0),
    (1.0, 600, 0.9, -math.inf),
    (1e-38, 0, 0.5, -math.inf),
]
"""Settings that reach every way to draw."""


def with_uniforms(rows, device="cpu"):
    """float64 [S, 5] on a device: the rows' settings, and random numbers."""
    uniforms = torch.rand(len(rows), 1, dtype=torch.float64)
    return torch.cat((torch.tensor(rows, dtype=torch.float64), uniforms), 1).to(device)


def random_logits(num_rows, vocab_size, dtype, num_values=0, device="cpu"):
    """Normally distributed; if there is a number of values, about so many different ones."""
    logits = torch.randn(num_rows, vocab_size) * 3
    if num_values:
        logits = (logits * num_values / 12).round() * (12 / num_values)
    return logits.to(device, dtype)


def check(logits, settings, vocab_size):
    """Compare with the reference; the logits must stay as they are."""
    before = logits.clone()
    expected, expected_finite = sample_tokens_reference(logits, settings, vocab_size)
    with poisoned_memory():
        token_ids, is_finite = sample_tokens(logits, settings, vocab_size)
    assert torch.equal(logits.nan_to_num(77), before.nan_to_num(77))
    assert torch.equal(is_finite, expected_finite)
    assert torch.equal(token_ids[is_finite], expected[is_finite])
    assert ((token_ids >= 0) & (token_ids < vocab_size)).all()
    return token_ids, is_finite


@settings(max_examples=15, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.3, 1.0, 1.7, 50.0]),
            st.sampled_from([0, 1, 2, 20, 300, 5000]),
            st.sampled_from([1e-9, 0.3, 0.9, 0.999, 1.0]),
            st.sampled_from([-math.inf, -5.0, -1.0, 0.0]),
        ),
        min_size=1,
        max_size=2,
    ),
    vocab_size=st.integers(1, 700) | st.sampled_from([1, 128, 256, 512]),
    dtype=st.sampled_from(DTYPES),
    num_values=st.sampled_from([0, 2, 10]),
    padding=st.integers(0, 20),
    seed=st.integers(0, 2**31),
)
def test_any_rows(rows, vocab_size, dtype, num_values, padding, seed):
    torch.manual_seed(seed)
    logits = padded_rows(random_logits(len(rows), vocab_size, dtype, num_values), padding)
    check(logits, with_uniforms(rows), vocab_size)


def test_vocabulary_of_more_than_one_chunk():
    torch.manual_seed(0)
    logits = padded_rows(random_logits(len(MIXED), 5001, torch.float16), 31)
    check(logits, with_uniforms(MIXED), 5001)


@pytest.mark.parametrize("capacity", [2, 1 << 14])
def test_more_candidates_than_fit(monkeypatch, capacity):
    """More than a tile of candidates, listed or not."""
    monkeypatch.setattr(module, "TILE", 64)
    monkeypatch.setattr(module, "CAPACITY", capacity)
    torch.manual_seed(1)
    rows = MIXED[5:7]
    check(random_logits(len(rows), 200, torch.bfloat16, num_values=20), with_uniforms(rows), 200)


def test_by_id_with_many_candidates(monkeypatch):
    """As vocabularies past SMALL_VOCAB are drawn from, in one that the interpreter can take."""
    monkeypatch.setattr(module, "SMALL_VOCAB", 8)
    monkeypatch.setattr(module, "MAX_RANKED_TOP_K", 9)
    monkeypatch.setattr(module, "TILE", 64)
    torch.manual_seed(2)
    rows = MIXED[5:9]
    check(random_logits(len(rows), 120, torch.bfloat16, num_values=9), with_uniforms(rows), 120)


def engine_case(logits, params):
    """What the engine's sampler draws, and its settings as this operation takes them."""
    vocab_size = logits.shape[1]
    requests = [make_request(SamplingParams(seed=seed, **values)) for seed, values in enumerate(params)]
    batch = make_batch(requests, vocab_size)
    rows = torch.zeros(len(params), 5, dtype=torch.float64)
    for group in batch.groups:
        rows[slice(None) if group.rows is None else group.rows] = group.settings
    methods = {group.method for group in batch.groups}
    return sample(logits, batch), rows, methods


PARAMS = [
    {"temperature": 0.0, "top_k": 5},
    {"temperature": 1.0},
    {"temperature": 1.4, "min_p": 0.1},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"temperature": 1.0, "top_k": 3},
    {"temperature": 1.2, "top_p": 0.9},
    {"temperature": 1.2, "top_p": 0.5, "min_p": 0.05},
    {"temperature": 1.0, "top_k": 1000, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 700},
]


@pytest.mark.parametrize(("vocab_size", "num_values"), [(300, 0), (300, 6), (4200, 0), (4200, 12)])
def test_equals_the_sampler_of_the_engine(monkeypatch, vocab_size, num_values):
    monkeypatch.setattr(engine.sampling.table, "uses_triton", lambda tensor: False)
    torch.manual_seed(vocab_size + num_values)
    logits = random_logits(len(PARAMS), vocab_size, torch.bfloat16, num_values)
    logits[:, ::7] = -torch.inf  # as a grammar leaves them
    sampled, rows, methods = engine_case(logits, PARAMS)
    if vocab_size > 4096:
        assert methods == {Method.WHOLE, Method.NUCLEUS, Method.TOP_K, Method.LARGE_TOP_K}
    token_ids, is_finite = check(logits, rows, vocab_size)
    assert torch.equal(token_ids, sampled.token_ids)
    assert torch.equal(is_finite, sampled.is_finite)


EDITED = [
    {"temperature": 0.0, "presence_penalty": 1.0, "logprobs": 3},
    {"temperature": 0.0, "logprobs": 0},
    {"frequency_penalty": 0.5, "repetition_penalty": 1.3, "top_p": 0.9},
    {"top_k": 20, "logit_bias": {5: 4.0}, "logprobs": 2, "logprob_token_ids": (3, 9, 250)},
    {"min_tokens": 9},
    {"allowed_token_ids": tuple(range(0, 300, 7)), "repetition_penalty": 2.0},
    {"bad_word_ids": ((9, 9, 4), (9, 5)), "top_k": 5},
    {"min_p": 0.1},
]


def test_edited_logits_and_logprobs_in_the_sampler_of_the_engine(monkeypatch):
    """Rows with all that it knows: by kernels as by torch."""
    torch.manual_seed(7)
    logits = padded_rows(random_logits(len(EDITED) * 2, 300, torch.bfloat16, num_values=40), 20)
    requests = [
        make_request(SamplingParams(seed=seed, **params), prompt=range(seed + 1), output=[9] * (seed % 5), eos=(1,))
        for seed, params in enumerate(EDITED * 2)
    ]
    batch = make_batch(requests, 300)
    assert [group.method for group in batch.groups] == [Method.ANY] and batch.settings is not None
    by_kernels = sample(logits, batch)
    reports = batch.token_logprobs(by_kernels)
    monkeypatch.setattr(kernels.backend, "_INTERPRETED", False)
    batch = make_batch(requests, 300)
    assert batch.settings is None and len(batch.groups) > 1
    by_torch = sample(logits, batch)
    assert torch.equal(by_kernels.token_ids, by_torch.token_ids)
    assert torch.equal(by_kernels.is_finite, by_torch.is_finite)
    for found, expected in zip(reports, batch.token_logprobs(by_torch), strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            assert (found.rank, found.top_token_ids) == (expected.rank, expected.top_token_ids)
            assert found.top_logprobs == pytest.approx(expected.top_logprobs, abs=1e-5)


def test_rows_that_are_no_numbers():
    torch.manual_seed(3)
    logits = random_logits(8, 300, torch.float32)
    logits[0, 150] = torch.nan
    logits[1] = -torch.inf
    logits[2, 299] = torch.inf
    logits[3] = torch.nan
    logits[4, 7] = -torch.nan
    logits[5, :299] = -torch.inf
    rows = with_uniforms([OFF, (1.0, 5, 1.0, -math.inf), (1.0, 0, 0.9, -1.0), (0.0, 0, 1.0, 0.0)] * 2)
    token_ids, is_finite = check(logits, rows, 300)
    assert is_finite.tolist() == [False] * 5 + [True] * 3
    assert token_ids[5] == 299
    alone, _ = sample_tokens(logits[6:7], rows[6:7], 300)
    assert alone == token_ids[6]


def test_greedy_takes_the_lowest_id_among_equals():
    logits = torch.full((3, 400), -1.0)
    logits[0, [131, 270]] = 2.0
    logits[1, 200], logits[1, 130] = 0.0, -0.0
    token_ids, _ = check(logits, with_uniforms([(0.0, 0, 1.0, -math.inf)] * 3), 400)
    assert token_ids.tolist() == [131, 130, 0]


@pytest.mark.parametrize("uniform", [0.0, 0.199, 0.2, 0.999, 1.0])
def test_cuts_among_equals_go_by_id(uniform):
    """top_p cuts among ten equals, top_k does not, and the rest is drawn in the order of ids."""
    rows = torch.tensor([[1.0, 0, 0.5, -math.inf, uniform], [1.0, 3, 1.0, -math.inf, uniform]], dtype=torch.float64)
    token_ids, _ = check(torch.zeros(2, 10), rows, 10)
    assert token_ids.tolist() == [min(int(uniform * 5), 4), min(int(uniform * 10), 9)]


MIXTURE = {"temperature": 0.8, "top_k": 6, "top_p": 0.9, "min_p": 0.05}


@pytest.mark.parametrize(("draw", "count"), [(sample_tokens, 40), (sample_tokens_reference, 20_000)])
def test_distribution(draw, count):
    torch.manual_seed(4)
    logits = torch.tensor([[1.0, 2.0, 0.5, 2.5, 2.0, -1.0, 1.5, -torch.inf]]).bfloat16()
    row = (MIXTURE["temperature"], MIXTURE["top_k"], MIXTURE["top_p"], math.log(MIXTURE["min_p"]))
    token_ids, _ = draw(logits.expand(count, 8), with_uniforms([row] * count), 8)
    found = token_ids.bincount(minlength=8).numpy()
    expected = probabilities(logits[0].double().numpy(), SamplingParams(**MIXTURE)) * count
    likely = expected > 0
    assert found[~likely].sum() == 0
    assert 3 <= likely.sum() < 7
    assert chisquare(found[likely], expected[likely]).pvalue > 1e-3


def test_no_rows():
    token_ids, is_finite = sample_tokens(torch.zeros(0, 40), torch.zeros(0, 5, dtype=torch.float64), 40)
    assert token_ids.shape == is_finite.shape == (0,)


SETTINGS = torch.zeros(2, 5, dtype=torch.float64)


@pytest.mark.parametrize(
    ("logits", "rows", "vocab_size", "found"),
    [
        (torch.zeros(2, 40), SETTINGS, 41, r"logits are \(2, 40\) and vocab_size is 41"),
        (torch.zeros(2, 40), SETTINGS, 0, "vocab_size is 0"),
        (torch.zeros(1, 1).expand(2, MAX_VOCAB + 1), SETTINGS, MAX_VOCAB + 1, "1 to 262144"),
        (torch.zeros(40), SETTINGS, 40, r"logits are \(40,\)"),
        (torch.zeros(2, 40).double(), SETTINGS, 40, "torch.float64"),
        (torch.zeros(40, 2).T, SETTINGS, 40, r"strides \(1, 2\)"),
        (torch.zeros(2, 40), SETTINGS.float(), 40, "settings are torch.float32"),
        (torch.zeros(2, 40), SETTINGS[:1], 40, r"\(1, 5\)"),
        (torch.zeros(2, 40), SETTINGS.T.contiguous().T, 40, r"strides \(1, 2\)"),
    ],
)
def test_refuses(logits, rows, vocab_size, found):
    with pytest.raises(ValueError, match=found):
        sample_tokens(logits, rows, vocab_size)
