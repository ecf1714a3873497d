"""What a fleet would cost whose autoscaler knew the trace: a bound, and a plan that comes near to what is possible."""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from ray.serve.config import AutoscalingContext

from cluster.simulation.replica import ReplicaSpeed
from cluster.simulation.trace import Arrival


def work_s(arrival: Arrival, speed: ReplicaSpeed) -> float:
    """Seconds of a replica that a request takes at least: in steps whose fixed part a full batch shares."""
    step_s = speed.step_s_per_sequence + speed.step_s / speed.max_num_seqs
    return arrival.prompt_tokens / speed.prefill_tokens_per_s + arrival.output_tokens * step_s


def least_hours(trace: Sequence[Arrival], speed: ReplicaSpeed) -> float:
    """Replica-hours that no fleet can do with less of: every batch full, no replica ever starting or spare."""
    return sum(work_s(arrival, speed) for arrival in trace) / 3600


class Foresight:
    """A policy that follows a plan made from the whole trace: replicas run when the load comes that takes them.

    Args:
        trace: all that will come.
        speed: of the replicas.
        load: how much of what they can do replicas should get: work that comes per second and replica.
        window_s: seconds over which work is averaged.
    """

    def __init__(self, trace: Sequence[Arrival], speed: ReplicaSpeed, load: float, window_s: int) -> None:
        work = [0.0] * (int(trace[-1].time_s) + 1 + window_s)
        for arrival in trace:
            work[int(arrival.time_s) + window_s // 2] += work_s(arrival, speed)
        sums = [0.0, *accumulate(work)]
        needed = [
            math.ceil((sums[second + window_s] - sums[second]) / window_s / load)
            for second in range(len(sums) - window_s)
        ]
        # One that is wanted again before another could start does not go.
        ahead_s = math.ceil(speed.startup_s) + 2
        self._targets = [max(needed[second : second + ahead_s]) for second in range(len(needed))]

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        second = int(context.current_time or 0.0)
        return float(self._targets[min(second, len(self._targets) - 1)]), {}
