"""QueueAndKvPolicy: how many engine replicas are wanted, from what the replicas report about their load.

Ray Serve makes one from `policy_kwargs` and calls it ten times a second in its controller, so a call takes well under a
millisecond, waits for nothing and never raises. A change is tried in cluster/simulate.py first.
"""

import logging
import math
import time
from dataclasses import dataclass
from typing import Any

from ray.serve.config import AutoscalingContext

from cluster.autoscaling_estimates import Average, Bursts, DrainRate, RecentMost
from cluster.autoscaling_metrics import AutoscalerMetrics

logger = logging.getLogger("ray.serve")

FULL_AFTER_S = 30.0
"""A replica is at full load when requests have been waiting for so long: its report averages over about that time, and
what it took up before there was a queue is less than it can."""
LEAST = 0.01
"""Replicas that any request calls for: one, after rounding."""

REPORTED = (
    "num_running",
    "num_waiting",
    "num_waiting_tokens",
    "kv_utilization",
    "sequence_utilization",
    "arrival_tokens_per_s",
    "taken_tokens_per_s",
    "queued_s",
)
"""What the policy reads of a replica's report (serve_app/load_report.py)."""


@dataclass(frozen=True)
class Load:
    """The load of all replicas that reported, summed; the last two are means."""

    num_reports: int
    num_requests: float
    waiting_tokens: float
    room_in_use: float
    """In replicas: of each its KV blocks or its seats in the batch, whichever is fuller."""
    arrival_tokens_per_s: float
    taken_tokens_per_s: float
    """Prompt tokens that one replica took up of late."""
    drained_tokens_per_s: float | None
    """The same of those at full load; None where there are none."""


class QueueAndKvPolicy:
    """Wants the largest of three numbers of replicas, and lets go of one only after a while without need of it.

    For prompts: what it takes to keep up with the prompt tokens that arrive, and to work off those that wait.
    For room: KV blocks (or seats in the batch, where those run out first) in use, over the target utilization.
    For bursts: where load comes and goes, what it took at most of late.

    Args:
        ttft_target_s: seconds in which waiting prompts should have been taken up.
        prefill_tokens_per_s: prompt tokens that one replica takes up at full load, to begin with: it is measured.
        target_utilization: how much of their room replicas should use, above 0, at most 1.
        target_load: how much of the prompts that they can take up replicas should get, above 0, at most 1.
        startup_s: seconds that a replica takes to start. Waiting prompts are spread over this time too, as replicas
            wanted now cannot help earlier; without it a queue that grows meanwhile calls for many too many.
        hold_s: seconds for which fewer replicas must have been enough before the number goes down.
        margin: share of load on top for which fewer replicas must be enough.
        arrival_memory_s: seconds over which arrivals are averaged.
        burst_memory_s: seconds for which replicas are kept for the next burst, once load has gone to half and come back
            to twice within that time. 0 keeps none.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        ttft_target_s: float = 2.0,
        prefill_tokens_per_s: float = 4000.0,
        target_utilization: float = 0.85,
        target_load: float = 0.95,
        startup_s: float = 30.0,
        hold_s: float = 60.0,
        margin: float = 0.05,
        arrival_memory_s: float = 30.0,
        burst_memory_s: float = 600.0,
    ) -> None:
        _check("ttft_target_s", ttft_target_s, above=0)
        _check("prefill_tokens_per_s", prefill_tokens_per_s, above=0)
        _check("target_utilization", target_utilization, above=0, most=1)
        _check("target_load", target_load, above=0, most=1)
        _check("startup_s", startup_s)
        _check("hold_s", hold_s)
        _check("margin", margin)
        _check("arrival_memory_s", arrival_memory_s, above=0)
        _check("burst_memory_s", burst_memory_s)
        self._backlog_s = ttft_target_s + startup_s
        self._drain = DrainRate(prefill_tokens_per_s)
        self._target_utilization = target_utilization
        self._target_load = target_load
        self._hold_s = hold_s
        self._margin = margin
        self._arrivals = Average(arrival_memory_s)
        self._room = Average(arrival_memory_s)
        self._bursts = Bursts(burst_memory_s)
        self._recent = RecentMost(hold_s)
        self._error = ""
        self.metrics = AutoscalerMetrics(("prompts", "room", "bursts", "unreported"))

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The number of replicas wanted now. Ray Serve keeps it within its bounds."""
        try:
            self.metrics.export(time.monotonic(), ctx.app_name or "", ctx.deployment_name)
            return self._decide(ctx), {}
        except Exception as error:  # Ray Serve would skip this turn of scaling for every application
            self.metrics.failed()
            if str(error) != self._error:  # ten times a second
                self._error = str(error)
                logger.exception("autoscaling keeps %d replicas on a fault", ctx.target_num_replicas)
            return ctx.target_num_replicas, {}

    def _decide(self, ctx: AutoscalingContext) -> int:
        if ctx.current_time is None or ctx.config is None:
            raise ValueError(f"the time is {ctx.current_time} and the configuration {ctx.config}, expected both")
        now_s = ctx.current_time
        if ctx.current_num_replicas == 0:  # nothing reports; Ray Serve itself wakes a first replica for a request
            self.metrics.decided({}, ctx.target_num_replicas, ctx.target_num_replicas, 0)
            return ctx.target_num_replicas
        wanted_for = self._wanted(ctx, now_s, ctx.config.get_target_ongoing_requests())
        target = self._target(ctx, now_s, wanted_for)
        self.metrics.decided(wanted_for, ctx.target_num_replicas, target, ctx.current_num_replicas)
        return target

    def _target(self, ctx: AutoscalingContext, now_s: float, wanted_for: dict[str, float]) -> int:
        """The number of replicas from what calls for them."""
        most = float(ctx.capacity_adjusted_max_replicas)
        needed = min(max(wanted_for["prompts"], wanted_for["room"]) + wanted_for["unreported"], most)
        recent = self._recent.add(now_s, math.ceil(needed * (1 + self._margin)))
        wanted = math.ceil(max(needed, min(wanted_for["bursts"], most)))
        if wanted > ctx.target_num_replicas:
            return wanted
        if now_s - self._recent.since_s < self._hold_s:
            return ctx.target_num_replicas
        return min(ctx.target_num_replicas, max(recent, wanted))

    def _wanted(self, ctx: AutoscalingContext, now_s: float, requests_per_replica: float) -> dict[str, float]:
        """Replicas that the load of this moment takes, not rounded, by reason. 0 if there is none.

        Requests at replicas that have not reported (yet) are known only by Ray Serve's own count.
        """
        load = sum_reports(ctx.raw_metrics or {})
        num_requests = float(ctx.total_num_requests)
        unreported = max(0.0, num_requests - load.num_requests) if load.num_reports < ctx.current_num_replicas else 0.0
        drain = self._drain.add(now_s, load.taken_tokens_per_s, load.drained_tokens_per_s)
        for_arrivals = self._arrivals.add(now_s, load.arrival_tokens_per_s) / self._target_load / drain
        for_queue = load.waiting_tokens / self._backlog_s / drain
        for_room = load.room_in_use / self._target_utilization
        # Without the queue: what a burst leaves waiting would call for replicas that the next one does not need.
        for_bursts = self._bursts.add(now_s, max(for_arrivals, self._room.add(now_s, for_room)))
        is_idle = not (load.num_requests or num_requests)
        return {
            "prompts": 0.0 if is_idle else max(for_arrivals + for_queue, LEAST),
            "room": for_room,
            "bursts": float(for_bursts),
            "unreported": unreported / requests_per_replica,
        }


def sum_reports(metrics: dict[str, dict[Any, Any]]) -> Load:
    """The latest of each replica's reports, summed.

    Args:
        metrics: by name and replica, its values of the last seconds in order of time, as in Ray Serve's
            `AutoscalingContext.raw_metrics`. A replica that lacks one of REPORTED, or whose values are no finite
            numbers of at least 0, counts as one that did not report.
    """
    reports = [_latest(metrics, replica) for replica in metrics.get(REPORTED[0], ())]
    known = [report for report in reports if report is not None]
    full = [report["taken_tokens_per_s"] for report in known if report["queued_s"] >= FULL_AFTER_S]
    full = [rate for rate in full if rate > 0]  # 0 is not known yet

    def total(name: str) -> float:
        return sum(report[name] for report in known)

    return Load(
        num_reports=len(known),
        num_requests=total("num_running") + total("num_waiting"),
        waiting_tokens=total("num_waiting_tokens"),
        room_in_use=sum(max(report["kv_utilization"], report["sequence_utilization"]) for report in known),
        arrival_tokens_per_s=total("arrival_tokens_per_s"),
        taken_tokens_per_s=total("taken_tokens_per_s") / len(known) if known else 0.0,
        drained_tokens_per_s=sum(full) / len(full) if full else None,
    )


def _latest(metrics: dict[str, dict[Any, Any]], replica: object) -> dict[str, float] | None:
    report = {}
    for name in REPORTED:
        series = metrics.get(name, {}).get(replica)
        if not series:
            return None
        value = float(series[-1].value)
        if not 0 <= value < math.inf:
            return None
        report[name] = value
    return report


def _check(name: str, value: float, above: float | None = None, most: float = math.inf) -> None:
    expected = "at least 0" if above is None else f"above {above:g}"
    expected += "" if most == math.inf else f" and at most {most:g}"
    is_number = isinstance(value, int | float) and math.isfinite(value)
    if not is_number or value > most or (value < 0 if above is None else value <= above):
        raise ValueError(f"{name} is {value!r}, expected a number {expected}")
