"""What a fleet would cost whose autoscaler knew the trace: a bound, and plans that come near to what is possible."""

import math
import random
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from ray.serve.config import AutoscalingContext

from cluster.simulation.fleet import Replay, Slo
from cluster.simulation.replica import ReplicaSpeed
from cluster.simulation.trace import Arrival

LATE_COST_S = 12.0
"""Replica-seconds that `refined` gives for one more request within the SLO: about what the last in a thousand cost."""
AFTER_S = 100
"""Seconds after a change of the plan in which it is taken to have an effect."""


def work_s(arrival: Arrival, speed: ReplicaSpeed) -> float:
    """Seconds of a replica that a request takes at least: in steps whose fixed part a full batch shares."""
    step_s = speed.step_s_per_sequence + speed.step_s / speed.max_num_seqs
    return arrival.prompt_tokens / speed.prefill_tokens_per_s + arrival.output_tokens * step_s


def least_hours(trace: Sequence[Arrival], speed: ReplicaSpeed) -> float:
    """Replica-hours that no fleet can do with less of: every batch full, no replica ever starting or spare."""
    return sum(work_s(arrival, speed) for arrival in trace) / 3600


def plan(trace: Sequence[Arrival], speed: ReplicaSpeed, load: float, window_s: int) -> list[int]:
    """The number of replicas to want in each second, so that they run when the load comes that takes them.

    Args:
        trace: all that will come.
        speed: of the replicas.
        load: how much of what they can do replicas should get: work that comes per second and replica.
        window_s: seconds over which work is averaged.
    """
    work = [0.0] * (int(trace[-1].time_s) + 1 + window_s)
    for arrival in trace:
        work[int(arrival.time_s) + window_s // 2] += work_s(arrival, speed)
    sums = [0.0, *accumulate(work)]
    needed = [
        math.ceil((sums[second + window_s] - sums[second]) / window_s / load) for second in range(len(sums) - window_s)
    ]
    # One that is wanted again before another could start does not go.
    ahead_s = math.ceil(speed.startup_s) + 2
    return [max(needed[second : second + ahead_s]) for second in range(len(needed))]


def refined(targets: list[int], replay: Callable[[list[int]], Replay], slo: Slo, rounds: int) -> list[int]:
    """A plan in which random changes are tried in each round, and those kept that are worth their replica-seconds.

    Args:
        targets: the plan to begin with.
        replay: runs the trace with a plan.
        slo: what requests should get.
        rounds: of two replays each.
    """
    source = random.Random(0)
    late = _late(replay(targets), slo, len(targets))
    for _ in range(rounds):
        tried, stretches, start = list(targets), [], source.randrange(120)
        while start < len(targets):
            stretch = slice(start, start + source.choice((10, 20, 30, 45, 60, 90, 150, 240)))
            change = source.choice((-1, -1, -1, 1))
            tried[stretch] = [max(1, target + change) for target in targets[stretch]]
            stretches.append(stretch)
            start = stretch.stop + source.randrange(90, 240)
        late_tried = _late(replay(tried), slo, len(targets))
        better = list(targets)
        for stretch in stretches:
            nearby = slice(stretch.start, stretch.stop + AFTER_S)
            more_late = sum(late_tried[nearby]) - sum(late[nearby])
            if sum(tried[stretch]) + LATE_COST_S * more_late < sum(targets[stretch]):
                better[stretch] = tried[stretch]
        late_better = _late(replay(better), slo, len(targets))
        if sum(better) + LATE_COST_S * sum(late_better) < sum(targets) + LATE_COST_S * sum(late):
            targets, late = better, late_better
    return targets


def _late(replay: Replay, slo: Slo, duration_s: int) -> list[int]:
    """Requests outside of the SLO, by the second in which they came."""
    late = [0] * duration_s
    for outcome in replay.outcomes:
        if not slo.met_by(outcome):
            late[int(outcome.arrival.time_s)] += 1
    return late


class Foresight:
    """A policy that follows a plan: the number of replicas to want in each second."""

    def __init__(self, targets: list[int]) -> None:
        self._targets = targets

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        second = int(context.current_time or 0.0)
        return float(self._targets[min(second, len(self._targets) - 1)]), {}
