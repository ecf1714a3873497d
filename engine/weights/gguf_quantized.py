"""A model with the weights of a GGUF file that stay quantized: Q8_0 and Q4_0 of linear layers and experts."""

import torch
from torch import nn

from engine.weights.checkpoint import Checkpoint
from engine.weights.gguf_checkpoint import GgufCheckpoint
from engine.weights.quantized_checkpoint import Part, QuantizedCheckpoint, quantizable_layers, swap
from engine.weights.quantized_formats import GGUF_BLOCKS, Format


def keep_quantized(
    model: nn.Module, checkpoint: GgufCheckpoint, device: torch.device, dtype: torch.dtype
) -> Checkpoint:
    """Swap linear layers for ones that take the file's blocks as they are, and get the checkpoint that fills the model.

    All else is dequantized: embeddings, the output projection, other types, layers that are computed at once and lie in
    several types, shares of ranks that are no whole blocks; and all of a float32 model on a GPU, where
    blocks are not multiplied with float32.

    Args:
        model: built on the meta device.
        checkpoint: weights that stay quantized are read as blocks afterwards.
        device: where the model will run.
        dtype: the model's.
    """
    if device.type == "cuda" and dtype == torch.float32:
        return checkpoint
    parts: dict[Part, Format] = {}
    for path, layer, found in quantizable_layers(model, checkpoint.tensors):
        formats = {_format(checkpoint, part) for part in found}
        stored = formats.pop()
        if formats or stored is None:
            continue
        try:
            swap(model, path, layer, found, stored)
        except ValueError:  # shares of ranks that are no whole blocks
            continue
        parts |= dict.fromkeys(found, stored)
        for part in found:
            checkpoint.keep_quantized(f"{part.name}.weight")
    return QuantizedCheckpoint(checkpoint, parts, "GGUF", device)


def _format(checkpoint: GgufCheckpoint, part: Part) -> Format | None:
    """The format of a weight that can stay as it is. What is missing or misshapen is left to those who load weights."""
    name = f"{part.name}.weight"
    info = checkpoint.tensors.get(name)
    if info is None or info.shape != (part.out_features, part.inputs.whole):
        return None
    return GGUF_BLOCKS.get(checkpoint.type_of(name))
