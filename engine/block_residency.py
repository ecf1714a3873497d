"""How long KV blocks keep what is in them, and how soon it is wanted again, measured on a sample of them."""

import time
from bisect import bisect_left
from itertools import accumulate

SAMPLE_EVERY = 8
"""One block of so many is watched. The pool looks at ids before it calls anything here."""
BOUNDS_S = (0.001, 0.01, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0, 3600.0)
"""Upper ends of the histograms' buckets; one more is without end."""


class Durations:
    """A histogram of seconds."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS_S) + 1)
        self.total_s = 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        self._counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.total_s += seconds

    def cumulated(self) -> list[int]:
        """How many were at most as long as each of the bounds; the last number is of all."""
        return list(accumulate(self._counts))


class BlockResidency:
    """Watches blocks from the moment that a request takes one until another's content is written into it.

    Attributes:
        lifetime: from being taken to being given to another request, or to having nothing of use in it.
        idle_before_evict: of those given to another request with findable content: since nobody owned them.
        reuse_gap: of cached blocks that a request takes up again: since nobody owned them.
    """

    def __init__(self) -> None:
        self.lifetime = Durations()
        self.idle_before_evict = Durations()
        self.reuse_gap = Durations()
        self._taken_at: dict[int, float] = {}
        self._idle_since: dict[int, float] = {}

    def taken(self, block: int) -> None:
        """A request gets a block for new content."""
        self._taken_at[block] = time.monotonic()

    def idle(self, block: int) -> None:
        """Nobody owns a block any more, and its content can be found."""
        self._idle_since[block] = time.monotonic()

    def reused(self, block: int) -> None:
        """A request takes up an idle block's content."""
        self.reuse_gap.add(time.monotonic() - self._idle_since.pop(block))

    def evicted(self, block: int) -> None:
        """An idle block's content is given up."""
        now = time.monotonic()
        self.idle_before_evict.add(now - self._idle_since.pop(block))
        self.lifetime.add(now - self._taken_at.pop(block))

    def freed(self, block: int) -> None:
        """Nobody owns a block any more, and its content is of no use."""
        self.lifetime.add(time.monotonic() - self._taken_at.pop(block))
