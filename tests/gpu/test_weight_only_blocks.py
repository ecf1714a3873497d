"""Products with weights in blocks of GGUF on a GPU, in the shapes of real models."""

import pytest
import torch

from kernels.weight_only_blocks import MAX_ROWS, weight_only_blocks
from tests.gguf_blocks import KINDS, random_blocks, split_blocks
from tests.gpu import captured, needs_cuda
from tests.kernels.test_weight_only_blocks import HALVES, check_product

pytestmark = needs_cuda
SIZES = [(6144, 4096), (1024, 3072), (2560, 9728), (4096, 4128)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_rows", [1, 7, 16, 17, 33, MAX_ROWS, MAX_ROWS + 1])
@pytest.mark.parametrize(("channels", "inner"), SIZES)
def test_layers(num_rows, channels, inner, kind):
    check_product(kind, num_rows, channels, inner, torch.bfloat16, has_bias=False, device="cuda")
    check_product(kind, num_rows, channels, inner, torch.bfloat16, padding=8, device="cuda")


@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(kind):
    for dtype in HALVES:
        check_product(kind, 20, 4096, 4096, dtype, device="cuda")


@pytest.mark.parametrize("kind", KINDS)
def test_in_a_graph(kind):
    weight, scale = (tensor.cuda() for tensor in split_blocks(random_blocks(kind, 4096, 4096)))
    x = torch.randn(5, 4096, dtype=torch.bfloat16, device="cuda")
    graph, y = captured(lambda: weight_only_blocks(x, weight, scale))
    x.copy_(torch.randn_like(x))
    for _ in range(3):
        graph.replay()
    assert torch.equal(y, weight_only_blocks(x, weight, scale))
