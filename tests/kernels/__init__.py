"""Kernels under Triton's interpreter and in the compiler, without a GPU; and what their tests on a GPU share."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from hypothesis import Phase, settings
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
UNIT_ROUNDOFF = {
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
    torch.float8_e4m3fn: 2.0**-4,
}
SUM_ERROR = 2.0**-19
"""Relative error allowed to float32 arithmetic, for sums in another order."""

interpreted = settings(max_examples=40, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
"""Property tests of what runs at the interpreter's pace: examples are not shrunk, which would take minutes."""


def assert_close(
    actual: Tensor, expected: Tensor, magnitude: float = 1.0, rounded_before_to: torch.dtype | None = None
) -> None:
    """Compare with what was computed in float32 from the same inputs: rounding to the result's dtype is allowed.

    Args:
        magnitude: size of the terms that sums are made of, where the sum may be much smaller.
        rounded_before_to: a dtype that values had before they were given the result's.
    """
    roundoff = UNIT_ROUNDOFF[actual.dtype] + UNIT_ROUNDOFF.get(rounded_before_to, 0.0) + SUM_ERROR
    subnormal = torch.finfo(actual.dtype).smallest_normal * UNIT_ROUNDOFF[actual.dtype]
    atol = max(subnormal, SUM_ERROR * magnitude)
    torch.testing.assert_close(actual.float(), expected.float(), rtol=roundoff, atol=atol)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, `torch.empty` gives NaN: what a kernel does not write cannot be right by chance."""
    torch.use_deterministic_algorithms(True)  # its option fill_uninitialized_memory is on unless told otherwise
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def padded_rows(values: Tensor, padding: int) -> Tensor:
    """The same matrix with `padding` NaN between its rows."""
    wide = torch.full((values.shape[0], values.shape[1] + padding), torch.nan, dtype=values.dtype, device=values.device)
    rows = wide[:, : values.shape[1]]
    rows.copy_(values)
    return rows
