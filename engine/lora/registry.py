"""The adapters that requests can name: those loaded on purpose, and those found in a folder when first asked for.

What a configuration names is read anew when its files change, so that all replicas come to have the same, whenever each
one started. A request has the old content or the new, never a part of each.
"""

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from engine.config import EngineConfig
from engine.errors import CheckpointError, ConfigError, QueueFullError, RequestError
from engine.lora.adapter import CONFIG, WEIGHTS, Adapter, PartShape, read_adapter
from engine.lora.handle import NAME

logger = logging.getLogger(__name__)

HOST_PER_PLACE = 4
"""So many adapters of the folder are kept in host memory for each place on the device."""
SETTLE_S = 1.0
"""Files that changed less than so long ago may be half of a change: the content known before serves until then."""
MAX_LISTED = 1000
"""Most names that are listed."""


class _Fingerprint(NamedTuple):
    """Changes when an adapter's files do."""

    folder: str
    """Links resolved: another one is another adapter, whatever its files' times."""
    sizes: tuple[int, ...]
    times_ns: tuple[int, ...]
    """When each file was last written."""


@dataclass(slots=True)
class _Entry:
    adapter: Adapter
    fingerprint: _Fingerprint
    is_kept: bool
    """Stays until unloaded, also if nobody uses it."""
    is_fixed: bool
    """Stays as it is, whatever becomes of its files."""


class AdapterRegistry:
    """Safe for threads: reading takes tens of milliseconds, so it is no work for the engine's own.

    Args:
        config: `adapters` are read now, and when they change; `lora_folder` is searched later.
        parts: the model's layers that adapters may change, by their names in checkpoints.
        dtype: of the model's activations.

    Raises:
        CheckpointError: an adapter of the configuration cannot be used.
        ConfigError: `lora_folder` is no folder.
    """

    def __init__(self, config: EngineConfig, parts: Mapping[str, PartShape], dtype: torch.dtype) -> None:
        self._folder = None if config.lora_folder is None else Path(config.lora_folder)
        if self._folder is not None and not self._folder.is_dir():
            raise ConfigError(
                f"lora_folder is {config.lora_folder!r}, expected a folder with a folder for each adapter"
            )
        self._named = {name: Path(path) for name, path in config.adapters.items()}
        self._parts, self._max_rank, self._dtype = parts, config.max_lora_rank, dtype
        self._most = HOST_PER_PLACE * config.max_loras + len(config.adapters)
        self._known: OrderedDict[str, _Entry] = OrderedDict()
        self._versions: dict[str, tuple[_Fingerprint, int]] = {}
        """What each name stood for last, and how often it stood for something else before."""
        self._lock = threading.Lock()
        for name, path in self._named.items():
            _check_name(name)
            self._read(name, path, is_kept=True)

    def find(self, name: str) -> Adapter:
        """The adapter of this name, read from its folder if it is not known yet or has changed there.

        Raises:
            RequestError: there is none, or it cannot be used; `param` is `adapter`.
            QueueFullError: as many adapters as may be in memory are in use.
        """
        with self._lock:
            entry = self._known.get(name)
            if entry is None or not entry.is_fixed:
                folder = self._folder_of(name)
                try:
                    if entry is None or _has_changed(folder, entry.fingerprint):
                        entry = self._read(name, folder, is_kept=name in self._named)
                except CheckpointError as error:
                    logger.error("adapter %s cannot be used: %s", name, error)
                    raise RequestError(f"adapter {name!r} cannot be used: {error}", "adapter") from None
            self._known.move_to_end(name)
            return entry.adapter

    def load(self, name: str, path: str | Path) -> None:
        """Read an adapter and keep it as it is until `unload`.

        Raises:
            CheckpointError: it cannot be used.
            RequestError: the name cannot be, or another adapter has it; `param` is `adapter`.
            QueueFullError: as many adapters as may be in memory are loaded or in use.
        """
        _check_name(name)
        with self._lock:
            if name in self._known and self._known[name].is_kept:
                raise RequestError(f"adapter {name!r} is loaded already, expected another name", "adapter")
            self._read(name, Path(path), is_kept=True, is_fixed=True)

    def unload(self, name: str) -> Adapter:
        """Forget an adapter. One that the configuration names, or that is in the folder, is read when next asked for.

        Raises:
            RequestError: it is not loaded, or requests use it; `param` is `adapter`.
        """
        with self._lock:
            entry = self._known.get(name)
            if entry is None:
                raise RequestError(f"adapter {name[:80]!r} is not loaded", "adapter")
            if entry.adapter.num_requests:
                raise RequestError(
                    f"adapter {name!r} is in use by {entry.adapter.num_requests} requests, expected none: "
                    "unload it when they are done",
                    "adapter",
                )
            del self._known[name]
            return entry.adapter

    def names(self) -> list[str]:
        """Of all adapters that can be asked for, sorted; at most MAX_LISTED."""
        found = {*self._named, *(name for name, entry in list(self._known.items()) if entry.is_kept)}
        if self._folder is not None:
            with os.scandir(self._folder) as entries:
                found.update(each.name for each in entries if NAME.fullmatch(each.name) and _is_adapter(each.path))
        return sorted(found)[:MAX_LISTED]

    def _folder_of(self, name: str) -> Path:
        """Where an adapter is read from on demand. A name cannot lead out of the folder."""
        if name in self._named:
            return self._named[name]
        if self._folder is None or NAME.fullmatch(name) is None or not _is_adapter(self._folder / name):
            raise RequestError(f"adapter {name[:80]!r} does not exist", "adapter")
        return self._folder / name

    def _read(self, name: str, folder: Path, is_kept: bool, is_fixed: bool = False) -> _Entry:
        start = time.perf_counter()
        folder = folder.resolve()  # both files from one folder, also if a link is turned to another meanwhile
        fingerprint = _fingerprint(folder)
        before, version = self._versions.get(name, (fingerprint, 0))
        version += before != fingerprint
        adapter = read_adapter(folder, name, version, self._parts, self._max_rank, self._dtype)
        if _fingerprint(folder) != fingerprint:
            raise CheckpointError(f"{folder}: its files changed while they were read; ask again when they are written")
        self._known.pop(name, None)  # requests that use the old content go on with it
        if len(self._known) >= self._most:
            self._make_room()
        self._versions[name] = fingerprint, version
        self._known[name] = entry = _Entry(adapter, fingerprint, is_kept, is_fixed)
        logger.info("adapter %s is read: %d layers, %.2f s", name, len(adapter.layers), time.perf_counter() - start)
        return entry

    def _make_room(self) -> None:
        """Forget the adapter of the folder that was not asked for for longest."""
        for name, entry in self._known.items():
            if not entry.is_kept and not entry.adapter.num_requests:
                del self._known[name]
                return
        raise QueueFullError(f"{len(self._known)} adapters are in use, as many as max_loras lets be in memory")


def _is_adapter(folder: str | Path) -> bool:
    return os.path.isfile(os.path.join(folder, CONFIG))


def _check_name(name: str) -> None:
    if NAME.fullmatch(name) is None:
        raise RequestError(f"adapter is {name[:80]!r}, expected a name as in {NAME.pattern}", "adapter")


def _fingerprint(folder: Path) -> _Fingerprint:
    folder = folder.resolve()
    found = []
    for name in (CONFIG, WEIGHTS):
        try:
            found.append((folder / name).stat())
        except OSError as error:
            raise CheckpointError(f"{folder / name}: cannot be read: {error.strerror}") from None
    return _Fingerprint(str(folder), tuple(each.st_size for each in found), tuple(each.st_mtime_ns for each in found))


def _has_changed(folder: Path, known: _Fingerprint) -> bool:
    """Whether a folder has other content than is known, and all of it."""
    found = _fingerprint(folder)
    age_s = time.time() - max(found.times_ns) / 1e9
    is_being_written = found.folder == known.folder and 0 <= age_s < SETTLE_S  # times may be those of another clock
    return found != known and not is_being_written
