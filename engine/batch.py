"""A scheduled step → the tensors that the model needs for it.

Every running request has a slot: its row in the tables here. Rows are written when a request is admitted, gets blocks
or gets a token; a step then only gathers from them, on the device, with no Python loop over tokens.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.lora.device import AdapterNotes
from engine.request import Request
from engine.scheduler import Step
from engine.staging import Staging


@dataclass(slots=True)
class StepInputs:
    """What every layer reads in one step, on the device."""

    input_ids: Tensor  # [num_tokens] int64
    cos_sin: Tensor  # [num_tokens, head_dim] float32, rotary cosines and sines
    slot_mapping: Tensor  # [num_tokens] int64, where each token's key and value go
    attention_plan: Any
    kv_caches: list[tuple[Tensor, Tensor]]  # per layer: two of [num_blocks, block_size, num_kv_heads, head_dim]


@dataclass(slots=True)
class HostBatch:
    """One step, on the host. num_tokens rows of all requests, one request after the other.

    Requests with a single row come first: attention serves those apart, as one slice of the rows.
    """

    order: np.ndarray  # [num_requests] int64, index in the step of each request
    request_slots: np.ndarray  # [num_requests] int64
    row_slots: np.ndarray  # [num_tokens] int64
    positions: np.ndarray  # [num_tokens] int64
    query_starts: np.ndarray  # [num_requests] int64, first row of each request
    query_lens: np.ndarray  # [num_requests] int64
    context_lens: np.ndarray  # [num_requests] int64, tokens in the cache after the step
    sampling: np.ndarray  # [num_sampling] int64, the requests that get a next token, in the step's order
    lookback: np.ndarray  # [num_sampling] int64, how many rows before the request's last one the token is sampled

    @property
    def is_decode(self) -> bool:
        """Whether every request has a single row and gets a next token."""
        return len(self.row_slots) == len(self.request_slots) == len(self.sampling)

    @property
    def sample_rows(self) -> np.ndarray:
        """[num_sampling] int64, the rows whose logits give the next tokens."""
        return self.query_starts[self.sampling] + self.query_lens[self.sampling] - 1 - self.lookback

    @property
    def sample_slots(self) -> np.ndarray:
        """[num_sampling] int64."""
        return self.request_slots[self.sampling]

    @property
    def sample_positions(self) -> np.ndarray:
        """[num_sampling] int64, the next tokens' positions."""
        return self.context_lens[self.sampling] - self.lookback


@dataclass(slots=True)
class TableNotes:
    """What the host knows before the device does, on its way into the tables."""

    prompts: list[tuple[int, np.ndarray]] = field(default_factory=list)
    """Slot and int32 tokens of requests that got it."""
    guesses: list[tuple[int, int, np.ndarray]] = field(default_factory=list)
    """Slot, position of the first, int32 tokens."""
    blocks: list[tuple[int, int, list[int]]] = field(default_factory=list)
    """Slot, number of the first among the request's blocks, blocks."""


@dataclass(slots=True)
class StepOrder:
    """One step, as every rank of a model runs it."""

    notes: TableNotes
    adapters: AdapterNotes | None
    batch: HostBatch
    prompt_rows: list[tuple[int, int]]
    """First row and the one after the last, of rows whose logits give log-probabilities of prompt tokens."""
    by_graph: bool
    """Whether it is a decode step that draws its tokens too, see DecodeGraphs ..."""
    settings: np.ndarray | None
    """... and how: float64 [num_requests, 5]. None: rows need more than that, their tokens are drawn anew."""


class BatchTables:
    """Token ids and block tables of all running requests, on the device: one row for each slot, and one for padding.

    A step reads there what the step before it sampled, before the host knows it. What the host knows first (prompts and
    blocks) is noted by `admit` and `grow`, and written by `flush`, in one copy.

    Args:
        max_num_seqs: number of slots; row `max_num_seqs` belongs to padding.
        max_model_len: most tokens of a request.
        padding_block: the block that padding reads and writes.
        staging: the way to the device.
    """

    def __init__(
        self, max_num_seqs: int, max_model_len: int, block_size: int, padding_block: int, staging: Staging
    ) -> None:
        self.block_size = block_size
        self.padding_slot = max_num_seqs
        shape = (max_num_seqs + 1, -(-max_model_len // block_size))
        # zeros, not empty: on a CPU, pages stay unmapped until a request is long enough to touch them.
        self.token_ids = torch.zeros(max_num_seqs + 1, max_model_len + 1, dtype=torch.int32, device=staging.device)
        self.block_table = torch.zeros(shape, dtype=torch.int32, device=staging.device)
        self.block_table[self.padding_slot] = padding_block
        self._staging = staging
        self._num_blocks = [0] * max_num_seqs
        self.notes = TableNotes()

    def admit(self, request: Request) -> None:
        """Note the tokens and blocks of a request that has just got its slot."""
        self.notes.prompts.append((request.slot, np.array(request.token_ids, dtype=np.int32)))
        self._num_blocks[request.slot] = 0
        self.grow(request)

    def grow(self, request: Request) -> None:
        """Note the blocks that a request got since last time."""
        first, slot = self._num_blocks[request.slot], request.slot
        self.notes.blocks.append((slot, first, request.block_table[first:]))
        self._num_blocks[slot] = len(request.block_table)

    def guess(self, request: Request, guesses: list[int]) -> None:
        """Note tokens that may follow those that a request has."""
        self.notes.guesses.append((request.slot, len(request.token_ids), np.array(guesses, dtype=np.int32)))

    def forget_notes(self) -> None:
        """Drop what was noted and not written, for requests that will all be admitted anew."""
        self.notes = TableNotes()

    def flush(self) -> None:
        """Write what was noted."""
        notes = self.notes
        if notes.prompts:
            slots, prompts = zip(*notes.prompts, strict=True)
            for slot, tokens in zip(slots, self._staging.send(*prompts), strict=True):
                self.token_ids[slot, : len(tokens)] = tokens
        if notes.guesses:
            sent = self._staging.send(*(guesses for _, _, guesses in notes.guesses))
            for (slot, first, _), own in zip(notes.guesses, sent, strict=True):
                self.token_ids[slot, first : first + len(own)] = own
        if notes.blocks:
            counts = np.array([len(blocks) for _, _, blocks in notes.blocks])
            slots_of_blocks = np.repeat(np.array([slot for slot, _, _ in notes.blocks]), counts)
            columns = np.concatenate([np.arange(first, first + len(blocks)) for _, first, blocks in notes.blocks])
            blocks = np.concatenate([np.array(blocks, dtype=np.int32) for _, _, blocks in notes.blocks])
            rows, columns_sent, blocks_sent = self._staging.send(slots_of_blocks, columns, blocks)
            self.block_table.index_put_((rows, columns_sent), blocks_sent)
        self.notes = TableNotes()

    def build(self, step: Step) -> HostBatch:
        """Work out a step's rows."""
        slots = np.fromiter((request.slot for request in step.requests), np.int64, len(step.requests))
        starts = np.array(step.starts, dtype=np.int64)
        query_lens = np.array(step.num_new_tokens, dtype=np.int64)
        order = np.argsort(query_lens > 1, kind="stable")
        places = np.empty_like(order)
        places[order] = np.arange(len(order))
        slots, starts, query_lens = slots[order], starts[order], query_lens[order]
        query_ends = np.cumsum(query_lens)
        sampling = np.array(step.sampling, dtype=np.int64)
        lookback = np.zeros_like(sampling)
        if step.guesses:
            lookback = np.searchsorted(sampling, sampling, side="right") - 1 - np.arange(len(sampling))
        query_starts = query_ends - query_lens
        return HostBatch(
            order=order,
            request_slots=slots,
            row_slots=np.repeat(slots, query_lens),
            positions=np.arange(query_ends[-1]) + np.repeat(starts - query_starts, query_lens),
            query_starts=query_starts,
            query_lens=query_lens,
            context_lens=starts + query_lens,
            sampling=places[sampling],
            lookback=lookback,
        )

    def input_ids(self, slots: Tensor, positions: Tensor) -> Tensor:
        """[num_tokens] int64, what the rows compute."""
        return self.token_ids[slots, positions].long()

    def slot_mapping(self, slots: Tensor, positions: Tensor) -> Tensor:
        """[num_tokens] int64, where in the cache the rows' keys and values go: block · block_size + offset."""
        blocks = self.block_table[slots, positions // self.block_size].long()
        return blocks * self.block_size + positions % self.block_size

    def append(self, slots: Tensor, positions: Tensor, token_ids: Tensor) -> None:
        """Write sampled tokens where the next step reads them."""
        self.token_ids.index_put_((slots, positions), token_ids.to(torch.int32))
