"""What the autoscaling policy tells of its decisions: in Ray Serve's controller, so that only Ray's agents show it."""

import math

from prometheus_client import CollectorRegistry

from serve_app.metrics.process import counter, gauge
from serve_app.metrics.ray_export import INTERVAL_S, RayExport


class AutoscalerMetrics:
    """The metrics of one policy. Cheap enough for ten calls a second.

    Args:
        reasons: what may call for replicas.
    """

    def __init__(self, reasons: tuple[str, ...]) -> None:
        self.registry = CollectorRegistry()
        wanted = gauge(self.registry, "autoscaler_wanted_replicas")
        self._wanted = {reason: wanted.labels(reason) for reason in reasons}
        self._target = gauge(self.registry, "autoscaler_target_replicas")
        self._running = gauge(self.registry, "autoscaler_running_replicas")
        self._decisions = counter(self.registry, "autoscaler_decisions_total")
        for reason in reasons:
            self._decisions.labels("up", reason)
        self._decisions.labels("down", "spare")
        self._decisions.labels("none", "fault")
        self._export: RayExport | None = None
        self._exported_s = -math.inf

    def decided(self, wanted: dict[str, float], before: int, target: int, running: int) -> None:
        """Note a turn of scaling.

        Args:
            wanted: replicas that each reason calls for.
            before: the target until now.
            target: the target from now on.
            running: replicas that run.
        """
        for reason, number in wanted.items():
            self._wanted[reason].set(number)
        self._target.set(target)
        self._running.set(running)
        if target > before:
            self._decisions.labels("up", max(wanted, key=lambda reason: wanted[reason])).inc()
        elif target < before:
            self._decisions.labels("down", "spare").inc()

    def failed(self) -> None:
        """Note a turn on which the policy had a fault."""
        self._decisions.labels("none", "fault").inc()

    def export(self, now_s: float, application: str, deployment: str) -> None:
        """Hand the values to Ray, if it is time to."""
        if now_s - self._exported_s < INTERVAL_S:
            return
        self._exported_s = now_s
        if self._export is None:
            self._export = RayExport(self.registry, {"application": application, "deployment": deployment})
        self._export.export()
