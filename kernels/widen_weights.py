"""Weights of 8 or 4 bits back to 16, for products with many rows, where reading them twice costs little."""

import torch
from torch import Tensor

from kernels.backend import CompileCase, tl, triton, uses_triton
from kernels.quantize_weights import SPAN, WORDS, dequantize_int4_group, dequantize_per_channel

TILE_ROWS = 16
TILE_COLUMNS = 256


def widen_weights_reference(weight: Tensor, scale: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    """As `widen_weights`."""
    if weight.dtype == torch.int16:
        return dequantize_int4_group(weight, scale, in_features, dtype)
    return dequantize_per_channel(weight, scale, dtype)


@triton.jit
def _widen_8bit_kernel(
    weight_ptr: tl.tensor,  # [N, K] int8 or float8_e4m3fn, contiguous
    scale_ptr: tl.tensor,  # [N] float32
    wide_ptr: tl.tensor,  # [N, K] contiguous
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    offsets = rows[:, None].to(tl.int64) * K + columns[None, :]
    mask = (rows < N)[:, None] & (columns < K)[None, :]
    weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + rows, mask=rows < N, other=0.0)
    tl.store(wide_ptr + offsets, (weight * scale[:, None]).to(wide_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _widen_int4_kernel(
    weight_ptr: tl.tensor,  # [N, ⌈K/256⌉ · 64] int16, contiguous: see quantize_weights
    scale_zero_ptr: tl.tensor,  # [⌈K/256⌉ · 2, N] int32, contiguous
    wide_ptr: tl.tensor,  # [N, K] contiguous
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    span = tl.program_id(1)
    words_of_row: tl.constexpr = (K + 255) // 256 * 64
    plane = tl.arange(0, 64)
    is_row = rows < N
    word_offsets = rows[:, None].to(tl.int64) * words_of_row + span * 64 + plane[None, :]
    words = tl.load(weight_ptr + word_offsets, mask=is_row[:, None], other=0).to(tl.int32)
    for index in tl.static_range(4):
        scale_zero = tl.load(scale_zero_ptr + (span * 2 + index // 2) * N + rows, mask=is_row, other=0)
        scale = (scale_zero >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        code = ((words >> (4 * index)) & 15) - (scale_zero & 15)[:, None]
        columns = span * 256 + index * 64 + plane
        wide = (code.to(tl.float32) * scale[:, None]).to(wide_ptr.dtype.element_ty)
        mask = is_row[:, None] & (columns < K)[None, :]
        tl.store(wide_ptr + rows[:, None].to(tl.int64) * K + columns[None, :], wide, mask=mask)


def widen_weights(weight: Tensor, scale: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    """weight · scale in `dtype`.

    Args:
        weight, scale: as for `weight_only_mm`, whose checks they have passed.
        in_features: K; int4 weights may be padded beyond it.

    Returns:
        [N, in_features].
    """
    if not uses_triton(weight):
        return widen_weights_reference(weight, scale, in_features, dtype)
    rows = weight.shape[0]
    wide = torch.empty(rows, in_features, dtype=dtype, device=weight.device)
    row_tiles = triton.cdiv(rows, TILE_ROWS)
    if weight.dtype == torch.int16:
        grid = (row_tiles, triton.cdiv(in_features, SPAN))
        _widen_int4_kernel[grid](weight, scale, wide, N=rows, K=in_features, ROWS=TILE_ROWS, num_warps=4)
    else:
        grid = (row_tiles, triton.cdiv(in_features, TILE_COLUMNS))
        _widen_8bit_kernel[grid](
            weight, scale, wide, N=rows, K=in_features, ROWS=TILE_ROWS, COLUMNS=TILE_COLUMNS, num_warps=4
        )
    return wide


def compile_cases() -> list[CompileCase]:
    """One size: others differ in nothing but bounds."""

    def case(name: str, weight: Tensor, scale: Tensor, min_capability: int) -> CompileCase:
        return CompileCase(
            f"widen_weights {name}", lambda: widen_weights(weight, scale, 4096, torch.bfloat16), min_capability
        )

    scale = torch.empty(4096, device="meta")
    scale_zero = torch.empty(4096 // SPAN * 2, 4096, dtype=torch.int32, device="meta")
    words = torch.empty(4096, 4096 // SPAN * WORDS, dtype=torch.int16, device="meta")
    eight = torch.empty(4096, 4096, dtype=torch.int8, device="meta")
    return [
        case("int4", words, scale_zero, 80),
        case("int8", eight, scale, 80),
        case("float8_e4m3fn", eight.to(torch.float8_e4m3fn), scale, 89),
    ]
