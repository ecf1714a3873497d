"""Checkpoints in the safetensors format: `model.safetensors`, or shards and `model.safetensors.index.json`.

A file is: header length (8 bytes, little endian), header (JSON: name -> dtype, shape, data_offsets), data. The headers
are checked here because an error must name the tensor and the numbers, which the library's own messages leave out; the
library checks them again when it maps the file.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open

from engine.errors import CheckpointError
from engine.weights.checkpoint import TensorInfo
from engine.weights.messages import shown

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"

# Room for 250,000 tensors in one file; bounds what a hostile file can make the JSON parser allocate.
_MAX_JSON_BYTES = 32 * 2**20

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class SafetensorsCheckpoint:
    """The safetensors files of one directory, memory-mapped, at most one file at a time.

    Args:
        directory: holds `model.safetensors`, or `model.safetensors.index.json` and the shards it names. Where both
            are there the single file is used.
        single: another name for the single file, which then has no shards.

    Raises:
        CheckpointError: a file is missing, damaged, or not what the index says.
    """

    def __init__(self, directory: Path, single: str = _SINGLE) -> None:
        self._directory = directory
        self._mapped: tuple[str, Any] | None = None
        self.tensors: dict[str, TensorInfo] = {}
        """Every tensor by name, shard by shard and by offset within the shard; from the headers only."""
        if os.path.isfile(directory / single):
            self.tensors.update(_read_header(directory / single))
        elif single != _SINGLE:
            raise CheckpointError(_nothing_found(directory, single))
        elif os.path.isfile(directory / _INDEX):
            self._add_shards(read_index(directory / _INDEX, ".safetensors"))
        else:
            raise CheckpointError(_nothing_found(directory, f"{_SINGLE} or {_INDEX}"))
        self._last_in_file = {info.file: name for name, info in self.tensors.items()}

    @property
    def num_bytes(self) -> int:
        """Bytes of data of all tensors."""
        return sum(info.num_bytes for info in self.tensors.values())

    def read(self, name: str) -> torch.Tensor:
        """A view into the mapped file, on the CPU: a slice of it touches only the pages of that slice.

        The file stays mapped while a view of it lives; the checkpoint itself lets go of it with the last tensor of the
        file, or when a tensor of another file is read.

        Raises:
            CheckpointError: the file was removed or changed since the checkpoint was opened.
        """
        info = self.tensors[name]
        try:
            tensor = self._map(info.file).get_tensor(name)
        except (SafetensorError, OSError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{self._directory / info.file}: no tensor {shown(name)}: {reason}") from error
        if self._last_in_file[info.file] == name:
            self._mapped = None
        if tuple(tensor.shape) != info.shape or tensor.dtype != info.dtype:
            raise CheckpointError(
                f"{self._directory / info.file}: tensor {shown(name)} is now {_described(tensor.shape, tensor.dtype)}, "
                f"but was {_described(info.shape, info.dtype)} when the checkpoint was opened: "
                "do not write to a checkpoint while it is loaded"
            )
        return tensor

    def _map(self, file: str) -> Any:
        if self._mapped is None or self._mapped[0] != file:
            self._mapped = None
            self._mapped = file, safe_open(self._directory / file, framework="pt", device="cpu")
        return self._mapped[1]

    def _add_shards(self, shard_of: Mapping[str, str]) -> None:
        index = self._directory / _INDEX
        for shard in sorted(set(shard_of.values())):
            if not os.path.isfile(self._directory / shard):
                raise CheckpointError(f"{index}: names shard {shown(shard)}, which is not there: download it again")
            # What the index does not place in this shard is no part of the checkpoint.
            header = _read_header(self._directory / shard)
            self.tensors.update({name: info for name, info in header.items() if shard_of.get(name) == shard})
        for name, shard in shard_of.items():
            if name not in self.tensors:
                raise CheckpointError(
                    f"{index}: places tensor {shown(name)} in {shard}, which does not hold it: "
                    "the files are not of one checkpoint; download them again"
                )


def _nothing_found(directory: Path, expected: str) -> str:
    try:
        found = sorted(entry.name for entry in directory.iterdir())
    except OSError as error:
        return f"{directory}: cannot be read as a checkpoint directory: {error.strerror}"
    some = ", ".join(shown(name) for name in found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
    return f"{directory}: expected {expected}, found {some or 'no files'}"


def _described(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _parse_json(path: Path, data: bytes, what: str) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {what} is not valid JSON ({error}): download the file again") from error


def read_index(path: Path, ending: str) -> dict[str, str]:
    """Tensor name -> name of its shard, a plain file name beside the index, with this ending.

    Raises:
        CheckpointError: there is no usable index.
    """
    try:
        size = path.stat().st_size
        if size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: has {size:,} bytes, expected at most {_MAX_JSON_BYTES:,}")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    index = _parse_json(path, data, "the index")
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: expected an object `weight_map` from tensor names to file names")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_shard_name(shard, ending):
            found = shown(shard) if isinstance(shard, str) else f"a JSON {type(shard).__name__}"
            raise CheckpointError(
                f"{path}: tensor {shown(name)} is placed in {found}, "
                f"expected the name of a {ending} file in the same directory"
            )
    return weight_map


def _read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one file by rising offset; every byte after the header belongs to exactly one of them."""
    header, data_bytes = _read_header_json(path)
    header.pop("__metadata__", None)
    entries = sorted((_parse_entry(path, name, entry) for name, entry in header.items()), key=lambda entry: entry[:2])
    position = 0
    for start, stop, name, _ in entries:
        if stop > data_bytes:
            raise CheckpointError(
                f"{path}: tensor {shown(name)} ends at byte {stop:,} of the data, which has only {data_bytes:,} bytes: "
                "the file is truncated; download it again"
            )
        if start != position:
            raise CheckpointError(
                f"{path}: tensor {shown(name)} starts at byte {start:,} of the data, expected {position:,}: "
                "tensors overlap or leave a gap; download the file again"
            )
        position = stop
    if position != data_bytes:
        raise CheckpointError(
            f"{path}: {data_bytes:,} bytes of data, but its tensors need {position:,}: download the file again"
        )
    return {name: info for _, _, name, info in entries}


def _read_header_json(path: Path) -> tuple[dict[str, Any], int]:
    """The header of one file and the number of bytes after it."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > size - 8:
                claim = f" but its header alone should have {length:,}" if len(prefix) == 8 else ""
                raise CheckpointError(
                    f"{path}: has {size:,} bytes{claim}: truncated or not a safetensors file; download it again"
                )
            if length > _MAX_JSON_BYTES:
                raise CheckpointError(
                    f"{path}: a header of {length:,} bytes, expected at most {_MAX_JSON_BYTES:,}: "
                    "not a safetensors file, or damaged; download it again"
                )
            data = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    header = _parse_json(path, data, "the header")
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is a JSON {type(header).__name__}, expected an object")
    return header, size - 8 - length


def _parse_entry(path: Path, name: str, entry: object) -> tuple[int, int, str, TensorInfo]:
    """Start, stop, name and description of one tensor of the header."""
    where = f"{path}: tensor {shown(name)}"
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        found = shown(dtype) if isinstance(dtype, str) else f"a JSON {type(dtype).__name__}"
        raise CheckpointError(f"{where} has dtype {found}, expected one of {', '.join(_DTYPES)}")
    if not _are_sizes(shape) or math.prod(shape) >= 2**63:
        raise CheckpointError(f"{where} has no usable shape, expected up to 8 sizes: download the file again")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where} has no usable data_offsets, expected [start, stop]: download the file again")
    info = TensorInfo(path.name, tuple(shape), _DTYPES[dtype])
    start, stop = offsets
    if stop - start != info.num_bytes:
        raise CheckpointError(
            f"{where} has {stop - start:,} bytes, expected {info.num_bytes:,} for "
            f"{_described(info.shape, info.dtype)}: download the file again"
        )
    return start, stop, name, info


def _is_shard_name(name: str, ending: str) -> bool:
    return name.endswith(ending) and name.isprintable() and "/" not in name and "\\" not in name


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list) and len(value) <= 8 and all(type(item) is int and 0 <= item < 2**63 for item in value)
    )
