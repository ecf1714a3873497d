"""Weights in a GGUF file, dequantized as they are read."""

import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.errors import CheckpointError
from engine.weights.checkpoint import TensorInfo
from engine.weights.gguf_file import GgufFile, GgufTensor
from engine.weights.messages import shown

GGUF_NAME = "model.gguf"
"""Name of the file, or a link to it, in a checkpoint folder."""
CHUNK_ELEMENTS = 2**20
"""Weights dequantized at a time: bounds the memory that takes, and keeps it in the caches."""

_TOP_LEVEL = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
"""Types that need no dequantizing."""


class GgufCheckpoint:
    """The tensors of a GGUF file under the names that Hugging Face gives them.

    Args:
        path: the file.
        dtype: what quantized tensors are read as.

    Raises:
        CheckpointError: the file is damaged, or has a tensor of an unknown name or type.
    """

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        self._path = path
        self._dtype = dtype
        file = GgufFile(path)
        self._data = np.memmap(path, dtype=np.uint8, mode="c")  # torch has no read-only tensors
        self._found: dict[str, GgufTensor] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for gguf_name, tensor in file.tensors.items():
            name = _name(path, gguf_name)
            self._check(gguf_name, tensor, file.num_bytes)
            self._found[name] = tensor
            self.tensors[name] = TensorInfo(path.name, tensor.shape, _PLAIN.get(tensor.type_id, dtype))

    def read(self, name: str) -> torch.Tensor:
        """The tensor on the CPU; plain types as a view into the mapped file."""
        tensor = self._found[name]
        raw = self._data[tensor.offset : tensor.offset + _num_bytes(tensor)]
        plain = _PLAIN.get(tensor.type_id)
        if plain is not None:
            return torch.from_numpy(raw).view(plain).view(tensor.shape)
        values = torch.empty(math.prod(tensor.shape), dtype=self._dtype)
        block_elements, block_bytes = _block(tensor.type_id)
        blocks = raw.reshape(-1, block_bytes)
        per_chunk = max(1, CHUNK_ELEMENTS // block_elements)
        for first in range(0, len(blocks), per_chunk):
            chunk = _dequantize(blocks[first : first + per_chunk], tensor.type_id)
            start = first * block_elements
            values[start : start + chunk.size] = torch.from_numpy(chunk.reshape(-1))
        return values.view(tensor.shape)

    def _check(self, name: str, tensor: GgufTensor, num_bytes: int) -> None:
        try:
            elements, _ = _block(tensor.type_id)
        except ValueError:
            raise CheckpointError(
                f"{self._path}: tensor {shown(name)} has type {tensor.type_id}, which cannot be dequantized"
            ) from None
        if tensor.shape[-1] % elements:
            raise CheckpointError(
                f"{self._path}: tensor {shown(name)} has rows of {tensor.shape[-1]} weights, expected a multiple of "
                f"{elements} for its type"
            )
        if tensor.type_id in _PLAIN and tensor.offset % 4:
            raise CheckpointError(f"{self._path}: tensor {shown(name)} begins at byte {tensor.offset:,}: not aligned")
        end = tensor.offset + _num_bytes(tensor)
        if end > num_bytes:
            raise CheckpointError(
                f"{self._path}: tensor {shown(name)} ends at byte {end:,}, the file has {num_bytes:,}: truncated; "
                "download it again"
            )


def _name(path: Path, gguf_name: str) -> str:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`."""
    parts = gguf_name.split(".")
    if len(parts) == 2 and parts[0] in _TOP_LEVEL:
        return f"{_TOP_LEVEL[parts[0]]}.{parts[1]}"
    if len(parts) == 4 and parts[0] == "blk" and parts[1].isdecimal() and parts[2] in _IN_LAYER:
        return f"model.layers.{int(parts[1])}.{_IN_LAYER[parts[2]]}.{parts[3]}"
    raise CheckpointError(f"{path}: tensor {shown(gguf_name)} has no place in a Qwen3 model")


@cache
def _block(type_id: int) -> tuple[int, int]:
    """Weights and bytes of a block of a ggml type. Raises ValueError for a type that cannot be dequantized."""
    library = _library()
    type_ = library.GGMLQuantizationType(type_id)
    elements, num_bytes = library.GGML_QUANT_SIZES[type_]
    if type_id not in _PLAIN:
        try:
            library.quants.dequantize(np.zeros((1, num_bytes), dtype=np.uint8), type_)
        except NotImplementedError as error:
            raise ValueError(str(error)) from None
    return int(elements), int(num_bytes)


def _num_bytes(tensor: GgufTensor) -> int:
    elements, num_bytes = _block(tensor.type_id)
    return math.prod(tensor.shape) // elements * num_bytes


def _dequantize(blocks: np.ndarray, type_id: int) -> np.ndarray:
    """Blocks, uint8 [n, bytes] → float32 [n, weights]."""
    library = _library()
    return library.quants.dequantize(blocks, library.GGMLQuantizationType(type_id))


def _library() -> Any:
    try:
        import gguf
        import gguf.quants
    except ModuleNotFoundError:
        raise CheckpointError("a GGUF file needs the package gguf, which is not installed: pip install gguf") from None
    return gguf
