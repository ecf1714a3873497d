"""Random weights of a model's shape, for benchmarks of any size without a checkpoint."""

import torch

from engine.weights.checkpoint import TensorInfo
from engine.weights.placement import whole_shape

STANDARD_DEVIATION = 0.02


class DummyCheckpoint:
    """Stands in for a checkpoint; its tensors are made on the device that they go to, the same ones every time.

    Args:
        model: built on the meta device.
        device: where tensors are made.
        dtype: their type.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._generator = torch.Generator(device).manual_seed(0)
        self.tensors = {
            name: TensorInfo("dummy", whole_shape(model, name, tuple(parameter.shape)), dtype)
            for name, parameter in model.named_parameters()
        }

    def read(self, name: str) -> torch.Tensor:
        """Ones for norms (and other vectors), small normal numbers for matrices."""
        info = self.tensors[name]
        if len(info.shape) == 1:
            return torch.ones(info.shape, dtype=info.dtype, device=self._device)
        values = torch.empty(info.shape, dtype=info.dtype, device=self._device)
        return values.normal_(0.0, STANDARD_DEVIATION, generator=self._generator)
