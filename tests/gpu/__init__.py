"""Tests that need a CUDA device; skipped where there is none. They run apart from tests/kernels, which interprets."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def captured(operation: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A CUDA graph of one operation, and the tensor that each replay writes its result to."""
    operation()  # compile outside of the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = operation()
    return graph, output
