"""Causal attention of many new tokens over the paged cache: prompts, chunks of prompts and single tokens in one launch.

A program attends with the query heads of one KV head for a few consecutive tokens of one request, a "query block", so
that keys and values are read once for all of them. It walks the request's keys tile by tile, straight from their
blocks, with the softmax computed on the way (arXiv:2205.14135) in base 2. Which query blocks there are is planned on
the host, where all lengths are known: the longest come first, so that none is left to run alone at the end.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.attention_common import (
    FLOAT8,
    TRITON_TYPES,
    attend_reference,
    attend_tiles,
    check_attention,
    check_window,
    matmul_dtype,
    output_like,
    softmax_scale_base2,
)
from kernels.backend import CompileCase, tl, triton, uses_triton

ROWS = (16, 64, 128)
"""Rows of a query block's tile, (token, query head) pairs: 16 is the least for tensor cores, 64 the least for wgmma."""


def tokens_per_query_block(max_query_len: int, group_size: int) -> int:
    """How many tokens a query block should have: as many as there are, or as fill the largest tile.

    Args:
        max_query_len: new tokens of the request that has most.
        group_size: query heads of a KV head.
    """
    wanted = max_query_len * group_size
    rows = next((rows for rows in ROWS if rows >= wanted), ROWS[-1])
    return max(1, rows // group_size)


def plan_query_blocks(
    query_starts: np.ndarray, query_lens: np.ndarray, context_lens: np.ndarray, tokens_per_block: int
) -> np.ndarray:
    """Cut the new tokens of each request into query blocks, those with most keys first.

    Args:
        query_starts: [num_requests], row of the request's first new token in the query.
        query_lens: [num_requests], new tokens; 0 for none.
        context_lens: [num_requests], all tokens, the new ones last; ≥ query_lens.
        tokens_per_block: most tokens in a block.

    Returns:
        int32 [num_query_blocks, 4]: request, row of the first token in the query, number of tokens, and the first
        token's position in its request. Rows of zeros may be added to reach a fixed number.
    """
    num_blocks = -(-query_lens // tokens_per_block)
    request = np.repeat(np.arange(len(query_lens)), num_blocks)
    first = (np.arange(len(request)) - (np.cumsum(num_blocks) - num_blocks)[request]) * tokens_per_block
    plan = np.empty((len(request), 4), np.int32)
    plan[:, 0] = request
    plan[:, 1] = query_starts[request] + first
    plan[:, 2] = np.minimum(tokens_per_block, query_lens[request] - first)
    plan[:, 3] = (context_lens - query_lens)[request] + first
    return plan[np.argsort(-(plan[:, 2] + plan[:, 3]), kind="stable")]


def paged_attention_reference(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    query_blocks: Tensor,
    *,
    softmax_scale: float | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    window: int | None = None,
    output: Tensor | None = None,
) -> Tensor:
    """As `paged_attention`, one query block after another."""
    scale = query.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    output = torch.empty_like(query) if output is None else output
    for request, row, num_tokens, position in query_blocks.tolist():
        rows = slice(row, row + num_tokens)
        output[rows] = attend_reference(
            query[rows], k_cache, v_cache, block_table[request], position, scale, (k_scale, v_scale), window
        )
    return output


@triton.jit(do_not_specialize=["table_stride"])
def _paged_attention_kernel(
    query_ptr: tl.tensor,  # [num_tokens, num_heads, HEAD_DIM], the last contiguous
    k_cache_ptr: tl.tensor,  # [num_blocks, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM], the last contiguous
    v_cache_ptr: tl.tensor,  # same shape, dtype and strides
    block_table_ptr: tl.tensor,  # [num_requests, max_blocks] int32, rows table_stride apart
    query_blocks_ptr: tl.tensor,  # [num_query_blocks, 4] int32 contiguous: request, first row, tokens, position
    output_ptr: tl.tensor,  # shape and dtype of query, the last contiguous
    scale: tl.tensor,  # softmax scale · k_scale · log2(e)
    v_scale: tl.tensor,
    query_row_stride: tl.tensor,
    query_head_stride: tl.tensor,
    output_row_stride: tl.tensor,
    output_head_stride: tl.tensor,
    table_stride: tl.tensor,
    block_stride: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a KV head
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows of a tile of queries: GROUP for each token
    BLOCK_N: tl.constexpr,  # keys of a tile
    DTYPE: tl.constexpr,  # what is multiplied
    WINDOW: tl.constexpr,  # how many keys up to its own a token sees; 0: all
) -> None:
    # Grid: one program for each query block and KV head; the heads of a block run together and end together.
    entry_ptr = query_blocks_ptr + (tl.program_id(0) // NUM_KV_HEADS).to(tl.int64) * 4
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    num_tokens = tl.load(entry_ptr + 2)
    if num_tokens == 0:
        return
    position = tl.load(entry_ptr + 3)
    token = tl.arange(0, BLOCK_M) // GROUP
    query_rows = (tl.load(entry_ptr + 1).to(tl.int64) + token)[:, None]
    query_heads = (kv_head * GROUP + tl.arange(0, BLOCK_M) % GROUP)[:, None]
    is_token = (token < num_tokens)[:, None]
    dim = tl.arange(0, HEAD_DIM)[None, :]
    query = tl.load(
        query_ptr + query_rows * query_row_stride + query_heads * query_head_stride + dim, mask=is_token, other=0.0
    ).to(DTYPE)
    num_keys = position + num_tokens
    first_tile = tl.maximum(position + 1 - WINDOW, 0) // BLOCK_N if WINDOW > 0 else 0
    values, total, _ = attend_tiles(
        query,
        position + token,
        k_cache_ptr + kv_head * head_stride,
        v_cache_ptr + kv_head * head_stride,
        block_table_ptr + tl.load(entry_ptr).to(tl.int64) * table_stride,
        first_tile,
        tl.cdiv(num_keys, BLOCK_N),
        position + 1,
        num_keys,
        scale,
        block_stride,
        token_stride,
        HEAD_DIM,
        BLOCK_SIZE,
        BLOCK_M,
        BLOCK_N,
        DTYPE,
        WINDOW,
    )
    result = values * (v_scale / total)[:, None]
    tl.store(
        output_ptr + query_rows * output_row_stride + query_heads * output_head_stride + dim,
        result.to(output_ptr.dtype.element_ty),
        mask=is_token,
    )


def paged_attention_config(head_dim: int, block_m: int, query_dtype: torch.dtype) -> tuple[int, int, int]:
    """(BLOCK_N, num_warps, num_stages).

    With 128 rows the limit is registers: 8 warps hold 128 × 128 sums and 128 × 64 scores. 16 rows wait for memory and
    want small tiles. float32 has no tensor cores at full precision; its tiles are as small as registers demand.
    """
    if query_dtype == torch.float32:
        return 16 if head_dim == 256 else 32, 8 if block_m == 128 else 4, 2
    if block_m == 128:
        return {64: 128, 128: 64, 256: 32}[head_dim], 8, 3
    return {64: 64, 128: 64, 256: 32}[head_dim], 4, 3


def paged_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    query_blocks: Tensor,
    tokens_per_block: int,
    *,
    softmax_scale: float | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    window: int | None = None,
    output: Tensor | None = None,
) -> Tensor:
    """Causal attention of each new token over its request's tokens up to itself. Nothing waits for the device.

    Args:
        query: [num_tokens, num_heads, head_dim] float16, bfloat16 or float32, any strides but the last. head_dim 64,
            128 or 256.
        k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim] of query's dtype or float8_e4m3fn (then
            multiplied in float16: query must be within ±65,504), same strides. block_size 16, 32, 64, 128 or 256.
        block_table: [num_requests, max_blocks] int32; ids past a request's blocks are never read.
        query_blocks: int32 [num_query_blocks, 4] on query's device, from `plan_query_blocks`.
        tokens_per_block: the number that `plan_query_blocks` was given.
        softmax_scale: head_dim ** -0.5 if None.
        k_scale, v_scale: what stored keys and values are to be multiplied by.
        window: how many tokens up to itself a token sees; None: all.
        output: shape and dtype of query, where to write; None: a new tensor. Rows of no query block are not written.

    Returns:
        [num_tokens, num_heads, head_dim], the dtype of query: `output` if given.

    Raises:
        ValueError: a tensor or a scale that is not as above.
    """
    check_attention(query, k_cache, v_cache, block_table)
    scale = softmax_scale_base2(softmax_scale, query.shape[2], k_scale)
    block_m = _block_m(query, k_cache, query_blocks, tokens_per_block)
    output = output_like(query, output)
    if not uses_triton(query):
        return paged_attention_reference(
            query,
            k_cache,
            v_cache,
            block_table,
            query_blocks,
            softmax_scale=softmax_scale,
            k_scale=k_scale,
            v_scale=v_scale,
            window=window,
            output=output,
        )
    _, block_size, num_kv_heads, head_dim = k_cache.shape
    block_n, num_warps, num_stages = paged_attention_config(head_dim, block_m, query.dtype)
    if len(query_blocks) == 0:
        return output
    _paged_attention_kernel[(len(query_blocks) * num_kv_heads,)](
        query,
        k_cache,
        v_cache,
        block_table,
        query_blocks,
        output,
        scale,
        v_scale,
        *query.stride()[:2],
        *output.stride()[:2],
        block_table.stride(0),
        *k_cache.stride()[:3],
        NUM_KV_HEADS=num_kv_heads,
        GROUP=query.shape[1] // num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        DTYPE=TRITON_TYPES[matmul_dtype(query, k_cache)],
        WINDOW=check_window(window),
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return output


def _block_m(query: Tensor, k_cache: Tensor, query_blocks: Tensor, tokens_per_block: int) -> int:
    """Rows of the tile of queries."""
    group_size = query.shape[1] // k_cache.shape[2]
    if not 1 <= tokens_per_block * group_size <= ROWS[-1]:
        raise ValueError(
            f"tokens_per_block is {tokens_per_block}, expected 1 to {ROWS[-1] // group_size} where {group_size} query "
            "heads share a KV head"
        )
    if query_blocks.dtype != torch.int32 or query_blocks.shape[1:] != (4,) or not query_blocks.is_contiguous():
        raise ValueError(
            f"query_blocks is {query_blocks.dtype} {tuple(query_blocks.shape)}, expected contiguous int32 "
            "[num_query_blocks, 4]"
        )
    return next(rows for rows in ROWS if rows >= tokens_per_block * group_size)


def compile_cases() -> list[CompileCase]:
    """Prompts of Qwen3-0.6B (16 query heads for 8) and 8B (32 for 8), speculative tokens, and the other paths."""
    bf16, fp16 = torch.bfloat16, torch.float16
    shapes: list[tuple[Any, ...]] = [
        # num_heads, num_kv_heads, head_dim, block_size, num_tokens, query dtype, cache dtype, window
        (16, 8, 128, 16, 4096, bf16, bf16),
        (28, 4, 128, 256, 4096, fp16, fp16),
        (32, 8, 128, 16, 4, bf16, bf16),
        (8, 4, 256, 16, 32, bf16, bf16),
        (32, 8, 128, 16, 4096, bf16, FLOAT8),
        (32, 8, 128, 16, 4096, bf16, bf16, 4096),
        (32, 8, 128, 16, 4, bf16, bf16, 4096),
    ]
    return [
        CompileCase(
            name=f"paged_attention {shape[0]}/{shape[1]}x{shape[2]} {shape[6]} of {shape[3]}, {shape[4]} tokens"
            + (f", window {shape[7]}" if len(shape) > 7 else ""),
            launch=partial(_launch_on_meta, *shape),
            min_capability=89 if shape[6] == FLOAT8 else 80,
            wgmma=shape[4] * shape[0] // shape[1] >= 64,
            max_spill_bytes=144,  # around the loop over tiles, not in it
        )
        for shape in shapes
    ]


def _launch_on_meta(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    num_tokens: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    window: int | None = None,
) -> Tensor:
    query = torch.empty(num_tokens, num_heads, head_dim, dtype=dtype, device="meta")
    cache = torch.empty(1024, block_size, num_kv_heads, head_dim, dtype=cache_dtype, device="meta")
    table, blocks = (torch.empty(7, width, dtype=torch.int32, device="meta") for width in (512, 4))
    tokens_per_block = tokens_per_query_block(num_tokens, num_heads // num_kv_heads)
    return paged_attention(query, cache, cache, table, blocks, tokens_per_block, window=window)
