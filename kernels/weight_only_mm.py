"""x · weightᵀ with few rows of x and weights of 8 or 4 bits, which are widened on their way to the matrix units.

With few rows the time is that of reading the weights, so every multiprocessor streams a share of them: a program takes
a tile of output channels for all rows, and where that makes too few programs, a part of the inner dimension (split_k).
Two orientations of the product: x · weightᵀ on the classic matrix instruction takes the fewest instructions a weight
for few rows; past that weight · xᵀ, whose left operand Hopper's wgmma reads from registers, where weights are widened.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import cpu_ops
from kernels.backend import CompileCase, num_multiprocessors, tl, triton, uses_triton
from kernels.int4_codes import NIBBLE_BASE, UNPACK_ASSEMBLY, int4_codes
from kernels.quantize_fp8 import require_fp8
from kernels.quantize_weights import GROUP, SPAN, WORDS
from kernels.split_k import (
    PLANNED_SHARED_MEMORY,
    combine_splits,
    pipeline_stages,
    plan_splits,
    shared_memory_limit,
    split_buffers,
)
from kernels.widen_weights import widen_weights

MAX_ROWS = 64
"""More rows of x are worth widening the weights in memory for, and a product of full-width matrices."""
INT8_CPU_ROWS = 64
"""On a CPU, with more rows than this, int8 weights are worth widening for the product of full-width matrices."""
BITS = {torch.int8: 8, torch.float8_e4m3fn: 8, torch.int16: 4}


def weight_only_mm_reference(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `weight_only_mm`: the weights in x's dtype, then an ordinary product."""
    return F.linear(x, widen_weights(weight, scale, x.shape[1], x.dtype), bias)


def weight_only_mm_cpu(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `weight_only_mm`, on a CPU: the C++ operations widen weights in registers."""
    y = None
    if weight.dtype == torch.int16:
        y = cpu_ops.linear_int4(x.contiguous(), weight, scale, bias)
    elif x.shape[0] <= INT8_CPU_ROWS:
        y = cpu_ops.linear_int8(x.contiguous(), weight, scale, bias)
    return weight_only_mm_reference(x, weight, scale, bias) if y is None else y


@triton.jit
def _dot(x: tl.tensor, weight: tl.tensor, total: tl.tensor, SWAP: tl.constexpr) -> tl.tensor:
    """total + x [BLOCK_M, k] · weight [BLOCK_N, k]ᵀ, transposed where SWAP."""
    return tl.dot(weight, tl.trans(x), total) if SWAP else tl.dot(x, tl.trans(weight), total)


@triton.jit
def store_rows(
    y_ptr: tl.tensor,  # [num_rows, N] contiguous
    bias_ptr: tl.tensor,  # [N] or None
    result: tl.tensor,  # [BLOCK_M, BLOCK_N] float32
    rows: tl.tensor,
    columns: tl.tensor,
    mask: tl.tensor,
    N: tl.constexpr,
) -> None:
    """Add the bias and round to y's dtype."""
    if bias_ptr is not None:
        result += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + rows[:, None] * N + columns[None, :], result.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _weight_only_8bit_kernel(
    x_ptr: tl.tensor,  # [num_rows, K] bfloat16 or float16, rows x_stride apart
    weight_ptr: tl.tensor,  # [N, K] int8 or float8_e4m3fn, contiguous
    scale_ptr: tl.tensor,  # [N] float32
    bias_ptr: tl.tensor,  # [N] dtype of x, or None
    y_ptr: tl.tensor,  # [num_rows, N] dtype of x, contiguous
    parts_ptr: tl.tensor,  # see combine_splits
    counters_ptr: tl.tensor,
    num_rows: tl.tensor,
    x_stride: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr,  # steps of BLOCK_K that a program takes
    SPLITS: tl.constexpr,
    SWAP: tl.constexpr,
) -> None:
    tile, split = tl.program_id(0), tl.program_id(1)
    rows = tl.arange(0, BLOCK_M)
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + rows[:, None].to(tl.int64) * x_stride + inner[None, :]
    weight_ptrs = weight_ptr + columns[:, None].to(tl.int64) * K + inner[None, :]
    x_mask, weight_mask = rows[:, None] < num_rows, columns[:, None] < N
    total = tl.zeros([BLOCK_N, BLOCK_M] if SWAP else [BLOCK_M, BLOCK_N], tl.float32)
    begin = split * (STEPS * BLOCK_K)
    for k in range(begin, min(begin + STEPS * BLOCK_K, K), BLOCK_K):
        in_range = inner[None, :] < (BLOCK_K if K % BLOCK_K == 0 else K - k)
        x = tl.load(x_ptrs + k, mask=x_mask & in_range, other=0.0)
        weight = tl.load(weight_ptrs + k, mask=weight_mask & in_range, other=0.0)
        # By way of float32: the compiler's shorter ways take more instructions, or slow ones.
        total = _dot(x, weight.to(tl.float32).to(x.dtype), total, SWAP)
    # On its way while parts are stored and counted.
    scale = tl.load(scale_ptr + columns, mask=columns < N, other=0.0)
    total, is_last = combine_splits(total, parts_ptr, counters_ptr, tile, split, total.shape[0], total.shape[1], SPLITS)
    result = (tl.trans(total) if SWAP else total) * scale[None, :]
    store_rows(y_ptr, bias_ptr, result, rows, columns, x_mask & (columns < N)[None, :] & is_last, N)


@triton.jit(do_not_specialize=["num_rows"])
def _weight_only_int4_kernel(
    x_ptr: tl.tensor,  # [num_rows, K] bfloat16 or float16, rows x_stride apart
    weight_ptr: tl.tensor,  # [N, ⌈K/256⌉ · 64] int16, contiguous: see quantize_weights
    scale_zero_ptr: tl.tensor,  # [⌈K/256⌉ · 2, N] int32, contiguous
    bias_ptr: tl.tensor,  # [N] dtype of x, or None
    y_ptr: tl.tensor,  # [num_rows, N] dtype of x, contiguous
    parts_ptr: tl.tensor,  # see combine_splits
    counters_ptr: tl.tensor,
    num_rows: tl.tensor,
    x_stride: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEPS: tl.constexpr,  # spans that a program takes
    SPLITS: tl.constexpr,
    SWAP: tl.constexpr,
    BASE: tl.constexpr,
    ASSEMBLY: tl.constexpr,
) -> None:
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    num_spans: tl.constexpr = (K + 255) // 256
    tile, split = tl.program_id(0), tl.program_id(1)
    rows = tl.arange(0, BLOCK_M)
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    plane = tl.arange(0, 64)
    x_ptrs = x_ptr + rows[:, None].to(tl.int64) * x_stride + plane[None, :]
    weight_ptrs = weight_ptr + columns[:, None].to(tl.int64) * (num_spans * 64) + plane[None, :]
    x_mask, is_channel = rows[:, None] < num_rows, columns < N
    total = tl.zeros([BLOCK_N, BLOCK_M] if SWAP else [BLOCK_M, BLOCK_N], tl.float32)
    begin = split * STEPS
    end = min(begin + STEPS, num_spans)
    group_ptrs = scale_zero_ptr + columns + begin * (2 * N)
    # Scales, wanted after the products, are fetched a span ahead; zeros, wanted before, come with the words.
    next_first = tl.load(group_ptrs, mask=is_channel, other=0)
    next_second = tl.load(group_ptrs + N, mask=is_channel, other=0)
    for span in range(begin, end):
        first, second = next_first, next_second
        has_next = is_channel & (span + 1 < end)
        next_first = tl.load(group_ptrs + 2 * N, mask=has_next, other=0)
        next_second = tl.load(group_ptrs + 3 * N, mask=has_next, other=0)
        words = tl.load(weight_ptrs + span * 64, mask=is_channel[:, None], other=0)
        for group in tl.static_range(2):
            scale_zero = tl.load(group_ptrs + group * N, mask=is_channel, other=0)
            product = tl.zeros(total.shape, tl.float32)
            for half in tl.static_range(2):
                k = span * 256 + group * 128 + half * 64
                in_range = plane[None, :] < (64 if K % 256 == 0 else K - k)
                x = tl.load(x_ptrs + k, mask=x_mask & in_range, other=0.0)
                weight = int4_codes(words, scale_zero, 2 * group + half, BASE, ASSEMBLY, dtype)
                product = _dot(x, weight, product, SWAP)
            scale = ((first if group == 0 else second) >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            total += product * (scale[:, None] if SWAP else scale[None, :])
        group_ptrs += 2 * N
    total, is_last = combine_splits(total, parts_ptr, counters_ptr, tile, split, total.shape[0], total.shape[1], SPLITS)
    result = tl.trans(total) if SWAP else total
    store_rows(y_ptr, bias_ptr, result, rows, columns, x_mask & is_channel[None, :] & is_last, N)


def weight_only_config(num_rows: int, bits: int, shared_memory: int) -> tuple[int, int, int, bool, int, int]:
    """(BLOCK_M, BLOCK_N, BLOCK_K, SWAP, num_warps, num_stages).

    BLOCK_N is wide enough that the bytes of x, which every program reads, stay well below its bytes of weights where
    that can be had; BLOCK_K is 128 bytes of a channel's weights.
    """
    block_m = max(16, triton.next_power_of_2(num_rows))
    block_n = max(64, min(128, 32 * block_m // bits))
    block_k = 1024 // bits
    stages = pipeline_stages(block_n * 128 + block_m * block_k * 2, shared_memory)
    return block_m, block_n, block_k, block_m >= 8 * bits, block_n // 16, stages


def weight_only_mm(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias, fastest for up to 64 rows; weights are widened in memory for more.

    Args:
        x: [num_rows, K] bfloat16 or float16 (on CPU also float32), any row stride.
        weight: contiguous int8 or float8_e4m3fn [N, K], or int16 [N, ⌈K/256⌉ · 64] as `pack_int4` makes it.
        scale: contiguous float32 [N] for 8 bits; int32 [⌈K/256⌉ · 2, N] as `pack_scale_zero` makes it for 4.
        bias: [N], the dtype of x, or None.

    Returns:
        [num_rows, N], the dtype of x.

    Raises:
        ValueError: shapes or dtypes that are not as above, or FP8 on a GPU older than compute capability 8.9.
    """
    _check(x, weight, scale, bias)
    if not uses_triton(x):
        return weight_only_mm_cpu(x, weight, scale, bias)
    if weight.dtype == torch.float8_e4m3fn:
        require_fp8(x.device)
    if x.shape[0] > MAX_ROWS:
        return weight_only_mm_reference(x, weight, scale, bias)
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    if x.shape[0]:
        _launch(x, weight, scale, bias, y)
    return y


def _check(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    channels, spans = weight.shape[0], -(-x.shape[-1] // SPAN)
    packed = weight.dtype == torch.int16
    weight_shape = (channels, spans * WORDS if packed else x.shape[-1])
    scale_shape, scale_dtype = ((2 * spans, channels), torch.int32) if packed else ((channels,), torch.float32)
    if x.dim() != 2 or x.stride(1) != 1 or weight.shape != weight_shape:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and strides {x.stride()}, {weight.dtype} weight {tuple(weight.shape)}; "
            f"expected contiguous rows and weight {weight_shape}"
        )
    if scale.shape != scale_shape or scale.dtype != scale_dtype:
        raise ValueError(f"scale is {scale.dtype} {tuple(scale.shape)}, expected {scale_dtype} {scale_shape}")
    if weight.dtype not in BITS or not (weight.is_contiguous() and scale.is_contiguous()):
        raise ValueError(f"weight is {weight.dtype} with strides {weight.stride()}, expected contiguous {list(BITS)}")
    if bias is not None and (bias.shape != (channels,) or bias.dtype != x.dtype):
        raise ValueError(f"bias is {bias.dtype} {tuple(bias.shape)}, expected {x.dtype} {(channels,)}")
    if uses_triton(x) and x.dtype not in NIBBLE_BASE:
        raise ValueError(f"x is {x.dtype}, expected bfloat16 or float16 on a GPU")


def _launch(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, y: Tensor) -> None:
    num_rows, inner = x.shape
    channels = weight.shape[0]
    bits = BITS[weight.dtype]
    block_m, block_n, block_k, swap, num_warps, num_stages = weight_only_config(
        num_rows, bits, shared_memory_limit(x.device)
    )
    num_tiles = triton.cdiv(channels, block_n)
    # Programs of 64 channels fit twice as often.
    programs = num_multiprocessors(x.device) * 128 // block_n
    steps, splits = plan_splits(num_tiles, triton.cdiv(inner, block_k), programs)
    parts, counters = split_buffers(num_tiles, splits, block_m * block_n, x.device)
    arguments = (x, weight, scale, bias, y, parts, counters, num_rows, x.stride(0))
    sizes = {"N": channels, "K": inner, "BLOCK_M": block_m, "BLOCK_N": block_n, "STEPS": steps, "SPLITS": splits}
    options = {"SWAP": swap, "num_warps": num_warps, "num_stages": num_stages}
    grid = (num_tiles, splits)
    if bits == 8:
        _weight_only_8bit_kernel[grid](*arguments, **sizes, **options, BLOCK_K=block_k)
    else:
        assembly = None if x.is_cpu else UNPACK_ASSEMBLY[x.dtype]
        _weight_only_int4_kernel[grid](*arguments, **sizes, **options, BASE=NIBBLE_BASE[x.dtype], ASSEMBLY=assembly)


def compile_cases() -> list[CompileCase]:
    """Every configuration, with and without a split: o_proj, gate_up and down_proj of Qwen3 8B."""

    def case(dtype: torch.dtype, x_dtype: torch.dtype, num_rows: int, channels: int, inner: int) -> CompileCase:
        packed = dtype == torch.int16
        x = torch.empty(num_rows, inner, dtype=x_dtype, device="meta")
        width = inner // SPAN * WORDS if packed else inner
        weight = torch.empty(channels, width, dtype=dtype, device="meta")
        scale = torch.empty(channels, device="meta")
        scale_zero = torch.empty(inner // GROUP, channels, dtype=torch.int32, device="meta")
        name = (
            f"{str(dtype).removeprefix('torch.')} {str(x_dtype).removeprefix('torch.')} {num_rows}x{channels}x{inner}"
        )
        return CompileCase(
            f"weight_only_mm {name}",
            lambda: weight_only_mm(x, weight, scale_zero if packed else scale),
            min_capability=89 if dtype == torch.float8_e4m3fn else 80,
            wgmma=weight_only_config(num_rows, BITS[dtype], PLANNED_SHARED_MEMORY)[3],
        )

    small, middle, large = (1, 4096, 4096), (32, 24_576, 4096), (64, 4096, 12_288)
    return [
        *(case(dtype, torch.bfloat16, *size) for dtype in (torch.int8, torch.int16) for size in (small, middle, large)),
        *(case(torch.float8_e4m3fn, torch.bfloat16, *size) for size in (small, large)),
        case(torch.int16, torch.float16, *small),
    ]
