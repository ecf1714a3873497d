"""The C++ products with weights in blocks of GGUF against what the gguf package dequantizes."""

import shutil

import gguf
import pytest
import torch
import torch.nn.functional as F

from kernels import cpu_build, cpu_ops
from kernels.quantize_weights import dequantize_blocks
from kernels.weight_only_blocks import CPU_ROWS, weight_only_blocks_cpu
from tests.gguf_blocks import KINDS, random_blocks, split_blocks, wide_weights

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, cpu_build.COMPILERS)), reason="needs a C++ compiler, which this machine has not"
)
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 2e-5}, torch.bfloat16: {"rtol": 1e-2, "atol": 1e-2}}


@pytest.fixture(params=TOLERANCE, ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    torch.manual_seed(0)
    return request.param


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_rows", [0, 1, 2, 7, 15])
@pytest.mark.parametrize(("channels", "inner"), [(16, 32), (48, 160), (4096, 512)])
def test_products(dtype, kind, num_rows, channels, inner, has_bias):
    blocks = random_blocks(kind, channels, inner)
    x = torch.randn(num_rows, inner, dtype=dtype)
    bias = torch.randn(channels, dtype=dtype) if has_bias else None
    found = cpu_ops.linear_blocks(x, *split_blocks(blocks), bias)
    expected = F.linear(x.float(), wide_weights(blocks, kind), None if bias is None else bias.float())
    torch.testing.assert_close(found, expected.to(dtype), **TOLERANCE[dtype])


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_its_neighbours(dtype, kind):
    weight, scale = split_blocks(random_blocks(kind, 64, 256))
    x = torch.randn(11, 256, dtype=dtype)
    x[4, 5] = torch.nan
    together = cpu_ops.linear_blocks(x, weight, scale, None)
    assert together[4].isnan().all()
    for row in (0, 3, 7, 8, 10):
        assert torch.equal(cpu_ops.linear_blocks(x[row : row + 1], weight, scale, None)[0], together[row])


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_with_large_small_and_negative_scales(dtype, kind):
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    codes = torch.arange(16 * (size - 2), dtype=torch.int32).mul(37).to(torch.uint8).view(16, 1, size - 2)
    scale = torch.tensor([6e-8, 65504.0, -0.5, 0.0] * 4).half().view(16, 1, 1)
    blocks = torch.cat((scale.view(torch.uint8), codes), dim=2)
    found = cpu_ops.linear_blocks(torch.eye(32, dtype=dtype), *split_blocks(blocks), None)
    expected = wide_weights(blocks, kind).t().to(dtype)
    torch.testing.assert_close(found, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-9)


def test_what_is_not_served():
    weight, scale = split_blocks(random_blocks("Q8_0", 24, 64))
    assert cpu_ops.linear_blocks(torch.randn(2, 64), weight, scale, None) is None  # 24 channels
    assert cpu_ops.linear_blocks(torch.randn(2, 64).half(), weight[:16], scale[:, :16].contiguous(), None) is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_rows", [CPU_ROWS, CPU_ROWS + 1])
def test_many_rows(dtype, kind, num_rows):
    blocks = random_blocks(kind, 32, 192)
    weight, scale = split_blocks(blocks)
    assert torch.equal(dequantize_blocks(weight, scale, torch.float32), wide_weights(blocks, kind))
    x = torch.randn(192, num_rows, dtype=dtype).t()
    found = weight_only_blocks_cpu(x, weight, scale)
    expected = F.linear(x.float(), wide_weights(blocks, kind)).to(dtype)
    torch.testing.assert_close(found, expected, **TOLERANCE[dtype])
