"""What ranks tell each other besides tensors, over a socket that only this user's processes can open.

The first rank sends a Start, then orders. Another rank sends its number, Ready when it has its device, and a Failure if
it has one.
"""

import os
import queue
import socket
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from engine.config import EngineConfig
from engine.model_config import ModelConfig

SOCKET = "orders"
"""Name of the socket in the ranks' folder ..."""
RENDEZVOUS = "ranks"
"""... and of the file through which their process groups find each other."""
MAX_REASON = 500


@dataclass(frozen=True, slots=True)
class Start:
    """What a rank needs to load its part of the model."""

    config: EngineConfig
    model_config: ModelConfig
    path: Path
    vocab_size: int


@dataclass(frozen=True, slots=True)
class Ready:
    """A rank has its device, and is about to join the others."""


@dataclass(frozen=True, slots=True)
class ClearBlocks:
    """Zero blocks, see ModelRunner.clear_blocks."""

    blocks: list[int]


@dataclass(frozen=True, slots=True)
class PromptLogits:
    """Compute a text, see ModelRunner.prompt_logits."""

    token_ids: list[int]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a rank ends."""

    kind: str
    """The exception's class."""
    reason: str

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """The exception in one line."""
        return cls(type(error).__name__, " ".join(str(error).split())[:MAX_REASON])


def connect(folder: Path) -> Connection:
    """To the first rank."""
    with socket.socket(socket.AF_UNIX) as made:
        made.connect(str(folder / SOCKET))
        return Connection(made.detach())


def hang_up(connection: Connection) -> None:
    """End a connection for both sides at once, also where a thread waits for it: closing it would wait for that."""
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        try:
            end.shutdown(socket.SHUT_RDWR)
        except OSError:  # the other side is gone
            return


class Inbox:
    """What the first rank sends, read on a thread: a rank whose device waits for a dead one must still see the end."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.has_ended = threading.Event()
        """Set when the first rank has closed the connection, or is dead."""
        self._messages: queue.SimpleQueue[object] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="orders", daemon=True).start()

    def get(self) -> object:
        """The next message; None after the last."""
        return self._messages.get()

    def _read(self) -> None:
        try:
            while True:
                self._messages.put(self.connection.recv())
        except (EOFError, OSError):
            self.has_ended.set()
            self._messages.put(None)
