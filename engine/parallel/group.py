"""The ranks that hold a model together, as its layers see them: who has which share, and sums over all.

A rank computes with its share of attention heads and of each MLP's inner width. What that gives are parts of sums,
which `all_reduce` adds up, twice a layer. The first rank gets all logits and draws the next tokens, and tells them to
the others: that way no two ranks ever disagree about a token.
"""

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from engine.errors import ConfigError
from engine.model_config import ModelConfig
from engine.parallel.share import Share

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for another that lives, as one may read its weights from a slower disk. The death of a rank is
noticed at once, see engine.parallel.workers."""
CONNECT_TIMEOUT = timedelta(minutes=2)
"""How long ranks that are ready may take to find each other. The death of one is noticed late meanwhile."""
LOOPBACK = "127.0.0.1"
c10d: Any = torch.distributed
"""Torch's type stubs leave out half of it. Groups are made without its global one: a process may hold many engines."""


class TensorParallel:
    """A group of one: all is its own, and there is nobody to exchange anything with."""

    rank = 0
    size = 1

    def share(self, count: int) -> Share:
        """An equal share. Raises ConfigError if there is none."""
        if count % self.size:
            raise ConfigError(f"{count} cannot be divided among {self.size} ranks: lower tensor_parallel_size")
        part = count // self.size
        return Share(count, self.rank * part, part)

    def share_or_copy(self, count: int) -> Share:
        """An equal share; where there are fewer than ranks, one that neighbours hold too."""
        return self.share(count) if count >= self.size else Share(count, self.rank * count // self.size, 1)

    def share_padded(self, count: int) -> Share:
        """An equal share, where the last ranks' may be padding."""
        part = -(-count // self.size)
        return Share(count, self.rank * part, part)

    def model_share(self, model: ModelConfig) -> ModelConfig:
        """The model as attention and its cache see it: with this rank's heads."""
        heads = {
            "num_attention_heads": self.share(model.num_attention_heads).size,
            "num_key_value_heads": self.share_or_copy(model.num_key_value_heads).size,
        }
        return model.model_copy(update=heads)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over all ranks, on each of them. May overwrite x, which is contiguous."""
        return x

    def gather_columns(self, x: Tensor) -> Tensor:
        """On the first rank, the columns of all ranks beside each other; x on others."""
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        """The first rank's x, written over that of others, which is contiguous and of its shape and dtype."""
        return x

    def minimum(self, value: int) -> int:
        """The least of all ranks' values. Waits for the device."""
        return value


ALONE = TensorParallel()


class RankGroup(TensorParallel):
    """One of several ranks, each with a device of its own: NCCL between GPUs, gloo between CPUs.

    Everything stays on this machine: ranks find each other through a file, and gloo listens on loopback alone.

    Args:
        rendezvous: a file that no other group uses.
        rank: 0 for the one that leads.
        size: how many there are.
        device: what this rank computes on.
    """

    def __init__(self, rendezvous: Path, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size, self._device = rank, size, device
        store = c10d.FileStore(str(rendezvous), size)
        store.set_timeout(CONNECT_TIMEOUT)
        self._backend = _nccl(store, rank, size) if device.type == "cuda" else _gloo(store, rank, size)
        self._sum = c10d.AllreduceOptions()
        self._least = c10d.AllreduceOptions()
        self._least.reduceOp = c10d.ReduceOp.MIN
        self._to_first = c10d.GatherOptions()
        self._from_first = c10d.BroadcastOptions()
        # In the order of the current stream: what is launched next may use the result, and graphs can capture it.
        for options in (self._sum, self._least, self._to_first, self._from_first):
            options.asyncOp = False
        self.minimum(0)  # connects all of them now, while they are equally far

    def all_reduce(self, x: Tensor) -> Tensor:
        self._backend.allreduce([x], self._sum).wait()
        return x

    def gather_columns(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else []
        self._backend.gather([parts] if parts else [], [x], self._to_first).wait()
        return torch.cat(parts, dim=1) if parts else x

    def broadcast(self, x: Tensor) -> Tensor:
        self._backend.broadcast([x], self._from_first).wait()
        return x

    def minimum(self, value: int) -> int:
        found = torch.tensor([value], dtype=torch.int64, device=self._device)
        self._backend.allreduce([found], self._least).wait()
        return int(found.item())

    def abort(self) -> None:
        """Let go of all that waits for other ranks. Safe to call from any thread.

        NCCL frees what waits at once, and then waits itself for the graphs that have captured any of its operations:
        these must be reset, by another thread if need be.
        """
        self._backend.abort()


def take_device(device: torch.device, index: int) -> None:
    """Make a GPU the one that this thread uses, and set it up now: that takes seconds if all ranks do it."""
    if device.type == "cuda":
        torch.cuda.set_device(index)
        torch.cuda.synchronize()


def _gloo(store: Any, rank: int, size: int) -> Any:
    options = c10d.ProcessGroupGloo._Options()
    options._timeout = TIMEOUT
    options._devices = [c10d.ProcessGroupGloo.create_device(hostname=LOOPBACK)]
    options._threads = 2
    return c10d.ProcessGroupGloo(store, rank, size, options)


def _nccl(store: Any, rank: int, size: int) -> Any:
    options = c10d.ProcessGroupNCCL.Options()
    options._timeout = TIMEOUT
    return c10d.ProcessGroupNCCL(store, rank, size, options)
