"""A row's token depends on its own parameters, logits and position alone, whichever way it is computed."""

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels.backend
from engine.request import SamplingParams
from engine.sampling.batch import Method, RowGroup
from engine.sampling.sampler import sample
from engine.sampling.table import MAX_CANDIDATES, SMALL_VOCABULARY, SamplingTable
from tests.sampling_reference import draw_by_full_sort, make_batch, make_request, on_meta, one_group

VOCAB_SIZE = SMALL_VOCABULARY + 77
MIXED = [
    {"temperature": 0},
    {"temperature": 0, "presence_penalty": 1.0, "logprobs": 3},
    {},
    {"min_p": 0.3, "temperature": 1.5},
    {"top_p": 0.6},
    {"top_p": 0.95, "frequency_penalty": 0.5, "logprobs": 0},
    {"top_k": 3},
    {"top_k": 3, "top_p": 0.5, "temperature": 3.0},
    {"top_k": 200, "logprobs": 20},
    {"top_k": MAX_CANDIDATES, "repetition_penalty": 1.3},
    {"top_k": MAX_CANDIDATES + 1, "top_p": 0.3, "temperature": 50.0},
    {"top_k": 3000, "logit_bias": {5: 2.0}},
    {"min_tokens": 3},
    {"allowed_token_ids": tuple(range(0, VOCAB_SIZE, 3)), "top_p": 0.9},
    {"allowed_token_ids": (4, 5), "bad_word_ids": ((9, 9, 4), (9, 5)), "temperature": 0},
    {"bad_word_ids": ((9, 9, 4), (9, 5), (11,)), "top_k": 8},
    {"logprobs": 2, "logprob_token_ids": (4000, 3, 9, 8, 7), "top_p": 0.5},
]


def tied_logits(num_rows: int, seed: int) -> torch.Tensor:
    """bfloat16 with padding columns; few different values, so that every cut goes through equal ones."""
    values = torch.randn(num_rows, VOCAB_SIZE + 50, generator=torch.Generator().manual_seed(seed)) * 2
    return (values * 4).round().div(4).bfloat16()


def mixed_requests():
    return [
        make_request(SamplingParams(seed=i, **params), prompt=range(i + 1), output=[9] * (i % 3), eos=(1,))
        for i, params in enumerate(MIXED)
    ]


def test_row_is_the_same_alone_and_in_any_company():
    requests = mixed_requests()
    for trial in range(3):
        logits = tied_logits(len(requests), trial)
        batch = make_batch(requests, VOCAB_SIZE)
        together = sample(logits, batch)
        reports = batch.token_logprobs(together)
        for order in (range(len(requests)), [*reversed(range(len(requests)))], [4, 4, 8, 10, 6]):
            parts = [[row] for row in order] if trial else [list(order), list(order)[::2]]
            for part in parts:
                batch = make_batch([requests[row] for row in part], VOCAB_SIZE)
                sampled = sample(logits[part], batch)
                assert sampled.token_ids.tolist() == together.token_ids[part].tolist()
                assert batch.token_logprobs(sampled) == [reports[row] for row in part]


def test_many_rows_equal_few():
    requests = [make_request(SamplingParams(seed=i, top_p=0.5 + i / 100)) for i in range(11)]
    logits = tied_logits(11, 0)
    expected = sample(logits, make_batch(requests, VOCAB_SIZE)).token_ids
    repeated = sample(logits.repeat(7, 1), make_batch(requests * 7, VOCAB_SIZE)).token_ids
    assert (repeated.view(7, 11) == expected).all()


def test_float_types_agree():
    requests = mixed_requests()
    logits = tied_logits(len(requests), 3)
    batch = make_batch(requests, VOCAB_SIZE)
    expected = sample(logits, batch).token_ids.tolist()
    assert sample(logits.float(), batch).token_ids.tolist() == expected
    assert sample(logits.half(), batch).token_ids.tolist() == expected


def test_same_seed_same_tokens_other_seed_or_position_other_tokens():
    params = SamplingParams(seed=-1, temperature=2.0)
    table = SamplingTable(4, VOCAB_SIZE, torch.device("cpu"))
    for slot, seed in enumerate((-1, 2**64 - 1, 0)):
        table.set_row(slot, make_request(SamplingParams(seed=seed, temperature=2.0)))
    table.set_row(3, make_request(params, prompt=range(50)))
    history, positions = np.zeros((4, 99), np.int32), np.arange(50, 82)
    logits = tied_logits(1, 0).expand(32, -1)
    by_slot = [
        sample(logits, table.gather(np.full(32, slot), positions, history)).token_ids.tolist() for slot in range(4)
    ]
    assert by_slot[0] == by_slot[1] == by_slot[3] != by_slot[2]
    assert len(set(by_slot[0])) > 16


def test_nothing_waits_for_the_device(monkeypatch):
    """Tensors on the meta device have no content: reading one, or a shape that depends on one, raises."""
    monkeypatch.setattr(kernels.backend, "HAS_TRITON", False)  # kernels would be launched
    batch = on_meta(make_batch(mixed_requests(), VOCAB_SIZE))
    sampled = sample(torch.empty(len(MIXED), VOCAB_SIZE + 50, dtype=torch.bfloat16, device="meta"), batch)
    assert sampled.token_ids.shape == (len(MIXED),)
    assert sampled.token_ids.is_meta


VALUES = st.one_of(st.integers(-8, 8).map(lambda value: value / 4), st.floats(-30, 30, width=32))


@settings(max_examples=80, deadline=None)
@given(
    values=st.lists(VALUES, min_size=2, max_size=300),
    temperature=st.sampled_from([1e-5, 0.1, 0.7, 1.0, 2.5, 100.0]),
    top_k=st.integers(1, 300),
    top_p=st.one_of(st.sampled_from([1e-9, 0.5, 1.0]), st.floats(1e-6, 1)),
    min_p=st.one_of(st.just(0.0), st.just(1.0), st.floats(1e-6, 1)),
    uniform=st.one_of(st.floats(2.0**-53, 1 - 2.0**-53), st.sampled_from([2.0**-53, 1 - 2.0**-53])),
)
def test_candidates_and_search_equal_a_full_sort(values, temperature, top_k, top_p, min_p, uniform):
    logits = torch.tensor(values)
    top_k = min(top_k, len(values))
    log_min_p = math.log(min_p) if min_p else -math.inf
    for method in (Method.TOP_K, Method.LARGE_TOP_K, Method.NUCLEUS):
        k = len(values) if method is Method.NUCLEUS else top_k
        row = [temperature, k, top_p, log_min_p, uniform]
        expected = draw_by_full_sort(logits, row, by_rank=method is Method.TOP_K)
        group = RowGroup(method, None, torch.tensor([row], dtype=torch.float64), k, None, None)
        sampled = sample(logits[None], one_group(group, 1, len(values)))
        assert sampled.token_ids.tolist() == [expected], method
