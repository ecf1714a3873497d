"""What a checkpoint is to the code that fills a model: named tensors, read one at a time. One class per file format."""

import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch


class TensorInfo(NamedTuple):
    """One tensor as the checkpoint's headers describe it, before any of its data is read."""

    file: str
    """Name of the file that holds it, without directories."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint(Protocol):
    """A readable checkpoint."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name, in the order in which reading them is cheapest: file by file, by rising offset."""

    def read(self, name: str) -> torch.Tensor:
        """The tensor on the CPU, with the shape and dtype that `tensors` gives for it.

        The caller drops it before it reads the next one, so that a memory-mapped file need not stay mapped.

        Raises:
            CheckpointError: the data cannot be read.
        """
