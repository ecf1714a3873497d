"""Products with weights in blocks of GGUF under the interpreter, against what the gguf package dequantizes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from kernels.split_k import tile_counters
from kernels.weight_only_blocks import MAX_ROWS, weight_only_blocks, widen_blocks
from tests.gguf_blocks import KINDS, random_blocks, split_blocks, wide_weights
from tests.kernels import assert_close, interpreted, padded_rows, poisoned_memory

HALVES = (torch.bfloat16, torch.float16)


def check_product(kind, num_rows, channels, inner, dtype, padding=0, has_bias=True, device="cpu"):
    torch.manual_seed(num_rows + channels + inner)
    blocks = random_blocks(kind, channels, inner)
    weight, scale = (tensor.to(device) for tensor in split_blocks(blocks))
    x = padded_rows(torch.randn(num_rows, inner, device=device).to(dtype), padding)
    bias = torch.randn(channels, device=device).to(dtype) if has_bias else None
    with poisoned_memory():
        y = weight_only_blocks(x, weight, scale, bias)
    wide = wide_weights(blocks, kind).to(device).to(dtype).float()  # rounded in the kernel too
    assert y.dtype == dtype and y.shape == (num_rows, channels) and y.is_contiguous()
    expected = F.linear(x.float(), wide, None if bias is None else bias.float())
    assert_close(y, expected, magnitude=float((x.float().abs() @ wide.abs().t()).max()))
    assert not tile_counters(x.device).any(), "counters must be left as they were found"


@interpreted
@given(
    num_rows=st.integers(1, 20) | st.sampled_from([33, 64]),
    channels=st.integers(1, 150),
    blocks=st.integers(1, 25),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(HALVES),
    padding=st.integers(0, 5),
    has_bias=st.booleans(),
)
def test_any_shape(num_rows, channels, blocks, kind, dtype, padding, has_bias):
    check_product(kind, num_rows, channels, blocks * 32, dtype, padding, has_bias)


@pytest.mark.parametrize("kind", KINDS)
def test_many_parts(kind):
    """Long rows of few channels: many programs a tile."""
    check_product(kind, 2, 64, 4096, torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("channels", "inner"), [(30, 256), (16, 32), (50, 480)])
def test_more_rows_than_the_kernel_takes(kind, channels, inner):
    blocks = random_blocks(kind, channels, inner)
    weight, scale = split_blocks(blocks)
    for dtype in HALVES:
        wide = widen_blocks(weight, scale, dtype)
        assert torch.equal(wide, wide_weights(blocks, kind).to(dtype))
        x = torch.randn(MAX_ROWS + 1, inner).to(dtype)
        assert torch.equal(weight_only_blocks(x, weight, scale), F.linear(x, wide))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_same_alone(kind):
    weight, scale = split_blocks(random_blocks(kind, 70, 1280))
    x = torch.randn(16, 1280).to(torch.bfloat16)
    x[2, 7] = torch.nan
    together = weight_only_blocks(x, weight, scale)
    assert together[2].isnan().all()
    assert torch.equal(together[5:6], weight_only_blocks(x[5:6], weight, scale))


def test_no_rows():
    weight, scale = split_blocks(random_blocks("Q4_0", 30, 64))
    assert weight_only_blocks(torch.empty(0, 64, dtype=torch.bfloat16), weight, scale).shape == (0, 30)


def test_refusals():
    weight, scale = split_blocks(random_blocks("Q8_0", 30, 64))
    x = torch.randn(2, 64).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"x has shape \(2, 63\).* expected contiguous rows of 64"):
        weight_only_blocks(x[:, :63], weight, scale)
    with pytest.raises(ValueError, match=r"strides \(1, 64\)"):
        weight_only_blocks(x, torch.zeros(64, 64, dtype=torch.int8).t(), scale)
    with pytest.raises(ValueError, match=r"weight is torch.float32"):
        weight_only_blocks(x, weight.float(), scale)
    with pytest.raises(ValueError, match=r"scale is torch.float32 \(2, 30\), expected float16 \(2, 30\)"):
        weight_only_blocks(x, weight, scale.float())
    with pytest.raises(ValueError, match=r"bias is torch.float32 \(30,\), expected torch.bfloat16 \(30,\)"):
        weight_only_blocks(x, weight, scale, torch.zeros(30))
    with pytest.raises(ValueError, match=r"x is torch.float32, expected bfloat16 or float16 on a GPU"):
        weight_only_blocks(x.float(), weight, scale)
