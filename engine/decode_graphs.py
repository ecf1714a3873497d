"""CUDA graphs of decode steps: hundreds of kernel launches become one.

A graph has a fixed batch size and fixed addresses. So there is one for each of a few sizes, a step runs in the smallest
that holds it, and the rows left over are padding: they read and write a slot and a block that belong to nobody.

A graph draws the next tokens too. Logits are no part of what it leaves: those of all sizes together would take as much
memory as a small model. Where they are wanted, they are computed again from the hidden states.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from engine.staging import ALIGNMENT, Staging

NUM_SETTINGS = 5


class Decoded(NamedTuple):
    """What a decode step leaves on the device, a row for each request."""

    hidden: Tensor  # [batch, hidden_size]
    token_ids: Tensor  # [batch] int64
    is_finite: Tensor  # [batch] bool, False where the logits are no numbers


Decode = Callable[[Tensor, Tensor, Tensor], Decoded]


def bucket_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, 8, then every 16th, past 256 every 64th, up to the most requests that run at once."""
    sizes = (1, 2, 4, 8, *range(16, 256, 16), *range(256, max_num_seqs, 64))
    return [*(size for size in sizes if size < max_num_seqs), max_num_seqs]


class DecodeGraphs:
    """Replays `decode` at bucketed batch sizes.

    Args:
        decode: from slots and positions, int64 [batch], and settings for `sample_tokens`, float64 [batch, 5]; its
            launches depend on the batch size alone.
        max_num_seqs: the largest batch.
        padding_slot: slot of the rows that fill a bucket up.
        staging: the way to the device.
        capture: False runs `decode` on the same padded buffers without graphs, for devices that have none.
    """

    def __init__(
        self, decode: Decode, max_num_seqs: int, padding_slot: int, staging: Staging, capture: bool, progress: bool
    ) -> None:
        self._decode = decode
        self._sizes = np.array(bucket_sizes(max_num_seqs))
        self._padding_slot = padding_slot
        self._staging = staging
        num_bytes = 8 * (2 + NUM_SETTINGS) * max_num_seqs + 3 * ALIGNMENT
        self._inputs = torch.zeros(num_bytes, dtype=torch.uint8, device=staging.device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._outputs: dict[int, Decoded] = {}
        if capture:
            self._capture_all(progress)

    @property
    def captured(self) -> list[torch.cuda.CUDAGraph]:
        """The graphs, smallest batch last; none where they are not captured."""
        return list(self._graphs.values())

    def launch(self, slots: np.ndarray, positions: np.ndarray, settings: np.ndarray | None) -> Decoded:
        """Decode for n requests; the output is overwritten by the next launch.

        Args:
            slots, positions: int64 [n].
            settings: float64 [n, 5] for `sample_tokens`; None: all greedy.
        """
        count = len(slots)
        size = int(self._sizes[np.searchsorted(self._sizes, count)])
        inputs = self._send(size, slots, positions, settings)
        graph = self._graphs.get(size)
        if graph is None:
            decoded = self._decode(*inputs)
        else:
            graph.replay()
            decoded = self._outputs[size]
        return Decoded(*(rows[:count] for rows in decoded))

    def _send(
        self, size: int, slots: np.ndarray, positions: np.ndarray, settings: np.ndarray | None = None
    ) -> list[Tensor]:
        """Put the inputs of a bucket, padded, where its graph reads them. Zeros stand for greedy rows."""
        count = len(slots)
        padded = np.zeros((2, size), dtype=np.int64)
        padded[0] = self._padding_slot
        padded[:, :count] = slots, positions
        padded_settings = np.zeros((size, NUM_SETTINGS))
        if settings is not None:
            padded_settings[:count] = settings
        return self._staging.send(padded[0], padded[1], padded_settings, into=self._inputs)

    def _capture_all(self, progress: bool) -> None:
        """Largest first, so that the smaller ones fit into its memory."""
        pool = None
        nobody = np.zeros(0, dtype=np.int64)
        # One for all, also for what comes before a capture: cuBLAS makes its workspace for a stream when that first
        # multiplies, which must not be in the memory of a graph.
        stream = torch.cuda.Stream()
        for size in tqdm(self._sizes[::-1].tolist(), desc="capturing graphs", delay=2, disable=not progress):
            inputs = self._send(size, nobody, nobody)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._decode(*inputs)  # compiles kernels, makes split-K's counters: what a capture may not
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self._outputs[size] = self._decode(*inputs)
            pool = graph.pool()
            self._graphs[size] = graph
