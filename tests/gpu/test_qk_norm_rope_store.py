"""Norms, rotation and cache writes on a GPU, in the shapes of real models."""

from dataclasses import replace

import pytest
import torch

from kernels.qk_norm_rope_store import qk_norm_rope_store
from tests.gpu import captured, needs_cuda
from tests.kernels import DTYPES, padded_rows
from tests.kernels.test_qk_norm_rope_store import FLOAT8, check, random_inputs

pytestmark = needs_cuda
HEADS = ((16, 8), (32, 8), (64, 8), (14, 2), (32, 4), (5, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 17, 1024])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_shapes_of_models(heads, num_tokens, dtype):
    inputs = random_inputs(num_tokens, *heads, 128, dtype, device="cuda")
    check(replace(inputs, qkv=padded_rows(inputs.qkv, 8)))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 256])
def test_sizes_of_heads(head_dim, norm):
    check(random_inputs(33, 16, 4, head_dim, torch.bfloat16, norm=norm, device="cuda"))


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="no float8_e4m3fn"
)
@pytest.mark.parametrize("scale", [1.0, 0.02, 1e-3])
def test_float8_cache(scale):
    inputs = random_inputs(100, 32, 8, 128, torch.bfloat16, FLOAT8, device="cuda")
    check(replace(inputs, k_scale=scale, v_scale=2 * scale))


def test_in_a_graph():
    inputs = random_inputs(7, 16, 8, 128, torch.bfloat16, device="cuda")
    graph, q = captured(lambda: qk_norm_rope_store(*inputs.arguments()))
    other = random_inputs(7, 16, 8, 128, torch.bfloat16, device="cuda")
    inputs.qkv.copy_(torch.randn_like(inputs.qkv))
    inputs.slot_mapping.copy_(inputs.slot_mapping.flip(0))
    inputs.k_cache.fill_(1.0)
    graph.replay()
    expected = replace(other, qkv=inputs.qkv, slot_mapping=inputs.slot_mapping)
    assert torch.equal(q, qk_norm_rope_store(*expected.arguments()))
    assert torch.equal(inputs.k_cache, expected.k_cache)
