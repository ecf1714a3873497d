"""GGUF files in parts: `name-00001-of-00003.gguf` and so on. Each has a header, the first one all that is said of the
model; tensors lie in any of them."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from engine.errors import CheckpointError
from engine.weights.gguf_file import GgufFile
from engine.weights.messages import shown

GGUF_NAME = "model.gguf"
"""Name of the file, or a link to it, in a checkpoint folder; parts are called `model-00001-of-00003.gguf` and so on."""
_PART = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf")


class GgufName(NamedTuple):
    """What the name of a file says. A file that is no part is the only one."""

    whole: str
    """The name that all parts together would have."""
    number: int
    num_parts: int

    @classmethod
    def of(cls, name: str) -> "GgufName":
        found = _PART.fullmatch(name)
        if found is None:
            return cls(name, 1, 1)
        return cls(f"{found['stem']}.gguf", int(found["number"]), int(found["count"]))


def part_name(whole: str, number: int, count: int) -> str:
    """The name of a part, or of the only file."""
    return whole if count == 1 else f"{whole.removesuffix('.gguf')}-{number:05}-of-{count:05}.gguf"


def group_parts(names: Iterable[str]) -> dict[str, list[str]]:
    """Names of GGUF files that are one model each, the first part first, by the name they would have as one file."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(GgufName.of(name).whole, []).append(name)
    return groups


def gguf_in(folder: Path) -> Path | None:
    """The file that a checkpoint folder has its weights in, or the first of its parts."""
    whole = folder / GGUF_NAME
    if whole.exists():
        return whole
    return next(folder.glob("model-00001-of-?????.gguf"), None)


def part_paths(path: Path) -> list[Path]:
    """All files of the model that `path`, or what it is a link to, is a part of.

    Raises:
        CheckpointError: one is missing.
    """
    # A hub's cache has links by which files are called so; a user may have a link by a name of his own to a part.
    if _PART.fullmatch(path.name) is None:
        path = path.resolve()
    whole, own_number, count = GgufName.of(path.name)
    if not 1 <= own_number <= count:
        raise CheckpointError(f"{path}: is part {own_number} of {count} by its name: download it again")
    if count == 1:
        return [path]
    paths = []
    for number in range(1, count + 1):
        part = path.with_name(part_name(whole, number, count))
        if not part.is_file():
            raise CheckpointError(f"{part}: is missing, expected beside {shown(path.name)}: download all {count} parts")
        paths.append(part)
    return paths


def read_parts(path: Path) -> list[GgufFile]:
    """The headers of all files of a model, the one with the metadata first.

    Args:
        path: of any part, or of the one file.

    Raises:
        CheckpointError: a part is missing or damaged, or they do not belong together.
    """
    files = [GgufFile(part) for part in part_paths(path)]
    places: dict[str, Path] = {}
    for index, file in enumerate(files):
        _check_part(file, index, len(files))
        for name in file.tensors:
            if name in places:
                raise CheckpointError(
                    f"{file.path}: has tensor {shown(name)}, as {places[name].name} has: not parts of one model"
                )
            places[name] = file.path
    claimed = files[0].metadata.get("split.tensors.count", len(places))
    if claimed != len(places):
        raise CheckpointError(
            f"{files[0].path}: split.tensors.count is {shown(repr(claimed))}, its {len(files)} parts have "
            f"{len(places)} tensors: not parts of one model; download all of them again"
        )
    return files


def _check_part(file: GgufFile, index: int, count: int) -> None:
    """Raise CheckpointError unless a file is, by its metadata, what its name says."""
    for key, expected in (("split.no", index), ("split.count", count)):
        found = file.metadata.get(key, expected if count == 1 else None)
        # Whoever splits a model into one part writes 1, or, as some do, nothing is split: 0.
        if found != expected and not (count == 1 and found == 0):
            raise CheckpointError(
                f"{file.path}: {key} is {shown(repr(found))}, expected {expected} by its name: parts of a model are "
                "called name-00001-of-00003.gguf and so on, as they were made"
            )
