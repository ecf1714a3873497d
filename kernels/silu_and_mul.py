"""SwiGLU's gate: silu(gate) · up (arXiv:2002.05202)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import cpu_ops
from kernels.backend import CompileCase, tl, triton, uses_triton

MAX_BLOCK = 1024
MIN_BLOCK = 256


def silu_and_mul_reference(gate_up: Tensor) -> Tensor:
    """As `silu_and_mul`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


@triton.jit
def _silu_and_mul_kernel(
    gate_up_ptr: tl.tensor,  # [num_rows, 2 · SIZE], rows gate_up_stride apart
    output_ptr: tl.tensor,  # [num_rows, SIZE] contiguous, same dtype
    gate_up_stride: tl.tensor,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    blocks_per_row: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    row = (program // blocks_per_row).to(tl.int64)
    columns = program % blocks_per_row * BLOCK + tl.arange(0, BLOCK)
    mask = columns < SIZE
    gate = tl.load(gate_up_ptr + row * gate_up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * gate_up_stride + SIZE + columns, mask=mask, other=0.0).to(tl.float32)
    output = gate * tl.sigmoid(gate) * up
    tl.store(output_ptr + row * SIZE + columns, output.to(output_ptr.dtype.element_ty), mask=mask)


def silu_and_mul_config(size: int) -> tuple[int, int]:
    """(BLOCK, num_warps): the longest block that divides a row, and a warp for 256 elements: 16 bytes a thread."""
    block = next((block for block in (MAX_BLOCK, MAX_BLOCK // 2) if size % block == 0), MIN_BLOCK)
    return block, block // 256


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) · up, in float32 inside on a GPU.

    Args:
        gate_up: [..., 2 · size], gate first; contiguous, or two-dimensional with any row stride.

    Returns:
        [..., size], contiguous, the dtype of gate_up.

    Raises:
        ValueError: on a GPU, a last dimension that is odd, or strides that are not as above.
    """
    if not uses_triton(gate_up):
        on_cpu = cpu_ops.silu_and_mul(gate_up)
        return silu_and_mul_reference(gate_up) if on_cpu is None else on_cpu
    *leading, width = gate_up.shape
    is_matrix = gate_up.dim() == 2 and gate_up.stride(1) == 1
    if width % 2 or not (is_matrix or gate_up.is_contiguous()):
        raise ValueError(
            f"gate_up has shape {tuple(gate_up.shape)} and strides {gate_up.stride()}; expected an even last dimension "
            "and contiguous rows of a matrix"
        )
    size = width // 2
    rows = gate_up if is_matrix else gate_up.view(-1, width)
    output = torch.empty(*leading, size, dtype=gate_up.dtype, device=gate_up.device)
    block, num_warps = silu_and_mul_config(size)
    grid = (rows.shape[0] * triton.cdiv(size, block),)
    _silu_and_mul_kernel[grid](rows, output, rows.stride(0), SIZE=size, BLOCK=block, num_warps=num_warps)
    return output


def compile_cases() -> list[CompileCase]:
    """Intermediate sizes of an expert of Qwen3-30B-A3B (768), Qwen3-0.6B (3072), 4B (9728), and an odd one."""

    def case(size: int) -> CompileCase:
        gate_up = torch.empty(64, 2 * size, dtype=torch.bfloat16, device="meta")
        return CompileCase(f"silu_and_mul {size}", lambda: silu_and_mul(gate_up))

    return [case(size) for size in (768, 3072, 9728, 1001)]
