"""Ranks as processes of this machine."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from engine.errors import ConfigError

_ROOT = Path(__file__).parents[2]


class StartedRank(Protocol):
    """A rank that runs somewhere on this machine."""

    def wait(self, timeout_s: float) -> str | None:
        """How it ended, as in "it ended with exit code 1"; None if it has not after so many seconds."""
        ...

    def kill(self) -> None:
        """End it at once."""
        ...


StartRank = Callable[[int, int, Path, torch.device], StartedRank]
"""Makes `run_rank` run elsewhere, from rank, number of ranks, the ranks' folder and the kind of device."""


class RankProcess:
    """See StartedRank."""

    def __init__(self, arguments: list[str]) -> None:
        self._process = subprocess.Popen(arguments, cwd=_ROOT, stdin=subprocess.DEVNULL)

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait(self, timeout_s: float) -> str | None:
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        if code < 0:
            return f"its process was killed by signal {-code} ({signal.Signals(-code).name})"
        return f"its process ended with exit code {code}"

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def start_process(rank: int, size: int, folder: Path, device: torch.device) -> RankProcess:
    """A rank in a new process, on the GPU of its number. Raises ConfigError if there are too few."""
    if device.type == "cuda" and size > torch.cuda.device_count():
        raise ConfigError(
            f"tensor_parallel_size is {size}, but torch finds {torch.cuda.device_count()} CUDA devices; "
            "expected one for each rank: lower tensor_parallel_size, or set device: cpu"
        )
    # A new interpreter, no fork and no copy of the caller's main module: any script may make an LLM.
    return RankProcess([sys.executable, "-m", "engine.parallel.follower", str(folder), str(rank)])
