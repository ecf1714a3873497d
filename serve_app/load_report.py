"""LoadReport: what a replica tells the autoscaler each second, from the engine's counters."""

import math
from typing import Protocol

MEMORY_S = 30.0
"""Seconds over which the rate at which prompts are taken up is averaged."""

LEAST_S = 10.0
"""Seconds after which that average is told."""


class LoadCounters(Protocol):
    """The part of EngineStats that tells load."""

    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def num_waiting_tokens(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def num_owned_blocks(self) -> int: ...
    @property
    def num_prompt_tokens(self) -> int: ...


class LoadReport:
    """Turns counters into gauges and rates. One for each replica; it remembers the counters of the report before.

    Args:
        max_num_seqs: the most requests that run at once.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self._max_num_seqs = max_num_seqs
        self._last: tuple[float, LoadCounters] | None = None
        self._queued_s = 0.0
        self._taken_tokens = 0.0
        self._taken_s = 0.0

    def measure(self, stats: LoadCounters, now_s: float) -> dict[str, int | float]:
        """The report of this moment.

        Args:
            stats: the engine's counters; a snapshot, as the next call compares with it.
            now_s: a monotonic clock.

        Returns:
            num_running, num_waiting, num_waiting_tokens: as in the engine;
            kv_utilization: KV blocks in use by requests, of all, 0 to 1;
            sequence_utilization: running requests, of the most that may run;
            arrival_tokens_per_s: prompt tokens that came in since the last report;
            taken_tokens_per_s: prompt tokens that left the queue, over the last MEMORY_S; 0 in the first LEAST_S;
            queued_s: for how long requests have been waiting in every report.
        """
        arrived_per_s = 0.0
        if self._last is not None and now_s > self._last[0]:
            elapsed_s, last = now_s - self._last[0], self._last[1]
            arrived = stats.num_prompt_tokens - last.num_prompt_tokens
            arrived_per_s = arrived / elapsed_s
            decay = math.exp(-elapsed_s / MEMORY_S)
            taken = max(0, arrived + last.num_waiting_tokens - stats.num_waiting_tokens)
            self._taken_tokens = self._taken_tokens * decay + taken
            self._taken_s = self._taken_s * decay + elapsed_s
            self._queued_s = self._queued_s + elapsed_s if last.num_waiting and stats.num_waiting else 0.0
        self._last = (now_s, stats)
        return {
            "num_running": stats.num_running,
            "num_waiting": stats.num_waiting,
            "num_waiting_tokens": stats.num_waiting_tokens,
            "kv_utilization": stats.num_owned_blocks / stats.num_blocks,
            "sequence_utilization": stats.num_running / self._max_num_seqs,
            "arrival_tokens_per_s": arrived_per_s,
            "taken_tokens_per_s": self._taken_tokens / self._taken_s if self._taken_s >= LEAST_S else 0.0,
            "queued_s": self._queued_s,
        }
