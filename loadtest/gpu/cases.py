"""What a measured kernel is: how to run it, what is right, and the least it must do."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

TOLERANCE = 2e-2
"""Of bfloat16 results, relative to the largest value."""


@dataclass(frozen=True)
class Case:
    """One kernel at one shape. `moved` bytes and `computed` operations are what it must do at least."""

    name: str
    run: Callable[[], Tensor]
    expected: Callable[[], Tensor]
    """From a float32 reference."""
    moved: float
    computed: float = 0.0
    peers: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)
    """What torch and others have for it, by name."""
    checked: Callable[[], Tensor] | None = None
    """What to compare instead of the result of `run`."""
    tolerance: float | None = None
    """None: TOLERANCE; 0: equal."""

    def check(self) -> float:
        """The error relative to the largest expected value.

        Raises:
            AssertionError: it is too large, or the result is not even a number.
        """
        expected = self.expected().float()
        # The memory that the result is put into next holds no numbers, so what a kernel leaves out shows.
        torch.full_like(expected, torch.nan, dtype=torch.bfloat16)
        found = (self.checked or self.run)().float()
        error = ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
        limit = TOLERANCE if self.tolerance is None else self.tolerance
        if not error <= limit:
            raise AssertionError(f"{self.name}: relative error {error:.3g}, expected at most {limit}")
        return error


def randn(*shape: int, device: str) -> Tensor:
    """Normal numbers in bfloat16."""
    return torch.randn(*shape, dtype=torch.bfloat16, device=device)
