"""Root-mean-square normalisation, plain and with the residual addition before it (arXiv:1910.07467)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import cpu_ops
from kernels.backend import CompileCase, tl, triton, uses_triton

MAX_HIDDEN = 32_768
"""A program keeps whole rows in registers; longer ones would spill."""
TILE = 1024
"""Elements that a program takes at least: several rows where rows are shorter."""


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `rms_norm`."""
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `add_rms_norm`."""
    total = torch.add(x, residual)
    return rms_norm_reference(total, weight, eps), total


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_kernel(
    x_ptr: tl.tensor,  # [num_rows, HIDDEN], rows x_stride apart
    residual_ptr: tl.tensor,  # [num_rows, HIDDEN], rows residual_stride apart; None: nothing is added
    weight_ptr: tl.tensor,  # [HIDDEN]
    normed_ptr: tl.tensor,  # [num_rows, HIDDEN] contiguous, dtype of x
    total_ptr: tl.tensor,  # [num_rows, HIDDEN] contiguous, dtype of x: x + residual; None without residual
    num_rows: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    eps: tl.tensor,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,  # power of two ≥ HIDDEN
    ROWS: tl.constexpr,  # power of two
) -> None:
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    # In the shape of the tile, all loads have one layout among threads.
    columns = tl.arange(0, BLOCK)[None, :] + tl.zeros([ROWS, 1], tl.int32)
    mask = (rows < num_rows) & (columns < HIDDEN)
    # On its way while the row is summed.
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + rows * x_stride + columns, mask=mask, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + rows * residual_stride + columns, mask=mask, other=0.0)
        # The stream is what later layers see: rounded to its dtype, then normalised.
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x_ptr.dtype.element_ty)
        tl.store(total_ptr + rows * HIDDEN + columns, x, mask=mask)
    x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / HIDDEN + eps)
    normed = x * scale[:, None] * weight
    tl.store(normed_ptr + rows * HIDDEN + columns, normed.to(normed_ptr.dtype.element_ty), mask=mask)


def rms_norm_config(hidden: int) -> tuple[int, int, int]:
    """(BLOCK, ROWS, num_warps): 8 elements a thread, which are 16 bytes of bfloat16, and more only past 16 warps."""
    block = triton.next_power_of_2(hidden)
    rows = max(1, TILE // block)
    return block, rows, min(16, max(4, block // 256))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in float32 inside.

    Args:
        x: [..., hidden], any float dtype; contiguous, or two-dimensional with any row stride.
        weight: [hidden], same dtype.

    Returns:
        [..., hidden], the dtype of x.

    Raises:
        ValueError: on a GPU, sizes or strides that are not as above, or hidden over 32,768.
    """
    if not uses_triton(x):
        on_cpu = cpu_ops.rms_norm(x, weight, eps)
        return rms_norm_reference(x, weight, eps) if on_cpu is None else on_cpu
    rows = _as_rows(x, weight)
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(rows, None, weight, normed, None, eps)
    return normed


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add, then normalise. Neither input is changed.

    Args:
        x, residual: [..., hidden], same dtype; each contiguous, or two-dimensional with any row stride.
        weight: [hidden].

    Returns:
        (normalised sum, sum), both [..., hidden].

    Raises:
        ValueError: as `rms_norm`.
    """
    if not uses_triton(x):
        return cpu_ops.add_rms_norm(x, residual, weight, eps) or add_rms_norm_reference(x, residual, weight, eps)
    rows, residual_rows = _as_rows(x, weight), _as_rows(residual, weight)
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise ValueError(
            f"residual is {residual.dtype} {tuple(residual.shape)}, expected {x.dtype} {tuple(x.shape)} as x is"
        )
    normed, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    _launch(rows, residual_rows, weight, normed, total, eps)
    return normed, total


def _as_rows(x: Tensor, weight: Tensor) -> Tensor:
    """x as [num_rows, hidden], if the kernel can walk it."""
    hidden = weight.shape[0]
    if x.shape[-1] != hidden or hidden > MAX_HIDDEN or not weight.is_contiguous():
        raise ValueError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)} with stride {weight.stride()}; expected "
            f"[..., hidden] and a contiguous [hidden], hidden at most {MAX_HIDDEN}"
        )
    if x.is_contiguous():
        return x.view(-1, hidden)
    if x.dim() != 2 or x.stride(1) != 1:
        raise ValueError(f"x has shape {tuple(x.shape)} and strides {x.stride()}; expected contiguous rows of a matrix")
    return x


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, normed: Tensor, total: Tensor | None, eps: float
) -> None:
    num_rows, hidden = x.shape
    block, rows, num_warps = rms_norm_config(hidden)
    _rms_norm_kernel[(triton.cdiv(num_rows, rows),)](
        x,
        residual,
        weight,
        normed,
        total,
        num_rows,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        eps,
        HIDDEN=hidden,
        BLOCK=block,
        ROWS=rows,
        num_warps=num_warps,
    )


def compile_cases() -> list[CompileCase]:
    """Norms of heads, and of hidden sizes from Qwen3-0.6B to 32B and the longest."""

    def case(hidden: int, add: bool) -> CompileCase:
        x = torch.empty(64, hidden, dtype=torch.bfloat16, device="meta")
        weight = x[0]
        if add:
            return CompileCase(f"add_rms_norm {hidden}", lambda: add_rms_norm(x, x, weight, 1e-6))
        return CompileCase(f"rms_norm {hidden}", lambda: rms_norm(x, weight, 1e-6))

    plain, added = (128, 1024), (1024, 2560, 5120, MAX_HIDDEN)
    return [*(case(hidden, False) for hidden in plain), *(case(hidden, True) for hidden in added)]
