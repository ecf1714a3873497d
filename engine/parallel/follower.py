"""Every rank but the first: computes its part of the steps that the first one orders."""

import logging
import os
import shutil
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from engine.batch import StepOrder
from engine.device import choose_device
from engine.errors import EngineError
from engine.outcome import LaunchedStep
from engine.parallel.group import RankGroup, take_device
from engine.parallel.orders import (
    RENDEZVOUS,
    ClearBlocks,
    Failure,
    Inbox,
    PromptLogits,
    Ready,
    Start,
    connect,
    hang_up,
)
from engine.prompt_spans import PromptSpan
from engine.runner import ModelRunner

logger = logging.getLogger(__name__)

END_TIMEOUT_S = 10.0
"""How long a rank has to end by itself once the first one is gone."""


class Follower(ModelRunner):
    """Runs what it is told and draws nothing: the first rank tells which tokens it drew."""

    @torch.inference_mode()
    def obey(self, order: object) -> None:
        """Run an order of the first rank."""
        match order:
            case StepOrder():
                self._run(order, (), lambda: None)
            case ClearBlocks(blocks):
                self.clear_blocks(blocks)
            case PromptLogits(token_ids):
                for hidden in self._prompt_hidden(token_ids):
                    self.model.compute_logits(hidden)

    def _run(self, order: StepOrder, spans: Sequence[PromptSpan], before_masks: Callable[[], object]) -> LaunchedStep:
        self._tables.notes = order.notes
        self._tables.flush()
        if self.adapters is not None and order.adapters is not None:
            self.adapters.notes = order.adapters
            self.adapters.flush()
        batch = order.batch
        if self.graphs is not None and order.by_graph:
            hidden = self.graphs.launch(batch.request_slots, batch.positions, order.settings).hidden
            if order.settings is not None:
                return LaunchedStep(None)
        else:
            hidden = self.model(self._to_device(batch))
            for start, stop in order.prompt_rows:
                self.model.compute_logits(hidden[start:stop])
            if not len(batch.sampling):
                return LaunchedStep(None)
            hidden = self._sampled_rows(batch, hidden)
        logits = self.model.compute_logits(hidden)
        slots, positions = self._staging.send(batch.sample_slots, batch.sample_positions)
        self._draw_plain(logits, slots, positions, logits)
        return LaunchedStep(None)

    def _draw_plain(self, logits: Tensor, slots: Tensor, positions: Tensor, settings: Tensor) -> tuple[Tensor, Tensor]:
        token_ids = torch.zeros_like(slots)
        self._tables.append(slots, positions, self._group.broadcast(token_ids))
        return token_ids, torch.ones_like(slots, dtype=torch.bool)


def run_rank(folder: Path, rank: int, device_index: int) -> None:
    """Be a rank, in a process that is for nothing else, until the first rank is done.

    Args:
        folder: where the first rank listens.
        rank: 1 or more.
        device_index: which of the GPUs that this process sees is this rank's.
    """
    inbox = Inbox(connect(folder))
    done = threading.Event()
    threading.Thread(target=_end_in_time, args=(inbox, done), name="end", daemon=True).start()
    follow(inbox, folder, rank, device_index)
    done.set()
    shutil.rmtree(folder, ignore_errors=True)  # the first rank may have been killed


def follow(inbox: Inbox, folder: Path, rank: int, device_index: int) -> None:
    """Load a part of the model and run what comes, until the end or a failure, which the first rank is told."""
    with inbox.connection as connection:
        connection.send(rank)
        try:
            _follow(inbox, folder, rank, device_index)
        except Exception as error:
            # Where the first rank is gone, what depends on it fails: nobody is left to tell.
            if not inbox.has_ended.wait(0.5):
                if not isinstance(error, EngineError):
                    # As text: a record of the exception would keep its frames, and the connections they hold.
                    logger.error("rank %d fails\n%s", rank, traceback.format_exc())
                connection.send(Failure.of(error))
        finally:
            hang_up(connection)


def _follow(inbox: Inbox, folder: Path, rank: int, device_index: int) -> None:
    start = inbox.get()
    if not isinstance(start, Start):
        return
    config = start.config.model_copy(update={"show_progress": False})
    device = choose_device(config)
    take_device(device, device_index)
    inbox.connection.send(Ready())
    group = RankGroup(folder / RENDEZVOUS, rank, config.tensor_parallel_size, device)
    follower = Follower(config, start.model_config, start.path, start.vocab_size, group)
    group.minimum(0)
    while (order := inbox.get()) is not None:
        follower.obey(order)
    for graph in () if follower.graphs is None else follower.graphs.captured:
        graph.reset()
    group.abort()


def _end_in_time(inbox: Inbox, done: threading.Event) -> None:
    """End the process if this rank hangs when the first one is gone: in a GPU's wait for it, there is no other way."""
    inbox.has_ended.wait()
    if not done.wait(END_TIMEOUT_S):
        os._exit(1)


if __name__ == "__main__":
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first rank, which ends this one
    run_rank(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[2]))
