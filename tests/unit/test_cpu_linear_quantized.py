"""The C++ products with weights of 8 and 4 bits against dequantized weights in float32."""

import shutil

import pytest
import torch
import torch.nn.functional as F

from kernels import cpu_build, cpu_ops
from kernels.quantize_weights import (
    dequantize_int4_group,
    dequantize_per_channel,
    pack_scale_zero,
    quantize_int4_group,
    quantize_int8_per_channel,
    unpack_scale_zero,
)
from kernels.weight_only_mm import INT8_CPU_ROWS, weight_only_mm_cpu

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, cpu_build.COMPILERS)), reason="needs a C++ compiler, which this machine has not"
)
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 2e-5}, torch.bfloat16: {"rtol": 1e-2, "atol": 1e-2}}
WAYS = {
    "int8": (cpu_ops.linear_int8, quantize_int8_per_channel),
    "int4": (cpu_ops.linear_int4, lambda weight: quantize_int4_group(weight, symmetric=False)),
}


def widened(quantized: torch.Tensor, scale: torch.Tensor, in_features: int) -> torch.Tensor:
    if quantized.dtype == torch.int16:
        return dequantize_int4_group(quantized, scale, in_features, torch.float32)
    return dequantize_per_channel(quantized, scale, torch.float32)


@pytest.fixture(params=TOLERANCE, ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    torch.manual_seed(0)
    return request.param


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_rows", [0, 1, 2, 7, 15])
@pytest.mark.parametrize(("out_features", "in_features"), [(16, 128), (48, 384), (4096, 512)])
def test_products(dtype, way, num_rows, out_features, in_features, has_bias):
    multiply, quantize = WAYS[way]
    quantized, scale = quantize(torch.randn(out_features, in_features) * 0.05 + 0.02)
    x = torch.randn(num_rows, in_features, dtype=dtype)
    bias = torch.randn(out_features, dtype=dtype) if has_bias else None
    found = multiply(x, quantized, scale, bias)
    expected = F.linear(x.float(), widened(quantized, scale, in_features), None if bias is None else bias.float())
    torch.testing.assert_close(found, expected.to(dtype), **TOLERANCE[dtype])


@pytest.mark.parametrize("way", WAYS)
def test_a_row_does_not_depend_on_its_neighbours(dtype, way):
    multiply, quantize = WAYS[way]
    quantized = quantize(torch.randn(64, 256))
    x = torch.randn(11, 256, dtype=dtype)
    x[4, 5] = torch.nan
    together = multiply(x, *quantized, None)
    assert together[4].isnan().all()
    for row in (0, 3, 7, 8, 10):
        assert torch.equal(multiply(x[row : row + 1], *quantized, None)[0], together[row])


def test_every_code_with_large_small_and_negative_scales(dtype):
    codes = torch.arange(16, dtype=torch.uint8).repeat(16, 8)
    scale = torch.tensor([[6e-8, 65504.0, -0.5, 0.0] * 4]).t().half()
    zero = torch.arange(16, dtype=torch.uint8).unsqueeze(1)
    scale_zero = pack_scale_zero(scale, zero)
    planes = codes.unflatten(1, (-1, 64)).short()
    packed = (planes[:, 0] | planes[:, 1] << 4).contiguous()
    assert torch.equal(unpack_scale_zero(scale_zero)[0][:, :1], scale)
    x = torch.eye(128, dtype=dtype)[:20]
    found = cpu_ops.linear_int4(x, packed, scale_zero, None)
    expected = ((codes.float() - zero) * scale.float()).t()[:20]
    torch.testing.assert_close(found, expected.to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-9)


def test_what_is_not_served():
    quantized, scale = quantize_int8_per_channel(torch.randn(24, 64))
    x = torch.randn(2, 64)
    assert cpu_ops.linear_int8(x, quantized, scale, None) is None  # 24 channels
    assert cpu_ops.linear_int8(x.half(), quantized[:16], scale[:16], None) is None
    assert cpu_ops.linear_int8(x[:, :50], quantized[:16, :50], scale[:16], None) is None
    assert cpu_ops.linear_int4(torch.randn(2, 64), torch.zeros(16, 64, dtype=torch.int16), scale, None) is None


@pytest.mark.parametrize("num_rows", [INT8_CPU_ROWS, INT8_CPU_ROWS + 1])
def test_many_rows(dtype, num_rows):
    quantized, scale = quantize_int8_per_channel(torch.randn(32, 192) * 0.1)
    x = torch.randn(192, num_rows, dtype=dtype).t()
    found = weight_only_mm_cpu(x, quantized, scale)
    expected = F.linear(x.float(), widened(quantized, scale, 192)).to(dtype)
    torch.testing.assert_close(found, expected, **TOLERANCE[dtype])
