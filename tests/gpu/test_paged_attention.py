"""Attention of prompts, chunks and single tokens on a GPU, in the shapes of real models; output starts as NaN."""

import numpy as np
import pytest
import torch

from kernels.paged_attention import (
    paged_attention,
    paged_attention_reference,
    plan_query_blocks,
    tokens_per_query_block,
)
from tests.gpu import captured, needs_cuda
from tests.paged_cache import PagedCache

pytestmark = needs_cuda
FLOAT8 = torch.float8_e4m3fn
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
FLOAT8_TOLERANCE = {**TOLERANCE, torch.float32: 2e-3}  # multiplied in float16
NO_FLOAT8 = torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9)
REQUESTS = {  # (query_len, tokens before)
    "one token": [(1, 0)],
    "a prompt of 4k": [(4096, 0)],
    "a chunk after 20k": [(700, 20_000)],
    "speculated tokens": [(4, 100 * i) for i in range(32)],
    "prompts, chunks and decodes": [(1, 999), (513, 0), (1, 3), (64, 1000), (1, 5000), (300, 17), (2, 0)],
}


def random_inputs(
    requests, num_heads, num_kv_heads, head_dim=128, block_size=16, dtype=torch.bfloat16, cache_dtype=None
):
    query_lens, before = (np.array(column, np.int64) for column in zip(*requests, strict=True))
    context_lens = query_lens + before
    cache = PagedCache.random(
        context_lens.tolist(), num_kv_heads, head_dim, block_size, cache_dtype or dtype, device="cuda"
    )
    query = torch.randn(int(query_lens.sum()), num_heads, head_dim, device="cuda").to(dtype)
    tokens = tokens_per_query_block(int(query_lens.max()), num_heads // num_kv_heads)
    blocks = plan_query_blocks(np.cumsum(query_lens) - query_lens, query_lens, context_lens, tokens)
    return (query, cache.k_cache, cache.v_cache, cache.block_table, torch.from_numpy(blocks).cuda()), tokens


def check(requests, heads=(16, 8), **shapes):
    inputs, tokens = random_inputs(requests, *heads, **shapes)
    output = torch.full_like(inputs[0], torch.nan)
    paged_attention(*inputs, tokens, output=output)
    tolerance = (FLOAT8_TOLERANCE if inputs[1].dtype == FLOAT8 else TOLERANCE)[output.dtype]
    torch.testing.assert_close(output, paged_attention_reference(*inputs), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("heads", [(16, 8), (32, 8), (64, 8), (14, 2), (32, 4), (5, 1)], ids=str)
@pytest.mark.parametrize("requests", REQUESTS.values(), ids=REQUESTS.keys())
def test_heads_and_lengths_of_models(requests, heads):
    check(requests, heads)


@pytest.mark.parametrize("query_len", [1, 20, 500], ids="{} tokens".format)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_dtypes_and_head_dims(dtype, head_dim, query_len):
    check([(query_len, 1000), (1, 5)], head_dim=head_dim, dtype=dtype)


@pytest.mark.skipif(NO_FLOAT8, reason="no float8_e4m3fn")
@pytest.mark.parametrize("query_len", [1, 20, 500], ids="{} tokens".format)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_float8_cache(dtype, head_dim, query_len):
    check([(query_len, 1000), (1, 5)], head_dim=head_dim, dtype=dtype, cache_dtype=FLOAT8)


@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
def test_block_sizes(block_size):
    check([(1000, 333), (1, 5)], block_size=block_size)


def test_in_a_graph_with_another_plan():
    """A graph for speculated tokens: as many query blocks as at capture, other contexts, some blocks empty."""
    inputs, tokens = random_inputs([(4, 1000)] * 8, 16, 8)
    query, k_cache, v_cache, table, blocks = inputs
    graph, output = captured(lambda: paged_attention(*inputs, tokens))
    starts, lens = np.arange(0, 24, 4), np.full(6, 4)
    plan = plan_query_blocks(starts, lens, np.array([4, 17, 1000, 400, 64, 65]), tokens)
    blocks.zero_()
    blocks[: len(plan)] = torch.from_numpy(plan)
    output.fill_(torch.nan)
    graph.replay()
    expected = paged_attention_reference(query, k_cache, v_cache, table, blocks)
    torch.testing.assert_close(output[:24], expected[:24], rtol=1e-2, atol=1e-2)
    assert output[24:].isnan().all()
