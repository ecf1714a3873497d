"""Products with narrow weights on a GPU, in the shapes of real models."""

import pytest
import torch

from kernels.quantize_weights import quantize_fp8_per_channel
from kernels.weight_only_mm import MAX_ROWS, weight_only_mm
from tests.gpu import captured, needs_cuda
from tests.gpu.test_scaled_mm_fp8 import HAS_FP8, needs_fp8
from tests.kernels import padded_rows
from tests.kernels.test_weight_only_mm import FORMATS, HALVES, check_product, random_inputs
from tests.kernels.test_widen_weights import QUANTIZERS, check_widen

pytestmark = needs_cuda
WEIGHTS = [pytest.param(name, marks=needs_fp8 if name == "fp8" else ()) for name in FORMATS]
SIZES = [(6144, 4096), (1024, 3072), (2560, 9728), (4096, 4224), (151_936, 1024)]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("num_rows", [1, 7, 16, 17, 33, MAX_ROWS])
@pytest.mark.parametrize(("channels", "inner"), SIZES)
def test_layers(num_rows, channels, inner, weights):
    x, quantized, scale, bias = random_inputs(num_rows, channels, inner, weights, torch.bfloat16, "cuda")
    check_product(x, quantized, scale, None)
    check_product(padded_rows(x, 8), quantized, scale, bias)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_dtypes(weights, dtype):
    for num_rows in (3, 20, 50):
        check_product(*random_inputs(num_rows, 4096, 4096, weights, dtype, "cuda"))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_same_every_time(weights):
    """Parts of a tile are added in one order, whichever program is last."""
    x, quantized, scale, bias = random_inputs(8, 1024, 8192, weights, torch.bfloat16, "cuda")
    first = weight_only_mm(x, quantized, scale, bias)
    assert all(torch.equal(first, weight_only_mm(x, quantized, scale, bias)) for _ in range(50))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_in_a_graph(weights):
    x, quantized, scale, bias = random_inputs(5, 4096, 4096, weights, torch.bfloat16, "cuda")
    graph, y = captured(lambda: weight_only_mm(x, quantized, scale, bias))
    x.copy_(torch.randn_like(x))
    for _ in range(3):
        graph.replay()
    assert torch.equal(y, weight_only_mm(x, quantized, scale, bias))


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_fp8 if name == "fp8" else ()) for name in QUANTIZERS])
def test_widened(name):
    for dtype in HALVES:
        check_widen(*QUANTIZERS[name](torch.randn(1000, 4224, device="cuda")), 4224, dtype)


@pytest.mark.skipif(HAS_FP8, reason="has FP8")
def test_refuses_fp8():
    x = torch.ones(2, 256, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(ValueError, match=r"FP8 needs a GPU of compute capability 8.9 or newer"):
        weight_only_mm(x, *quantize_fp8_per_channel(torch.ones(32, 256, device="cuda")))
