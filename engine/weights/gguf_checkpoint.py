"""Weights in GGUF files, dequantized as they are read unless they are to stay quantized."""

import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from engine.errors import CheckpointError
from engine.weights.checkpoint import TensorInfo
from engine.weights.gguf_file import MAX_TENSORS, GgufFile, GgufTensor
from engine.weights.gguf_parts import read_parts
from engine.weights.messages import shown

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
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
"""Tensors that hold a matrix of every expert."""
MAX_EXPERTS = 1024
_UNUSED = ("rope_freqs.weight",)
"""What it says is in config.json: see gguf_folder."""
_PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
"""Types that need no dequantizing."""


class _Found(NamedTuple):
    """A tensor and the file that holds it."""

    path: Path
    data: np.ndarray
    """All of the file, mapped."""
    tensor: GgufTensor


class GgufCheckpoint:
    """The tensors of a GGUF file, or of all its parts, under the names that Hugging Face gives them.

    Args:
        path: the file, or any of its parts.
        dtype: what quantized tensors are read as.

    Raises:
        CheckpointError: a file is missing or damaged, or has a tensor of an unknown name or type.
    """

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._found: dict[str, _Found] = {}
        self.tensors: dict[str, TensorInfo] = {}
        files = read_parts(path)
        self._heads = _interleaved_heads(files[0])
        for file in files:
            data = np.memmap(file.path, dtype=np.uint8, mode="c")  # torch has no read-only tensors
            for gguf_name, tensor in file.tensors.items():
                if gguf_name in _UNUSED:
                    continue
                _check(file, gguf_name, tensor)
                for name, part in _by_name(file.path, gguf_name, tensor):
                    self._found[name] = _Found(file.path, data, part)
                    self.tensors[name] = TensorInfo(file.path.name, part.shape, _PLAIN.get(part.type_id, dtype))
                if len(self.tensors) > MAX_TENSORS:
                    raise CheckpointError(
                        f"{file.path}: has more than {MAX_TENSORS:,} tensors, those of each expert counted: damaged"
                    )

    def type_of(self, name: str) -> int:
        """ggml's number of the type that a tensor has in the file."""
        return self._found[name].tensor.type_id

    def keep_quantized(self, name: str) -> None:
        """From now on the matrix is, and is read as, the file's own blocks: uint8 [rows, blocks, bytes of a block]."""
        path, _, tensor = self._found[name]
        elements, num_bytes = _block(tensor.type_id)
        rows, columns = tensor.shape
        self.tensors[name] = TensorInfo(path.name, (rows, columns // elements, num_bytes), torch.uint8)

    def read(self, name: str) -> torch.Tensor:
        """The tensor on the CPU; plain types, and what stays quantized, as a view into the mapped file."""
        path, data, tensor = self._found[name]
        values = self._read(data, tensor, self.tensors[name])
        num_heads = self._heads.get(name.rpartition(".")[0].rpartition(".")[2])
        if num_heads is None:
            return values
        if len(values) % (2 * num_heads):
            raise CheckpointError(
                f"{path}: tensor {shown(name)} has {len(values)} rows, expected a multiple of {2 * num_heads}"
            )
        # Pairs that are rotated together are neighbours there; here, one is half a head after the other.
        return values.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)

    def _read(self, data: np.ndarray, tensor: GgufTensor, info: TensorInfo) -> torch.Tensor:
        raw = data[tensor.offset : tensor.offset + _num_bytes(tensor)]
        if info.dtype == torch.uint8:
            return torch.from_numpy(raw).view(info.shape)
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


def _check(file: GgufFile, name: str, tensor: GgufTensor) -> None:
    """Raise CheckpointError for a tensor whose data cannot be read."""
    try:
        elements, _ = _block(tensor.type_id)
    except ValueError:
        raise CheckpointError(
            f"{file.path}: tensor {shown(name)} has type {tensor.type_id}, which cannot be dequantized"
        ) from None
    if tensor.shape[-1] % elements:
        raise CheckpointError(
            f"{file.path}: tensor {shown(name)} has rows of {tensor.shape[-1]} weights, expected a multiple of "
            f"{elements} for its type"
        )
    if tensor.type_id in _PLAIN and tensor.offset % 4:
        raise CheckpointError(f"{file.path}: tensor {shown(name)} begins at byte {tensor.offset:,}: not aligned")
    end = tensor.offset + _num_bytes(tensor)
    if end > file.num_bytes:
        raise CheckpointError(
            f"{file.path}: tensor {shown(name)} ends at byte {end:,}, the file has {file.num_bytes:,}: truncated; "
            "download it again"
        )


def _interleaved_heads(file: GgufFile) -> dict[str, int]:
    """Heads of the projections whose rows the file has in another order: those of Llama."""
    if file.metadata.get("general.architecture") != "llama":
        return {}
    num_heads = file.metadata.get("llama.attention.head_count")
    num_kv_heads = file.metadata.get("llama.attention.head_count_kv", num_heads)
    if not (isinstance(num_heads, int) and isinstance(num_kv_heads, int) and num_heads > 0 and num_kv_heads > 0):
        raise CheckpointError(f"{file.path}: llama.attention.head_count is missing or no number of heads")
    return {"q_proj": num_heads, "k_proj": num_kv_heads}


def _by_name(path: Path, gguf_name: str, tensor: GgufTensor) -> Iterator[tuple[str, GgufTensor]]:
    """A tensor under its name, or the matrices of experts that lie in it, each under its own."""
    parts = gguf_name.split(".")
    if not (len(parts) == 4 and parts[0] == "blk" and parts[1].isdecimal() and parts[2] in _EXPERTS):
        yield _name(path, gguf_name), tensor
        return
    if len(tensor.shape) != 3 or not 1 <= tensor.shape[0] <= MAX_EXPERTS:
        raise CheckpointError(
            f"{path}: tensor {shown(gguf_name)} has shape {list(tensor.shape)}, expected [experts, outputs, inputs] of "
            f"at most {MAX_EXPERTS} experts"
        )
    one = tensor._replace(shape=tensor.shape[1:])
    for expert in range(tensor.shape[0]):
        name = f"model.layers.{int(parts[1])}.mlp.experts.{expert}.{_EXPERTS[parts[2]]}.{parts[3]}"
        yield name, one._replace(offset=tensor.offset + expert * _num_bytes(one))


def _name(path: Path, gguf_name: str) -> str:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`."""
    parts = gguf_name.split(".")
    if len(parts) == 2 and parts[0] in _TOP_LEVEL:
        return f"{_TOP_LEVEL[parts[0]]}.{parts[1]}"
    if len(parts) == 4 and parts[0] == "blk" and parts[1].isdecimal() and parts[2] in _IN_LAYER:
        return f"model.layers.{int(parts[1])}.{_IN_LAYER[parts[2]]}.{parts[3]}"
    raise CheckpointError(f"{path}: tensor {shown(gguf_name)} has no place in a model of a supported architecture")


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
