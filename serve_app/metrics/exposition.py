"""The metrics of all processes as one text, the same from whichever ingress answers."""

import asyncio
import time
from collections.abc import Iterable, Sequence

import msgspec
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve_app.metrics.definitions import DEFINITIONS
from serve_app.metrics.process import Sample, Snapshot

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
ANSWER_S = 2.0
"""How long the processes may take to tell their values. A scrape often has to end within 5 s or so."""
FORGOTTEN_AFTER_S = 300.0


class FleetMetrics:
    """Asks every ingress and every replica for its values.

    A process that hangs keeps the others' values from coming, too, so until Ray has replaced it the last ones are shown
    again; `process_metrics_age_seconds` tells.

    Args:
        handles: of the deployments, whose processes answer `metrics()` with a list of Snapshots (msgpack).
    """

    def __init__(self, handles: Sequence[DeploymentHandle]) -> None:
        self._handles = handles
        self._decoder = msgspec.msgpack.Decoder(list[Snapshot])
        self._last: list[list[tuple[float, Snapshot]]] = [[] for _ in handles]
        """Of each deployment, with the time of their arrival."""

    async def text(self) -> bytes:
        """What /metrics answers."""
        await asyncio.gather(*(self._ask(index) for index in range(len(self._handles))))
        now = time.monotonic()
        known = [(now - at, each) for found in self._last for at, each in found if now - at < FORGOTTEN_AFTER_S]
        return await asyncio.to_thread(render, known)

    async def _ask(self, index: int) -> None:
        try:
            response = self._handles[index].broadcast("metrics")
            answers = await response.results_async(timeout_s=ANSWER_S, return_exceptions=True)
        except TimeoutError:
            return
        except RayServeException:  # there is no replica
            answers = []
        now = time.monotonic()
        told = [self._decoder.decode(answer) for answer in answers if isinstance(answer, bytes)]
        self._last[index] = [(now, snapshot) for snapshots in told for snapshot in snapshots]


class _Families(Collector):
    """What prometheus-client wants to have, to write it down."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def render(snapshots: Sequence[tuple[float, Snapshot]]) -> bytes:
    """Snapshots, each with its age in seconds, in Prometheus' text format."""
    families: dict[str, Metric] = {}
    for age_s, snapshot in snapshots:
        constant = {"model_name": snapshot.model_name, snapshot.process: snapshot.id}
        for sample in snapshot.samples:
            family = families.get(sample.metric) or families.setdefault(sample.metric, _family(sample.metric))
            family.add_sample(sample.name, sample.labels | constant, sample.value)
        age = Sample("process_metrics_age_seconds", "", {"process": snapshot.process, "id": snapshot.id}, age_s)
        family = families.get(age.metric) or families.setdefault(age.metric, _family(age.metric))
        family.add_sample(age.name, age.labels | {"model_name": snapshot.model_name}, age.value)
    return generate_latest(_Families(families[name] for name in DEFINITIONS if name in families))


def _family(name: str) -> Metric:
    definition = DEFINITIONS[name]
    return Metric(definition.full_name.removesuffix("_total"), definition.help, definition.kind)
