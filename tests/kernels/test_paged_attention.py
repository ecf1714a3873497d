import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import paged_attention as module
from kernels.paged_attention import (
    paged_attention,
    paged_attention_reference,
    plan_query_blocks,
    tokens_per_query_block,
)
from tests.kernels import interpreted
from tests.paged_cache import PagedCache

FLOAT8 = torch.float8_e4m3fn
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
FLOAT8_TOLERANCE = {**TOLERANCE, torch.float32: 2e-3}  # multiplied in float16
Requests = list[tuple[int, int]]  # (query_len, tokens before)
REQUESTS = st.lists(st.tuples(st.integers(0, 80), st.integers(0, 150)), min_size=1, max_size=4)


def plan(requests: Requests, tokens_per_block):
    query_lens, before = (np.array(column, np.int64) for column in zip(*requests, strict=True))
    starts = np.cumsum(query_lens) - query_lens
    return plan_query_blocks(starts, query_lens, query_lens + before, tokens_per_block)


def check(
    requests: Requests,
    *,
    num_kv_heads=1,
    group_size=2,
    head_dim=64,
    block_size=16,
    tokens_per_block=None,
    dtype=torch.float32,
    cache_dtype=None,
    seed=0,
    **scales,
):
    """The kernel against attention without pages."""
    context_lens = [query_len + before for query_len, before in requests]
    cache = PagedCache.random(context_lens, num_kv_heads, head_dim, block_size, cache_dtype or dtype, seed=seed)
    num_tokens = sum(query_len for query_len, _ in requests)
    query = torch.randn(num_tokens + 1, num_kv_heads * group_size, head_dim).to(dtype)
    tokens = tokens_per_block or tokens_per_query_block(max(query_len for query_len, _ in requests), group_size)
    blocks = torch.from_numpy(plan(requests, tokens))
    blocks = torch.cat((blocks, torch.zeros(2, 4, dtype=torch.int32)))
    tensors = (query, cache.k_cache, cache.v_cache, cache.block_table, blocks)
    output = torch.full_like(query, torch.nan)
    result = paged_attention(*tensors, tokens, output=output, **scales)
    assert result is output and output.dtype == dtype
    tolerance = (FLOAT8_TOLERANCE if cache_dtype == FLOAT8 else TOLERANCE)[dtype]
    scale = scales.get("softmax_scale", head_dim**-0.5) * scales.get("k_scale", 1.0)
    start = 0
    for request, (query_len, before) in enumerate(requests):
        rows = slice(start, start + query_len)
        expected = cache.attend(request, query[rows], before, scale, scales.get("window"))
        expected = expected * scales.get("v_scale", 1.0)
        torch.testing.assert_close(output[rows].float(), expected, rtol=tolerance, atol=tolerance)
        start += query_len
    assert output[num_tokens:].isnan().all(), "rows of no query block are not written"
    reference = paged_attention_reference(*tensors, **scales)[:num_tokens]
    torch.testing.assert_close(output[:num_tokens], reference, rtol=tolerance, atol=tolerance)


@settings(interpreted, max_examples=16)
@given(
    requests=REQUESTS,
    num_kv_heads=st.sampled_from([1, 2, 3]),
    group_size=st.sampled_from([1, 2, 3, 4, 7]),
    block_size=st.sampled_from([16, 32, 128]),
    seed=st.integers(0, 9),
)
def test_prompts_chunks_and_decodes_together(**shapes):
    check(**shapes)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_dtypes_and_head_dims(dtype, head_dim):
    check([(70, 0), (1, 40), (33, 100)], head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize("query_len", [1, 4, 20, 64], ids="{} tokens".format)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_float8_cache_is_scaled(dtype, query_len):
    """Tiles of 16, 64 and 128 rows, which convert values in two ways."""
    scales = {"k_scale": 0.5, "v_scale": 3.0, "softmax_scale": 0.2}
    check([(query_len, 90), (1, 0)], head_dim=128, dtype=dtype, cache_dtype=FLOAT8, **scales)


@settings(interpreted, max_examples=10)
@given(
    requests=REQUESTS,
    window=st.integers(1, 200),
    group_size=st.sampled_from([1, 3]),
    block_size=st.sampled_from([16, 128]),
    seed=st.integers(0, 9),
)
def test_a_token_sees_its_window_alone(**shapes):
    check(**shapes)


@pytest.mark.parametrize("window", [1, 63, 64, 65, 129])
def test_windows_at_the_edges_of_tiles(window):
    check([(70, 190), (1, 128), (4, 300)], window=window)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_windows_of_every_dtype(dtype):
    check([(70, 100), (1, 40)], head_dim=128, dtype=dtype, window=50)


@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
def test_block_sizes(block_size):
    check([(90, 200), (5, 60)], block_size=block_size)


@pytest.mark.parametrize(("group_size", "tokens_per_block"), [(16, 8), (33, 3), (64, 2), (1, 128), (5, 1), (3, 21)])
def test_rows_of_a_tile(group_size, tokens_per_block):
    check([(30, 50)], group_size=group_size, tokens_per_block=tokens_per_block)


def test_slices_of_larger_tensors():
    cache = PagedCache.random([60], 2, 64)
    fused = torch.randn(20, 12, 64)
    both = torch.stack((cache.k_cache, cache.v_cache), dim=1)
    output = torch.full((20, 12, 64), torch.nan)
    blocks = torch.from_numpy(plan([(20, 40)], 16))
    paged_attention(fused[:, 4:8], both[:, 0], both[:, 1], cache.block_table, blocks, 16, output=output[:, 2:6])
    torch.testing.assert_close(output[:, 2:6], cache.attend(0, fused[:, 4:8], 40), rtol=2e-5, atol=2e-5)
    assert output[:, :2].isnan().all() and output[:, 6:].isnan().all()


def test_elements_past_two_to_the_31():
    head_dim, block_size = 256, 256
    num_blocks = 2**31 // (head_dim * block_size) + 2
    k_cache, v_cache = (torch.empty(num_blocks, block_size, 1, head_dim, dtype=FLOAT8) for _ in range(2))
    small = PagedCache.random([20], 1, head_dim, block_size, FLOAT8)
    for large, cache in ((k_cache, small.k_cache), (v_cache, small.v_cache)):
        large[-1] = cache[small.block_table[0, 0]]
    query = torch.randn(20, 2, head_dim)
    table = torch.full((1, 1), num_blocks - 1, dtype=torch.int32)
    output = paged_attention(query, k_cache, v_cache, table, torch.from_numpy(plan([(20, 0)], 64)), 64)
    torch.testing.assert_close(output, small.attend(0, query, 0), rtol=2e-3, atol=2e-3)


def test_no_tokens():
    cache = PagedCache.random([16], 1, 64)
    blocks = torch.empty(0, 4, dtype=torch.int32)
    output = paged_attention(torch.empty(0, 2, 64), cache.k_cache, cache.v_cache, cache.block_table, blocks, 1)
    assert output.shape == (0, 2, 64)


def test_without_triton_the_reference_answers(monkeypatch):
    monkeypatch.setattr(module, "uses_triton", lambda _tensor: False)
    check([(20, 30), (1, 5)])


@given(requests=REQUESTS, tokens_per_block=st.integers(1, 128))
def test_plan_has_each_token_once_and_the_longest_first(requests, tokens_per_block):
    rows = plan(requests, tokens_per_block)
    assert rows.dtype == np.int32 and rows.flags.c_contiguous
    assert ((rows[:, 2] >= 1) & (rows[:, 2] <= tokens_per_block)).all()
    num_keys = rows[:, 2] + rows[:, 3]
    assert (np.diff(num_keys) <= 0).all()
    planned = sorted(
        (request, row + token, position + token)
        for request, row, num_tokens, position in rows.tolist()
        for token in range(num_tokens)
    )
    expected, start = [], 0
    for request, (query_len, before) in enumerate(requests):
        expected += [(request, start + token, before + token) for token in range(query_len)]
        start += query_len
    assert planned == expected


@pytest.mark.parametrize(
    ("max_query_len", "group_size", "tokens"),
    [(1, 2, 8), (4, 4, 4), (5, 4, 16), (16, 4, 16), (17, 4, 32), (8192, 2, 64), (8192, 7, 18), (1, 64, 1), (9, 64, 2)],
)
def test_tokens_of_a_query_block(max_query_len, group_size, tokens):
    assert tokens_per_query_block(max_query_len, group_size) == tokens


GOOD = {
    "query": torch.zeros(2, 4, 64),
    "k_cache": torch.zeros(3, 16, 2, 64),
    "v_cache": torch.zeros(3, 16, 2, 64),
    "block_table": torch.zeros(2, 1, dtype=torch.int32),
    "query_blocks": torch.zeros(1, 4, dtype=torch.int32),
    "tokens_per_block": 8,
}


@pytest.mark.parametrize(
    ("message", "bad"),
    [
        ("tokens_per_block is 0, expected 1 to 64 where 2", {"tokens_per_block": 0}),
        ("tokens_per_block is 65", {"tokens_per_block": 65}),
        ("query_blocks is torch.int64", {"query_blocks": torch.zeros(1, 4, dtype=torch.int64)}),
        ("query_blocks is torch.int32", {"query_blocks": torch.zeros(4, dtype=torch.int32)}),
        ("query_blocks is torch.int32", {"query_blocks": torch.zeros(4, 4, dtype=torch.int32).T}),
        ("window is 0, expected at least 1", {"window": 0}),
        ("softmax_scale -1", {"softmax_scale": -1.0}),
        ("output is torch.float16", {"output": torch.zeros(2, 4, 64, dtype=torch.float16)}),
        ("block_size of the caches is 512", {name: torch.zeros(1, 512, 2, 64) for name in ("k_cache", "v_cache")}),
    ],
)
def test_bad_arguments_are_named(message, bad):
    with pytest.raises(ValueError, match=message):
        paged_attention(**(GOOD | bad))
