"""x · weightᵀ in float8_e4m3fn: x is quantised per token on the fly, sums are float32.

Two ways to scale: a scale for each token and each output channel, applied after the sum; or a scale for 128 inputs of
a token and each 128 × 128 block of weights, applied to each partial sum of 128, as checkpoints with `weight_scale_inv`
want (arXiv:2412.19437, section 3.3).
"""

import torch
from torch import Tensor

from kernels.backend import CompileCase, num_multiprocessors, tl, triton, uses_triton
from kernels.quantize_fp8 import quantize_fp8_per_token, quantize_fp8_per_token_reference, require_fp8
from kernels.quantize_weights import SCALE_BLOCK, dequantize_fp8_block
from kernels.split_k import combine_splits, pipeline_stages, plan_splits, shared_memory_limit, split_buffers

BLOCK_K = 128
"""Also how many products Hopper's matrix unit may add up before they go to float32: it keeps some 14 bits of a sum."""
LONG_K = 4096
"""From here on cuBLASLt is asked to do the same: shorter sums lose less than a percent, half of what rounding to FP8
costs."""
SMALL_M = 64
"""Up to here this file's kernel streams weights from every multiprocessor."""


def scaled_mm_fp8_reference(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `scaled_mm_fp8`: what both factors are after rounding to FP8, multiplied in float32."""
    if weight_scale.dim() == 1:
        quantized, scale = quantize_fp8_per_token_reference(x)
        y = (quantized.float() @ weight.float().t()) * scale.unsqueeze(1) * weight_scale.float()
    else:
        quantized, scale = quantize_fp8_per_token_reference(x, SCALE_BLOCK)
        scales = scale.repeat_interleave(SCALE_BLOCK, dim=1)[:, : x.shape[1]]
        y = (quantized.float() * scales) @ dequantize_fp8_block(weight, weight_scale, torch.float32).t()
    return (y if bias is None else y + bias.float()).to(x.dtype)


@triton.jit(do_not_specialize=["num_rows"])
def _scaled_mm_fp8_kernel(
    x_ptr: tl.tensor,  # [num_rows, K] float8_e4m3fn, contiguous
    x_scale_ptr: tl.tensor,  # float32 [num_rows], or with BLOCKS [num_rows, ⌈K/128⌉] contiguous
    weight_ptr: tl.tensor,  # [N, K] float8_e4m3fn, contiguous
    weight_scale_ptr: tl.tensor,  # float [N], or with BLOCKS [⌈N/128⌉, ⌈K/128⌉] contiguous
    bias_ptr: tl.tensor,  # [N] or None
    y_ptr: tl.tensor,  # [num_rows, N] contiguous
    parts_ptr: tl.tensor,  # see combine_splits
    counters_ptr: tl.tensor,
    num_rows: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCKS: tl.constexpr,  # whether weights are scaled in blocks
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # divides 128
    STEPS: tl.constexpr,  # steps of 128 that a program takes
    SPLITS: tl.constexpr,
    SWAP: tl.constexpr,  # weight · xᵀ: Hopper's matrix instruction wants 64 rows on the left
) -> None:
    scale_columns: tl.constexpr = (K + 127) // 128
    # Tiles of the same weights are neighbours: they run together, and memory is read once for all.
    row_tiles = tl.cdiv(num_rows, BLOCK_M)
    tile, split = tl.program_id(0), tl.program_id(1)
    rows = tile % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile // row_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, 128)
    is_row, is_column = rows < num_rows, columns < N
    x_ptrs = x_ptr + rows[:, None].to(tl.int64) * K + inner[None, :]
    weight_ptrs = weight_ptr + columns[:, None].to(tl.int64) * K + inner[None, :]
    begin = split * STEPS
    end = min(begin + STEPS, scale_columns)
    total = tl.zeros([BLOCK_N, BLOCK_M] if SWAP else [BLOCK_M, BLOCK_N], tl.float32)
    if BLOCKS:
        x_scale_ptrs = x_scale_ptr + rows * scale_columns
        block_scale_ptr = weight_scale_ptr + tile // row_tiles * BLOCK_N // 128 * scale_columns
        # Scales are wanted after the product, so they are fetched a step ahead.
        block_scale = tl.load(block_scale_ptr + begin).to(tl.float32)
        next_scale = tl.load(x_scale_ptrs + begin, mask=is_row, other=0.0) * block_scale
    for step in range(begin, end):
        in_range = inner[None, :] < (128 if K % 128 == 0 else K - step * 128)
        x = tl.load(x_ptrs + step * 128, mask=is_row[:, None] & in_range, other=0.0)
        weight = tl.load(weight_ptrs + step * 128, mask=is_column[:, None] & in_range, other=0.0)
        if BLOCKS:
            scale = next_scale
            has_next = step + 1 < end
            block_scale = tl.load(block_scale_ptr + step + 1, mask=has_next, other=0.0).to(tl.float32)
            next_scale = tl.load(x_scale_ptrs + step + 1, mask=is_row & has_next, other=0.0) * block_scale
            product = tl.dot(weight, tl.trans(x)) if SWAP else tl.dot(x, tl.trans(weight))
            total += product * (scale[None, :] if SWAP else scale[:, None])
        elif SWAP:
            total = tl.dot(weight, tl.trans(x), total, max_num_imprecise_acc=128)
        else:
            total = tl.dot(x, tl.trans(weight), total, max_num_imprecise_acc=128)
    if not BLOCKS:  # on their way while parts are stored and counted
        row_scale = tl.load(x_scale_ptr + rows, mask=is_row, other=0.0)
        column_scale = tl.load(weight_scale_ptr + columns, mask=is_column, other=0.0).to(tl.float32)
    total, is_last = combine_splits(total, parts_ptr, counters_ptr, tile, split, total.shape[0], total.shape[1], SPLITS)
    result = tl.trans(total) if SWAP else total
    if not BLOCKS:
        result = result * row_scale[:, None] * column_scale[None, :]
    if bias_ptr is not None:
        result += tl.load(bias_ptr + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + rows[:, None].to(tl.int64) * N + columns[None, :]
    tl.store(y_ptrs, result.to(y_ptr.dtype.element_ty), mask=is_row[:, None] & is_column[None, :] & is_last)


def scaled_mm_fp8_config(num_rows: int, shared_memory: int) -> tuple[int, int, bool, int, int]:
    """(BLOCK_M, BLOCK_N, SWAP, num_warps, num_stages)."""
    block_m = max(16, min(128, triton.next_power_of_2(num_rows)))
    block_n = 64 if block_m < 64 else 128
    stages = pipeline_stages((block_m + block_n) * BLOCK_K, shared_memory)
    return block_m, block_n, block_m < 64, 8 if block_m >= 64 else 4, stages


def prefers_cublas(num_rows: int, channels: int, inner: int, capability: tuple[int, int]) -> bool:
    """Whether a product with a scale per token and channel goes to torch._scaled_mm (cuBLASLt, or CUTLASS on 8.9).

    For few rows its tiles of 64 or more leave multiprocessors without work, where the kernel here splits the inner
    dimension and reads weights at the speed of memory. For many rows it is at the matrix units' limit: copy engine and
    warps with roles of their own, which Triton's pipeline lacks. It wants sizes in multiples of 16, and on compute
    capability 12.x it has no scales per row.
    """
    return num_rows > SMALL_M and channels % 16 == 0 and inner % 16 == 0 and capability[0] < 12


def scaled_mm_fp8(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · (weight · weight_scale)ᵀ + bias, both factors in FP8.

    Args:
        x: [num_rows, K] bfloat16 or float16 (on CPU also float32), any row stride; K a multiple of 16 on a GPU.
        weight: [N, K] float8_e4m3fn, contiguous.
        weight_scale: what weights are multiplied by: contiguous [N], or [⌈N/128⌉, ⌈K/128⌉] for blocks; any float dtype.
        bias: [N], the dtype of x, or None.

    Returns:
        [num_rows, N], the dtype of x.

    Raises:
        ValueError: shapes or dtypes that are not as above, or a GPU older than compute capability 8.9.
    """
    _check(x, weight, weight_scale, bias)
    if not uses_triton(x):
        return scaled_mm_fp8_reference(x, weight, weight_scale, bias)
    require_fp8(x.device)
    quantized, scale = quantize_fp8_per_token(x, None if weight_scale.dim() == 1 else SCALE_BLOCK)
    (num_rows, inner), channels = x.shape, weight.shape[0]
    if x.is_cuda and weight_scale.dim() == 1:
        capability = torch.cuda.get_device_capability(x.device)
        if prefers_cublas(num_rows, channels, inner, capability):
            return scaled_mm_cublas(quantized, scale, weight, weight_scale, bias, x.dtype)
    y = torch.empty(num_rows, channels, dtype=x.dtype, device=x.device)
    if num_rows:
        _launch(quantized, scale, weight, weight_scale, bias, y)
    return y


def scaled_mm_cublas(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The product of `scaled_mm_fp8` for x already quantised, by torch."""
    return torch._scaled_mm(
        x,
        weight.t(),
        scale_a=x_scale.unsqueeze(1),
        scale_b=weight_scale.float().unsqueeze(0),
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=x.shape[1] < LONG_K,
    )


def _check(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
    channels, inner = weight.shape
    blocks = (-(-channels // SCALE_BLOCK), -(-inner // SCALE_BLOCK))
    if weight.dtype != torch.float8_e4m3fn or x.dim() != 2 or x.shape[1] != inner or not weight.is_contiguous():
        raise ValueError(
            f"x has shape {tuple(x.shape)}, weight is {weight.dtype} {tuple(weight.shape)} with strides "
            f"{weight.stride()}; expected [num_rows, K] and contiguous torch.float8_e4m3fn [N, K]"
        )
    if weight_scale.shape not in ((channels,), blocks) or not weight_scale.is_contiguous():
        raise ValueError(
            f"weight_scale has shape {tuple(weight_scale.shape)}, expected contiguous {(channels,)} or {blocks}"
        )
    if bias is not None and (bias.shape != (channels,) or bias.dtype != x.dtype):
        raise ValueError(f"bias is {bias.dtype} {tuple(bias.shape)}, expected {x.dtype} {(channels,)}")
    if uses_triton(x) and (inner % 16 or x.dtype not in (torch.bfloat16, torch.float16)):
        raise ValueError(f"x is {x.dtype} with K = {inner}; expected bfloat16 or float16 and a multiple of 16 on a GPU")


def _launch(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, y: Tensor) -> None:
    (num_rows, inner), channels = x.shape, weight.shape[0]
    block_m, block_n, swap, num_warps, num_stages = scaled_mm_fp8_config(num_rows, shared_memory_limit(x.device))
    num_tiles = triton.cdiv(num_rows, block_m) * triton.cdiv(channels, block_n)
    programs = num_multiprocessors(x.device) * (2 if swap else 1)
    steps, splits = plan_splits(num_tiles, triton.cdiv(inner, BLOCK_K), programs)
    parts, counters = split_buffers(num_tiles, splits, block_m * block_n, x.device)
    _scaled_mm_fp8_kernel[num_tiles, splits](
        x,
        x_scale,
        weight,
        weight_scale,
        bias,
        y,
        parts,
        counters,
        num_rows,
        N=channels,
        K=inner,
        BLOCKS=weight_scale.dim() == 2,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        STEPS=steps,
        SPLITS=splits,
        SWAP=swap,
        num_warps=num_warps,
        num_stages=num_stages,
    )


def compile_cases() -> list[CompileCase]:
    """Every configuration with blocks, the extremes with channels, split or not: gate_up and o_proj of Qwen3 8B."""

    def case(num_rows: int, channels: int, inner: int, scale_shape: tuple[int, ...]) -> CompileCase:
        x = torch.empty(num_rows, inner, dtype=torch.bfloat16, device="meta")
        weight = torch.empty(channels, inner, dtype=torch.float8_e4m3fn, device="meta")
        weight_scale = torch.empty(scale_shape, device="meta")
        name = f"scaled_mm_fp8 {'channels' if len(scale_shape) == 1 else 'blocks'} {num_rows}x{channels}x{inner}"
        return CompileCase(name, lambda: scaled_mm_fp8(x, weight, weight_scale), min_capability=89, wgmma=True)

    sizes = ((1, 4096, 4096), (32, 24_576, 4096), (64, 4096, 4096), (1024, 24_576, 4096))
    per_channel = [case(num_rows, channels, inner, (channels,)) for num_rows, channels, inner in sizes[::3]]
    return per_channel + [
        case(num_rows, channels, inner, (channels // SCALE_BLOCK, inner // SCALE_BLOCK))
        for num_rows, channels, inner in sizes
    ]
