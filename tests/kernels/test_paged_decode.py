from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime import interpreter

from kernels import paged_decode as module
from kernels.paged_decode import DecodeScratch, paged_decode, paged_decode_reference
from tests.kernels import interpreted
from tests.paged_cache import PagedCache

FLOAT8 = torch.float8_e4m3fn
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
FLOAT8_TOLERANCE = {**TOLERANCE, torch.float32: 2e-3}  # multiplied in float16


def make_scratch(num_programs, group_size, head_dim):
    """Few programs, so that spans have many edges, and scratch memory that must be written before it is read."""
    return DecodeScratch(
        torch.full((2 * num_programs, group_size, head_dim), torch.nan),
        torch.full((2 * num_programs, group_size), torch.nan),
        torch.zeros(num_programs, dtype=torch.int32),
    )


@contextmanager
def programs_in_order(order, num_programs):
    """On a GPU programs end in any order; the interpreter runs them one after another."""
    orders = {"first to last": list(range(num_programs)), "last to first": list(range(num_programs))[::-1]}
    orders["mixed"] = np.random.default_rng(0).permutation(num_programs).tolist()
    set_grid_idx = interpreter.InterpreterBuilder.set_grid_idx
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            interpreter.InterpreterBuilder,
            "set_grid_idx",
            lambda builder, x, y, z: set_grid_idx(builder, orders[order][x], y, z),
        )
        yield


def check(
    context_lens,
    *,
    num_kv_heads=1,
    group_size=2,
    head_dim=64,
    block_size=16,
    num_programs=4,
    dtype=torch.float32,
    cache_dtype=None,
    order="first to last",
    seed=0,
    **scales,
):
    """The kernel against attention without pages; returns its scratch memory."""
    cache = PagedCache.random(context_lens, num_kv_heads, head_dim, block_size, cache_dtype or dtype, seed=seed)
    query = torch.randn(len(context_lens), num_kv_heads * group_size, head_dim).to(dtype)
    lens = torch.tensor(context_lens, dtype=torch.int32)
    scratch = make_scratch(num_programs, group_size, head_dim)
    output = torch.full_like(query, torch.nan)
    tensors = (query, cache.k_cache, cache.v_cache, cache.block_table, lens)
    with programs_in_order(order, num_programs):
        result = paged_decode(*tensors, scratch, output=output, **scales)
    assert result is output and output.dtype == dtype
    tolerance = (FLOAT8_TOLERANCE if cache_dtype == FLOAT8 else TOLERANCE)[dtype]
    scale = scales.get("softmax_scale", head_dim**-0.5) * scales.get("k_scale", 1.0)
    for request, context_len in enumerate(context_lens):
        expected = torch.zeros(1, *query.shape[1:])
        if context_len:
            row = query[request : request + 1]
            expected = cache.attend(request, row, context_len - 1, scale, scales.get("window"))
        expected = expected[0] * scales.get("v_scale", 1.0)
        torch.testing.assert_close(output[request].float(), expected, rtol=tolerance, atol=tolerance)
    reference = paged_decode_reference(*tensors, **scales)
    torch.testing.assert_close(output, reference, rtol=tolerance, atol=tolerance)
    assert not scratch.arrivals.any(), "the next launch needs zeros"
    return scratch


@settings(interpreted, max_examples=12)
@given(
    context_lens=st.lists(st.integers(0, 200), min_size=1, max_size=4),
    num_kv_heads=st.sampled_from([1, 2, 3]),
    group_size=st.sampled_from([1, 2, 3, 4, 7]),
    block_size=st.sampled_from([16, 32, 128]),
    num_programs=st.sampled_from([1, 3, 8, 20]),
    order=st.sampled_from(["first to last", "last to first", "mixed"]),
    seed=st.integers(0, 9),
)
def test_any_lengths_over_any_number_of_programs(**shapes):
    check(**shapes)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_dtypes_and_head_dims(dtype, head_dim):
    check([1, 2 * 8192 // head_dim + 5, 100], head_dim=head_dim, dtype=dtype, num_programs=3)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_float8_cache_is_scaled(dtype):
    scales = {"k_scale": 0.5, "v_scale": 3.0, "softmax_scale": 0.2}
    check([1, 150, 64], head_dim=128, dtype=dtype, cache_dtype=FLOAT8, num_programs=5, **scales)


@settings(interpreted, max_examples=10)
@given(
    context_lens=st.lists(st.integers(0, 400), min_size=1, max_size=4),
    window=st.integers(1, 300),
    num_kv_heads=st.sampled_from([1, 2]),
    num_programs=st.sampled_from([1, 3, 8]),
    order=st.sampled_from(["first to last", "last to first", "mixed"]),
    seed=st.integers(0, 9),
)
def test_a_window_of_the_last_tokens(**shapes):
    check(**shapes)


@pytest.mark.parametrize("window", [1, 127, 128, 129, 1000])
def test_windows_at_the_edges_of_tiles(window):
    check([256, 257, 300, 1], window=window)


@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
def test_block_sizes(block_size):
    """Tiles of 64 keys: several blocks, one block, and part of one."""
    check([300, 257, 64], block_size=block_size, num_programs=2)


@pytest.mark.parametrize("group_size", [16, 33, 64])
def test_many_query_heads_to_a_kv_head(group_size):
    check([70, 200], group_size=group_size, num_programs=3)


def test_a_long_context_is_shared_by_all_programs():
    scratch = check([1500, 3, 20, 1], group_size=16, num_programs=12)
    assert scratch.outputs.isfinite().all(dim=2).all(dim=1).sum() == 8, "24 tiles in spans of 3, merged 4 at a time"


@pytest.mark.parametrize("order", ["last to first", "mixed"])
def test_whoever_arrives_last_merges(order):
    """Spans of 7 tiles over heads of 5: most programs end one head's keys and begin another's."""
    check([320, 300, 290], num_kv_heads=2, num_programs=5, order=order)


def test_more_requests_than_are_looked_at_together():
    check([1 + i % 3 for i in range(135)], num_programs=3, group_size=1)


def test_scratch_serves_one_call_after_another():
    cache = PagedCache.random([500], 2, 64)
    query, lens = torch.randn(1, 4, 64), torch.tensor([500], dtype=torch.int32)
    scratch = make_scratch(7, 2, 64)
    first, second = (
        paged_decode(query, cache.k_cache, cache.v_cache, cache.block_table, lens, scratch) for _ in range(2)
    )
    torch.testing.assert_close(first, cache.attend(0, query, 499), rtol=2e-5, atol=2e-5)
    assert torch.equal(first, second)


def test_slices_of_larger_tensors():
    cache = PagedCache.random([40, 90], 2, 64)
    fused = torch.randn(2, 12, 64)
    both = torch.stack((cache.k_cache, cache.v_cache), dim=1)
    table = torch.cat((cache.block_table, cache.block_table), dim=1)[:, : cache.block_table.shape[1]]
    output = torch.full((2, 12, 64), torch.nan)
    lens = torch.tensor([40, 90], dtype=torch.int32)
    scratch = make_scratch(3, 2, 64)
    paged_decode(fused[:, 4:8], both[:, 0], both[:, 1], table, lens, scratch, output=output[:, 2:6])
    for request in range(2):
        expected = cache.attend(request, fused[request : request + 1, 4:8], int(lens[request]) - 1)
        torch.testing.assert_close(output[request : request + 1, 2:6], expected, rtol=2e-5, atol=2e-5)
    assert output[:, :2].isnan().all() and output[:, 6:].isnan().all()


def test_elements_past_two_to_the_31():
    head_dim, block_size = 256, 256
    num_blocks = 2**31 // (head_dim * block_size) + 2
    k_cache, v_cache = (torch.empty(num_blocks, block_size, 1, head_dim, dtype=FLOAT8) for _ in range(2))
    small = PagedCache.random([20], 1, head_dim, block_size, FLOAT8)
    for large, cache in ((k_cache, small.k_cache), (v_cache, small.v_cache)):
        large[-1] = cache[small.block_table[0, 0]]
    query = torch.randn(1, 2, head_dim)
    table = torch.full((1, 1), num_blocks - 1, dtype=torch.int32)
    lens = torch.tensor([20], dtype=torch.int32)
    output = paged_decode(query, k_cache, v_cache, table, lens, make_scratch(2, 2, head_dim))
    torch.testing.assert_close(output, small.attend(0, query, 19), rtol=2e-3, atol=2e-3)


def test_empty_batch():
    cache = PagedCache.random([16], 1, 64)
    empty = torch.empty(0, dtype=torch.int32)
    output = paged_decode(torch.empty(0, 2, 64), cache.k_cache, cache.v_cache, cache.block_table[:0], empty)
    assert output.shape == (0, 2, 64)


def test_without_triton_the_reference_answers(monkeypatch):
    monkeypatch.setattr(module, "uses_triton", lambda _tensor: False)
    check([0, 30])


GOOD = {
    "query": torch.zeros(2, 4, 64),
    "k_cache": torch.zeros(3, 16, 2, 64),
    "v_cache": torch.zeros(3, 16, 2, 64),
    "block_table": torch.zeros(2, 1, dtype=torch.int32),
    "context_lens": torch.ones(2, dtype=torch.int32),
}


@pytest.mark.parametrize(
    ("message", "bad"),
    [
        (r"query has shape \(2, 256\)", {"query": torch.zeros(2, 256)}),
        ("v_cache", {"v_cache": torch.zeros(3, 16, 1, 64)}),
        ("head_dim is 96", {"query": torch.zeros(2, 4, 96)}),
        ("block_size of the caches is 24", {name: torch.zeros(3, 24, 2, 64) for name in ("k_cache", "v_cache")}),
        ("block_size of the caches is 8", {name: torch.zeros(3, 8, 2, 64) for name in ("k_cache", "v_cache")}),
        ("3 heads and the caches 2", {"query": torch.zeros(2, 3, 64)}),
        ("130 heads and the caches 2", {"query": torch.zeros(2, 130, 64)}),
        ("query is torch.float64", {"query": torch.zeros(2, 4, 64, dtype=torch.float64)}),
        ("k_cache torch.float16", {name: GOOD[name].half() for name in ("k_cache", "v_cache")}),
        ("v_cache torch.float8_e4m3fn", {"v_cache": GOOD["v_cache"].to(FLOAT8)}),
        ("k_cache has strides", {"k_cache": torch.zeros(3, 2, 16, 64).transpose(1, 2)}),
        ("query has strides", {"query": torch.zeros(2, 4, 128)[..., ::2]}),
        ("block_table is torch.int64", {"block_table": torch.zeros(2, 1, dtype=torch.int64)}),
        ("block_table has 1 rows", {"block_table": torch.zeros(1, 1, dtype=torch.int32)}),
        ("context_lens is torch.int64", {"context_lens": torch.ones(2, dtype=torch.int64)}),
        ("window is -1, expected at least 1", {"window": -1}),
        ("softmax_scale 0.0", {"softmax_scale": 0.0}),
        ("k_scale nan", {"k_scale": float("nan")}),
        ("output is torch.float32", {"output": torch.zeros(2, 4, 128)}),
        ("scratch is for", {"scratch": make_scratch(2, 4, 64)}),
    ],
)
def test_bad_arguments_are_named(message, bad):
    with pytest.raises(ValueError, match=message):
        paged_decode(**(GOOD | bad))
