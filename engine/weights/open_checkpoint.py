"""Which format a checkpoint folder has."""

from pathlib import Path

import torch

from engine.weights.checkpoint import Checkpoint
from engine.weights.gguf_checkpoint import GgufCheckpoint
from engine.weights.gguf_parts import gguf_in
from engine.weights.safetensors_checkpoint import SafetensorsCheckpoint
from engine.weights.torch_checkpoint import TorchCheckpoint, has_torch_files


def open_checkpoint(folder: Path, dtype: torch.dtype) -> Checkpoint:
    """The weights in a folder: safetensors, or else GGUF, or else files of torch.save.

    Args:
        folder: as `resolve_model` returns it.
        dtype: the model's.

    Raises:
        CheckpointError: there are none, or they cannot be used.
    """
    gguf = gguf_in(folder)
    if gguf is not None:
        return GgufCheckpoint(gguf, dtype)
    if has_torch_files(folder) and not any(folder.glob("*.safetensors")):
        return TorchCheckpoint(folder)
    return SafetensorsCheckpoint(folder)
