"""The engine's counters as metrics of its replica."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.block_residency import BlockResidency, Durations
from engine.config import EngineConfig
from engine.stats import EngineStats, WaitingFor
from serve_app.metrics.definitions import DEFINITIONS
from serve_app.metrics.process import family_of, gauge


class EngineCollector(Collector):
    """Reads EngineStats whenever somebody wants to know; costs a running engine nothing.

    Args:
        stats: reads them.
        residency: of the KV blocks.
    """

    def __init__(self, stats: Callable[[], EngineStats], residency: BlockResidency) -> None:
        self._stats = stats
        self._residency = residency

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        waiting = {str(reason): stats.num_waiting if stats.waiting_for is reason else 0 for reason in WaitingFor}
        stages = {
            "schedule": stats.schedule_s, "launch": stats.launch_s, "wait": stats.wait_s, "update": stats.update_s,
        }  # fmt: skip
        finished = {str(reason): count for reason, count in stats.num_finished.items()}
        blocks = {"free": stats.num_free_blocks, "cached": stats.num_cached_blocks, "owned": stats.num_owned_blocks}
        yield family_of("num_requests_running", stats.num_running)
        yield family_of("num_requests_waiting", stats.num_waiting)
        yield family_of("num_requests_waiting_by_reason", waiting)
        yield family_of("num_tokens_waiting", stats.num_waiting_tokens)
        yield family_of("num_preemptions_total", stats.num_preemptions)
        yield family_of("engine_steps_total", stats.num_steps)
        yield family_of("engine_step_seconds_total", stages)
        yield family_of("prompt_tokens_total", stats.num_prompt_tokens)
        yield family_of("generation_tokens_total", stats.num_generated_tokens)
        yield family_of("engine_requests_total", finished)
        yield family_of("prefill_tokens_per_second", stats.prefill_tokens_per_s)
        yield family_of("kv_cache_usage_perc", stats.num_owned_blocks / stats.num_blocks)
        yield family_of("kv_blocks", blocks)
        yield family_of("prefix_cache_queries_total", stats.num_prompt_tokens)
        yield family_of("prefix_cache_hits_total", stats.num_cached_prompt_tokens)
        yield family_of("spec_decode_num_draft_tokens_total", stats.num_guessed_tokens)
        yield family_of("spec_decode_num_accepted_tokens_total", stats.num_right_guesses)
        yield _durations("kv_block_lifetime_seconds", self._residency.lifetime)
        yield _durations("kv_block_idle_before_evict_seconds", self._residency.idle_before_evict)
        yield _durations("kv_block_reuse_gap_seconds", self._residency.reuse_gap)


def replica_registry(
    config: EngineConfig, stats: Callable[[], EngineStats], residency: BlockResidency
) -> CollectorRegistry:
    """The metrics of one engine replica.

    Args:
        config: the engine's.
        stats: reads its counters.
        residency: of its KV blocks.
    """
    registry = CollectorRegistry()
    registry.register(EngineCollector(stats, residency))
    cache = gauge(registry, "cache_config_info")
    num_blocks, caches = stats().num_blocks, config.enable_prefix_caching
    cache.labels(str(config.block_size), str(num_blocks), str(caches).lower()).set(1)
    return registry


def _durations(name: str, durations: Durations) -> Metric:
    """A histogram that is kept elsewhere."""
    definition = DEFINITIONS[name]
    ends = [*(str(bound) for bound in definition.buckets), "+Inf"]
    buckets = list(zip(ends, durations.cumulated(), strict=True))
    return HistogramMetricFamily(definition.full_name, definition.help, buckets, durations.total_s)
