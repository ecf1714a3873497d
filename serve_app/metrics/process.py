"""The metrics of one process, and the form in which it hands them to whoever shows them."""

from collections.abc import Mapping

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import Metric
from ray import serve
from ray.serve.exceptions import RayServeException

from serve_app.metrics.definitions import DEFINITIONS, Definition, Kind

disable_created_metrics()  # a series more for each counter and histogram, which nothing uses


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """One value."""

    metric: str
    """Key of DEFINITIONS."""
    suffix: str
    """What a histogram's sample has after its name: `_bucket`, `_sum` or `_count`."""
    labels: dict[str, str]
    value: float

    @property
    def name(self) -> str:
        """In Prometheus."""
        return DEFINITIONS[self.metric].full_name + self.suffix


class Snapshot(msgspec.Struct, frozen=True, array_like=True):
    """The values that one process has of one model at one moment."""

    process: str
    """`ingress` or `replica`, which is also the name of the label that tells them apart."""
    id: str
    model_name: str
    """A label of all samples."""
    samples: list[Sample]


def process_id() -> str:
    """The id that Ray Serve gave this process; empty where it runs none, as in a script."""
    try:
        return serve.get_replica_context().replica_id.unique_id
    except RayServeException:
        return ""


def counter(registry: CollectorRegistry, name: str) -> Counter:
    """The counter of this name, in a registry."""
    definition = _defined(name, Kind.COUNTER)
    return Counter(definition.full_name, definition.help, definition.labels, registry=registry)


def gauge(registry: CollectorRegistry, name: str) -> Gauge:
    """The gauge of this name, in a registry."""
    definition = _defined(name, Kind.GAUGE)
    return Gauge(definition.full_name, definition.help, definition.labels, registry=registry)


def histogram(registry: CollectorRegistry, name: str) -> Histogram:
    """The histogram of this name, in a registry."""
    definition = _defined(name, Kind.HISTOGRAM)
    return Histogram(
        definition.full_name, definition.help, definition.labels, registry=registry, buckets=definition.buckets
    )


def family_of(name: str, values: float | Mapping[str, float]) -> Metric:
    """A counter or gauge with these values: one, or one for each value of its only label."""
    definition = DEFINITIONS[name]
    family = Metric(definition.full_name.removesuffix("_total"), definition.help, definition.kind)
    if isinstance(values, Mapping):
        for key, value in values.items():
            [label] = definition.labels
            family.add_sample(definition.full_name, {label: key}, value)
    else:
        family.add_sample(definition.full_name, {}, values)
    return family


def samples_of(registry: CollectorRegistry) -> list[Sample]:
    """All values in a registry. Its metrics must be ours."""
    found = []
    for family in registry.collect():
        metric = _NAMES[family.name]
        full_name = DEFINITIONS[metric].full_name
        found += [
            Sample(metric, sample.name.removeprefix(full_name), sample.labels, sample.value)
            for sample in family.samples
        ]
    return found


def _defined(name: str, kind: Kind) -> Definition:
    definition = DEFINITIONS[name]
    if definition.kind is not kind:
        raise ValueError(f"the metric {name} is a {definition.kind}, expected a {kind}")
    return definition


_NAMES = {definition.full_name.removesuffix("_total"): name for name, definition in DEFINITIONS.items()}
"""Keys of DEFINITIONS by what prometheus-client calls them."""
