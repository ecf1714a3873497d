"""What the metadata of a GGUF file says, checked as it is asked for."""

from typing import Any

import numpy as np

from engine.errors import CheckpointError
from engine.weights.gguf_file import GgufFile
from engine.weights.messages import shown


class GgufMetadata:
    """The metadata of a file, by key and kind of value. Everything here raises CheckpointError for another kind."""

    def __init__(self, file: GgufFile) -> None:
        self.path = file.path
        self._values = file.metadata

    def find(self, key: str, kind: type) -> Any:
        """The value, or None if there is none."""
        value = self._values.get(key)
        if value is None or (type(value) is kind):
            return value
        raise CheckpointError(f"{self.path}: {key} is {shown(repr(value))}, expected a {kind.__name__}")

    def get(self, key: str, kind: type) -> Any:
        """The value, which must be there."""
        value = self.find(key, kind)
        if value is None:
            raise CheckpointError(f"{self.path}: has no {key}: not a file with a language model, or damaged")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of texts, which must be there."""
        values: list[str] = self.get(key, list)
        if not all(isinstance(value, str) for value in values):
            raise CheckpointError(f"{self.path}: {key} is {shown(repr(values[:3]))} and so on, expected texts")
        return values

    def numbers(self, key: str) -> np.ndarray:
        """A list of numbers, which must be there."""
        values: np.ndarray = self.get(key, np.ndarray)
        return values
