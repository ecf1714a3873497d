"""The parts of `make gpu`, in the order they run."""

from dataclasses import dataclass
from importlib import import_module

from loadtest.gpu.results import Group

PART_LIMIT_S = 540.0
"""A part ends within ten minutes, its start included."""


@dataclass(frozen=True)
class Part:
    """One JSON file of results."""

    module: str
    group_limit_s: float
    is_ours: bool = True
    """Whether a failure is an error of this project."""

    def groups(self) -> dict[str, Group]:
        """By name. Imports the part, and with it what it measures."""
        found: dict[str, Group] = import_module(f"loadtest.gpu.{self.module}").groups()
        return found


PARTS = {
    "kernels": Part("kernels_part", 180),
    "golden": Part("golden_part", 240),
    "engine": Part("engine_part", 180),
    "tests": Part("tests_part", 300),
    "peers": Part("peers_part", 240, is_ours=False),
}
