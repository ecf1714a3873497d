"""The norms under the interpreter, against their reference in float32."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.rms_norm import MAX_HIDDEN, add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from tests.kernels import DTYPES, assert_close, interpreted, padded_rows, poisoned_memory

EPS = 1e-6
SHAPES = {
    "num_rows": st.integers(1, 12),
    "hidden": st.integers(1, 700) | st.sampled_from([64, 128, 256, 1024]),
    "dtype": st.sampled_from(DTYPES),
    "padding": st.integers(0, 9),
}


def random_inputs(num_rows, hidden, dtype, device="cpu"):
    torch.manual_seed(num_rows + hidden)
    x, residual = (torch.randn(num_rows, hidden).mul(3).to(device, dtype) for _ in range(2))
    return x, residual, torch.randn(hidden).to(device, dtype)


def check_rms_norm(x, weight):
    with poisoned_memory():
        normed = rms_norm(x, weight, EPS)
    assert normed.dtype == x.dtype and normed.shape == x.shape and normed.is_contiguous()
    assert_close(normed, rms_norm_reference(x.float(), weight.float(), EPS))


def check_add_rms_norm(x, residual, weight):
    before = x.clone(), residual.clone()
    with poisoned_memory():
        normed, total = add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1]), "inputs must stay as they are"
    assert torch.equal(total, add_rms_norm_reference(x, residual, weight, EPS)[1])
    assert_close(normed, rms_norm_reference(total.float(), weight.float(), EPS))


@interpreted
@given(**SHAPES)
def test_rms_norm_of_any_shape(num_rows, hidden, dtype, padding):
    x, _, weight = random_inputs(num_rows, hidden, dtype)
    check_rms_norm(padded_rows(x, padding), weight)


@interpreted
@given(**SHAPES)
def test_add_rms_norm_of_any_shape(num_rows, hidden, dtype, padding):
    x, residual, weight = random_inputs(num_rows, hidden, dtype)
    check_add_rms_norm(x, padded_rows(residual, padding), weight)


@pytest.mark.parametrize("hidden", [2560, 5120, 16_384, MAX_HIDDEN])
def test_long_rows(hidden):
    check_add_rms_norm(*random_inputs(2, hidden, torch.bfloat16))


def test_leading_dimensions():
    x, residual, weight = random_inputs(6, 48, torch.float32)
    assert torch.equal(rms_norm(x.view(2, 3, 48), weight, EPS), rms_norm(x, weight, EPS).view(2, 3, 48))
    normed, total = add_rms_norm(x.view(3, 2, 48), residual.view(3, 2, 48), weight, EPS)
    assert normed.shape == total.shape == (3, 2, 48)


def test_squares_past_the_range_of_float16():
    x = torch.full((1, 100), 3e4, dtype=torch.float16)
    assert_close(rms_norm(x, torch.ones(100, dtype=torch.float16), EPS), torch.ones(1, 100))


def test_no_rows():
    x, residual, weight = random_inputs(0, 32, torch.float32)
    assert rms_norm(x, weight, EPS).shape == (0, 32)
    assert add_rms_norm(x, residual, weight, EPS)[1].shape == (0, 32)


def test_reference_is_the_formula():
    x, _, weight = random_inputs(5, 77, torch.float64)
    expected = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
    torch.testing.assert_close(rms_norm_reference(x, weight, EPS), expected)


@pytest.mark.parametrize(
    ("shape", "hidden", "found"),
    [((4, 32), 64, r"\(4, 32\)"), ((1, MAX_HIDDEN + 1), MAX_HIDDEN + 1, "hidden at most 32768")],
)
def test_refuses_sizes(shape, hidden, found):
    with pytest.raises(ValueError, match=found):
        rms_norm(torch.zeros(shape), torch.zeros(hidden), EPS)


def test_refuses_strides():
    with pytest.raises(ValueError, match=r"strides \(1, 4\)"):
        rms_norm(torch.zeros(32, 4).T, torch.zeros(32), EPS)
    with pytest.raises(ValueError, match="expected contiguous rows"):
        rms_norm(torch.zeros(2, 6, 32)[:, ::2], torch.zeros(32), EPS)


def test_refuses_another_residual():
    x = torch.zeros(4, 32)
    for residual in (torch.zeros(3, 32), torch.zeros(4, 32, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=r"residual is .*expected torch.float32 \(4, 32\)"):
            add_rms_norm(x, residual, torch.zeros(32), EPS)
