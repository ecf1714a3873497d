"""Low-rank adapters beside a matrix product: y += B · (A · x), with another A and B for each row (arXiv:2106.09685).

Adapters lie below each other in two tensors of fixed size, and each row of x has a number: 0 for none, else 1 + the
adapter's place. So the launches of a step do not depend on which adapters its rows have, as CUDA graphs ask. A program
takes a block of rows and one adapter, and ends at once where no row of its block has that adapter (the idea of S-LoRA's
and Punica's kernels, arXiv:2311.03285 and arXiv:2310.18547; the rows of a prompt are neighbours, so few blocks mix).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from kernels.backend import CompileCase, tl, triton, uses_triton
from kernels.linear import linear

MIN_RANK = 16
"""Adapters of smaller ranks are filled up with zeros: matrix units multiply so many values at least."""
FEW_ROWS = 64
"""Up to so many rows, blocks are of 16 rows; they are of 64 beyond."""
BLOCK_N = 64
BLOCK_K = 64


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """Which adapter each row of a step has.

    Args:
        numbers: [num_rows] int32, 0 for none.
        groups: for torch, which computes one adapter after the other: numbers other than 0, each with the int64 indices
            of its rows, or None for all rows. Not read on a GPU.
    """

    numbers: Tensor
    groups: Sequence[tuple[int, Tensor | None]]

    @classmethod
    def of(cls, numbers: Tensor) -> "AdapterRows":
        """Work the groups out, once for all layers of a step. Nothing is read back from a GPU."""
        if uses_triton(numbers):
            return cls(numbers, ())
        found = numbers.unique().tolist()
        if len(found) == 1:
            return cls(numbers, [(number, None) for number in found if number])
        return cls(numbers, [(number, (numbers == number).nonzero().squeeze(1)) for number in found if number])


def add_lora_reference(
    y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, part_sizes: Sequence[int], rows: AdapterRows
) -> None:
    """As `add_lora`."""
    for number, chosen in rows.groups:
        low = linear(x if chosen is None else x[chosen], lora_a[number - 1]).chunk(len(part_sizes), dim=1)
        parts = lora_b[number - 1].split(list(part_sizes))
        delta = [linear(part_low.contiguous(), part) for part_low, part in zip(low, parts, strict=True)]
        change = delta[0] if len(delta) == 1 else torch.cat(delta, dim=1)
        if chosen is None:
            y += change
        else:
            y.index_add_(0, chosen, change)


@triton.jit(do_not_specialize=["num_rows"])
def _shrink_kernel(
    x_ptr: tl.tensor,  # [num_rows, IN], rows x_stride apart
    a_ptr: tl.tensor,  # [num_adapters, RANKS, IN] contiguous
    numbers_ptr: tl.tensor,  # [num_rows] int32
    low_ptr: tl.tensor,  # [num_rows, RANKS] contiguous
    num_rows: tl.tensor,
    x_stride: tl.tensor,
    IN: tl.constexpr,
    RANKS: tl.constexpr,  # of all parts
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    adapter = tl.program_id(1)
    is_own = tl.load(numbers_ptr + rows, mask=rows < num_rows, other=0) == adapter + 1
    if tl.max(is_own.to(tl.int32), axis=0) == 0:
        return
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    inner = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * x_stride + inner[None, :]
    a_rows = adapter.to(tl.int64) * RANKS + ranks
    a_ptrs = a_ptr + a_rows[:, None] * IN + inner[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for k in range(0, IN, BLOCK_K):
        in_range = inner[None, :] < (BLOCK_K if IN % BLOCK_K == 0 else IN - k)
        x = tl.load(x_ptrs + k, mask=is_own[:, None] & in_range, other=0.0)
        a = tl.load(a_ptrs + k, mask=(ranks < RANKS)[:, None] & in_range, other=0.0)
        total = tl.dot(x, tl.trans(a), total, input_precision="ieee")
    low_ptrs = low_ptr + rows.to(tl.int64)[:, None] * RANKS + ranks[None, :]
    tl.store(low_ptrs, total.to(low_ptr.dtype.element_ty), mask=is_own[:, None] & (ranks < RANKS)[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def _expand_kernel(
    low_ptr: tl.tensor,  # [num_rows, RANKS] contiguous
    b_ptr: tl.tensor,  # [num_adapters, OUT, RANK] contiguous
    numbers_ptr: tl.tensor,  # [num_rows] int32
    y_ptr: tl.tensor,  # [num_rows, OUT], rows y_stride apart
    num_rows: tl.tensor,
    y_stride: tl.tensor,
    OUT: tl.constexpr,
    RANKS: tl.constexpr,  # of all parts
    RANK: tl.constexpr,  # of this part, a power of two
    FIRST_RANK: tl.constexpr,
    FIRST: tl.constexpr,  # first column of this part
    SIZE: tl.constexpr,  # columns of this part
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,  # divides RANK
) -> None:
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    adapter = tl.program_id(1)
    is_own = tl.load(numbers_ptr + rows, mask=rows < num_rows, other=0) == adapter + 1
    if tl.max(is_own.to(tl.int32), axis=0) == 0:
        return
    columns = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = columns < SIZE
    inner = tl.arange(0, BLOCK_R)
    low_ptrs = low_ptr + rows.to(tl.int64)[:, None] * RANKS + FIRST_RANK + inner[None, :]
    b_rows = adapter.to(tl.int64) * OUT + FIRST + columns
    b_ptrs = b_ptr + b_rows[:, None] * RANK + inner[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, RANK, BLOCK_R):
        low = tl.load(low_ptrs + k, mask=is_own[:, None], other=0.0)
        b = tl.load(b_ptrs + k, mask=is_column[:, None], other=0.0)
        total = tl.dot(low, tl.trans(b), total, input_precision="ieee")
    mask = is_own[:, None] & is_column[None, :]
    y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * y_stride + FIRST + columns[None, :]
    y = tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptrs, (y + total).to(y_ptr.dtype.element_ty), mask=mask)


def add_lora(
    y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, part_sizes: Sequence[int], rows: AdapterRows
) -> None:
    """Add to y what the adapters of its rows make of x. Rows without adapter stay as they are.

    Args:
        y: [num_rows, out_features], written to; any row stride.
        x: [num_rows, in_features], same dtype; any row stride.
        lora_a: [num_adapters, num_parts · rank, in_features], same dtype, contiguous; rank a power of two ≥ MIN_RANK.
        lora_b: [num_adapters, out_features, rank], same dtype, contiguous. The scale is part of it.
        part_sizes: columns of y that belong to each part; they add up to out_features. Part i has rows
            i · rank … (i + 1) · rank - 1 of A.
        rows: which adapter each row has.

    Raises:
        ValueError: on a GPU, shapes or strides that are not as above.
    """
    if not uses_triton(y):
        add_lora_reference(y, x, lora_a, lora_b, part_sizes, rows)
        return
    _check(y, x, lora_a, lora_b, part_sizes, rows.numbers)
    num_rows, num_adapters = len(x), len(lora_a)
    if not num_rows:
        return
    ranks, rank = lora_a.shape[1], lora_b.shape[2]
    block_m = 16 if num_rows <= FEW_ROWS else 64
    block_r = min(64, rank)
    low = torch.empty(num_rows, ranks, dtype=x.dtype, device=x.device)
    blocks = triton.cdiv(num_rows, block_m)
    _shrink_kernel[blocks, num_adapters, triton.cdiv(ranks, block_r)](
        x,
        lora_a,
        rows.numbers,
        low,
        num_rows,
        x.stride(0),
        IN=x.shape[1],
        RANKS=ranks,
        BLOCK_M=block_m,
        BLOCK_R=block_r,
        BLOCK_K=BLOCK_K,
        num_warps=4,
    )
    for part, (first, last) in enumerate(pairwise(accumulate(part_sizes, initial=0))):
        _expand_kernel[blocks, num_adapters, triton.cdiv(last - first, BLOCK_N)](
            low,
            lora_b,
            rows.numbers,
            y,
            num_rows,
            y.stride(0),
            OUT=y.shape[1],
            RANKS=ranks,
            RANK=rank,
            FIRST_RANK=part * rank,
            FIRST=first,
            SIZE=last - first,
            BLOCK_M=block_m,
            BLOCK_N=BLOCK_N,
            BLOCK_R=block_r,
            num_warps=4,
        )


def _check(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, part_sizes: Sequence[int], numbers: Tensor) -> None:
    rank = lora_b.shape[2]
    shapes = (
        (len(x), sum(part_sizes)),
        (len(lora_b), rank * len(part_sizes), x.shape[1]),
        (len(lora_a), sum(part_sizes), rank),
        (len(x),),
    )
    if (y.shape, lora_a.shape, lora_b.shape, numbers.shape) != shapes or rank < MIN_RANK or rank & (rank - 1):
        raise ValueError(
            f"y is {tuple(y.shape)}, x {tuple(x.shape)}, lora_a {tuple(lora_a.shape)}, lora_b {tuple(lora_b.shape)}, "
            f"rows {tuple(numbers.shape)} for parts {list(part_sizes)}; expected [rows, out], [rows, in], "
            f"[adapters, parts · rank, in], [adapters, out, rank] and [rows], with a power of two ≥ {MIN_RANK} as rank"
        )
    contiguous = lora_a.is_contiguous() and lora_b.is_contiguous() and numbers.is_contiguous()
    if not contiguous or y.stride(1) != 1 or x.stride(1) != 1:
        raise ValueError(
            f"strides are {y.stride()}, {x.stride()}, {lora_a.stride()} and {lora_b.stride()}; expected contiguous "
            "adapters, and contiguous rows of y and x"
        )


def compile_cases() -> list[CompileCase]:
    """q, k and v of Qwen3-0.6B and 8B, decoded and in a prompt, of small and large rank; and float32."""

    def case(num_rows: int, in_features: int, sizes: Sequence[int], rank: int, dtype: torch.dtype) -> CompileCase:
        def empty(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device="meta")

        y, x = empty(num_rows, sum(sizes)), empty(num_rows, in_features)
        lora_a, lora_b = empty(8, len(sizes) * rank, in_features), empty(8, sum(sizes), rank)
        rows = AdapterRows(torch.empty(num_rows, dtype=torch.int32, device="meta"), ())
        name = f"lora {num_rows} {in_features} rank {rank} {str(dtype).removeprefix('torch.')}"
        return CompileCase(name, lambda: add_lora(y, x, lora_a, lora_b, sizes, rows))

    return [
        case(1, 1024, (2048, 1024, 1024), 16, torch.bfloat16),
        case(4096, 4096, (4096, 1024, 1024), 128, torch.bfloat16),
        case(16, 1000, (1000,), 32, torch.float32),
    ]
