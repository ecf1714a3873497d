"""The gate of the MLP on a GPU, in the shapes of real models."""

import pytest
import torch

from kernels.silu_and_mul import silu_and_mul
from tests.gpu import captured, needs_cuda
from tests.kernels import DTYPES, padded_rows
from tests.kernels.test_silu_and_mul import check

pytestmark = needs_cuda


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 17, 1024])
@pytest.mark.parametrize("size", [768, 3072, 6144, 9728, 12_288, 17_408, 25_600, 1001])
def test_shapes_of_models(num_rows, size, dtype):
    torch.manual_seed(size)
    gate_up = torch.randn(num_rows, 2 * size, device="cuda").mul(4).to(dtype)
    check(gate_up)
    check(padded_rows(gate_up, 8))


def test_offsets_past_32_bits():
    gate_up = torch.zeros(2**17 + 1, 2 * 8192, dtype=torch.bfloat16, device="cuda")
    gate_up[-1] = 50.0
    assert (silu_and_mul(gate_up)[-1] == 2500.0 - 4.0).all()  # 2500 as bfloat16


def test_in_a_graph():
    gate_up = torch.randn(5, 2 * 3072, device="cuda")
    graph, output = captured(lambda: silu_and_mul(gate_up))
    gate_up.copy_(torch.randn_like(gate_up))
    graph.replay()
    assert torch.equal(output, silu_and_mul(gate_up))
