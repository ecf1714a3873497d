"""Checkpoints that torch.save wrote: `pytorch_model.bin`, or shards and `pytorch_model.bin.index.json`.

They are read with `weights_only`, so nothing in them is executed, and memory-mapped.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from engine.errors import CheckpointError
from engine.weights.checkpoint import TensorInfo
from engine.weights.messages import shown
from engine.weights.safetensors_checkpoint import read_index

_SINGLE = "pytorch_model.bin"
_INDEX = "pytorch_model.bin.index.json"


def has_torch_files(folder: Path) -> bool:
    """Whether the folder holds such a checkpoint."""
    return (folder / _SINGLE).is_file() or (folder / _INDEX).is_file()


class TorchCheckpoint:
    """The files of one folder, mapped one at a time.

    Raises:
        CheckpointError: a file is missing, damaged, or holds anything but named tensors.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: tuple[str, Mapping[str, Any]] | None = None
        self.tensors: dict[str, TensorInfo] = {}
        if (folder / _SINGLE).is_file():
            self._add(_SINGLE, None)
            return
        shard_of = read_index(folder / _INDEX, ".bin")
        for shard in sorted(set(shard_of.values())):
            self._add(shard, {name for name, file in shard_of.items() if file == shard})

    def read(self, name: str) -> torch.Tensor:
        """A view into the mapped file, on the CPU."""
        info = self.tensors[name]
        tensor: torch.Tensor = self._load(info.file)[name]
        return tensor

    def _add(self, file: str, wanted: set[str] | None) -> None:
        """Take over the tensors of a file: the wanted ones, or all."""
        found = self._load(file)
        for name in found if wanted is None else sorted(wanted):
            tensor = found.get(name)
            if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
                what = "nothing" if tensor is None else f"a {type(tensor).__name__}"
                raise CheckpointError(f"{self._folder / file}: {shown(str(name))} is {what}, expected a tensor")
            self.tensors[name] = TensorInfo(file, tuple(tensor.shape), tensor.dtype)

    def _load(self, file: str) -> Mapping[str, Any]:
        """What is in a file, by name."""
        if self._open is None or self._open[0] != file:
            self._open = None
            path = self._folder / file
            try:
                found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except FileNotFoundError:
                raise CheckpointError(f"{path}: is not there: download it again") from None
            except pickle.UnpicklingError as error:
                raise CheckpointError(f"{path}: refused, as it holds more than tensors: {_first_line(error)}") from None
            except (RuntimeError, ValueError, OSError, EOFError, KeyError, AttributeError, TypeError) as error:
                raise CheckpointError(f"{path}: damaged, or not written by torch.save: {_first_line(error)}") from None
            if not isinstance(found, Mapping):
                raise CheckpointError(f"{path}: holds a {type(found).__name__}, expected named tensors")
            self._open = file, found
        return self._open[1]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
