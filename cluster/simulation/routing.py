"""Ways to route requests to replicas, and the modelled fleet to try them on. The number of replicas does not change."""

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol
from zlib import crc32

from cluster.simulation.caching_replica import CachingReplica
from cluster.simulation.replica import Outcome, ReplicaSpeed
from cluster.simulation.trace import Arrival
from serve_app.placement import Placement, Prompt
from serve_app.steps import ReplicaLoad

REPORT_DELAY_S = 0.005
"""From the end of a step until the ingresses know of it."""
HEARTBEAT_S = 0.5
"""A replica without anything to do says so this often."""


@dataclass(slots=True, eq=False)
class View:
    """What the ingresses know of a replica (serve_app.placement.ReplicaState)."""

    load: ReplicaLoad | None = None
    block_keys: set[bytes] = field(default_factory=set)
    updated_s: float = 0.0


class Router(Protocol):
    """One ingress's way to choose a replica."""

    def choose(self, request_id: int, arrival: Arrival, views: Sequence[View], num_requests: Sequence[int]) -> int:
        """The index of the replica. `num_requests` are those at each replica, at this moment: no view is so fresh."""

    def begun(self, request_id: int, num_cached_tokens: int, now_s: float) -> None:
        """A request got its first token."""


MakeRouter = Callable[[int], Router]
"""Makes the router of the ingress with this index."""


class Stateless:
    """A router that does not care what comes of its requests."""

    def begun(self, request_id: int, num_cached_tokens: int, now_s: float) -> None:
        del request_id, num_cached_tokens, now_s


class RandomRouter(Stateless):
    """Any replica."""

    def __init__(self, ingress: int) -> None:
        self._random = random.Random(ingress)

    def choose(self, request_id: int, arrival: Arrival, views: Sequence[View], num_requests: Sequence[int]) -> int:
        del request_id, arrival, views
        return self._random.randrange(len(num_requests))


class RoundRobinRouter(Stateless):
    """One replica after the other."""

    def __init__(self, ingress: int) -> None:
        self._next = ingress

    def choose(self, request_id: int, arrival: Arrival, views: Sequence[View], num_requests: Sequence[int]) -> int:
        del request_id, arrival, views
        self._next += 1
        return self._next % len(num_requests)


class PowerOfTwoRouter(Stateless):
    """Of two random replicas that with fewer requests: Ray Serve's default."""

    def __init__(self, ingress: int) -> None:
        self._random = random.Random(ingress)

    def choose(self, request_id: int, arrival: Arrival, views: Sequence[View], num_requests: Sequence[int]) -> int:
        del request_id, arrival, views
        two = self._random.sample(range(len(num_requests)), min(2, len(num_requests)))
        return min(two, key=num_requests.__getitem__)


class SessionHashRouter(Stateless):
    """Always the same replica for a session, whatever its load.

    Traces tell no sessions: one is taken to be all prompts with the same second block, as the first is that of a system
    prompt that all have.
    """

    def __init__(self, ingress: int) -> None:
        del ingress

    def choose(self, request_id: int, arrival: Arrival, views: Sequence[View], num_requests: Sequence[int]) -> int:
        del views
        session = arrival.keys[min(1, len(arrival.keys) - 1)] if arrival.keys else request_id.to_bytes(8, "big")
        return crc32(session) % len(num_requests)


class TextPrefixRouter(Stateless):
    """Where most of the text was sent before, without knowing what the caches still hold.

    The rule of the routers of SGLang and Ray Serve LLM: at least `least_match` of the prompt must match, else that
    with the fewest requests gets it. So it does when the fleet is uneven: the most requests at a replica are over
    `most_uneven` more than the fewest, and half as many again.

    Args:
        ingress: its index.
        most_uneven: in requests.
        least_match: as a share of the prompt.
    """

    def __init__(self, ingress: int, most_uneven: float, least_match: float = 0.3) -> None:
        self._random = random.Random(ingress)
        self._most_uneven = most_uneven
        self._least_match = least_match
        self._sent: list[set[bytes]] = []

    def choose(self, request_id: int, arrival: Arrival, views: Sequence[View], num_requests: Sequence[int]) -> int:
        del request_id, views
        while len(self._sent) < len(num_requests):
            self._sent.append(set())
        chosen = self._random.choice([i for i, count in enumerate(num_requests) if count == min(num_requests)])
        is_even = max(num_requests) - min(num_requests) <= self._most_uneven
        if arrival.keys and (is_even or max(num_requests) <= 1.5 * min(num_requests)):
            matches = [_num_matching(arrival.keys, sent) for sent in self._sent]
            if max(matches) >= self._least_match * len(arrival.keys):
                chosen = matches.index(max(matches))
        self._sent[chosen].update(arrival.keys)
        return chosen


class KvAwareRouter:
    """This project's placement.

    Args:
        ingress: its index.
        block_size: of the trace's keys.
        sees_caches: False leaves it with what it knows of load.
    """

    def __init__(self, ingress: int, block_size: int, sees_caches: bool = True) -> None:
        self.placement = Placement(seed=ingress)
        self._block_size = block_size
        self._sees_caches = sees_caches

    def choose(self, request_id: int, arrival: Arrival, views: Sequence[View], num_requests: Sequence[int]) -> int:
        del num_requests
        prompt = Prompt(arrival.keys if self._sees_caches else (), arrival.prompt_tokens, self._block_size)
        named = {str(index): view for index, view in enumerate(views)}
        candidates = self.placement.rank(prompt, named, arrival.time_s)
        best = candidates[0].replica_id
        self.placement.place(str(request_id), prompt, candidates, best, arrival.time_s)
        return int(best)

    def begun(self, request_id: int, num_cached_tokens: int, now_s: float) -> None:
        self.placement.first_token(str(request_id), num_cached_tokens, now_s)


@dataclass
class Routed:
    """What came out of a trace."""

    outcomes: list[Outcome]
    computed_tokens: list[int]
    """Prompt tokens that each replica computed."""
    replicas: list[int]
    """Where each request went."""
    routers: Sequence[Router]

    @property
    def hit_rate(self) -> float:
        """Share of the prompt tokens that a prefix cache held."""
        cached = sum(outcome.num_cached_tokens for outcome in self.outcomes)
        return cached / sum(outcome.arrival.prompt_tokens for outcome in self.outcomes)

    @property
    def imbalance(self) -> float:
        """The most requests at one replica over the mean."""
        counts = Counter(self.replicas)
        return max(counts.values()) * len(self.computed_tokens) / len(self.replicas)

    def ttft_s(self, share: float) -> float:
        """The time to first token within which a share of the requests stayed."""
        times = sorted(outcome.ttft_s for outcome in self.outcomes)
        return times[min(len(times) - 1, math.floor(share * len(times)))]


class RoutedFleet:
    """Replicas behind several ingresses, which take requests in turn.

    Args:
        speeds: of each replica.
        make_router: for each ingress.
        num_ingresses: how many.
    """

    def __init__(self, speeds: Sequence[ReplicaSpeed], make_router: MakeRouter, num_ingresses: int) -> None:
        self.replicas = [CachingReplica(speed, 0.0) for speed in speeds]
        self.views = [View() for _ in speeds]
        self.routers = [make_router(index) for index in range(num_ingresses)]
        self._source = random.Random(0)
        self._asked: dict[int, tuple[int, Router]] = {}
        """Requests without a token: by the id() of their outcome, their number and who routed them."""

    def replay(self, trace: Sequence[Arrival]) -> Routed:
        """Run a trace, and then on until the last request has ended."""
        outcomes = [Outcome(arrival) for arrival in trace]
        chosen = []
        for number, outcome in enumerate(outcomes):
            self._advance(outcome.arrival.time_s)
            router = self._source.choice(self.routers)
            counts = [replica.num_requests for replica in self.replicas]
            chosen.append(router.choose(number, outcome.arrival, self.views, counts))
            self._asked[id(outcome)] = (number, router)
            self.replicas[chosen[-1]].submit(outcome)
        now_s = trace[-1].time_s
        while any(replica.num_requests for replica in self.replicas):
            now_s += 1.0
            self._advance(now_s)
        return Routed(outcomes, [replica.num_computed_tokens for replica in self.replicas], chosen, self.routers)

    def _advance(self, now_s: float) -> None:
        """Run all replicas up to a time, and let the ingresses know what they have told until then."""
        known_s = now_s - REPORT_DELAY_S
        for replica, view in zip(self.replicas, self.views, strict=True):
            replica.advance(now_s)
            reports = replica.reports
            while reports and reports[0].time_s <= known_s:
                report = reports.popleft()
                view.load, view.updated_s = report.load, report.time_s + REPORT_DELAY_S
                view.block_keys.difference_update(report.evicted)
                view.block_keys.update(report.stored)
                for outcome in report.begun:
                    number, router = self._asked.pop(id(outcome))
                    router.begun(number, outcome.num_cached_tokens, view.updated_s)
            if not reports and not replica.num_requests:
                view.updated_s = max(view.updated_s, known_s - known_s % HEARTBEAT_S)


def _num_matching(keys: Sequence[bytes], known: set[bytes]) -> int:
    return next((index for index, key in enumerate(keys) if key not in known), len(keys))
