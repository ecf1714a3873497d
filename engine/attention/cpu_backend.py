"""Attention on a CPU: single tokens straight from the block table in C++, prompts as in plain torch."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.attention.backend import AttentionBatch
from engine.attention.torch_backend import Piece, TorchAttention
from engine.model_config import ModelConfig
from engine.staging import Staging
from kernels import cpu_ops


@dataclass(slots=True)
class _SingleTokens:
    """Requests with one new token each: their rows of the query, blocks and context lengths."""

    rows: Tensor  # [n] int64
    block_tables: Tensor  # [n, max_blocks] int32
    context_lens: Tensor  # [n] int64


@dataclass(slots=True)
class _Plan:
    """One step: requests with one new token, and pieces of those with several."""

    single: _SingleTokens | None
    prompts: dict[int | None, list[Piece]]
    """By window."""


class CpuAttention:
    """The backend for CPUs with a compiler; see `supports`."""

    def __init__(self, block_size: int, staging: Staging, windows: Iterable[int | None] = (None,)) -> None:
        self._staging = staging
        self._windows = tuple(windows)
        self._torch = TorchAttention(block_size, staging)

    @staticmethod
    def supports(model: ModelConfig, dtype: torch.dtype) -> bool:
        """Whether heads of the model, with activations and cache of this dtype, can be computed."""
        return cpu_ops.serves_heads(dtype, model.head_dim)

    def plan(self, batch: AttentionBatch) -> _Plan:
        several = np.flatnonzero(batch.query_lens > 1).tolist()
        plan = _Plan(
            None,
            {
                window: [piece for request in several for piece in self._torch.prefill_pieces(batch, request, window)]
                for window in self._windows
            },
        )
        single = np.flatnonzero(batch.query_lens == 1)
        if len(single):
            rows, lens, chosen = self._staging.send(batch.query_starts[single], batch.context_lens[single], single)
            tables = batch.block_tables
            plan.single = _SingleTokens(rows, tables if len(tables) == len(single) else tables[chosen], lens)
        return plan

    def plan_decode(self, block_tables: Tensor, context_lens: Tensor) -> _Plan:
        rows = torch.arange(len(context_lens))
        single = _SingleTokens(rows, block_tables.contiguous(), context_lens.long())
        return _Plan(single, {window: [] for window in self._windows})

    def forward(
        self, query: Tensor, k_cache: Tensor, v_cache: Tensor, plan: _Plan, window: int | None = None
    ) -> Tensor:
        if plan.single is None:
            return self._torch.forward(query, k_cache, v_cache, plan.prompts, window)
        query = query.contiguous()
        output = torch.empty_like(query)
        self._torch.write(output, query, k_cache, v_cache, plan.prompts[window])
        single = plan.single
        cpu_ops.paged_attention(
            query, k_cache, v_cache, single.rows, single.block_tables, single.context_lens, output, window
        )
        return output
