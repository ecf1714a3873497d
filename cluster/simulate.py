"""Replay a request trace against autoscaling policies on a queueing model of replicas, and compare what comes out.

python -m cluster.simulate [--copies 3] [--plot FILE] [TRACE.csv ...]

A trace is a file of the Azure LLM inference traces of 2023; without any, an hour with the same statistics is made up.
A step trace follows: five times the load within a second. For each, a table: this project's policy with its default
arguments, the cheapest settings of Ray Serve's default policy (of the sweep below) and the smallest fixed fleet that
serve at least as well.
"""

import argparse
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.serve.autoscaling_policy import default_autoscaling_policy
from ray.serve.config import AutoscalingConfig

from cluster.autoscaling import QueueAndKvPolicy
from cluster.simulation.fleet import Autoscaler, Fleet, Replay, Slo
from cluster.simulation.replica import ReplicaSpeed
from cluster.simulation.trace import (
    STEP_S,
    Arrival,
    hour_of_conversations,
    multiplied,
    read_azure_trace,
    step_up,
    synthetic_trace,
)

SPEED = ReplicaSpeed()
SLO = Slo()
MOST_REPLICAS = 24
FIRST_REPLICAS = 4
BOUNDS = {"min_replicas": 1, "max_replicas": MOST_REPLICAS, "metrics_interval_s": 1}
SERVE_SWEEP: dict[str, tuple[float, ...]] = {
    "target_ongoing_requests": (12, 16, 20, 24, 28, 32),
    "upscale_delay_s": (0, 30),
    "downscale_delay_s": (60, 300),
    "downscaling_factor": (0.3, 1.0),
    "look_back_period_s": (3, 30),
}
"""Settings of Ray Serve's default policy that are tried, in all combinations."""


@dataclass(frozen=True)
class Result:
    """One replay, under a name that says of what."""

    name: str
    replay: Replay
    attainment: float

    @property
    def hours(self) -> float:
        return self.replay.replica_hours


def queue_and_kv(trace: Sequence[Arrival], **arguments: float) -> Result:
    """This project's policy; `arguments` differ from its defaults."""
    config = AutoscalingConfig(**BOUNDS, look_back_period_s=3, upscale_delay_s=0, downscale_delay_s=0)
    scaler = Autoscaler(QueueAndKvPolicy(**({"startup_s": SPEED.startup_s} | arguments)), config)
    return _run("QueueAndKvPolicy", trace, scaler, FIRST_REPLICAS)


def serve_default(trace: Sequence[Arrival], **settings: Any) -> Result:
    """Ray Serve's default policy with some settings."""
    scaler = Autoscaler(default_autoscaling_policy, AutoscalingConfig(**BOUNDS, **settings))
    return _run(", ".join(f"{name} {value:g}" for name, value in settings.items()), trace, scaler, FIRST_REPLICAS)


def fixed_fleet(trace: Sequence[Arrival], num_replicas: int) -> Result:
    """As many replicas all the time."""
    return _run(f"{num_replicas} replicas", trace, None, num_replicas)


def sweep_serve_default(trace: Sequence[Arrival], sweep: dict[str, tuple[float, ...]]) -> list[Result]:
    """Ray Serve's default policy in all combinations of settings."""
    return [
        serve_default(trace, **dict(zip(sweep, values, strict=True))) for values in itertools.product(*sweep.values())
    ]


def cheapest(results: Iterable[Result], attainment: float) -> Result | None:
    """That with the fewest replica-hours of those that serve at least so well."""
    return min(
        (result for result in results if result.attainment >= attainment), key=lambda found: found.hours, default=None
    )


def reaction_s(replay: Replay, step_s: float) -> tuple[int, float]:
    """How long a step in the load lasts for those who notice it.

    Returns:
        Seconds from the step until replicas were asked for, and until the last request came that got its first token
        too late.
    """
    before = replay.targets[int(step_s) - 1]
    asked = next((index for index, target in enumerate(replay.targets[int(step_s) :]) if target > before), -1)
    late = [each.arrival.time_s for each in replay.outcomes if each.ttft_s > SLO.ttft_s]
    return asked, max(0.0, max(late, default=step_s) - step_s)


def _run(name: str, trace: Sequence[Arrival], scaler: Autoscaler | None, num_replicas: int) -> Result:
    replay = Fleet(SPEED, scaler, num_replicas).replay(trace)
    return Result(name, replay, replay.attainment(SLO))


def _rows(results: Iterable[tuple[str, Result]], ours: Result, has_step: bool) -> Iterable[str]:
    """A Markdown table."""
    columns = ["policy", "setting", "SLO attainment", "replica-hours", "of ours", "TTFT p99"]
    columns += ["asked after", "late until"] if has_step else []
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    for policy, result in results:
        cells = [policy, result.name, f"{result.attainment:.2%}", f"{result.hours:.2f}"]
        cells += [f"{result.hours / ours.hours:.2f}", f"{result.replay.ttft_s(0.99):.2f} s"]
        if has_step:
            asked_s, late_s = reaction_s(result.replay, STEP_S)
            cells += [f"{asked_s} s" if asked_s >= 0 else "never", f"{late_s:.0f} s"]
        yield f"| {' | '.join(cells)} |"


def compare(
    title: str, trace: Sequence[Arrival], sweep: dict[str, tuple[float, ...]], say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Run all on one trace and say what came out. Returns the results, by kind, for the plot."""
    ours = queue_and_kv(trace)
    swept = sweep_serve_default(trace, sweep)
    fleets = [fixed_fleet(trace, number) for number in range(1, MOST_REPLICAS + 1)]
    shown = [("QueueAndKvPolicy", Result("defaults", ours.replay, ours.attainment))]
    for policy, results in (("Serve's default", swept), ("fixed fleet", fleets)):
        equal = cheapest(results, ours.attainment)
        if equal is not None:
            shown.append((f"{policy}, no worse", equal))
        affordable = [result for result in results if result.hours <= ours.hours]
        if affordable:
            best = max(affordable, key=lambda found: found.attainment)
            shown.append((f"{policy}, no dearer", best))
    tokens = sum(each.prompt_tokens for each in trace) / len(trace)
    say(f"\n### {title}\n\n{len(trace)} requests in {trace[-1].time_s:.0f} s, {tokens:.0f} prompt tokens on average.\n")
    for row in _rows(shown, ours, title.startswith("Step")):
        say(row)
    return {"title": title, "trace": trace, "ours": ours, "swept": swept, "fleets": fleets, "shown": dict(shown)}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="*", type=Path, metavar="TRACE.csv")
    parser.add_argument("--copies", type=int, default=3, help="multiply the traces' users (default: %(default)s)")
    parser.add_argument("--plot", type=Path, help="draw into this file (.svg, .png); needs matplotlib")
    options = parser.parse_args()
    if options.copies < 1:
        parser.error(f"--copies is {options.copies}, expected at least 1")
    traces = [(path.stem, read_azure_trace(path)) for path in options.traces]
    if not traces:
        traces = [("Synthetic hour", synthetic_trace(hour_of_conversations, 3600.0))]
    traces.append(("Step of five times the load", synthetic_trace(step_up, 1800.0)))
    results = [compare(title, multiplied(trace, options.copies), SERVE_SWEEP) for title, trace in traces]
    if options.plot is not None:
        from cluster.simulation.plot import draw

        draw(results, options.plot)


if __name__ == "__main__":
    main()
