"""FP8 products on a GPU, in the shapes of real models."""

import pytest
import torch

from kernels.scaled_mm_fp8 import SMALL_M, scaled_mm_fp8
from tests.gpu import captured
from tests.kernels import padded_rows
from tests.kernels.test_quantize_fp8 import check_quantize, random_rows
from tests.kernels.test_scaled_mm_fp8 import QUANTIZERS, assert_product, check_product, random_inputs

HAS_FP8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
needs_fp8 = pytest.mark.skipif(not HAS_FP8, reason="needs a CUDA device of compute capability 8.9 or newer")
pytestmark = needs_fp8
MATRIX_UNIT_ERROR = 2.0**-12
"""Hopper adds 128 FP8 products with some 14 bits."""
FAST_ERROR = 2.0**-9
"""And cuBLAS up to 4095 of them, if asked to be fast."""
SIZES = [(6144, 4096), (1024, 3072), (2560, 9728), (4000, 2064)]


@pytest.mark.parametrize("scales", QUANTIZERS)
@pytest.mark.parametrize("num_rows", [1, 7, 16, 17, 33, SMALL_M])
@pytest.mark.parametrize(("channels", "inner"), SIZES)
def test_few_rows(num_rows, channels, inner, scales):
    x, weight, scale, bias = random_inputs(num_rows, channels, inner, scales, torch.bfloat16, "cuda")
    check_product(x, weight, scale, None, MATRIX_UNIT_ERROR)
    check_product(padded_rows(x, 8), weight, scale, bias, MATRIX_UNIT_ERROR)


@pytest.mark.parametrize("num_rows", [SMALL_M + 1, 300, 2048])
@pytest.mark.parametrize(("channels", "inner"), SIZES)
def test_many_rows_with_blocks(num_rows, channels, inner):
    check_product(*random_inputs(num_rows, channels, inner, "blocks", torch.bfloat16, "cuda"), MATRIX_UNIT_ERROR)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_rows", [SMALL_M + 1, 300, 2048])
@pytest.mark.parametrize(("channels", "inner"), SIZES)
def test_many_rows_with_channels(num_rows, channels, inner, dtype):
    x, weight, scale, bias = random_inputs(num_rows, channels, inner, "channels", dtype, "cuda")
    assert_product(scaled_mm_fp8(x, weight, scale, bias), x, weight, scale, bias, FAST_ERROR)


@pytest.mark.parametrize("group_size", [None, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [1024, 2064, 12_288, 25_600])
def test_quantize(width, dtype, group_size):
    check_quantize(padded_rows(random_rows(50, width, dtype, "cuda"), 8), group_size)


@pytest.mark.parametrize("scales", QUANTIZERS)
def test_the_same_every_time(scales):
    """Parts of a tile are added in one order, whichever program is last."""
    x, weight, scale, bias = random_inputs(8, 1024, 8192, scales, torch.bfloat16, "cuda")
    first = scaled_mm_fp8(x, weight, scale, bias)
    assert all(torch.equal(first, scaled_mm_fp8(x, weight, scale, bias)) for _ in range(50))


@pytest.mark.parametrize("scales", QUANTIZERS)
def test_in_a_graph(scales):
    x, weight, scale, bias = random_inputs(5, 4096, 4096, scales, torch.bfloat16, "cuda")
    graph, y = captured(lambda: scaled_mm_fp8(x, weight, scale, bias))
    x.copy_(torch.randn_like(x))
    for _ in range(3):
        graph.replay()
    assert torch.equal(y, scaled_mm_fp8(x, weight, scale, bias))
