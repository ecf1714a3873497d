"""The norms on a GPU, in the shapes of real models."""

import pytest
import torch

from kernels.rms_norm import add_rms_norm, rms_norm
from tests.gpu import captured, needs_cuda
from tests.kernels import DTYPES, padded_rows
from tests.kernels.test_rms_norm import EPS, check_add_rms_norm, check_rms_norm, random_inputs

pytestmark = needs_cuda
HIDDEN = (1024, 2048, 2560, 4096, 5120, 16_384)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 17, 1024])
@pytest.mark.parametrize("hidden", HIDDEN)
def test_both_norms(num_rows, hidden, dtype):
    x, residual, weight = random_inputs(num_rows, hidden, dtype, "cuda")
    check_rms_norm(padded_rows(x, 8), weight)
    check_add_rms_norm(x, residual, weight)


@pytest.mark.parametrize("head_dim", [64, 128, 80])
def test_heads(head_dim):
    x, _, weight = random_inputs(1000 * 16 + 1, head_dim, torch.bfloat16, "cuda")
    check_rms_norm(x, weight)


def test_offsets_past_32_bits():
    x = torch.zeros(2**19 + 1, 4096, dtype=torch.bfloat16, device="cuda")
    x[-1] = 1.0
    weight = torch.full((4096,), 0.5, dtype=torch.bfloat16, device="cuda")
    assert (rms_norm(x, weight, EPS)[-1] == 0.5).all()


def test_in_a_graph():
    x, residual, weight = random_inputs(7, 1024, torch.bfloat16, "cuda")
    graph, normed = captured(lambda: add_rms_norm(x, residual, weight, EPS)[0])
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(normed, add_rms_norm(x, residual, weight, EPS)[0])
