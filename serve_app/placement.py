"""Placement: which replica takes a request, by predicted time to its first token.

Pure Python without Ray, torch or a clock of its own, so that the router, the tests and cluster/simulate_routing.py run
the same code. docs/routing.md explains the prediction and what came out of it.
"""

import random
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from enum import StrEnum
from math import sqrt
from statistics import median
from typing import NamedTuple, Protocol
from zlib import crc32

import msgspec

from serve_app.steps import ReplicaLoad

FIRST_RATE = 4000.0
"""Prompt tokens per second of a replica as long as none has told its rate."""
DELIVERY_S = 0.03
"""What a request takes from its placement until the engine can put it into a step."""
QUIET_S = 1.0
"""For how long, and two steps more, a replica may say nothing without being less trusted."""
KV_S = 0.1
"""Seconds by which a replica whose KV cache is half full seems slower; nine times as much at 90 %."""
KV_FULL = 0.95
"""From this share of its KV cache on, a replica seems slower in proportion to what it is asked to hold."""
TIE_S, TIE_SHARE = 0.005, 0.1
"""Predictions so close (seconds, or share of the best one) are equal: more exact they are not."""
RECOMPUTE_S = 0.3
"""What is computed costs those who come later as long again, and again for each such time that all have to wait."""
MISS_MEMORY = 100
"""Requests over which the share of prompt tokens that no cache held is averaged."""

_PRIME = 2**61 - 1
_NO_KEYS: AbstractSet[bytes] = frozenset()
_NO_LOAD = ReplicaLoad(0, 0, 0, num_free_blocks=2**20, num_blocks=2**20, step_s=0.0, prefill_tokens_per_s=0.0)
"""Of a replica that has not reported: nothing but what this process sent there."""


class ReplicaState(Protocol):
    """What an ingress knows of a replica from its step stream."""

    @property
    def load(self) -> ReplicaLoad | None:
        """Of the last report; None before the first."""

    @property
    def block_keys(self) -> AbstractSet[bytes]:
        """Keys of the KV blocks in its prefix cache."""

    @property
    def updated_s(self) -> float:
        """When the last report came, or when the replica was first heard of."""


class Reason(StrEnum):
    """Why a request went where it did."""

    CACHED = "cached"
    """No replica held a longer prefix of it."""
    LOAD = "load"
    """Another held a longer prefix, but would have taken longer."""
    COLD = "cold"
    """No replica held any of it."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What placement needs to know of a request."""

    keys: Sequence[bytes]
    """Of its full blocks, see engine.block_pool.block_keys; none if its prompt has to be computed in any case."""
    num_tokens: int
    block_size: int


class Candidate(msgspec.Struct, frozen=True):
    """A replica, and what would come of a request there."""

    replica_id: str
    num_cached_tokens: int
    wait_s: float
    """Predicted time until the prompt is computed ..."""
    compute_s: float
    """... and how long that takes."""

    @property
    def ttft_s(self) -> float:
        """Predicted time to the first token."""
        return self.wait_s + self.compute_s


@dataclass(slots=True)
class PlacementCounters:
    """Running totals over the requests that got their first token: how good the decisions were."""

    by_reason: dict[Reason, int] = field(default_factory=lambda: dict.fromkeys(Reason, 0))
    num_prompt_tokens: int = 0
    num_predicted_cached_tokens: int = 0
    num_cached_tokens: int = 0
    predicted_ttft_s: float = 0.0
    ttft_s: float = 0.0
    """From the placement on."""


class _InFlight(NamedTuple):
    """A request between its placement and its first token."""

    prompt: Prompt
    chosen: Candidate
    reason: Reason
    placed_s: float
    new_keys: Sequence[bytes]
    """Of blocks that the replica will have cached when it has computed the prompt."""

    @property
    def num_uncached_tokens(self) -> int:
        return self.prompt.num_tokens - self.chosen.num_cached_tokens


class _Queue:
    """This process's requests at one replica that have no token yet, in the order of their placement."""

    def __init__(self) -> None:
        self.requests: dict[str, _InFlight] = {}
        self.num_tokens = 0
        self.num_uncached_tokens = 0
        self.expected: set[bytes] = set()
        """Keys of blocks that they will leave in the cache. What one of them leaves is no other's to leave."""

    def add(self, request_id: str, request: _InFlight) -> None:
        self.requests[request_id] = request
        self.num_tokens += request.prompt.num_tokens
        self.num_uncached_tokens += request.num_uncached_tokens
        self.expected.update(request.new_keys)

    def remove(self, request_id: str) -> _InFlight:
        request = self.requests.pop(request_id)
        self.num_tokens -= request.prompt.num_tokens
        self.num_uncached_tokens -= request.num_uncached_tokens
        self.expected.difference_update(request.new_keys)
        return request

    def num_waiting_tokens(self, reported: int, since_s: float, miss_share: float) -> float:
        """Prompt tokens of requests, whoever sent them, that the replica has yet to take up.

        Args:
            reported: the same by the replica's report, with those that are cached.
            since_s: the report does not tell of requests placed later.
            miss_share: of the prompt tokens of other processes' requests, those that are not cached.
        """
        unseen = unseen_uncached = 0
        for request in reversed(self.requests.values()):
            if request.placed_s <= since_s:
                break
            unseen += request.prompt.num_tokens
            unseen_uncached += request.num_uncached_tokens
        # What waits there is ours as far as we have placed so much, and of ours we know how much is cached.
        seen = self.num_tokens - unseen
        ours = (self.num_uncached_tokens - unseen_uncached) * min(1.0, reported / seen) if seen else 0.0
        return unseen_uncached + ours + max(0, reported - seen) * miss_share


class Placement:
    """Decides for one process, and keeps a ledger of what it has decided.

    Args:
        seed: of the draws between equal replicas; None: from the system, so that processes differ.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.counters = PlacementCounters()
        self._random = random.Random(seed)
        self._queues: dict[str, _Queue] = {}
        self._replica_of: dict[str, str] = {}
        self._miss_share = 1.0

    @property
    def num_in_flight(self) -> int:
        """Requests that have been placed and have no token yet."""
        return len(self._replica_of)

    def rank(self, prompt: Prompt, replicas: Mapping[str, ReplicaState], now_s: float) -> list[Candidate]:
        """All replicas, the best for this prompt first."""
        typical = self._typical_rate(replicas)
        keys = prompt.keys[::-1]
        found = [self._predict(prompt, keys, name, state, typical, now_s) for name, state in replicas.items()]
        if not found:
            return []
        weight = 2 + min(candidate.wait_s for candidate in found) / RECOMPUTE_S
        costs = sorted([(each.wait_s + weight * each.compute_s, index) for index, each in enumerate(found)])
        limit_s = costs[0][0] * (1 + TIE_SHARE) + TIE_S
        equal = [found[index] for cost_s, index in costs if cost_s <= limit_s]
        longest = max(candidate.num_cached_tokens for candidate in equal)
        best = self._draw(prompt, [each for each in equal if each.num_cached_tokens == longest])
        return [best, *(found[index] for _, index in costs if found[index] is not best)]

    def place(
        self, request_id: str, prompt: Prompt, candidates: Sequence[Candidate], replica_id: str, now_s: float
    ) -> None:
        """Note that a request goes to a replica; one that was noted before goes there instead.

        Args:
            request_id: of the request.
            prompt: its prompt.
            candidates: what `rank` returned for it.
            replica_id: one of them.
            now_s: the time.
        """
        self.remove(request_id)
        chosen = next(candidate for candidate in candidates if candidate.replica_id == replica_id)
        longest = max(candidate.num_cached_tokens for candidate in candidates)
        reason = Reason.LOAD if chosen.num_cached_tokens < longest else Reason.CACHED if longest else Reason.COLD
        new_keys = prompt.keys[chosen.num_cached_tokens // prompt.block_size :]
        request = _InFlight(prompt, chosen, reason, now_s, new_keys)
        self._queues.setdefault(replica_id, _Queue()).add(request_id, request)
        self._replica_of[request_id] = replica_id
        self._miss_share += (request.num_uncached_tokens / prompt.num_tokens - self._miss_share) / MISS_MEMORY

    def first_token(self, request_id: str, num_cached_tokens: int, now_s: float) -> None:
        """Take a request off the ledger: its prompt is computed. Unknown ones are none of ours any more.

        Args:
            request_id: of the request.
            num_cached_tokens: prompt tokens that the replica had in its cache.
            now_s: the time.
        """
        request = self.remove(request_id)
        if request is not None:
            counters = self.counters
            counters.by_reason[request.reason] += 1
            counters.num_prompt_tokens += request.prompt.num_tokens
            counters.num_predicted_cached_tokens += request.chosen.num_cached_tokens
            counters.num_cached_tokens += num_cached_tokens
            counters.predicted_ttft_s += request.chosen.ttft_s
            counters.ttft_s += now_s - request.placed_s

    def remove(self, request_id: str) -> _InFlight | None:
        """Take a request off the ledger, if it is there: it has ended, or goes elsewhere."""
        replica_id = self._replica_of.pop(request_id, None)
        if replica_id is None:
            return None
        queue = self._queues[replica_id]
        request = queue.remove(request_id)
        if not queue.requests:
            del self._queues[replica_id]
        return request

    def _draw(self, prompt: Prompt, equal: Sequence[Candidate]) -> Candidate:
        """One of replicas that hold equally much of a prompt: at random, but by the first block that none holds.

        So a prefix that is new to all goes the same way from every process, though none knows what others have sent.
        """
        first_new = equal[0].num_cached_tokens // prompt.block_size
        if first_new >= len(prompt.keys):
            return self._random.choice(equal)
        number = int.from_bytes(prompt.keys[first_new][:8], "big")
        return min(equal, key=lambda each: number * crc32(each.replica_id.encode()) % _PRIME)

    def _typical_rate(self, replicas: Mapping[str, ReplicaState]) -> float:
        """Prompt tokens per second of a replica that has not told its rate."""
        told = [state.load.prefill_tokens_per_s for state in replicas.values() if state.load is not None]
        known = [rate for rate in told if rate > 0]
        return median(known) if known else FIRST_RATE

    def _predict(
        self,
        prompt: Prompt,
        keys: Sequence[bytes],
        replica_id: str,
        state: ReplicaState,
        typical_rate: float,
        now_s: float,
    ) -> Candidate:
        """What would come of the prompt at a replica; `keys` are its, the last one first."""
        load = state.load or _NO_LOAD
        step_s, num_waiting_tokens = load.step_s, load.num_waiting_tokens
        queue = self._queues.get(replica_id)
        if queue is None:
            num_blocks = _num_prefix_blocks(keys, state.block_keys, _NO_KEYS)
            ahead = num_waiting_tokens * self._miss_share
        else:
            num_blocks = _num_prefix_blocks(keys, state.block_keys, queue.expected)
            since_s = state.updated_s - step_s - DELIVERY_S
            ahead = queue.num_waiting_tokens(num_waiting_tokens, since_s, self._miss_share)
        # The last token is always computed: its logits are wanted.
        num_cached = min(num_blocks, (prompt.num_tokens - 1) // prompt.block_size) * prompt.block_size
        uncached = prompt.num_tokens - num_cached
        num_tokens = load.num_prefill_tokens + ahead + uncached
        in_use = 1 - (load.num_free_blocks - num_tokens / prompt.block_size) / load.num_blocks
        full_s = KV_S * in_use / (1 - (in_use if in_use < KV_FULL else KV_FULL))
        silent_s = now_s - state.updated_s - QUIET_S - 2 * step_s
        # Half-way to the others: it also depends on the prompts, as what remains of cached ones is computed piecemeal.
        rate = sqrt((load.prefill_tokens_per_s or typical_rate) * typical_rate)
        wait_s = (num_tokens - uncached) / rate + full_s + (silent_s if silent_s > 0 else 0.0)
        return Candidate(replica_id, num_cached, wait_s, uncached / rate)


def _num_prefix_blocks(keys: Sequence[bytes], stored: AbstractSet[bytes], expected: AbstractSet[bytes]) -> int:
    """How many blocks of a prompt a replica has, or will have when what is ahead of it there is computed.

    By bisection: a key stands for all tokens up to its block, and caches give up the tail of a prefix first.

    Args:
        keys: of the prompt's blocks, the last one first.
        stored: keys in the replica's cache.
        expected: keys that requests ahead will leave there.
    """
    num_missing = bisect_left(keys, True, key=stored.__contains__)
    if expected and num_missing:
        num_missing = bisect_left(keys, True, hi=num_missing, key=expected.__contains__)
    return len(keys) - num_missing
