"""Ranks of a model as threads of this process: with sockets and gloo groups as ever, but without new interpreters."""

import threading
from pathlib import Path

import torch

from engine.parallel.follower import follow
from engine.parallel.orders import Inbox, connect


class RankThread:
    """A StartedRank."""

    def __init__(self, rank: int, folder: Path) -> None:
        self._thread = threading.Thread(target=self._run, args=(rank, folder), daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float) -> str | None:
        self._thread.join(timeout_s)
        return None if self._thread.is_alive() else "its thread ended"

    def kill(self) -> None:
        raise RuntimeError("a rank hangs")

    @staticmethod
    def _run(rank: int, folder: Path) -> None:
        follow(Inbox(connect(folder)), folder, rank, device_index=0)


def start_thread(rank: int, size: int, folder: Path, device: torch.device) -> RankThread:
    """A StartRank."""
    return RankThread(rank, folder)
