"""Narrow weights widened under the interpreter, against their reference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.quantize_weights import quantize_fp8_per_channel, quantize_int4_group, quantize_int8_per_channel
from kernels.widen_weights import widen_weights, widen_weights_reference
from tests.kernels import DTYPES, assert_close, interpreted, poisoned_memory

QUANTIZERS = {
    "int8": quantize_int8_per_channel,
    "fp8": quantize_fp8_per_channel,
    "int4": lambda weight: quantize_int4_group(weight, symmetric=False),
}


def check_widen(quantized, scale, inner, dtype):
    with poisoned_memory():
        wide = widen_weights(quantized, scale, inner, dtype)
    assert wide.shape == (quantized.shape[0], inner) and wide.dtype == dtype
    assert_close(wide, widen_weights_reference(quantized, scale, inner, torch.float32))


@interpreted
@given(
    channels=st.integers(1, 20),
    groups=st.integers(1, 3),
    quantize=st.sampled_from(sorted(QUANTIZERS)),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(channels, groups, quantize, dtype):
    inner = groups * 128
    torch.manual_seed(channels)
    check_widen(*QUANTIZERS[quantize](torch.randn(channels, inner)), inner, dtype)


@pytest.mark.parametrize("inner", [1, 77, 257])
def test_8_bits_of_any_width(inner):
    check_widen(*quantize_int8_per_channel(torch.randn(5, inner)), inner, torch.bfloat16)
