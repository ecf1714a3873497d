"""Causal attention of one new token per request over the paged cache, as fast as memory can be read.

All (request, KV head, tile of keys) triples, in this order, are cut into one equal span for each program that the GPU
can hold at once. So a long context is shared among many programs, short ones share a program, and whatever the lengths
are, all programs end together (arXiv:2405.10480). Where a span's edge falls inside a head's keys, each program that has
a part of them leaves its result in scratch memory, and the last to arrive merges the parts, in the order of the keys.
Each program works its span out from the lengths, on the device: the launch is the same for any lengths, as CUDA graphs
need.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

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
from kernels.backend import CompileCase, num_multiprocessors, tl, triton, uses_triton

PROGRAMS_PER_MULTIPROCESSOR = 3
MAX_REGISTERS = 168
"""Of a thread, so that three programs of 128 threads fit into the 65,536 of a multiprocessor."""


@dataclass(frozen=True, slots=True)
class DecodeScratch:
    """Memory that the programs of one launch share. One serves all layers, but not two streams at once."""

    outputs: Tensor  # [2 · num_programs, group_size, head_dim] float32, results of parts
    log_sums: Tensor  # [2 · num_programs, group_size] float32, log2 of the sums of their weights
    arrivals: Tensor  # [num_programs] int32, how many parts are there; zero between launches


def decode_scratch(num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device) -> DecodeScratch:
    """Scratch memory for any batch of a model: a few MB, which also fixes the number of programs."""
    num_programs = num_multiprocessors(device) * PROGRAMS_PER_MULTIPROCESSOR
    return DecodeScratch(
        torch.empty(2 * num_programs, num_heads // num_kv_heads, head_dim, dtype=torch.float32, device=device),
        torch.empty(2 * num_programs, num_heads // num_kv_heads, dtype=torch.float32, device=device),
        torch.zeros(num_programs, dtype=torch.int32, device=device),
    )


def paged_decode_reference(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    *,
    softmax_scale: float | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    window: int | None = None,
    output: Tensor | None = None,
) -> Tensor:
    """As `paged_decode`, one request after another."""
    scale = query.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    output = torch.empty_like(query) if output is None else output
    for request, context_len in enumerate(context_lens.tolist()):
        if context_len == 0:
            output[request] = 0
            continue
        row = slice(request, request + 1)
        output[row] = attend_reference(
            query[row], k_cache, v_cache, block_table[request], context_len - 1, scale, (k_scale, v_scale), window
        )
    return output


@triton.jit
def _first_tile(context_lens: tl.tensor, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr) -> tl.tensor:
    """The first tile that is seen."""
    return tl.maximum(context_lens - WINDOW, 0) // BLOCK_N if WINDOW > 0 else context_lens * 0


@triton.jit
def _num_tiles(
    context_lens_ptr: tl.tensor,  # [batch_size] int32
    requests: tl.tensor,  # [CHUNK]
    batch_size: tl.tensor,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
) -> tl.tensor:
    """Tiles of keys [CHUNK] that each request sees: at least one, so that empty contexts are written too; 0 past the
    batch."""
    context_lens = tl.load(context_lens_ptr + requests, mask=requests < batch_size, other=0)
    seen = tl.cdiv(context_lens, BLOCK_N) - _first_tile(context_lens, BLOCK_N, WINDOW)
    return tl.where(requests < batch_size, tl.maximum(seen, 1), 0)


@triton.jit
def _add_pairs(a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor) -> tl.tensor:
    return a + c, b + d


@triton.jit
def _find_request(
    context_lens_ptr: tl.tensor,
    unit: tl.tensor,
    batch_size: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
) -> tl.tensor:
    """(the request that has the given unit of work, its first unit)."""
    request = 0
    first_unit = 0
    for first in range(0, batch_size, CHUNK):
        requests = first + tl.arange(0, CHUNK)
        units = _num_tiles(context_lens_ptr, requests, batch_size, BLOCK_N, WINDOW) * NUM_KV_HEADS
        # Never so for the last request, nor for what is past it.
        is_before = first_unit + tl.cumsum(units, axis=0) <= unit
        num_before, units_before = tl.reduce(
            (is_before.to(tl.int32), tl.where(is_before, units, 0)), axis=0, combine_fn=_add_pairs
        )
        request += num_before
        first_unit += units_before
    return request, first_unit


@triton.jit
def _store_rows(
    ptr: tl.tensor, stride: tl.tensor, rows: tl.tensor, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr
) -> None:
    """Write the first GROUP rows, `stride` apart."""
    row = tl.arange(0, rows.shape[0])[:, None]
    tl.store(ptr + row * stride + tl.arange(0, HEAD_DIM)[None, :], rows.to(ptr.dtype.element_ty), mask=row < GROUP)


@triton.jit
def _part_slot(program: tl.tensor, first_program: tl.tensor) -> tl.tensor:
    """Where a program leaves its part: a program may end one head's keys and begin another's, so each has two slots."""
    return 2 * program + (program == first_program).to(tl.int32)


@triton.jit
def _merge(
    part_outputs_ptr: tl.tensor,
    part_log_sums_ptr: tl.tensor,
    first_program: tl.tensor,
    num_parts: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
) -> tl.tensor:
    """The result [GROUP rounded up, HEAD_DIM] from the parts of programs first_program … + num_parts - 1."""
    ROWS: tl.constexpr = triton.next_power_of_2(GROUP)
    PARTS: tl.constexpr = max(1, 4096 // (ROWS * HEAD_DIM))  # at a time: 32 registers of a thread
    row = tl.arange(0, ROWS)[None, :]
    dim = tl.arange(0, HEAD_DIM)[None, None, :]
    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    merged = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    for first in range(0, num_parts, PARTS):
        part = first + tl.arange(0, PARTS)[:, None]
        part_rows = _part_slot(first_program + part, first_program) * GROUP + row
        mask = (part < num_parts) & (row < GROUP)
        # Past the first-level cache, which does not hear of other programs' stores.
        log_sums = tl.load(part_log_sums_ptr + part_rows, mask=mask, other=float("-inf"), cache_modifier=".cg")
        outputs_ptr = part_outputs_ptr + part_rows[:, :, None] * HEAD_DIM + dim
        outputs = tl.load(outputs_ptr, mask=mask[:, :, None], other=0.0, cache_modifier=".cg")
        # Rows past GROUP are all -inf; zero keeps them, unused as they are, from becoming NaN.
        new_maximum = tl.maximum(maximum, tl.maximum(tl.max(log_sums, axis=0), -1e30))
        decay = tl.exp2(maximum - new_maximum)
        weights = tl.exp2(log_sums - new_maximum[None, :])
        total = total * decay + tl.sum(weights, axis=0)
        merged = merged * decay[:, None] + tl.sum(outputs * weights[:, :, None], axis=0)
        maximum = new_maximum
    return merged / total[:, None]


@triton.jit(do_not_specialize=["batch_size", "table_stride"])
def _paged_decode_kernel(
    query_ptr: tl.tensor,  # [batch_size, num_heads, HEAD_DIM], the last contiguous
    k_cache_ptr: tl.tensor,  # [num_blocks, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM], the last contiguous
    v_cache_ptr: tl.tensor,  # same shape, dtype and strides
    block_table_ptr: tl.tensor,  # [batch_size, max_blocks] int32, rows table_stride apart
    context_lens_ptr: tl.tensor,  # [batch_size] int32 contiguous
    output_ptr: tl.tensor,  # shape and dtype of query, the last contiguous
    part_outputs_ptr: tl.tensor,  # [2 · num_programs, GROUP, HEAD_DIM] float32 contiguous
    part_log_sums_ptr: tl.tensor,  # [2 · num_programs, GROUP] float32 contiguous
    arrivals_ptr: tl.tensor,  # [num_programs] int32
    scale: tl.tensor,  # softmax scale · k_scale · log2(e)
    v_scale: tl.tensor,
    batch_size: tl.tensor,
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
    BLOCK_M: tl.constexpr,  # rows of a tile of queries, at least GROUP
    BLOCK_N: tl.constexpr,  # keys of a tile
    CHUNK: tl.constexpr,  # requests looked at together
    DTYPE: tl.constexpr,  # what is multiplied
    WINDOW: tl.constexpr,  # how many of its last tokens a request sees; 0: all
) -> None:
    # A unit of work is one tile of keys of one KV head of one request. This program has those from `unit` to `stop`.
    num_units = 0
    for first in range(0, batch_size, CHUNK):
        tiles = _num_tiles(context_lens_ptr, first + tl.arange(0, CHUNK), batch_size, BLOCK_N, WINDOW)
        num_units += tl.sum(tiles, axis=0) * NUM_KV_HEADS
    span = tl.cdiv(num_units, tl.num_programs(0))
    unit = tl.program_id(0) * span
    stop = tl.minimum(unit + span, num_units)
    if unit >= stop:
        return
    request, request_unit = _find_request(context_lens_ptr, unit, batch_size, NUM_KV_HEADS, BLOCK_N, CHUNK, WINDOW)
    while unit < stop:
        context_len = tl.load(context_lens_ptr + request)
        unseen_tiles = _first_tile(context_len, BLOCK_N, WINDOW)
        num_tiles = tl.maximum(tl.cdiv(context_len, BLOCK_N) - unseen_tiles, 1)
        kv_head = (unit - request_unit) // num_tiles
        # The head's units are head_unit … head_unit + num_tiles - 1; this program's among them:
        head_unit = request_unit + kv_head * num_tiles
        first_tile = unit - head_unit
        stop_tile = tl.minimum(num_tiles, stop - head_unit)
        head_row = (kv_head * GROUP).to(tl.int64)
        cache_offset = kv_head * head_stride
        row = tl.arange(0, BLOCK_M)
        dim = tl.arange(0, HEAD_DIM)
        head_query_ptr = query_ptr + request.to(tl.int64) * query_row_stride + head_row * query_head_stride
        query = tl.load(
            head_query_ptr + row[:, None] * query_head_stride + dim[None, :], mask=row[:, None] < GROUP, other=0.0
        )
        values, total, maximum = attend_tiles(
            query.to(DTYPE),
            context_len - 1 + tl.zeros_like(row),
            k_cache_ptr + cache_offset,
            v_cache_ptr + cache_offset,
            block_table_ptr + request.to(tl.int64) * table_stride,
            unseen_tiles + first_tile,
            unseen_tiles + stop_tile,
            context_len,
            context_len,
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
        # An empty context has no maximum; its result is zero.
        result = tl.where(context_len > 0, values * (v_scale / total)[:, None], 0.0)
        head_output_ptr = output_ptr + request.to(tl.int64) * output_row_stride + head_row * output_head_stride
        if stop_tile - first_tile == num_tiles:
            _store_rows(head_output_ptr, output_head_stride, result, GROUP, HEAD_DIM)
        else:
            # Parts have a program each, the first of which begins the head's units and may end another head's before.
            first_program = head_unit // span
            num_parts = (head_unit + num_tiles - 1) // span - first_program + 1
            slot = _part_slot(tl.program_id(0), first_program)
            _store_rows(part_outputs_ptr + slot * GROUP * HEAD_DIM, HEAD_DIM, result, GROUP, HEAD_DIM)
            tl.store(part_log_sums_ptr + slot * GROUP + row, maximum + tl.log2(total), mask=row < GROUP)
            # All threads have stored before one thread, releasing, says so.
            tl.debug_barrier()
            arrived = tl.atomic_add(arrivals_ptr + first_program, 1, sem="acq_rel", scope="gpu")
            if arrived == num_parts - 1:
                tl.store(arrivals_ptr + first_program, 0)
                merged = _merge(part_outputs_ptr, part_log_sums_ptr, first_program, num_parts, GROUP, HEAD_DIM)
                _store_rows(head_output_ptr, output_head_stride, merged, GROUP, HEAD_DIM)
        unit = head_unit + stop_tile
        if unit == request_unit + num_tiles * NUM_KV_HEADS:
            request += 1
            request_unit = unit


def paged_decode_config(head_dim: int, query_dtype: torch.dtype) -> tuple[int, int]:
    """(BLOCK_N, num_stages).

    A tile of keys is 16 KiB. With three stages two tiles of keys and as many of values are on their way at a time in
    each program, with three programs 192 KiB on each multiprocessor; 40 KiB would cover the time that memory takes.
    """
    return (4096 if query_dtype == torch.float32 else 8192) // head_dim, 3


def paged_decode(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    scratch: DecodeScratch | None = None,
    *,
    softmax_scale: float | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    window: int | None = None,
    output: Tensor | None = None,
) -> Tensor:
    """Attention of one token per request over all tokens of the request. Nothing waits for the device.

    Args:
        query: [batch_size, num_heads, head_dim] float16, bfloat16 or float32, any strides but the last. head_dim 64,
            128 or 256.
        k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim] of query's dtype or float8_e4m3fn (then
            multiplied in float16: query must be within ±65,504), same strides. block_size 16, 32, 64, 128 or 256.
        block_table: [batch_size, max_blocks] int32; ids past a request's blocks are never read.
        context_lens: [batch_size] int32 on query's device, tokens of each request, its own included. 0 gives zeros.
        scratch: from `decode_scratch`. None: allocated here, at the cost of one more launch.
        softmax_scale: head_dim ** -0.5 if None.
        k_scale, v_scale: what stored keys and values are to be multiplied by.
        window: how many of a request's last tokens are seen; None: all.
        output: shape and dtype of query, where to write; None: a new tensor.

    Returns:
        [batch_size, num_heads, head_dim], the dtype of query: `output` if given. Rounding depends on where the batch's
        lengths put the edges of spans.

    Raises:
        ValueError: a tensor or a scale that is not as above.
    """
    check_attention(query, k_cache, v_cache, block_table)
    scale = softmax_scale_base2(softmax_scale, query.shape[2], k_scale)
    if context_lens.dtype != torch.int32 or context_lens.shape != query.shape[:1] or len(block_table) < len(query):
        raise ValueError(
            f"context_lens is {context_lens.dtype} {tuple(context_lens.shape)} and block_table has {len(block_table)} "
            f"rows; expected int32 [{len(query)}] and {len(query)} rows, one for each of query"
        )
    output = output_like(query, output)
    if not uses_triton(query):
        return paged_decode_reference(
            query,
            k_cache,
            v_cache,
            block_table,
            context_lens,
            softmax_scale=softmax_scale,
            k_scale=k_scale,
            v_scale=v_scale,
            window=window,
            output=output,
        )
    _, block_size, num_kv_heads, head_dim = k_cache.shape
    group_size = query.shape[1] // num_kv_heads
    if scratch is None:
        scratch = decode_scratch(query.shape[1], num_kv_heads, head_dim, query.device)
    elif scratch.outputs.shape[1:] != (group_size, head_dim):
        raise ValueError(
            f"scratch is for {tuple(scratch.outputs.shape[1:])}, expected (group_size, head_dim) = "
            f"{(group_size, head_dim)}"
        )
    if len(query) == 0:
        return output
    block_m = max(16, triton.next_power_of_2(group_size))
    block_n, num_stages = paged_decode_config(head_dim, query.dtype)
    _paged_decode_kernel[(len(scratch.arrivals),)](
        query,
        k_cache,
        v_cache,
        block_table,
        context_lens.contiguous(),
        output,
        scratch.outputs,
        scratch.log_sums,
        scratch.arrivals,
        scale,
        v_scale,
        len(query),
        *query.stride()[:2],
        *output.stride()[:2],
        block_table.stride(0),
        *k_cache.stride()[:3],
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group_size,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        CHUNK=32 if len(query) <= 32 else 128,
        DTYPE=TRITON_TYPES[matmul_dtype(query, k_cache)],
        WINDOW=check_window(window),
        num_warps=4,
        num_stages=num_stages,
        maxnreg=MAX_REGISTERS if block_m < 64 else None,
    )
    return output


def compile_cases() -> list[CompileCase]:
    """Qwen3-0.6B (16 query heads for 8) and 8B (32 for 8), and the other paths."""
    bf16, fp32 = torch.bfloat16, torch.float32
    shapes: list[tuple[Any, ...]] = [
        # num_heads, num_kv_heads, head_dim, batch_size, query dtype, cache dtype, window
        (16, 8, 128, 1, bf16, bf16),
        (32, 8, 128, 64, bf16, bf16),
        (8, 4, 256, 64, bf16, bf16),
        (32, 8, 128, 64, bf16, FLOAT8),
        (16, 8, 128, 64, fp32, fp32),
        (32, 8, 128, 64, bf16, bf16, 4096),
    ]
    return [
        CompileCase(
            name=f"paged_decode {shape[0]}/{shape[1]}x{shape[2]} {shape[5]}, batch {shape[3]}"
            + (f", window {shape[6]}" if len(shape) > 6 else ""),
            launch=partial(_launch_on_meta, *shape),
            min_capability=89 if shape[5] == FLOAT8 else 80,
            max_spill_bytes=128,  # around the loop over tiles, not in it
        )
        for shape in shapes
    ]


def _launch_on_meta(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    batch_size: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    window: int | None = None,
) -> Tensor:
    query = torch.empty(batch_size, num_heads, head_dim, dtype=dtype, device="meta")
    cache = torch.empty(1024, 16, num_kv_heads, head_dim, dtype=cache_dtype, device="meta")
    table = torch.empty(batch_size, 512, dtype=torch.int32, device="meta")
    lens = torch.empty(batch_size, dtype=torch.int32, device="meta")
    return paged_decode(query, cache, cache, table, lens, window=window)
