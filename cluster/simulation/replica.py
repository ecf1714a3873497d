"""ModelledReplica: the engine as a queue. Continuous batching, chunked prefill and KV space, but no tokens."""

import math
from collections import deque
from dataclasses import dataclass
from heapq import heappop, heappush

from cluster.simulation.trace import Arrival


@dataclass(frozen=True)
class ReplicaSpeed:
    """How fast a replica is, and what fits on it.

    A step takes `step_s`, and more for each request that decodes and each prompt token in it.
    """

    step_s: float = 0.02
    step_s_per_sequence: float = 0.0004
    prefill_tokens_per_s: float = 10_000.0
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 64
    num_blocks: int = 6_250
    block_size: int = 16
    startup_s: float = 40.0
    """From the decision for a replica until it takes requests."""


@dataclass(slots=True)
class Outcome:
    """How a request went. Times are of the trace's clock."""

    arrival: Arrival
    first_token_s: float = math.inf
    finish_s: float = math.inf
    num_cached_tokens: int = 0
    """Prompt tokens that a prefix cache held."""

    @property
    def ttft_s(self) -> float:
        return self.first_token_s - self.arrival.time_s

    @property
    def tpot_s(self) -> float:
        """Seconds per output token after the first."""
        return (self.finish_s - self.first_token_s) / max(1, self.arrival.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class ReplicaStats:
    """A replica's counters, named as in EngineStats: LoadReport reads either."""

    num_running: int
    num_waiting: int
    num_waiting_tokens: int
    num_blocks: int
    num_owned_blocks: int
    num_prompt_tokens: int


class ModelledReplica:
    """One replica.

    Args:
        speed: of this replica.
        now_s: when it begins to take requests.
    """

    def __init__(self, speed: ReplicaSpeed, now_s: float) -> None:
        self._speed = speed
        self._now_s = now_s
        self._waiting: deque[Outcome] = deque()
        self._prefilling: deque[list] = deque()
        """[outcome, prompt tokens left]"""
        self._decoding: list[tuple[int, int, Outcome]] = []
        """A heap of (step after which it ends, a number that breaks ties, outcome)."""
        self._num_steps = 0
        """Steps in which decoding requests got a token."""
        self._num_started = 0
        self._reserved_tokens = 0
        self._kv_tokens = 0
        """Of prompts and of outputs of those that decode, up to now."""
        self.num_waiting_tokens = 0
        self._num_prompt_tokens = 0

    @property
    def num_running(self) -> int:
        return len(self._prefilling) + len(self._decoding)

    @property
    def num_requests(self) -> int:
        return len(self._waiting) + self.num_running

    def stats(self) -> ReplicaStats:
        """Load and totals, now."""
        num_blocks = self._speed.num_blocks
        return ReplicaStats(
            num_running=self.num_running,
            num_waiting=len(self._waiting),
            num_waiting_tokens=self.num_waiting_tokens,
            num_blocks=num_blocks,
            num_owned_blocks=min(num_blocks, math.ceil(self._kv_tokens / self._speed.block_size)),
            num_prompt_tokens=self._num_prompt_tokens,
        )

    def submit(self, outcome: Outcome) -> None:
        """Queue a request. Requests come in the order of their arrival."""
        self._waiting.append(outcome)
        self.num_waiting_tokens += outcome.arrival.prompt_tokens
        self._num_prompt_tokens += outcome.arrival.prompt_tokens

    def advance(self, until_s: float) -> None:
        """Run steps until a time. The last one may end later; the next call then does less."""
        while self._now_s < until_s:
            tokens = self._prefill_chunk()
            if tokens:
                self._take_step(tokens)
            elif self._decoding:
                self._decode(until_s)
            else:
                self._now_s = min(until_s, self._next_arrival_s)

    @property
    def _next_arrival_s(self) -> float:
        """Of a request that has been submitted ahead of its time, or one that waits for room: now."""
        return self._waiting[0].arrival.time_s if self._waiting else math.inf

    def _step_s(self) -> float:
        return self._speed.step_s + self._speed.step_s_per_sequence * len(self._decoding)

    def _prefill_chunk(self) -> int:
        """Give the next step its prompt tokens, admitting requests while there is room. Returns how many tokens."""
        budget = left = self._speed.max_num_batched_tokens - len(self._decoding)
        for entry in self._prefilling:
            part = min(left, entry[1])
            entry[1] -= part
            left -= part
        while left > 0 and self._waiting and self._has_room(self._waiting[0].arrival):
            outcome = self._waiting.popleft()
            self.num_waiting_tokens -= outcome.arrival.prompt_tokens
            uncached = self._admit(outcome)
            part = min(left, uncached)
            self._prefilling.append([outcome, uncached - part])
            left -= part
        return budget - left

    def _admit(self, outcome: Outcome) -> int:
        """Give a request its room. Returns how many prompt tokens are to be computed."""
        prompt = outcome.arrival.prompt_tokens
        self._reserved_tokens += prompt + outcome.arrival.output_tokens
        self._kv_tokens += prompt
        return prompt

    def _has_room(self, arrival: Arrival) -> bool:
        fits = self._fits(arrival) or not self.num_running
        return arrival.time_s <= self._now_s and self.num_running < self._speed.max_num_seqs and fits

    def _fits(self, arrival: Arrival) -> bool:
        needed = self._reserved_tokens + arrival.prompt_tokens + arrival.output_tokens
        return needed <= self._speed.num_blocks * self._speed.block_size

    def _take_step(self, prompt_tokens: int) -> None:
        """One step with prompt tokens in it."""
        self._now_s += self._step_s() + prompt_tokens / self._speed.prefill_tokens_per_s
        self._finish_steps(1)
        while self._prefilling and not self._prefilling[0][1]:
            outcome = self._prefilling.popleft()[0]
            outcome.first_token_s = self._now_s
            self._begin_output(outcome)
            self._num_started += 1
            last_step = self._num_steps + outcome.arrival.output_tokens - 1
            heappush(self._decoding, (last_step, self._num_started, outcome))
        self._end_finished()

    def _decode(self, until_s: float) -> None:
        """As many steps without prompt tokens as are alike: until a request ends or comes, or the time is over."""
        step_s = self._step_s()
        stop_s = until_s if self._next_arrival_s <= self._now_s else min(until_s, self._next_arrival_s)
        num_steps = max(1, min(self._decoding[0][0] - self._num_steps, math.ceil((stop_s - self._now_s) / step_s)))
        self._now_s += num_steps * step_s
        self._finish_steps(num_steps)
        self._end_finished()

    def _finish_steps(self, num_steps: int) -> None:
        self._num_steps += num_steps
        self._kv_tokens += num_steps * len(self._decoding)

    def _end_finished(self) -> None:
        while self._decoding and self._decoding[0][0] <= self._num_steps:
            outcome = heappop(self._decoding)[2]
            outcome.finish_s = self._now_s
            self._release(outcome)

    def _begin_output(self, outcome: Outcome) -> None:
        """The prompt is computed: for a replica that keeps what it computed."""

    def _release(self, outcome: Outcome) -> None:
        """Take back the room of a request that has ended."""
        tokens = outcome.arrival.prompt_tokens + outcome.arrival.output_tokens
        self._reserved_tokens -= tokens
        self._kv_tokens -= tokens - 1
