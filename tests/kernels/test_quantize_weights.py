"""Weights in fewer bits and back: bounds on the error, and where every int4 lies."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.quantize_weights import (
    GROUP,
    dequantize_fp8_block,
    dequantize_int4_group,
    dequantize_per_channel,
    pack_int4,
    pack_scale_zero,
    quantize_fp8_block,
    quantize_fp8_per_channel,
    quantize_int4_group,
    quantize_int8_per_channel,
    unpack_int4,
    unpack_scale_zero,
)
from tests.kernels import interpreted

FP8_ROUNDOFF, FP8_SUBNORMAL = 2.0**-4, 2.0**-10
QUANTIZERS = {
    "int8": quantize_int8_per_channel,
    "fp8": quantize_fp8_per_channel,
    "block": quantize_fp8_block,
    "int4": lambda weight: quantize_int4_group(weight, symmetric=True),
}


def random_weight(channels, inner, dtype=torch.bfloat16):
    torch.manual_seed(channels + inner)
    return (torch.randn(channels, inner) * torch.logspace(-4, 1, channels).unsqueeze(1)).to(dtype)


@interpreted
@given(channels=st.integers(1, 20), inner=st.integers(1, 300))
def test_int8_per_channel(channels, inner):
    weight = random_weight(channels, inner)
    quantized, scale = quantize_int8_per_channel(weight)
    error = (dequantize_per_channel(quantized, scale, torch.float32) - weight.float()).abs()
    assert quantized.dtype == torch.int8 and scale.shape == (channels,)
    assert (error <= scale.unsqueeze(1) * 0.501).all()
    assert (quantized.abs().amax(1) == 127).all()


@interpreted
@given(channels=st.integers(1, 20), inner=st.integers(1, 300))
def test_fp8_per_channel(channels, inner):
    weight = random_weight(channels, inner).float()
    quantized, scale = quantize_fp8_per_channel(weight)
    error = (dequantize_per_channel(quantized, scale, torch.float32) - weight).abs()
    assert (error <= weight.abs() * FP8_ROUNDOFF + scale.unsqueeze(1) * FP8_SUBNORMAL).all()
    assert (quantized.float().abs().amax(1) == 448).all()


@interpreted
@given(channels=st.integers(1, 300), inner=st.integers(1, 300))
def test_fp8_block(channels, inner):
    weight = random_weight(channels, inner).float()
    quantized, scale = quantize_fp8_block(weight)
    assert scale.shape == (-(-channels // 128), -(-inner // 128))
    for row in range(scale.shape[0]):
        for column in range(scale.shape[1]):
            block = (slice(row * 128, row * 128 + 128), slice(column * 128, column * 128 + 128))
            torch.testing.assert_close(scale[row, column] * 448, weight[block].abs().max())
            error = (quantized[block].float() * scale[row, column] - weight[block]).abs()
            assert (error <= weight[block].abs() * FP8_ROUNDOFF + scale[row, column] * FP8_SUBNORMAL).all()
    expected = quantized.float() * scale.repeat_interleave(128, 0)[:channels].repeat_interleave(128, 1)[:, :inner]
    assert torch.equal(dequantize_fp8_block(quantized, scale, torch.float32), expected)


@interpreted
@given(channels=st.integers(1, 12), groups=st.integers(1, 5), symmetric=st.booleans(), shift=st.floats(-3, 3))
def test_int4_group(channels, groups, symmetric, shift):
    weight = random_weight(channels, groups * GROUP).float() * 0.1 + shift * 0.01
    packed, scale_zero = quantize_int4_group(weight, symmetric)
    back = dequantize_int4_group(packed, scale_zero, weight.shape[1], torch.float32)
    step = unpack_scale_zero(scale_zero)[0][:, :groups].float().repeat_interleave(GROUP, 1)
    # Half a step; the scale's own rounding moves the outermost code, and an asymmetric zero is rounded too.
    assert ((back - weight).abs() <= step * 1.02 + 1e-7).all()
    assert symmetric is False or (unpack_scale_zero(scale_zero)[1][:, :groups] == 8).all()


def test_int4_zeros_and_a_tiny_group():
    weight = torch.zeros(2, 256)
    weight[1, 128:] = 1e-7
    for symmetric in (True, False):
        back = dequantize_int4_group(*quantize_int4_group(weight, symmetric), 256, torch.float32)
        assert (back - weight).abs().max() <= 1e-7


@interpreted
@given(channels=st.integers(1, 5), inner=st.integers(1, 600))
def test_int4_words(channels, inner):
    codes = torch.randint(0, 16, (channels, inner), dtype=torch.uint8)
    packed = pack_int4(codes)
    assert packed.dtype == torch.int16 and packed.shape == (channels, -(-inner // 256) * 64)
    unpacked = unpack_int4(packed)
    assert torch.equal(unpacked[:, :inner], codes) and not unpacked[:, inner:].any()
    channel, index = channels - 1, inner - 1
    span, (plane, word) = index // 256, divmod(index % 256, 64)
    assert (int(packed[channel, span * 64 + word]) >> 4 * plane) & 15 == codes[channel, index]


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_scales_and_zeros(groups):
    scale, zero = torch.randn(3, groups).half(), torch.randint(0, 16, (3, groups), dtype=torch.uint8)
    packed = pack_scale_zero(scale, zero)
    assert packed.dtype == torch.int32 and packed.shape == (groups + groups % 2, 3) and packed.is_contiguous()
    back_scale, back_zero = unpack_scale_zero(packed)
    assert torch.equal(back_scale[:, :groups], scale) and torch.equal(back_zero[:, :groups], zero)
    assert not back_scale[:, groups:].any()


@pytest.mark.parametrize("quantize", QUANTIZERS.values(), ids=QUANTIZERS)
def test_a_channel_of_zeros(quantize):
    quantized, scale = quantize(torch.zeros(4, 256))
    assert torch.isfinite(scale.float()).all()
    if quantized.dtype != torch.int16:
        assert not quantized.float().any() and (scale > 0).all()


@pytest.mark.parametrize("quantize", QUANTIZERS.values(), ids=QUANTIZERS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_refuses_what_is_not_finite(quantize, value):
    weight = torch.ones(4, 256)
    weight[2, 3] = value
    with pytest.raises(ValueError, match=r"weight of shape \(4, 256\) is infinite or not a number"):
        quantize(weight)


def test_int4_refusals():
    with pytest.raises(ValueError, match=r"\(4, 200\), expected \[N, K\] with K a multiple of 128"):
        quantize_int4_group(torch.zeros(4, 200), symmetric=True)
    with pytest.raises(ValueError, match="weights reach 1e\\+06, too large for a float16 scale"):
        quantize_int4_group(torch.full((4, 128), 1e6), symmetric=True)
