"""CachingReplica: a modelled replica with the engine's block pool, so that prefixes stay and are evicted as there."""

from collections import deque
from dataclasses import dataclass

from cluster.simulation.replica import ModelledReplica, Outcome, ReplicaSpeed
from cluster.simulation.trace import Arrival
from engine.block_pool import BlockPool
from engine.stats import PrefillRate
from serve_app.steps import ReplicaLoad


@dataclass(frozen=True, slots=True)
class Report:
    """What a replica tells after a step."""

    time_s: float
    load: ReplicaLoad
    stored: list[bytes]
    evicted: list[bytes]
    begun: list[Outcome]
    """Requests that got their first token."""


class CachingReplica(ModelledReplica):
    """One replica with a prefix cache. `speed.block_size` is that of the trace's keys.

    Args:
        speed: of this replica.
        now_s: when it begins to take requests.
    """

    def __init__(self, speed: ReplicaSpeed, now_s: float) -> None:
        super().__init__(speed, now_s)
        self.reports: deque[Report] = deque()
        """Of the steps since somebody took them out, oldest first."""
        self.num_computed_tokens = 0
        """Of prompts."""
        self._pool = BlockPool(speed.num_blocks)
        self._pool.take_events()
        self._blocks: dict[int, list[int]] = {}
        """Block tables, by the id() of the outcome."""
        self._rate = PrefillRate()
        self._begun: list[Outcome] = []

    def _usable_keys(self, arrival: Arrival) -> tuple[bytes, ...]:
        """Keys of the blocks that a hit may cover: the prompt's last token is always computed."""
        return arrival.keys[: (arrival.prompt_tokens - 1) // self._speed.block_size]

    def _num_blocks(self, arrival: Arrival) -> int:
        return -(-(arrival.prompt_tokens + arrival.output_tokens) // self._speed.block_size)

    def _fits(self, arrival: Arrival) -> bool:
        shared = self._pool.find_prefix(self._usable_keys(arrival))
        needed = self._num_blocks(arrival) - len(shared) + self._pool.num_cached_among(shared)
        return needed <= self._pool.num_available

    def _admit(self, outcome: Outcome) -> int:
        arrival = outcome.arrival
        shared = self._pool.find_prefix(self._usable_keys(arrival))
        self._pool.share(shared)
        self._blocks[id(outcome)] = shared + self._pool.allocate(self._num_blocks(arrival) - len(shared))
        outcome.num_cached_tokens = len(shared) * self._speed.block_size
        self.num_computed_tokens += arrival.prompt_tokens - outcome.num_cached_tokens
        return arrival.prompt_tokens - outcome.num_cached_tokens

    def _begin_output(self, outcome: Outcome) -> None:
        for block, key in zip(self._blocks[id(outcome)], outcome.arrival.keys, strict=False):  # outputs have no keys
            self._pool.register(block, key)
        self._begun.append(outcome)

    def _release(self, outcome: Outcome) -> None:
        self._pool.release(self._blocks.pop(id(outcome)))

    def _take_step(self, prompt_tokens: int) -> None:
        began_s = self._now_s
        super()._take_step(prompt_tokens)
        self._rate.add(prompt_tokens, self._now_s - began_s)
        self._report(self._now_s - began_s)

    def _decode(self, until_s: float) -> None:
        step_s = self._step_s()
        super()._decode(until_s)
        self._report(step_s)

    def _report(self, step_s: float) -> None:
        load = ReplicaLoad(
            num_running=self.num_running,
            num_waiting=len(self._waiting),
            num_waiting_tokens=self.num_waiting_tokens,
            num_free_blocks=self._pool.num_available,
            num_blocks=self._pool.num_blocks,
            step_s=step_s,
            prefill_tokens_per_s=self._rate.tokens_per_s,
            num_prefill_tokens=sum(left for _, left in self._prefilling),
        )
        begun, self._begun = self._begun, []
        self.reports.append(Report(self._now_s, load, *self._pool.take_events(), begun))
