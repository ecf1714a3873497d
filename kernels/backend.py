"""Where the kernels meet Triton: the one import of it, and which tensors it serves.

Triton need not be installed: kernels are then defined but never launched, and every operation takes its torch path.

How kernels are written here: `@triton.jit`, run-time parameters annotated `tl.tensor` (which they are inside a kernel;
`int` would force 32 bits), sizes that a model fixes `tl.constexpr`, and counts of tokens or rows, which every step
changes, in `do_not_specialize`: Triton would otherwise compile anew for a count of one and for multiples of 16.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

__all__ = ["HAS_TRITON", "CompileCase", "num_multiprocessors", "tl", "triton", "uses_triton"]

PLANNED_MULTIPROCESSORS = 132
"""Launches that no device serves (interpreted, or recorded for offline compilation) are planned for an H200."""

if TYPE_CHECKING:
    import triton.language as tl

    class Kernel:
        """What `triton.jit` makes: `kernel[grid](*arguments)` launches it, other kernels call it."""

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]: ...
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    class triton:
        """The part of Triton that kernels use, typed."""

        @staticmethod
        def jit(function: Callable[..., Any] = ..., *, do_not_specialize: Sequence[str] = ()) -> Kernel: ...
        @staticmethod
        def cdiv(x: int, y: int) -> int: ...
        @staticmethod
        def next_power_of_2(n: int) -> int: ...

    HAS_TRITON = True
else:
    try:
        import triton
        import triton.language as tl

        HAS_TRITON = True
    except ModuleNotFoundError:

        class _Absent:
            """Stands in for Triton's modules where kernels are defined: attributes and calls give itself."""

            def __getattr__(self, name: str) -> "_Absent":
                return self

            def __call__(self, *args: object, **kwargs: object) -> "_Absent":
                return self

        triton = tl = _Absent()
        HAS_TRITON = False

# Triton decides between compiling and interpreting when a kernel is decorated, so one answer holds for the process.
_INTERPRETED: bool = HAS_TRITON and triton.knobs.runtime.interpret is True  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class CompileCase:
    """A launch that real models cause, for compiling its kernels where there is no GPU.

    `launch` calls an operation with tensors on the "meta" device; each Triton kernel it reaches is compiled as it would
    be for a GPU, with the same specialisation, and not run. A kernel file's `compile_cases()` lists its cases.
    """

    name: str
    launch: Callable[[], object]
    min_capability: int = 80
    """First compute capability, times ten, that can run it: 89 where float8_e4m3fn is converted."""
    wgmma: bool = False
    """Whether at least one of the kernels must use Hopper's matrix instruction."""
    max_spill_bytes: int = 0
    """Most bytes of registers per thread that may be spilled to memory."""


def uses_triton(tensor: Tensor) -> bool:
    """Whether operations on `tensor` launch Triton kernels; if not, they are computed by torch.

    True for CUDA tensors, for CPU tensors under TRITON_INTERPRET=1, and for meta tensors, whose launches must be
    recorded by someone (see CompileCase).
    """
    if tensor.is_cpu:
        return _INTERPRETED
    return HAS_TRITON and (tensor.is_cuda or tensor.is_meta)


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; PLANNED_MULTIPROCESSORS for any other device."""
    if device.type != "cuda":
        return PLANNED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
