"""Counters that the parts of an ingress keep for themselves, as metrics: admission, keys, routing."""

from collections.abc import Iterable, Mapping

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from serve_app.admission_queue import AdmissionQueue
from serve_app.auth import ApiKeys
from serve_app.fleet import Loss
from serve_app.metrics.process import family_of
from serve_app.placement import PlacementCounters


class AdmissionCollector(Collector):
    """Reads the queue.

    Args:
        queue: of the process.
    """

    def __init__(self, queue: AdmissionQueue) -> None:
        self._queue = queue

    def collect(self) -> Iterable[Metric]:
        queue = self._queue
        yield family_of("admission_queued_requests", queue.num_queued)
        yield family_of("admission_queued_tokens", queue.queued_tokens)
        yield family_of("admission_sent_requests", queue.num_sent)
        yield family_of("admission_tokens_per_second", queue.rate.per_s)
        yield family_of("admission_refused_total", queue.num_refused)


class KeyCollector(Collector):
    """Reads what the limits of keys refused.

    Args:
        keys: of the process.
    """

    def __init__(self, keys: ApiKeys) -> None:
        self._keys = keys

    def collect(self) -> Iterable[Metric]:
        family = family_of("key_refused_total", {})
        for caller in self._keys.callers:
            for reason, count in caller.num_refused.items():
                family.add_sample(family.name + "_total", {"key": caller.name, "reason": reason}, count)
        yield family


class RoutingCollector(Collector):
    """Reads how good the router's decisions were, and how many requests had to go on elsewhere.

    Args:
        counters: of the process's router.
        num_migrations: by why the first replica was lost.
    """

    def __init__(self, counters: PlacementCounters, num_migrations: Mapping[Loss, int]) -> None:
        self._counters = counters
        self._num_migrations = num_migrations

    def collect(self) -> Iterable[Metric]:
        counters = self._counters
        reasons = {str(reason): count for reason, count in counters.by_reason.items()}
        yield family_of("router_decisions_total", reasons)
        yield family_of("router_prompt_tokens_total", counters.num_prompt_tokens)
        yield family_of("router_predicted_cached_tokens_total", counters.num_predicted_cached_tokens)
        yield family_of("router_cached_tokens_total", counters.num_cached_tokens)
        yield family_of("router_predicted_ttft_seconds_total", counters.predicted_ttft_s)
        yield family_of("router_ttft_seconds_total", counters.ttft_s)
        yield family_of("migrations_total", {str(loss): count for loss, count in self._num_migrations.items()})
