"""What QueueAndKvPolicy remembers of the load: averages, what a replica can do, the most of late, and bursts."""

import math
from collections import deque

DRAIN_MEMORY_S = 30.0
"""Seconds at full load over which the drain rate follows what is measured."""


class Average:
    """An average over time that forgets exponentially.

    Args:
        memory_s: seconds over which it forgets.
    """

    def __init__(self, memory_s: float) -> None:
        self._memory_s = memory_s
        self._value = 0.0
        self._updated_s: float | None = None

    def add(self, now_s: float, value: float) -> float:
        """Take in the value that holds now; returns the average. The first counts as if it had always held."""
        if self._updated_s is None:
            self._value = value
        else:
            elapsed_s = max(0.0, now_s - self._updated_s)
            self._value += (value - self._value) * -math.expm1(-elapsed_s / self._memory_s)
        self._updated_s = now_s
        return self._value


class DrainRate:
    """Prompt tokens per second that one replica takes up at full load, as measured.

    At full load it follows what is taken up. At less it only learns that a replica can do as much as it does: so it
    rises until a queue forms now and then, also when prompts become easier.

    Args:
        tokens_per_s: to begin with.
    """

    def __init__(self, tokens_per_s: float) -> None:
        self._value = tokens_per_s
        self._updated_s = -math.inf

    def add(self, now_s: float, taken_tokens_per_s: float, drained_tokens_per_s: float | None) -> float:
        """Take in what a replica takes up, and what one does at full load if any is; returns the rate, above 0."""
        if drained_tokens_per_s is None:
            self._value = max(self._value, taken_tokens_per_s)
        else:
            elapsed_s = min(1.0, max(0.0, now_s - self._updated_s))
            self._value += (drained_tokens_per_s - self._value) * -math.expm1(-elapsed_s / DRAIN_MEMORY_S)
        self._updated_s = now_s
        return self._value


class RecentMost:
    """The largest of the numbers of the last `period_s` seconds."""

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self._falling: deque[tuple[float, int]] = deque()
        """Those that no later one reaches: times rise, numbers fall."""
        self.since_s = math.inf
        """Time of the first number of all."""

    def add(self, now_s: float, number: int) -> int:
        """Take in the number of this moment; returns the largest."""
        self.since_s = min(self.since_s, now_s)
        while self._falling and self._falling[-1][1] <= number:
            self._falling.pop()
        self._falling.append((now_s, number))
        while self._falling[0][0] < now_s - self._period_s:
            self._falling.popleft()
        return self._falling[0][1]


class Bursts:
    """How many replicas to keep through the pauses of a load that comes in bursts.

    A burst is load that at least doubles, by a replica or more, after it had halved within the last `memory_s`. The
    first one is none yet, so a load that rises and falls once, or slowly, is never kept replicas for.

    Args:
        memory_s: seconds after a burst for which replicas are kept, as many as load took at most in that time.
    """

    def __init__(self, memory_s: float) -> None:
        self._memory_s = memory_s
        self._recent = RecentMost(memory_s)
        self._is_high = True
        self._extreme = 0.0
        """The most since load came, or the least since it went."""
        self._went_s = -math.inf
        self._until_s = -math.inf

    def add(self, now_s: float, replicas: float) -> int:
        """Take in what the load of this moment takes; returns how many replicas to keep, 0 without bursts."""
        most = self._recent.add(now_s, math.ceil(replicas))
        if self._is_high:
            self._extreme = max(self._extreme, replicas)
            if replicas <= min(self._extreme / 2, self._extreme - 1):
                self._is_high, self._extreme, self._went_s = False, replicas, now_s
        else:
            self._extreme = min(self._extreme, replicas)
            if replicas >= max(self._extreme * 2, self._extreme + 1):
                if now_s - self._went_s <= self._memory_s:
                    self._until_s = now_s + self._memory_s
                self._is_high, self._extreme = True, replicas
        return most if now_s < self._until_s else 0
