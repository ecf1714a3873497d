"""Attention by our Triton kernels: one for requests with one new token, one for those with more, in the same step."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.attention.backend import AttentionBatch
from engine.model_config import ModelConfig
from engine.staging import Staging
from kernels.paged_attention import paged_attention, plan_query_blocks, tokens_per_query_block
from kernels.paged_decode import decode_scratch, paged_decode

HEAD_DIMS = (64, 128, 256)
BLOCK_SIZES = (16, 32, 64, 128, 256)


@dataclass(slots=True)
class _Plan:
    """Requests with one new token, then those with several; either may be none."""

    block_tables: Tensor  # [num_requests, max_blocks] int32
    context_lens: Tensor  # [num_single] int32, of those with one new token
    query_blocks: Tensor | None  # [num_query_blocks, 4] int32 of the others, see plan_query_blocks
    tokens_per_block: int


class TritonAttention:
    """The default on CUDA. `supports` tells for which models."""

    def __init__(self, model: ModelConfig, staging: Staging) -> None:
        self._staging = staging
        self._group_size = model.num_attention_heads // model.num_key_value_heads
        self._scratch = decode_scratch(
            model.num_attention_heads, model.num_key_value_heads, model.head_dim, staging.device
        )

    @staticmethod
    def supports(model: ModelConfig, block_size: int) -> bool:
        """Whether the kernels take a model's heads and a cache's blocks."""
        return model.head_dim in HEAD_DIMS and block_size in BLOCK_SIZES

    def plan(self, batch: AttentionBatch) -> _Plan:
        num_single = int(np.count_nonzero(batch.query_lens == 1))
        context_lens = batch.context_lens[:num_single].astype(np.int32)
        if num_single == len(batch.query_lens):
            return self.plan_decode(batch.block_tables, *self._staging.send(context_lens))
        several = slice(num_single, None)
        tokens_per_block = tokens_per_query_block(int(batch.query_lens.max()), self._group_size)
        query_blocks = plan_query_blocks(
            batch.query_starts[several], batch.query_lens[several], batch.context_lens[several], tokens_per_block
        )
        sent_lens, sent_blocks = self._staging.send(context_lens, query_blocks)
        return _Plan(batch.block_tables, sent_lens, sent_blocks, tokens_per_block)

    def plan_decode(self, block_tables: Tensor, context_lens: Tensor) -> _Plan:
        return _Plan(block_tables, context_lens, None, 0)

    def forward(
        self, query: Tensor, k_cache: Tensor, v_cache: Tensor, plan: _Plan, window: int | None = None
    ) -> Tensor:
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        num_single = len(plan.context_lens)
        if num_single:
            paged_decode(
                query[:num_single],
                k_cache,
                v_cache,
                plan.block_tables[:num_single],
                plan.context_lens,
                self._scratch,
                window=window,
                output=output[:num_single],
            )
        if plan.query_blocks is not None:
            tables = plan.block_tables[num_single:]
            paged_attention(
                query,
                k_cache,
                v_cache,
                tables,
                plan.query_blocks,
                plan.tokens_per_block,
                window=window,
                output=output,
            )
        return output
