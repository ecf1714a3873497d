"""The GGUF format: metadata and named, mostly quantized tensors in one file.

A file is: magic, version, number of tensors, number of metadata entries; the entries (key, type, value); for each
tensor name, sizes, type and offset; padding; data. Numbers are little endian. All of it is checked here, before any
data is read, so that no length in a damaged file makes us read, loop or allocate beyond the file, nor, where that is
large, beyond what a header may have.
"""

import math
import mmap
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.errors import CheckpointError
from engine.weights.messages import shown

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
MAX_HEADER_BYTES = 2**26
"""Room for the tokens and merges of a vocabulary of a million."""
MAX_TENSORS = 2**18
"""Matrices of experts counted one by one: some 36,000 in Qwen3-235B-A22B."""

_NUMBERS = dict(enumerate("BbHhIif", start=0)) | {10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_MIN_STRING_BYTES = 8
_MIN_ENTRY_BYTES = 8 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 4 + 4 + 8


class GgufTensor(NamedTuple):
    """A tensor as the file describes it."""

    type_id: int
    """Of ggml, such as 8 for Q8_0."""
    shape: tuple[int, ...]
    """As torch orders sizes: the last one is contiguous."""
    offset: int
    """Of its data in the file, in bytes."""


class GgufFile:
    """The header of a file.

    Args:
        path: the file.

    Raises:
        CheckpointError: it cannot be read, or is no GGUF file, or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.num_bytes = os.fstat(file.fileno()).st_size
                if self.num_bytes < 24:
                    raise CheckpointError(f"{path}: has {self.num_bytes} bytes, too few for a GGUF file")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    self._read(_Cursor(path, data))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error

    def _read(self, cursor: "_Cursor") -> None:
        magic = cursor.bytes(4)
        if magic != MAGIC:
            raise CheckpointError(f"{self.path}: begins with {magic!r}, expected {MAGIC!r}: not a GGUF file")
        version = cursor.number("I")
        if version not in VERSIONS:
            raise CheckpointError(f"{self.path}: is GGUF version {version}, expected one of {VERSIONS}")
        num_tensors = cursor.count("Q", "tensors", _MIN_TENSOR_BYTES)
        if num_tensors > MAX_TENSORS:
            raise CheckpointError(f"{self.path}: claims {num_tensors:,} tensors, expected at most {MAX_TENSORS:,}")
        num_entries = cursor.count("Q", "metadata entries", _MIN_ENTRY_BYTES)
        self.metadata: dict[str, Any] = {}
        for _ in range(num_entries):
            key = cursor.string()
            self.metadata[key] = cursor.value(cursor.number("I"), key)
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 1 <= alignment <= 2**16:
            raise CheckpointError(f"{self.path}: general.alignment is {alignment!r}, expected 1 to 65536")
        found = [self._tensor(cursor) for _ in range(num_tensors)]
        start = -(-cursor.position // alignment) * alignment
        self.tensors: dict[str, GgufTensor] = {}
        """By name, in the order of the file."""
        for name, type_id, shape, offset in sorted(found, key=lambda tensor: tensor[3]):
            self.tensors[name] = GgufTensor(type_id, shape, start + offset)
        if len(self.tensors) != len(found):
            raise CheckpointError(f"{self.path}: two tensors have one name: download the file again")

    def _tensor(self, cursor: "_Cursor") -> tuple[str, int, tuple[int, ...], int]:
        name = cursor.string()
        num_dimensions = cursor.number("I")
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise CheckpointError(
                f"{self.path}: tensor {shown(name)} has {num_dimensions} dimensions, expected 1 to {MAX_DIMENSIONS}"
            )
        shape = tuple(reversed([cursor.number("Q") for _ in range(num_dimensions)]))
        # A weight takes at least a bit.
        if not 1 <= math.prod(shape) <= 8 * self.num_bytes:
            raise CheckpointError(
                f"{self.path}: tensor {shown(name)} has shape {list(shape)}, more than a file of "
                f"{self.num_bytes:,} bytes can hold: download it again"
            )
        return name, cursor.number("I"), shape, cursor.number("Q")


class _Cursor:
    """Reads values one after the other."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.position = 0
        self._path = path
        self._data = data
        self._end = min(len(data), MAX_HEADER_BYTES)

    def bytes(self, length: int) -> bytes:
        end = self.position + length
        if end > self._end:
            raise CheckpointError(
                f"{self._path}: the header needs byte {end:,}, expected it to end by byte {self._end:,}: truncated or "
                "damaged; download it again"
            )
        found = self._data[self.position : end]
        self.position = end
        return found

    def number(self, code: str) -> Any:
        """A number, by its letter in `struct`."""
        return struct.unpack(f"<{code}", self.bytes(struct.calcsize(f"<{code}")))[0]

    def count(self, code: str, what: str, min_bytes: int) -> int:
        """How many of something follow, each at least so many bytes long."""
        count = int(self.number(code))
        if count * min_bytes > self._end - self.position:
            raise CheckpointError(
                f"{self._path}: claims {count:,} {what}, more than fit into the header, which ends by byte "
                f"{self._end:,}: damaged; download it again"
            )
        return count

    def string(self) -> str:
        raw = self.bytes(self.count("Q", "bytes of text", 1))
        # Tokens are bytes spelled as characters, so what is no UTF-8 is damage; it shows where the text is used.
        return raw.decode("utf-8", "replace")

    def value(self, type_id: int, key: str, in_array: bool = False) -> Any:
        """A metadata value of this type."""
        if type_id in _NUMBERS:
            return self.number(_NUMBERS[type_id])
        if type_id == _BOOL:
            return self.number("B") != 0
        if type_id == _STRING:
            return self.string()
        if type_id == _ARRAY and not in_array:
            return self._array(key)
        raise CheckpointError(f"{self._path}: {shown(key)} has value type {type_id}, which is not known")

    def _array(self, key: str) -> list[Any] | np.ndarray:
        """Numbers as an array, which takes no more memory than they do in the file; others as a list."""
        item_type = self.number("I")
        code = _NUMBERS.get(item_type)
        if code is None:
            count = self.count("Q", f"items of {shown(key)}", _MIN_STRING_BYTES if item_type == _STRING else 1)
            return [self.value(item_type, key, in_array=True) for _ in range(count)]
        size = struct.calcsize(f"<{code}")
        count = self.count("Q", f"items of {shown(key)}", size)
        return np.frombuffer(self.bytes(count * size), dtype=f"<{code}")
