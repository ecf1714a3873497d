"""A fleet of modelled replicas under an autoscaler, fed with a trace."""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray.serve._private.common import DeploymentID
from ray.serve.autoscaling_policy import _apply_delay_logic, _apply_scaling_factors, _get_cold_start_scale_up_replicas
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from cluster.simulation.replica import ModelledReplica, Outcome, ReplicaSpeed
from cluster.simulation.trace import Arrival
from serve_app.load_report import LoadReport

TICK_S = 0.25
"""Replicas and router see each other this often."""
REPORT_S = 1.0
"""Replicas report, and the autoscaler decides, this often."""

_DEPLOYMENT = DeploymentID(name="EngineReplica", app_name="qwen3")

Policy = Callable[[AutoscalingContext], tuple[float, dict[str, Any]]]


class Autoscaler:
    """A policy inside Ray Serve's own factors, delays and bounds, at the clock of the simulation.

    Those are private functions of Ray 2.60: there is no other way to run them at another clock than this machine's.
    """

    def __init__(self, policy: Policy, config: AutoscalingConfig) -> None:
        self.config = config
        self._policy = policy
        self._state: dict[str, Any] = {}

    def __call__(self, context: AutoscalingContext) -> int:
        number = _get_cold_start_scale_up_replicas(context)
        if number is None:
            desired, _ = self._policy(context)
            number = _apply_scaling_factors(desired, context.current_num_replicas, self.config)
            if context.current_num_replicas or number <= 0:
                number, self._state = _apply_delay_logic(
                    max(0, number), context.target_num_replicas, self.config, self._state, _now=context.current_time
                )
        return max(self.config.min_replicas, min(self.config.max_replicas, number))


@dataclass(frozen=True)
class Slo:
    """What a request should get."""

    ttft_s: float = 2.0
    tpot_s: float = 0.1

    def met_by(self, outcome: Outcome) -> bool:
        return outcome.ttft_s <= self.ttft_s and outcome.tpot_s <= self.tpot_s


@dataclass
class Replay:
    """What came out of a trace."""

    outcomes: list[Outcome]
    replica_hours: float
    """Starting and draining replicas included: they hold their machines."""
    targets: list[int] = field(default_factory=list)
    """Of each second: how many replicas the autoscaler wanted."""
    running: list[int] = field(default_factory=list)
    """Of each second: how many took requests."""

    def attainment(self, slo: Slo) -> float:
        """Share of the requests that got what they should, 0 to 1."""
        return sum(slo.met_by(outcome) for outcome in self.outcomes) / len(self.outcomes)

    def ttft_s(self, share: float) -> float:
        """The time to first token within which a share of the requests stayed."""
        times = sorted(outcome.ttft_s for outcome in self.outcomes)
        return times[min(len(times) - 1, math.floor(share * len(times)))]


@dataclass
class _Member:
    """A replica of the fleet."""

    replica: ModelledReplica
    report: LoadReport
    since_s: float
    ready_s: float
    reports: deque[dict[str, float]] = field(default_factory=lambda: deque(maxlen=3))


@dataclass(frozen=True)
class _Sample:
    value: float


class Fleet:
    """Replicas that come and go as an autoscaler says.

    Args:
        speed: of each replica.
        autoscaler: None keeps the fleet as it is.
        num_replicas: at the beginning, ready.
    """

    def __init__(self, speed: ReplicaSpeed, autoscaler: Autoscaler | None, num_replicas: int) -> None:
        self._speed = speed
        self._autoscaler = autoscaler
        self._members = [self._member(0.0, ready_s=0.0) for _ in range(num_replicas)]
        self._draining: list[_Member] = []
        self._unrouted: deque[Outcome] = deque()
        self._replica_s = 0.0
        look_back_s = autoscaler.config.look_back_period_s if autoscaler else REPORT_S
        self._num_requests: deque[int] = deque(maxlen=max(1, round(look_back_s / REPORT_S)))

    def replay(self, trace: Sequence[Arrival]) -> Replay:
        """Run a trace, and then on until the last request has ended."""
        replay = Replay([Outcome(arrival) for arrival in trace], 0.0)
        arriving = deque(replay.outcomes)
        num_ticks = 0
        while arriving or self._unrouted or any(member.replica.num_requests for member in self._all()):
            now_s = num_ticks * TICK_S
            while arriving and arriving[0].arrival.time_s < now_s + TICK_S:
                self._unrouted.append(arriving.popleft())
            self._route(now_s)
            for member in self._all():
                member.replica.advance(now_s + TICK_S)
            num_ticks += 1
            if num_ticks % round(REPORT_S / TICK_S) == 0:
                self._each_second(num_ticks * TICK_S, replay)
        now_s = num_ticks * TICK_S
        for member in self._all():
            self._replica_s += now_s - member.since_s
        replay.replica_hours = self._replica_s / 3600
        return replay

    def _all(self) -> list[_Member]:
        return self._members + self._draining

    def _member(self, now_s: float, ready_s: float) -> _Member:
        replica = ModelledReplica(self._speed, ready_s)
        return _Member(replica, LoadReport(self._speed.max_num_seqs), now_s, ready_s)

    def _running(self, now_s: float) -> list[_Member]:
        return [member for member in self._members if member.ready_s <= now_s]

    def _route(self, now_s: float) -> None:
        """To the replica with the fewest prompt tokens ahead, then the fewest requests."""
        replicas = [member.replica for member in self._running(now_s)]
        while self._unrouted and replicas:
            chosen = min(replicas, key=lambda replica: (replica.num_waiting_tokens, replica.num_running))
            chosen.submit(self._unrouted.popleft())

    def _each_second(self, now_s: float, replay: Replay) -> None:
        for member in [each for each in self._draining if not each.replica.num_requests]:
            self._replica_s += now_s - member.since_s
            self._draining.remove(member)
        running = self._running(now_s)
        for member in running:
            member.reports.append(member.report.measure(member.replica.stats(), now_s))
        self._num_requests.append(sum(each.replica.num_requests for each in running) + len(self._unrouted))
        if self._autoscaler is not None:
            self._scale(self._autoscaler(self._context(self._autoscaler.config, running, now_s)), now_s)
        replay.targets.append(len(self._members))
        replay.running.append(len(self._running(now_s)))

    def _context(self, config: AutoscalingConfig, running: list[_Member], now_s: float) -> AutoscalingContext:
        metrics: dict[str, dict[Any, Any]] = {}
        for index, member in enumerate(running):
            for name in member.reports[-1]:
                metrics.setdefault(name, {})[index] = [_Sample(report[name]) for report in member.reports]
        return AutoscalingContext(
            deployment_id=_DEPLOYMENT,
            deployment_name=_DEPLOYMENT.name,
            app_name=_DEPLOYMENT.app_name,
            current_num_replicas=len(running),
            target_num_replicas=len(self._members),
            running_replicas=[],
            total_num_requests=sum(self._num_requests) / len(self._num_requests),
            total_queued_requests=float(len(self._unrouted)),
            aggregated_metrics=None,
            raw_metrics=metrics,
            capacity_adjusted_min_replicas=config.min_replicas,
            capacity_adjusted_max_replicas=config.max_replicas,
            policy_state={},
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=now_s,
            config=config,
        )

    def _scale(self, target: int, now_s: float) -> None:
        """Start replicas, or let the newest go: those that still start first, as Ray Serve does."""
        while len(self._members) < target:
            self._members.append(self._member(now_s, now_s + self._speed.startup_s))
        while len(self._members) > target:
            self._draining.append(self._members.pop())
