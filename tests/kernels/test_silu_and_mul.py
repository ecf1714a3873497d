"""The gate of the MLP under the interpreter, against its reference in float32."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.silu_and_mul import silu_and_mul, silu_and_mul_reference
from tests.kernels import DTYPES, assert_close, interpreted, padded_rows, poisoned_memory


def check(gate_up):
    with poisoned_memory():
        output = silu_and_mul(gate_up)
    assert output.dtype == gate_up.dtype and output.is_contiguous()
    assert_close(output, silu_and_mul_reference(gate_up.float()))


@interpreted
@given(
    num_rows=st.integers(1, 7),
    size=st.integers(1, 700) | st.sampled_from([768, 1024, 1536, 3072]),
    dtype=st.sampled_from(DTYPES),
    padding=st.integers(0, 9),
)
def test_any_shape(num_rows, size, dtype, padding):
    torch.manual_seed(size)
    check(padded_rows(torch.randn(num_rows, 2 * size).mul(4).to(dtype), padding))


def test_leading_dimensions():
    gate_up = torch.randn(2, 3, 40)
    assert torch.equal(silu_and_mul(gate_up), silu_and_mul(gate_up.view(6, 40)).view(2, 3, 20))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's numpy; the limit is right
def test_extremes():
    gate = torch.tensor([-1e4, -90.0, -0.0, 0.0, 90.0, 1e4])
    check(torch.cat((gate, torch.full((6,), 2.0))).unsqueeze(0))


def test_no_rows():
    assert silu_and_mul(torch.zeros(0, 64)).shape == (0, 32)


def test_reference_is_the_formula():
    gate_up = torch.randn(3, 50, dtype=torch.float64)
    gate, up = gate_up[:, :25], gate_up[:, 25:]
    torch.testing.assert_close(silu_and_mul_reference(gate_up), gate / (1 + torch.exp(-gate)) * up)


@pytest.mark.parametrize("gate_up", [torch.zeros(2, 5), torch.zeros(8, 2).T, torch.zeros(2, 4, 8)[:, ::2]])
def test_refuses(gate_up):
    with pytest.raises(ValueError, match="expected an even last dimension and contiguous rows"):
        silu_and_mul(gate_up)
