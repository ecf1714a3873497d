"""Activations to float8_e4m3fn on the fly, each token with a scale of its own, or one for each 128 of its values."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import CompileCase, tl, triton, uses_triton
from kernels.quantize_weights import FP8_MAX

MAX_WIDTH = 32_768
"""A program keeps a whole row in registers where the row has one scale."""
TILE = 4096
"""Values a program takes where groups are independent."""
SMALLEST = 1e-10
"""Rows whose largest value is below this are quantised as if it were this: no division by zero."""


@cache
def require_fp8(device: torch.device) -> None:
    """Raises ValueError if `device` is a GPU without float8_e4m3fn conversions."""
    if device.type == "cuda":
        check_fp8_capability(torch.cuda.get_device_capability(device))


def check_fp8_capability(capability: tuple[int, int]) -> None:
    """Raises ValueError if GPUs of this compute capability (major, minor) lack float8_e4m3fn conversions."""
    if capability < (8, 9):
        raise ValueError(
            f"FP8 needs a GPU of compute capability 8.9 or newer (Ada, Hopper, Blackwell), this one has "
            f"{capability[0]}.{capability[1]}; use int8 or int4 weights, or an unquantized checkpoint"
        )


def quantize_fp8_per_token_reference(x: Tensor, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """As `quantize_fp8_per_token`."""
    width = x.shape[1]
    size = width if group_size is None else group_size
    groups = F.pad(x.float(), (0, -width % size)).unflatten(1, (-1, size))
    largest = groups.abs().amax(dim=2, keepdim=True).clamp_min(SMALLEST)
    # A number over a tensor would be its reciprocal times the number, rounded twice.
    quantized = (groups * (torch.full_like(largest, FP8_MAX) / largest)).to(torch.float8_e4m3fn)
    scale = largest.squeeze(2) / FP8_MAX
    return quantized.flatten(1)[:, :width].contiguous(), scale.squeeze(1) if group_size is None else scale


@triton.jit
def _quantize_fp8_kernel(
    x_ptr: tl.tensor,  # [num_tokens, WIDTH] bfloat16 or float16, rows x_stride apart
    quantized_ptr: tl.tensor,  # [num_tokens, WIDTH] float8_e4m3fn contiguous
    scale_ptr: tl.tensor,  # [num_tokens, ⌈WIDTH / GROUP⌉] float32 contiguous
    x_stride: tl.tensor,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,  # power of two; ≥ WIDTH for one scale a token
    GROUPS: tl.constexpr,  # groups of a program, a power of two
) -> None:
    row = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    columns = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    mask = columns < WIDTH
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(x), axis=1), 1e-10)  # SMALLEST
    quantized = x * tl.div_rn(448.0, largest)[:, None]
    tl.store(quantized_ptr + row * WIDTH + columns, quantized.to(tl.float8e4nv), mask=mask)
    num_groups: tl.constexpr = (WIDTH + GROUP - 1) // GROUP
    tl.store(scale_ptr + row * num_groups + groups, tl.div_rn(largest, 448.0), mask=groups < num_groups)


def quantize_fp8_config(width: int, group_size: int | None) -> tuple[int, int, int]:
    """(GROUP, GROUPS, num_warps): 16 values a thread, and more only past 16 warps."""
    block = triton.next_power_of_2(width)
    if group_size is None:
        return block, 1, min(16, max(1, block // 512))
    block = min(TILE, max(block, group_size))
    return group_size, block // group_size, max(1, block // 512)


def quantize_fp8_per_token(x: Tensor, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Scale each token, or each group of a token's values, so that the largest becomes 448, and round.

    Args:
        x: [num_tokens, width] bfloat16 or float16 (on CPU also float32), any row stride.
        group_size: consecutive values that share a scale, a power of two; None: all of a token.

    Returns:
        (float8_e4m3fn [num_tokens, width], float32 scale [num_tokens] or [num_tokens, ⌈width / group_size⌉]).
        Values that are not numbers stay so, and one that is infinite makes its group so.

    Raises:
        ValueError: a GPU older than compute capability 8.9, rows that are not contiguous, or width over 32,768 with one
            scale a token.
    """
    if not uses_triton(x):
        return quantize_fp8_per_token_reference(x, group_size)
    require_fp8(x.device)
    num_tokens, width = x.shape
    if x.stride(1) != 1 or (group_size is None and width > MAX_WIDTH):
        raise ValueError(
            f"x has shape {tuple(x.shape)} and strides {x.stride()}; expected contiguous rows of at most {MAX_WIDTH}"
        )
    group, groups, num_warps = quantize_fp8_config(width, group_size)
    num_groups = triton.cdiv(width, group)
    quantized = torch.empty(num_tokens, width, dtype=torch.float8_e4m3fn, device=x.device)
    scale_shape = (num_tokens,) if group_size is None else (num_tokens, num_groups)
    scale = torch.empty(scale_shape, dtype=torch.float32, device=x.device)
    if num_tokens:
        _quantize_fp8_kernel[num_tokens, triton.cdiv(num_groups, groups)](
            x, quantized, scale, x.stride(0), WIDTH=width, GROUP=group, GROUPS=groups, num_warps=num_warps
        )
    return quantized, scale


def compile_cases() -> list[CompileCase]:
    """The widest input of a Qwen3 layer with one scale a token, and groups."""

    def case(width: int, group_size: int | None) -> CompileCase:
        x = torch.empty(8, width, dtype=torch.bfloat16, device="meta")
        name = f"quantize_fp8 {width} {'token' if group_size is None else f'group {group_size}'}"
        return CompileCase(name, lambda: quantize_fp8_per_token(x, group_size), min_capability=89)

    return [case(25_600, None), case(4096, 128)]
