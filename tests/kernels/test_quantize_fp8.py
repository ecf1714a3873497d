"""Activations to FP8 under the interpreter, against the reference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.quantize_fp8 import (
    MAX_WIDTH,
    check_fp8_capability,
    quantize_fp8_per_token,
    quantize_fp8_per_token_reference,
)
from tests.kernels import DTYPES, interpreted, padded_rows, poisoned_memory


def random_rows(num_tokens, width, dtype, device="cpu"):
    torch.manual_seed(num_tokens + width)
    return (torch.randn(num_tokens, width) * torch.logspace(-3, 2, num_tokens).unsqueeze(1)).to(device, dtype)


def check_quantize(x, group_size):
    with poisoned_memory():
        quantized, scale = quantize_fp8_per_token(x, group_size)
    # On the CPU, where torch divides by numbers; on a GPU it multiplies by their reciprocal.
    expected, expected_scale = quantize_fp8_per_token_reference(x.cpu(), group_size)
    assert quantized.is_contiguous() and scale.shape == expected_scale.shape
    assert torch.equal(scale.cpu(), expected_scale)
    assert torch.equal(quantized.cpu().view(torch.uint8), expected.view(torch.uint8))


@interpreted
@given(
    num_tokens=st.integers(1, 6),
    width=st.integers(1, 700) | st.just(4100),
    dtype=st.sampled_from(DTYPES),
    group_size=st.sampled_from([None, 128]),
    padding=st.integers(0, 5),
)
def test_any_shape(num_tokens, width, dtype, group_size, padding):
    check_quantize(padded_rows(random_rows(num_tokens, width, dtype), padding), group_size)


@pytest.mark.parametrize("group_size", [None, 128])
def test_error_and_range(group_size):
    x = random_rows(5, 300, torch.float32)
    quantized, scale = quantize_fp8_per_token_reference(x, group_size)
    spread = scale.unsqueeze(1) if group_size is None else scale.repeat_interleave(128, 1)[:, :300]
    error = (quantized.float() * spread - x).abs()
    assert (error <= x.abs() * 2.0**-4 + spread * 2.0**-10).all()
    assert quantized.float().abs().max() == 448


def test_a_token_of_zeros():
    quantized, scale = quantize_fp8_per_token(torch.zeros(2, 100, dtype=torch.bfloat16))
    assert not quantized.float().any() and (scale > 0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")
def test_what_is_not_finite_stays_in_its_token(value):
    x = torch.ones(3, 100, dtype=torch.bfloat16)
    x[1, 5] = value
    quantized, scale = quantize_fp8_per_token(x)
    values = quantized.float() * scale.unsqueeze(1)
    assert not values[1, 5].isfinite() and torch.equal(values[::2], torch.ones(2, 100))


def test_no_tokens():
    quantized, scale = quantize_fp8_per_token(torch.zeros(0, 256, dtype=torch.bfloat16), 128)
    assert quantized.shape == (0, 256) and scale.shape == (0, 2)


def test_refusals():
    with pytest.raises(ValueError, match="expected contiguous rows of at most 32768"):
        quantize_fp8_per_token(torch.zeros(1, MAX_WIDTH + 1))
    with pytest.raises(ValueError, match=r"strides \(1, 4\)"):
        quantize_fp8_per_token(torch.zeros(32, 4).t())


def test_needs_a_recent_gpu():
    check_fp8_capability((8, 9))
    check_fp8_capability((10, 0))
    with pytest.raises(ValueError, match=r"FP8 needs a GPU of compute capability 8.9 or newer.*this one has 8.6"):
        check_fp8_capability((8, 6))
