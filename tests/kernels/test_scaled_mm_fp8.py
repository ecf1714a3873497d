"""FP8 products under the interpreter, against the same FP8 values multiplied in float32."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.quantize_fp8 import quantize_fp8_per_token_reference
from kernels.quantize_weights import dequantize_fp8_block, quantize_fp8_block, quantize_fp8_per_channel
from kernels.scaled_mm_fp8 import (
    SMALL_M,
    prefers_cublas,
    scaled_mm_cublas,
    scaled_mm_fp8,
    scaled_mm_fp8_config,
    scaled_mm_fp8_reference,
)
from kernels.split_k import PLANNED_SHARED_MEMORY, tile_counters
from tests.kernels import DTYPES, SUM_ERROR, UNIT_ROUNDOFF, assert_close, interpreted, padded_rows, poisoned_memory

QUANTIZERS = {"channels": quantize_fp8_per_channel, "blocks": quantize_fp8_block}


def random_inputs(num_rows, channels, inner, scales, dtype, device="cpu"):
    torch.manual_seed(num_rows + channels + inner)
    weight, scale = QUANTIZERS[scales](torch.randn(channels, inner) * torch.logspace(-2, 1, channels).unsqueeze(1))
    x = torch.randn(num_rows, inner) * torch.logspace(-1, 1, num_rows).unsqueeze(1)
    bias = torch.randn(channels).to(device, dtype)
    return x.to(device, dtype), weight.to(device), scale.to(device), bias


def check_product(x, weight, scale, bias, sum_error=SUM_ERROR):
    with poisoned_memory():
        y = scaled_mm_fp8(x, weight, scale, bias)
    assert y.is_contiguous()
    assert_product(y, x, weight, scale, bias, sum_error)
    assert not tile_counters(x.device).any(), "counters must be left as they were found"


def assert_product(y, x, weight, scale, bias, sum_error):
    """sum_error: what sums may be off by, as a part of the sum of their terms' magnitudes."""
    assert y.dtype == x.dtype and y.shape == (x.shape[0], weight.shape[0])
    expected = scaled_mm_fp8_reference(x.float(), weight, scale, None if bias is None else bias.float())
    magnitude = scaled_mm_fp8_reference(x.float().abs(), weight.float().abs().to(weight.dtype), scale).max()
    assert_close(y, expected, magnitude=float(magnitude) * sum_error / SUM_ERROR)


@settings(interpreted, max_examples=30)
@given(
    num_rows=st.integers(1, 20) | st.sampled_from([33, 64, 70, 130]),
    channels=st.integers(1, 150),
    inner=st.integers(1, 26).map(lambda steps: steps * 16),
    scales=st.sampled_from(sorted(QUANTIZERS)),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    padding=st.integers(0, 5),
    has_bias=st.booleans(),
)
def test_any_shape(num_rows, channels, inner, scales, dtype, padding, has_bias):
    x, weight, scale, bias = random_inputs(num_rows, channels, inner, scales, dtype)
    check_product(padded_rows(x, padding), weight, scale, bias if has_bias else None)


@pytest.mark.parametrize("scales", QUANTIZERS)
def test_many_parts(scales):
    """Long rows of few channels: sixteen programs a tile."""
    check_product(*random_inputs(2, 64, 4096, scales, torch.bfloat16))


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16])
def test_scales_of_checkpoints(scale_dtype):
    x, weight, scale, _ = random_inputs(3, 140, 256, "blocks", torch.bfloat16)
    check_product(x, weight, scale.to(scale_dtype), None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_multiplies_what_was_rounded(dtype):
    x, weight, scale, bias = random_inputs(5, 150, 200, "blocks", dtype)
    quantized, x_scale = quantize_fp8_per_token_reference(x, 128)
    rounded = quantized.double() * x_scale.double().repeat_interleave(128, 1)[:, :200]
    expected = rounded @ dequantize_fp8_block(weight, scale, torch.float64).t() + bias.double()
    y = scaled_mm_fp8_reference(x, weight, scale, bias)
    assert y.dtype == dtype
    atol = expected.abs().max().item() * (UNIT_ROUNDOFF[dtype] + SUM_ERROR)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("scales", QUANTIZERS)
def test_close_to_the_product_of_unrounded_factors(scales):
    torch.manual_seed(0)
    x, weight = torch.randn(8, 1024, dtype=torch.bfloat16), torch.randn(64, 1024)
    y = scaled_mm_fp8(x, *QUANTIZERS[scales](weight))
    exact = x.float() @ weight.t()
    assert (y.float() - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("scales", QUANTIZERS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")
def test_what_is_not_finite_stays_in_its_row(scales, value):
    x, weight, scale, _ = random_inputs(4, 30, 256, scales, torch.bfloat16)
    clean = scaled_mm_fp8(x, weight, scale)
    x[2, 7] = value
    y = scaled_mm_fp8(x, weight, scale)
    assert not y[2].isfinite().any() and torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize("scales", QUANTIZERS)
def test_no_rows(scales):
    x, weight, scale, bias = random_inputs(0, 30, 256, scales, torch.bfloat16)
    assert scaled_mm_fp8(x, weight, scale, bias).shape == (0, 30)


def test_torch_product():
    """The call that goes to cuBLAS on a GPU; torch computes it on a CPU too."""
    x, weight, scale, bias = random_inputs(80, 64, 256, "channels", torch.bfloat16)
    quantized, x_scale = quantize_fp8_per_token_reference(x)
    y = scaled_mm_cublas(quantized, x_scale, weight, scale, bias, torch.bfloat16)
    expected = scaled_mm_fp8_reference(x, weight, scale, bias)
    assert (y.float() - expected.float()).abs().max() <= expected.abs().max().item() * UNIT_ROUNDOFF[torch.bfloat16] * 4


@pytest.mark.parametrize(
    ("num_rows", "channels", "inner", "capability", "expected"),
    [
        (SMALL_M, 4096, 4096, (9, 0), False),
        (SMALL_M + 1, 4096, 4096, (9, 0), True),
        (2048, 4096, 4096, (8, 9), True),
        (2048, 4096, 4096, (12, 0), False),
        (2048, 4100, 4096, (9, 0), False),
        (2048, 4096, 4104, (9, 0), False),
    ],
)
def test_who_multiplies(num_rows, channels, inner, capability, expected):
    assert prefers_cublas(num_rows, channels, inner, capability) is expected


def test_configurations():
    for num_rows in (*range(1, 130), 1000):
        block_m, block_n, swap, num_warps, stages = scaled_mm_fp8_config(num_rows, PLANNED_SHARED_MEMORY)
        assert block_m >= min(num_rows, 128) and 128 % block_n == 0
        assert num_warps * 32 <= block_m * block_n // 8 and swap is (block_m < 64)
        assert stages * (block_m + block_n) * 128 < PLANNED_SHARED_MEMORY


def test_refusals():
    x, weight, scale, bias = random_inputs(2, 140, 256, "blocks", torch.bfloat16)
    with pytest.raises(ValueError, match=r"x has shape \(2, 200\).*expected \[num_rows, K\]"):
        scaled_mm_fp8(x[:, :200], weight, scale)
    with pytest.raises(ValueError, match=r"weight_scale has shape \(1, 2\), expected contiguous \(140,\) or \(2, 2\)"):
        scaled_mm_fp8(x, weight, scale[:1])
    with pytest.raises(ValueError, match=r"bias is torch.float32 \(140,\), expected torch.bfloat16 \(140,\)"):
        scaled_mm_fp8(x, weight, scale, bias.float())
    with pytest.raises(ValueError, match=r"weight is torch.float32 \(140, 256\)"):
        scaled_mm_fp8(x, weight.float(), scale)
    with pytest.raises(ValueError, match="expected bfloat16 or float16 and a multiple of 16 on a GPU"):
        scaled_mm_fp8(x.float(), weight, scale)
