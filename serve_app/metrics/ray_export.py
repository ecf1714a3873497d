"""The metrics of one process to the agent of its Ray node, which shows them to Prometheus as `ray_qwen3_…`."""

import asyncio

from prometheus_client import CollectorRegistry
from ray.util.metrics import Gauge

from serve_app.metrics.definitions import DEFINITIONS
from serve_app.metrics.process import samples_of

INTERVAL_S = 5.0


class RayExport:
    """Hands over the values of a registry as they are, each series as a gauge of Ray's.

    Ray's own histograms would cost a call for each observation, and its agents would replace their sums by guesses (of
    each bucket its middle). PromQL does not look at types: `rate` and `histogram_quantile` work on these as ever.

    Args:
        registry: holds the process's metrics.
        labels: what all its series get.
    """

    def __init__(self, registry: CollectorRegistry, labels: dict[str, str]) -> None:
        self._registry = registry
        self._labels = labels
        self._gauges: dict[str, Gauge] = {}

    async def run(self) -> None:
        """Hand over again and again, until cancelled."""
        while True:
            self.export()
            await asyncio.sleep(INTERVAL_S)

    def export(self) -> None:
        """Hand over the values of this moment."""
        for sample in samples_of(self._registry):
            labels = sample.labels | self._labels
            gauge = self._gauges.get(sample.name)
            if gauge is None:
                help_text = DEFINITIONS[sample.metric].help
                gauge = self._gauges[sample.name] = Gauge(sample.name, help_text, tuple(labels))
            gauge.set(sample.value, labels)
