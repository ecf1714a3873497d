"""Decode attention on a GPU, in the shapes of real models; scratch memory and output start as NaN."""

import pytest
import torch

from kernels.paged_decode import decode_scratch, paged_decode, paged_decode_reference
from tests.gpu import captured, needs_cuda
from tests.paged_cache import PagedCache

pytestmark = needs_cuda
FLOAT8 = torch.float8_e4m3fn
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
FLOAT8_TOLERANCE = {**TOLERANCE, torch.float32: 2e-3}  # multiplied in float16
NO_FLOAT8 = torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9)


def poisoned_scratch(num_heads, num_kv_heads, head_dim):
    scratch = decode_scratch(num_heads, num_kv_heads, head_dim, torch.device("cuda"))
    scratch.outputs.fill_(torch.nan)
    scratch.log_sums.fill_(torch.nan)
    return scratch


def random_inputs(context_lens, num_heads, num_kv_heads, head_dim, block_size, dtype, cache_dtype):
    cache = PagedCache.random(context_lens, num_kv_heads, head_dim, block_size, cache_dtype, device="cuda")
    query = torch.randn(len(context_lens), num_heads, head_dim, device="cuda").to(dtype)
    lens = torch.tensor(context_lens, dtype=torch.int32, device="cuda")
    return query, cache.k_cache, cache.v_cache, cache.block_table, lens


def check(context_lens, heads=(16, 8), head_dim=128, block_size=16, dtype=torch.bfloat16, cache_dtype=None):
    inputs = random_inputs(context_lens, *heads, head_dim, block_size, dtype, cache_dtype or dtype)
    scratch = poisoned_scratch(*heads, head_dim)
    output = torch.full_like(inputs[0], torch.nan)
    paged_decode(*inputs, scratch, output=output)
    expected = paged_decode_reference(*inputs)
    tolerance = (FLOAT8_TOLERANCE if cache_dtype == FLOAT8 else TOLERANCE)[dtype]
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
    assert not scratch.arrivals.any()
    for _ in range(20):
        # Parts are merged in the order of the keys, whoever arrives last.
        assert torch.equal(paged_decode(*inputs, scratch), output)


LENGTHS = {
    "one short": [1],
    "one of 512": [512],
    "one of 32k": [32_768 + 3],
    "64 of about 1k": [1000 + 7 * i for i in range(64)],
    "one of 128k among short ones": [100 + i for i in range(15)] + [131_072] + [33 * i for i in range(16)],
    "257 from empty to 256": list(range(257)),
}


@pytest.mark.parametrize("heads", [(16, 8), (32, 8), (64, 8), (14, 2), (32, 4), (5, 1)], ids=str)
@pytest.mark.parametrize("context_lens", LENGTHS.values(), ids=LENGTHS.keys())
def test_heads_and_lengths_of_models(context_lens, heads):
    check(context_lens, heads)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_dtypes_and_head_dims(dtype, head_dim):
    check([1, 5000, 77, 0, 300], head_dim=head_dim, dtype=dtype)


@pytest.mark.skipif(NO_FLOAT8, reason="no float8_e4m3fn")
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_float8_cache(dtype, head_dim):
    check([1, 5000, 77, 0, 300], head_dim=head_dim, dtype=dtype, cache_dtype=FLOAT8)


@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
def test_block_sizes(block_size):
    check([1, 5000, 77, 0, 300], block_size=block_size)


def test_one_graph_for_any_lengths():
    query, k_cache, v_cache, table, lens = random_inputs([2000] * 8, 16, 8, 128, 16, torch.bfloat16, torch.bfloat16)
    scratch = poisoned_scratch(16, 8, 128)
    graph, output = captured(lambda: paged_decode(query, k_cache, v_cache, table, lens, scratch))
    for seed in range(20):
        torch.manual_seed(seed)
        lens.copy_(torch.randint(0, 2001, (8,)))
        output.fill_(torch.nan)
        graph.replay()
        expected = paged_decode_reference(query, k_cache, v_cache, table, lens)
        torch.testing.assert_close(output, expected, rtol=1e-2, atol=1e-2)


def test_cache_past_two_to_the_31_elements():
    num_blocks = 2**31 // (16 * 8 * 128) + 512
    k_cache, v_cache = (torch.zeros(num_blocks, 16, 8, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    k_cache[-512:].normal_()
    v_cache[-512:].normal_()
    table = torch.arange(num_blocks - 512, num_blocks, dtype=torch.int32, device="cuda").view(2, 256)
    query = torch.randn(2, 16, 128, dtype=torch.bfloat16, device="cuda")
    lens = torch.tensor([4096, 3000], dtype=torch.int32, device="cuda")
    output = paged_decode(query, k_cache, v_cache, table, lens)
    expected = paged_decode_reference(query, k_cache, v_cache, table, lens)
    torch.testing.assert_close(output, expected, rtol=1e-2, atol=1e-2)
