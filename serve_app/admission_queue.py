"""AdmissionQueue: which requests go to the replicas now, which wait for a moment, which are to come back later.

What waits at the replicas goes by a window of prompt tokens: what they drain within a quarter of the time to first
token that is promised. What comes beyond waits here, where it has an order: priority, then the API key that had the
least, then arrival. It waits for half of that time at most, so that what is admitted keeps the promise; the rest is
for its own prompt. Everything here is bounded.
"""

import math
from bisect import insort
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum, auto

from serve_app.config import AdmissionConfig
from serve_app.retry_tickets import RetryTickets
from serve_app.steps import ReplicaLoad

AT_REPLICAS = 0.25
"""Share of the time to first token for which requests may wait at the replicas."""
IN_QUEUE = 0.5
"""Share of it for which they may wait here."""
REQUESTS_PER_REPLICA = 2
"""So many may wait at the replicas however long they take: a replica has something to go on with."""
REQUEST_TOKENS = 32
"""What starting a request costs beside its prompt, in prompt tokens."""
FIRST_TOKENS_PER_S = 500.0
"""Taken for the drain rate until it is measured. Low, as what waits here meanwhile is not lost."""
RATE_MEMORY_S = 5.0
"""Seconds over which the drain rate is averaged."""


class _State(Enum):
    QUEUED = auto()
    SENT = auto()
    STARTED = auto()
    """Its first token came: nothing of it waits any more."""
    ENDED = auto()


@dataclass(slots=True, eq=False)
class Entry:
    """One HTTP request on its way to its first token."""

    key: str
    """Name of the API key; requests of a name share what is theirs."""
    priority: int
    """Lower goes first."""
    tokens: int
    """What it costs: its prompt, and REQUEST_TOKENS for each choice."""
    identity: int
    """Equal when the same request is sent again."""
    arrival_s: float = 0.0
    """When it first came, if it was refused and is back."""
    queued_s: float = 0.0
    sent_s: float = 0.0
    tokens_ahead: int | None = None
    """Of those sent before that still waited then, and its own; None if there was no replica: it waited for one."""
    state: _State = _State.QUEUED

    @property
    def is_sent(self) -> bool:
        """Whether it waits at a replica."""
        return self.state is _State.SENT


class DrainRate:
    """Prompt tokens per second that the replicas take up: what was ahead of requests, over the time that it took.

    Summed, so that requests weigh as long as they waited: what many wait for tells the rate, and a single one on idle
    replicas little, whatever limits them: prompts, seats in the batch, or KV blocks.
    """

    def __init__(self) -> None:
        self._tokens = FIRST_TOKENS_PER_S
        self._waited_s = 1.0
        self._updated_s = -math.inf

    def add(self, tokens: int, waited_s: float, now_s: float) -> None:
        """A request got its first token: so many were ahead of it when it was sent, with its own, so long ago."""
        decay = math.exp((self._updated_s - now_s) / RATE_MEMORY_S) if self._updated_s > -math.inf else 1.0
        self._tokens = self._tokens * decay + tokens
        self._waited_s = self._waited_s * decay + waited_s
        self._updated_s = now_s

    @property
    def per_s(self) -> float:
        return max(1.0, self._tokens / max(self._waited_s, 1e-6))


class AdmissionQueue:
    """The decisions, without waiting or a clock. Times are seconds of any clock that never goes back.

    Among requests of the same priority, keys share by virtual time (start-time fair queueing, Goyal et al. 1996): the
    time of a key goes on by the tokens it gets, and the key that is furthest behind comes next. Where too much waits,
    the last of the key that asks for the most is refused, which need not be the newest request.

    Args:
        config: how much may wait.
        ttft_s: seconds to the first token that requests should keep.

    Attributes:
        num_queued, queued_tokens: waiting here.
        num_sent, sent_tokens: waiting at the replicas.
        rate: of all replicas, as seen from here.
        num_refused: requests refused, by reason.
    """

    def __init__(self, config: AdmissionConfig, ttft_s: float) -> None:
        self.configure(config, ttft_s)
        self.num_queued = self.queued_tokens = 0
        self.num_sent = self.sent_tokens = 0
        self.rate = DrainRate()
        self.num_refused = {"queue_full": 0, "waited_too_long": 0}
        self._tickets = RetryTickets()
        self._queues: dict[tuple[int, str], list[Entry]] = {}
        """By priority and key, each by arrival; none is empty."""
        self._by_age: dict[Entry, None] = {}
        """All of them, in the order in which they were queued."""
        self._virtual: dict[str, float] = {}
        self._virtual_now = 0.0

    def configure(self, config: AdmissionConfig, ttft_s: float) -> None:
        """Go by other limits from now on; also for what waits already."""
        self._config = config
        self._at_replicas_s = AT_REPLICAS * ttft_s
        self._in_queue_s = IN_QUEUE * ttft_s

    def offer(self, entry: Entry, now_s: float) -> None:
        """Put a request into the queue. `step` then decides about it."""
        came_s = self._tickets.claim(entry.identity, now_s)
        entry.arrival_s = now_s if came_s is None else came_s
        entry.queued_s = now_s
        if not any(key == entry.key for _, key in self._queues):
            # Whoever had nothing to send has not saved anything up.
            self._virtual[entry.key] = max(self._virtual.get(entry.key, 0.0), self._virtual_now)
        insort(self._queues.setdefault((entry.priority, entry.key), []), entry, key=lambda each: each.arrival_s)
        self._by_age[entry] = None
        self.num_queued += 1
        self.queued_tokens += entry.tokens

    def step(self, now_s: float, loads: Collection[ReplicaLoad]) -> tuple[list[Entry], list[tuple[Entry, int]]]:
        """Send and refuse as it is time to.

        Args:
            now_s: the clock.
            loads: of the replicas that take requests.

        Returns:
            Requests to be sent; those refused, each with the seconds after which to come back.
        """
        sent = []
        while self._queues and self._may_send(entry := self._first(), loads):
            self._unqueue(entry)
            self._virtual_now = max(self._virtual_now, self._virtual[entry.key])
            self._virtual[entry.key] += entry.tokens
            entry.state = _State.SENT
            self.num_sent += 1
            self.sent_tokens += entry.tokens
            entry.sent_s = now_s
            entry.tokens_ahead = self.sent_tokens if loads else None
            sent.append(entry)
        refused = []
        while self._by_age and now_s - (entry := next(iter(self._by_age))).queued_s >= self._in_queue_s:
            refused.append((entry, self._refuse(entry, "waited_too_long", now_s)))
        while self._is_full(now_s):
            entry = self._last()
            refused.append((entry, self._refuse(entry, "queue_full", now_s)))
        return sent, refused

    def started(self, entry: Entry, now_s: float) -> None:
        """A request that was sent has its first token."""
        if entry.state is _State.SENT:
            if entry.tokens_ahead is not None:
                self.rate.add(entry.tokens_ahead, now_s - entry.sent_s, now_s)
            self._leave_replicas(entry)
            entry.state = _State.STARTED

    def ended(self, entry: Entry) -> None:
        """A request is over, wherever it is."""
        if entry.state is _State.QUEUED:
            self._unqueue(entry)
        elif entry.state is _State.SENT:
            self._leave_replicas(entry)
        entry.state = _State.ENDED

    def charge(self, key: str, tokens: int) -> None:
        """Generated tokens, too, are something that a key got."""
        self._virtual[key] += tokens

    def _may_send(self, entry: Entry, loads: Collection[ReplicaLoad]) -> bool:
        """Whether the replicas would get to it soon: by what this process sees, and by what they tell of all."""
        if self.num_sent < REQUESTS_PER_REPLICA * max(1, len(loads)):
            return True
        waiting = sum(load.num_waiting_tokens + load.num_prefill_tokens for load in loads)
        per_s = sum(load.prefill_tokens_per_s for load in loads)
        if per_s and waiting > per_s * self._at_replicas_s:
            return False
        return self.sent_tokens + entry.tokens <= self.rate.per_s * self._at_replicas_s

    def _is_full(self, now_s: float) -> bool:
        """Whether too much waits. By the rate only when it is slow: after quiet times the rate is an underestimate."""
        if self.num_queued <= 1:
            return False
        if self.num_queued > self._config.max_queued_requests or self.queued_tokens > self._config.max_queued_tokens:
            return True
        is_slow = now_s - next(iter(self._by_age)).queued_s >= self._in_queue_s / 2
        return is_slow and self.queued_tokens > self.rate.per_s * self._in_queue_s

    def _first(self) -> Entry:
        """The next to be sent."""
        return min((queue[0] for queue in self._queues.values()), key=self._rank)

    def _last(self) -> Entry:
        """The next to be refused: the newest of the key that asks for the most."""

        def rank(queue: list[Entry]) -> tuple[int, float, float]:
            tail = queue[-1]
            return tail.priority, self._virtual[tail.key] + sum(each.tokens for each in queue), tail.arrival_s

        return max(self._queues.values(), key=rank)[-1]

    def _rank(self, entry: Entry) -> tuple[int, float, float]:
        return entry.priority, self._virtual[entry.key], entry.arrival_s

    def _refuse(self, entry: Entry, reason: str, now_s: float) -> int:
        self._unqueue(entry)
        entry.state = _State.ENDED
        self.num_refused[reason] += 1
        return self._tickets.issue(entry.identity, entry.arrival_s, entry.tokens / self.rate.per_s, now_s)

    def _unqueue(self, entry: Entry) -> None:
        queue = self._queues[entry.priority, entry.key]
        queue.remove(entry)
        if not queue:
            del self._queues[entry.priority, entry.key]
        del self._by_age[entry]
        self.num_queued -= 1
        self.queued_tokens -= entry.tokens

    def _leave_replicas(self, entry: Entry) -> None:
        self.num_sent -= 1
        self.sent_tokens -= entry.tokens
