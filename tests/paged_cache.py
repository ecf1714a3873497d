"""A paged KV cache to test attention with, hostile wherever no request has written, and attention without pages."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

FAR_BLOCK = 2**30
"""Fills block tables past a request's blocks: following it would leave the cache."""


@dataclass
class PagedCache:
    k_cache: Tensor  # [num_blocks, block_size, num_kv_heads, head_dim], NaN past each request's context
    v_cache: Tensor
    block_table: Tensor  # [num_requests, max_blocks] int32
    keys: list[Tensor]  # of each request [context_len, num_kv_heads, head_dim] float32, as read back from the cache
    values: list[Tensor]

    @classmethod
    def random(
        cls,
        context_lens: list[int],
        num_kv_heads: int,
        head_dim: int,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        seed: int = 0,
    ) -> "PagedCache":
        torch.manual_seed(seed)
        num_blocks = [-(-length // block_size) for length in context_lens]
        caches = [
            torch.full((sum(num_blocks) + 2, block_size, num_kv_heads, head_dim), torch.nan, device=device).to(dtype)
            for _ in range(2)
        ]
        ids = torch.randperm(sum(num_blocks) + 2)[: sum(num_blocks)].to(device, torch.int32)
        table = torch.full((len(context_lens), max(num_blocks, default=0) + 1), FAR_BLOCK, dtype=torch.int32)
        table = table.to(device)
        kept: tuple[list[Tensor], list[Tensor]] = ([], [])
        for request, (length, blocks) in enumerate(zip(context_lens, ids.split(num_blocks), strict=True)):
            table[request, : len(blocks)] = blocks
            at = torch.arange(length, device=device)
            for cache, rows in zip(caches, kept, strict=True):
                new = torch.randn(length, num_kv_heads, head_dim, device=device).to(dtype)
                cache[blocks[at // block_size].long(), at % block_size] = new
                rows.append(new.float())
        return cls(*caches, table, *kept)

    def attend(
        self, request: int, query: Tensor, position: int, scale: float | None = None, window: int | None = None
    ) -> Tensor:
        """Causal attention of query [num_tokens, num_heads, head_dim], its first token at `position`, in float32."""
        num_tokens, num_heads, _ = query.shape
        num_keys = position + num_tokens
        k, v = (
            rows[request][:num_keys].repeat_interleave(num_heads // rows[request].shape[1], dim=1).transpose(0, 1)
            for rows in (self.keys, self.values)
        )
        mask = torch.ones(num_tokens, num_keys, dtype=torch.bool, device=query.device).tril(position)
        mask = mask if window is None else mask.triu(position - window + 1)
        q = query.float().transpose(0, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(0, 1)
