"""Attention by the library flash-attn (FlashAttention-2, arXiv:2307.08691), if the extra `flash` is installed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.attention.backend import AttentionBatch
from engine.errors import ConfigError
from engine.model_config import ModelConfig
from engine.staging import Staging

PAGE_SIZE = 256
"""The library's paged cache has blocks of a multiple of so many tokens; the engine's have at most as many."""
MAX_HEAD_DIM = 256
OLDEST_CAPABILITY = (8, 0)


@dataclass(slots=True)
class _Plan:
    """Requests with one new token, then those with several; either may be none."""

    block_tables: Tensor  # [num_requests, max_blocks] int32
    context_lens: Tensor  # [num_single] int32, of those with one new token
    cu_query_lens: Tensor | None  # [num_several + 1] int32: 0, then sums of the others' query_lens
    cu_context_lens: Tensor | None  # [num_several + 1] int32: 0, then sums of the others' context_lens
    longest_query: int
    longest_context: int


class FlashAttention:
    """The backend for `attention_backend: flash`; `load_flash_attention` makes one.

    Args:
        attend_single: the library's `flash_attn_with_kvcache`.
        attend_several: the library's `flash_attn_varlen_func`.
    """

    def __init__(
        self, attend_single: Callable[..., Tensor], attend_several: Callable[..., Tensor], staging: Staging
    ) -> None:
        self._attend_single, self._attend_several = attend_single, attend_several
        self._staging = staging

    def plan(self, batch: AttentionBatch) -> _Plan:
        num_single = int(np.count_nonzero(batch.query_lens == 1))
        context_lens = batch.context_lens[:num_single].astype(np.int32)
        if num_single == len(batch.query_lens):
            return self.plan_decode(batch.block_tables, *self._staging.send(context_lens))
        query_lens, others_context_lens = batch.query_lens[num_single:], batch.context_lens[num_single:]
        lens, cu_query_lens, cu_context_lens = self._staging.send(
            context_lens, _cumulative(query_lens), _cumulative(others_context_lens)
        )
        longest = int(query_lens.max()), int(others_context_lens.max())
        return _Plan(batch.block_tables, lens, cu_query_lens, cu_context_lens, *longest)

    def plan_decode(self, block_tables: Tensor, context_lens: Tensor) -> _Plan:
        return _Plan(block_tables, context_lens, None, None, 0, 0)

    def forward(
        self, query: Tensor, k_cache: Tensor, v_cache: Tensor, plan: _Plan, window: int | None = None
    ) -> Tensor:
        num_single = len(plan.context_lens)
        # How many keys before and after its own a token sees; -1: all.
        window_size = (-1, -1) if window is None else (window - 1, 0)
        parts = []
        if num_single:
            arguments = _single_arguments(query[:num_single], k_cache, v_cache, plan)
            parts.append(self._attend_single(**arguments, window_size=window_size).squeeze(1))
        if plan.cu_query_lens is not None:
            arguments = _several_arguments(query[num_single:], k_cache, v_cache, plan)
            parts.append(self._attend_several(**arguments, window_size=window_size))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def load_flash_attention(
    model: ModelConfig, block_size: int, staging: Staging, dtype: torch.dtype, cache_dtype: torch.dtype
) -> FlashAttention:
    """The backend with the installed library.

    Raises:
        ConfigError: the library is not installed, or does not take the device, the cache or the model.
    """
    device = staging.device
    problem = None
    if device.type != "cuda":
        problem = f"runs on CUDA devices alone, and the device is {device.type}; expected attention_backend: auto"
    elif torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        problem = f"needs compute capability 8.0 or later, {torch.cuda.get_device_name(device)} is older"
    elif dtype not in (torch.bfloat16, torch.float16):
        problem = f"takes bfloat16 and float16, and dtype is {str(dtype).removeprefix('torch.')}"
    elif cache_dtype != dtype:
        problem = "has no FP8 KV cache; expected kv_cache_dtype: auto, or attention_backend: triton"
    elif block_size % PAGE_SIZE:
        problem = f"needs KV blocks of a multiple of {PAGE_SIZE} tokens, and block_size is {block_size}"
    elif model.head_dim > MAX_HEAD_DIM or model.head_dim % 8:
        problem = f"takes heads of a multiple of 8 values up to {MAX_HEAD_DIM}, and the model's have {model.head_dim}"
    if problem:
        raise ConfigError(f"attention_backend 'flash' {problem}")
    try:
        from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
    except ImportError as error:
        raise ConfigError(
            f"attention_backend is 'flash', but flash-attn cannot be imported ({error}); install the extra `flash`, "
            "or set attention_backend: auto"
        ) from None
    return FlashAttention(flash_attn_with_kvcache, flash_attn_varlen_func, staging)


def _single_arguments(query: Tensor, k_cache: Tensor, v_cache: Tensor, plan: _Plan) -> dict[str, Any]:
    """Arguments of `flash_attn_with_kvcache` for requests with one new token, which is in the cache already.

    Args:
        query: [num_single, num_heads, head_dim].
    """
    return {
        "q": query.unsqueeze(1),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "cache_seqlens": plan.context_lens,
        "block_table": plan.block_tables[: len(query)],
        "causal": True,
    }


def _several_arguments(query: Tensor, k_cache: Tensor, v_cache: Tensor, plan: _Plan) -> dict[str, Any]:
    """Arguments of `flash_attn_varlen_func` for requests with several new tokens.

    Args:
        query: [num_tokens of these requests, num_heads, head_dim].
    """
    return {
        "q": query,
        "k": k_cache,
        "v": v_cache,
        "cu_seqlens_q": plan.cu_query_lens,
        "cu_seqlens_k": plan.cu_context_lens,
        "max_seqlen_q": plan.longest_query,
        "max_seqlen_k": plan.longest_context,
        "causal": True,  # aligned to the end: the last new token sees the whole context
        "block_table": plan.block_tables[len(plan.context_lens) :],
    }


def _cumulative(lens: np.ndarray) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(lens))).astype(np.int32)
