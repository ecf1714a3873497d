"""x · weightᵀ with weights as GGUF files hold them: blocks of 32 inputs of a channel with a float16 scale.

Q8_0: an int8 code for each input, weight = code · scale. Q4_0: 16 bytes, byte j with the code of input j in its lower
half and that of input 16 + j in its upper half, weight = (code − 8) · scale. Codes stay as the file has them; scales
come apart, groups first, so that those of neighbouring channels are read at once. As in weight_only_mm, few rows take
the time of reading the weights, so an output tile is split among programs where there are too few.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import cpu_ops
from kernels.backend import CompileCase, num_multiprocessors, tl, triton, uses_triton
from kernels.quantize_weights import BLOCK, dequantize_blocks
from kernels.split_k import (
    combine_splits,
    pipeline_stages,
    plan_splits,
    shared_memory_limit,
    split_buffers,
)
from kernels.weight_only_mm import MAX_ROWS, store_rows

CPU_ROWS = 64
"""On a CPU, with more rows than this, weights are worth widening for the product of full-width matrices."""
BLOCK_BYTES = {torch.int8: 32, torch.uint8: 16}
"""Of a block's codes."""
TILE_CHANNELS = 64
STEP = 4
"""Blocks of a channel that a program reads at a time: with more of Q4_0, registers run out on older GPUs."""
WIDEN_CHANNELS = 16


@triton.jit
def widened(
    codes: tl.tensor,  # [channels, blocks, BYTES] int8 or uint8
    scale: tl.tensor,  # [channels, blocks] float16
    HALF: tl.constexpr,  # of each byte, where it holds two codes
    BYTES: tl.constexpr,
    DTYPE: tl.constexpr,
) -> tl.tensor:
    """[channels, blocks · BYTES] weights of DTYPE."""
    numbers = codes.to(tl.int32)
    if BYTES == 16:
        numbers = ((numbers >> (4 * HALF)) & 15) - 8
    wide = (numbers.to(tl.float32) * scale.to(tl.float32)[:, :, None]).to(DTYPE)
    return tl.reshape(wide, [codes.shape[0], codes.shape[1] * BYTES])


@triton.jit(do_not_specialize=["num_rows"])
def _weight_only_blocks_kernel(
    x_ptr: tl.tensor,  # [num_rows, BLOCKS · 32] bfloat16 or float16, rows x_stride apart
    weight_ptr: tl.tensor,  # [N, BLOCKS · BYTES] int8 or uint8, contiguous
    scale_ptr: tl.tensor,  # [BLOCKS, N] float16, contiguous
    bias_ptr: tl.tensor,  # [N] dtype of x, or None
    y_ptr: tl.tensor,  # [num_rows, N] dtype of x, contiguous
    parts_ptr: tl.tensor,  # see combine_splits
    counters_ptr: tl.tensor,
    num_rows: tl.tensor,
    x_stride: tl.tensor,
    N: tl.constexpr,
    BLOCKS: tl.constexpr,
    BYTES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,  # blocks of a channel taken at a time
    STEPS: tl.constexpr,  # how many times a program does
    SPLITS: tl.constexpr,
) -> None:
    tile, split = tl.program_id(0), tl.program_id(1)
    rows = tl.arange(0, BLOCK_M)
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tl.arange(0, STEP)
    byte = tl.arange(0, STEP * BYTES)
    inputs = byte // BYTES * 32 + byte % BYTES
    x_ptrs = x_ptr + rows[:, None].to(tl.int64) * x_stride + inputs[None, :]
    offsets = block[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
    weight_ptrs = weight_ptr + columns[:, None, None].to(tl.int64) * (BLOCKS * BYTES) + offsets[None, :, :]
    scale_ptrs = scale_ptr + block[None, :] * N + columns[:, None]
    x_mask, is_channel = rows[:, None] < num_rows, columns < N
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    begin = split * (STEPS * STEP)
    for first in range(begin, min(begin + STEPS * STEP, BLOCKS), STEP):
        left = STEP if BLOCKS % STEP == 0 else BLOCKS - first
        mask = is_channel[:, None] & (block < left)[None, :]
        codes = tl.load(weight_ptrs + first * BYTES, mask=mask[:, :, None], other=0)
        scale = tl.load(scale_ptrs + first * N, mask=mask, other=0.0)
        for half in tl.static_range(32 // BYTES):
            x = tl.load(x_ptrs + first * 32 + half * 16, mask=x_mask & (inputs < left * 32)[None, :], other=0.0)
            total = tl.dot(x, tl.trans(widened(codes, scale, half, BYTES, x.dtype)), total)
    total, is_last = combine_splits(total, parts_ptr, counters_ptr, tile, split, BLOCK_M, BLOCK_N, SPLITS)
    store_rows(y_ptr, bias_ptr, total, rows, columns, x_mask & is_channel[None, :] & is_last, N)


@triton.jit
def _widen_blocks_kernel(
    weight_ptr: tl.tensor,  # [N, BLOCKS · BYTES] int8 or uint8, contiguous
    scale_ptr: tl.tensor,  # [BLOCKS, N] float16, contiguous
    wide_ptr: tl.tensor,  # [N, BLOCKS · 32] contiguous
    N: tl.constexpr,
    BLOCKS: tl.constexpr,
    BYTES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tl.program_id(1) * STEP + tl.arange(0, STEP)
    mask = (columns < N)[:, None] & (block < BLOCKS)[None, :]
    places = columns[:, None].to(tl.int64) * BLOCKS + block[None, :]
    codes = tl.load(weight_ptr + places[:, :, None] * BYTES + tl.arange(0, BYTES), mask=mask[:, :, None], other=0)
    scale = tl.load(scale_ptr + block[None, :] * N + columns[:, None], mask=mask, other=0.0)
    byte = tl.program_id(1) * (STEP * BYTES) + tl.arange(0, STEP * BYTES)
    inputs = byte // BYTES * 32 + byte % BYTES
    wide_mask = (columns < N)[:, None] & (inputs < BLOCKS * 32)[None, :]
    wide_ptrs = wide_ptr + columns[:, None].to(tl.int64) * (BLOCKS * 32) + inputs[None, :]
    for half in tl.static_range(32 // BYTES):
        wide = widened(codes, scale, half, BYTES, wide_ptr.dtype.element_ty)
        tl.store(wide_ptrs + half * 16, wide, mask=wide_mask)


def weight_only_blocks_reference(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `weight_only_blocks`: the weights in x's dtype, then an ordinary product."""
    return F.linear(x, dequantize_blocks(weight, scale, x.dtype), bias)


def weight_only_blocks_cpu(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `weight_only_blocks`, on a CPU: the C++ operations widen weights in registers."""
    y = None
    if x.shape[0] <= CPU_ROWS:
        y = cpu_ops.linear_blocks(x.contiguous(), weight, scale, bias)
    return weight_only_blocks_reference(x, weight, scale, bias) if y is None else y


def weight_only_blocks(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias, fastest for up to 64 rows; weights are widened in memory for more.

    Args:
        x: [num_rows, K] bfloat16 or float16 (on CPU also float32), any row stride; K is a multiple of 32.
        weight: contiguous codes, int8 [N, K] of Q8_0 or uint8 [N, K/2] of Q4_0.
        scale: contiguous float16 [K/32, N].
        bias: [N], the dtype of x, or None.

    Returns:
        [num_rows, N], the dtype of x.

    Raises:
        ValueError: shapes or dtypes that are not as above.
    """
    _check(x, weight, scale, bias)
    if not uses_triton(x):
        return weight_only_blocks_cpu(x, weight, scale, bias)
    if x.shape[0] > MAX_ROWS:
        return F.linear(x, widen_blocks(weight, scale, x.dtype), bias)
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    if x.shape[0]:
        _launch(x, weight, scale, bias, y)
    return y


def widen_blocks(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """weight · scale: [N, K] of `dtype`, from weight and scale as for `weight_only_blocks`, on a GPU."""
    (blocks, channels), num_bytes = scale.shape, BLOCK_BYTES[weight.dtype]
    wide = torch.empty(channels, blocks * BLOCK, dtype=dtype, device=weight.device)
    grid = (triton.cdiv(channels, WIDEN_CHANNELS), triton.cdiv(blocks, STEP))
    sizes = {"N": channels, "BLOCKS": blocks, "BYTES": num_bytes}
    _widen_blocks_kernel[grid](weight, scale, wide, **sizes, BLOCK_N=WIDEN_CHANNELS, STEP=STEP, num_warps=4)
    return wide


def _check(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    if weight.dtype not in BLOCK_BYTES or not (weight.is_contiguous() and scale.is_contiguous()):
        raise ValueError(
            f"weight is {weight.dtype} with strides {weight.stride()}, expected contiguous {list(BLOCK_BYTES)}"
        )
    channels, blocks = weight.shape[0], weight.shape[1] // BLOCK_BYTES[weight.dtype]
    if x.dim() != 2 or x.stride(1) != 1 or x.shape[1] != blocks * BLOCK:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and strides {x.stride()}, expected contiguous rows of {blocks * BLOCK} "
            f"for {weight.dtype} weight {tuple(weight.shape)}"
        )
    if scale.shape != (blocks, channels) or scale.dtype != torch.float16:
        raise ValueError(f"scale is {scale.dtype} {tuple(scale.shape)}, expected float16 {(blocks, channels)}")
    if bias is not None and (bias.shape != (channels,) or bias.dtype != x.dtype):
        raise ValueError(f"bias is {bias.dtype} {tuple(bias.shape)}, expected {x.dtype} {(channels,)}")
    if uses_triton(x) and x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"x is {x.dtype}, expected bfloat16 or float16 on a GPU")


def _launch(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, y: Tensor) -> None:
    blocks, channels = scale.shape
    num_bytes = BLOCK_BYTES[weight.dtype]
    block_m = max(16, triton.next_power_of_2(x.shape[0]))
    stage_bytes = STEP * (TILE_CHANNELS * num_bytes + block_m * BLOCK * 2)
    num_tiles = triton.cdiv(channels, TILE_CHANNELS)
    steps, splits = plan_splits(num_tiles, triton.cdiv(blocks, STEP), 2 * num_multiprocessors(x.device))
    parts, counters = split_buffers(num_tiles, splits, block_m * TILE_CHANNELS, x.device)
    _weight_only_blocks_kernel[num_tiles, splits](
        *(x, weight, scale, bias, y, parts, counters, x.shape[0], x.stride(0)),
        **{"N": channels, "BLOCKS": blocks, "BYTES": num_bytes, "BLOCK_M": block_m, "BLOCK_N": TILE_CHANNELS},
        **{"STEP": STEP, "STEPS": steps, "SPLITS": splits, "num_warps": 4},
        num_stages=pipeline_stages(stage_bytes, shared_memory_limit(x.device)),
    )


def compile_cases() -> list[CompileCase]:
    """Both kinds of blocks, with and without a split: o_proj, gate_up and down_proj of Qwen3 8B; and widening."""

    def case(dtype: torch.dtype, x_dtype: torch.dtype, num_rows: int, channels: int, inner: int) -> CompileCase:
        x = torch.empty(num_rows, inner, dtype=x_dtype, device="meta")
        weight = torch.empty(channels, inner // BLOCK * BLOCK_BYTES[dtype], dtype=dtype, device="meta")
        scale = torch.empty(inner // BLOCK, channels, dtype=torch.float16, device="meta")
        name = f"weight_only_blocks {dtype} {x_dtype} {num_rows}x{channels}x{inner}".replace("torch.", "")
        return CompileCase(name, lambda: weight_only_blocks(x, weight, scale))

    sizes = ((1, 4096, 4096), (32, 24_576, 4096), (64, 4096, 12_288))
    cases = [case(dtype, torch.bfloat16, *size) for dtype in BLOCK_BYTES for size in sizes]
    wide = CompileCase(
        "widen_blocks uint8",
        lambda: widen_blocks(
            torch.empty(4096, 2048, dtype=torch.uint8, device="meta"),
            torch.empty(128, 4096, dtype=torch.float16, device="meta"),
            torch.bfloat16,
        ),
    )
    return [*cases, case(torch.uint8, torch.float16, *sizes[0]), wide]
