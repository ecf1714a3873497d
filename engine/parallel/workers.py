"""The other ranks, as the first one sees them: started, told what to run, watched, ended."""

import logging
import os
import pickle
import shutil
import socket
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

from engine.errors import CheckpointError, ConfigError, EngineDeadError, EngineError
from engine.parallel.group import RankGroup, take_device
from engine.parallel.orders import RENDEZVOUS, SOCKET, Failure, Start, hang_up
from engine.parallel.processes import StartedRank, StartRank

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 300.0
"""How long a rank may take to start. Under Ray, its actor may have to wait for a busy machine."""
MAX_SOCKET_PATH = 107
"""Bytes of a socket's path that Linux takes."""
REASON_TIMEOUT_S = 5.0
"""How long to wait for the reason of a fault that another rank may have caused, and for ranks to end."""
POLL_S = 0.1


class Workers:
    """Ranks 1 … size - 1. The first one to fail fails all, with its reason.

    Args:
        start: what they load.
        start_rank: starts one.
        device: what kind each computes on.

    Raises:
        ConfigError: they cannot be started, or the folder for temporary files has too long a name.
        EngineDeadError: one ended before it was connected.
    """

    def __init__(self, start: Start, start_rank: StartRank, device: torch.device) -> None:
        self._size = start.config.tensor_parallel_size
        self._state = _State(Path(tempfile.mkdtemp(prefix="qwen3-ranks-")))
        self._end = weakref.finalize(self, self._state.end)
        folder = self._state.folder
        with self.guard(), socket.socket(socket.AF_UNIX) as listener:
            if len(os.fsencode(folder / SOCKET)) > MAX_SOCKET_PATH:
                raise ConfigError(
                    f"{folder / SOCKET} is too long for the path of a socket, expected at most {MAX_SOCKET_PATH} "
                    "bytes: set TMPDIR to a folder with a shorter name"
                )
            listener.bind(str(folder / SOCKET))
            listener.listen(self._size)
            listener.settimeout(POLL_S)
            for rank in range(1, self._size):
                self._state.ranks[rank] = start_rank(rank, self._size, folder, device)
            self._accept(listener)
            self.send(start)
            take_device(device, 0)
            self._await_ready()
            threading.Thread(target=_watch, args=(self._state, self._size), name="ranks", daemon=True).start()
            self.group = self._state.group = RankGroup(folder / RENDEZVOUS, 0, self._size, device)

    def send(self, order: object) -> None:
        """Tell all ranks what to run next."""
        message = pickle.dumps(order)
        for connection in self._state.connections.values():
            connection.send_bytes(message)

    def end_graphs_first(self, graphs: Sequence[torch.cuda.CUDAGraph]) -> None:
        """Let go of these before the ranks' group, which waits for graphs that have captured any of its operations."""
        self._state.graphs = graphs

    def check(self) -> None:
        """Raise if a rank has failed."""
        if self._state.failure is not None:
            raise self._state.failure

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Around what all ranks do together. What fails there ends all of them, with the reason of the first to fail.

        Raises:
            EngineDeadError: in the place of any error that does not say by itself what to do about it.
        """
        self.check()
        try:
            yield
        except Exception as error:
            if not isinstance(error, EngineError):
                self._state.failed.wait(REASON_TIMEOUT_S)  # an operation fails a moment before its cause is known
            self._state.fail(_as_engine_error(error))
        except BaseException:
            self._state.fail(EngineDeadError("a step was interrupted, and the ranks are not equally far any more"))
            raise
        finally:
            if self._state.failure is not None:
                self.close()
        self.check()

    def close(self) -> None:
        """End all ranks."""
        self._end()

    def _accept(self, listener: socket.socket) -> None:
        deadline = time.monotonic() + CONNECT_TIMEOUT_S
        while len(self._state.connections) < self._size - 1:
            try:
                accepted, _ = listener.accept()
            except TimeoutError:
                self._raise_if_ended(is_late=time.monotonic() > deadline)
                continue
            accepted.setblocking(True)
            connection = Connection(accepted.detach())
            try:
                self._state.connections[connection.recv()] = connection
            except EOFError:  # it has just ended: the next turn tells why
                continue

    def _await_ready(self) -> None:
        """Wait until all ranks have their devices, so that they look for each other at the same time."""
        deadline = time.monotonic() + CONNECT_TIMEOUT_S
        for rank, connection in self._state.connections.items():
            if not connection.poll(max(0.0, deadline - time.monotonic())):
                raise EngineDeadError(
                    f"rank {rank} of {self._size} failed: it has no device after {CONNECT_TIMEOUT_S:.0f} s"
                )
            if (error := _heard(self._state, rank, self._size)) is not None:
                raise error

    def _raise_if_ended(self, is_late: bool) -> None:
        for rank, started in self._state.ranks.items():
            if rank in self._state.connections:
                continue
            reason = started.wait(0)
            if reason is None and is_late:
                reason = f"it has not started after {CONNECT_TIMEOUT_S:.0f} s"
            if reason is not None:
                raise EngineDeadError(f"rank {rank} of {self._size} failed: {reason}")


class _State:
    """What outlives Workers, until all is ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ranks: dict[int, StartedRank] = {}
        self.connections: dict[int, Connection] = {}
        self.group: RankGroup | None = None
        self.graphs: Sequence[torch.cuda.CUDAGraph] = ()
        self.failure: EngineError | None = None
        self.failed = threading.Event()
        self.is_ending = False

    def fail(self, failure: EngineError) -> None:
        """Take note of the first failure."""
        if self.failure is None:
            self.failure = failure
            self.failed.set()

    def end(self) -> None:
        """A rank ends when its connection does. Those that hang are killed."""
        self.is_ending = True
        for connection in self.connections.values():
            hang_up(connection)
        for graph in self.graphs:
            graph.reset()
        if self.group is not None:
            self.group.abort()
        deadline = time.monotonic() + REASON_TIMEOUT_S
        for started in self.ranks.values():
            if started.wait(max(0.0, deadline - time.monotonic())) is None:
                started.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


def _watch(state: _State, size: int) -> None:
    """Wait for a rank to fail, and let go of what waits for it."""
    ready = wait(list(state.connections.values()))
    rank = next(rank for rank, connection in state.connections.items() if connection in ready)
    error = _heard(state, rank, size)
    if error is None or state.is_ending:
        return
    logger.error("%s", error)
    state.fail(error)
    if state.group is not None:
        state.group.abort()


def _heard(state: _State, rank: int, size: int) -> EngineError | None:
    """Why a rank fails that has sent something or hung up; None if it does not."""
    try:
        message = state.connections[rank].recv()
    except (EOFError, OSError):
        if state.is_ending:
            return None
        reason = state.ranks[rank].wait(REASON_TIMEOUT_S) or "its connection broke"
        return EngineDeadError(f"rank {rank} of {size} failed: {reason}")
    return _failed(message, f"rank {rank} of {size} failed: ") if isinstance(message, Failure) else None


def _failed(failure: Failure, prefix: str) -> EngineError:
    kinds = {kind.__name__: kind for kind in (ConfigError, CheckpointError)}
    if failure.kind in kinds:
        return kinds[failure.kind](prefix + failure.reason)
    return EngineDeadError(f"{prefix}{failure.kind}: {failure.reason}")


def _as_engine_error(error: Exception) -> EngineError:
    if isinstance(error, EngineError):
        return error
    made = _failed(Failure.of(error), "rank 0 failed: ")
    made.__cause__ = error
    return made
