"""Replay a request trace against autoscaling policies on a queueing model of replicas, and compare what comes out.

python -m cluster.simulate [--copies 3] [--seeds 5] [--refine ROUNDS] [--plot FILE] [TRACE.csv ...]

A trace is a file of the Azure LLM inference traces of 2023; without any, an hour with the same statistics is made up.
A step trace follows: five times the load within a second. For each, a table: this project's policy with its default
arguments; the cheapest settings of Ray Serve's default policy (of the sweep below), the smallest fixed fleet and the
cheapest plan of one who knows the trace that serve at least as well; and the best of them that cost no more. They are
chosen on the first seed, and a row has the medians over all seeds.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.serve.autoscaling_policy import default_autoscaling_policy
from ray.serve.config import AutoscalingConfig

from cluster.autoscaling import QueueAndKvPolicy
from cluster.simulation.fleet import Autoscaler, Fleet, Policy, Slo
from cluster.simulation.foresight import Foresight, least_hours, plan, refined
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

Traces = Sequence[Sequence[Arrival]]
"""The same load with several seeds."""
Sweep = dict[str, tuple[float, ...]]
"""Values to try for each argument."""

SPEED = ReplicaSpeed()
SLO = Slo()
MOST_REPLICAS = 24
FIRST_REPLICAS = 4
BOUNDS = {"min_replicas": 1, "max_replicas": MOST_REPLICAS, "metrics_interval_s": 1}
SERVE_SWEEP: Sweep = {
    "target_ongoing_requests": (12, 16, 20, 24, 28, 32),
    "upscale_delay_s": (0, 30),
    "downscale_delay_s": (60, 300),
    "downscaling_factor": (0.3, 1.0),
    "look_back_period_s": (3, 30),
}
"""Settings of Ray Serve's default policy that are tried, in all combinations."""
FORESIGHT_SWEEP: Sweep = {
    "load": (0.3, 0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0),
    "window_s": (10, 20),
}
"""The same for plans made with knowledge of the trace."""
NO_DELAYS = {"look_back_period_s": 3, "upscale_delay_s": 0, "downscale_delay_s": 0}


@dataclass(frozen=True)
class Contender:
    """A way to decide on replicas, under a name that says how."""

    name: str
    start: Callable[[Sequence[Arrival]], Fleet]
    """A fleet for a trace."""

    def run(self, traces: Traces) -> "Result":
        """Replay all, and sum up."""
        replays = [self.start(trace).replay(trace) for trace in traces]
        late_s = [each.arrival.time_s for each in replays[0].outcomes if each.ttft_s > SLO.ttft_s]
        return Result(
            self,
            attainment=statistics.median(replay.attainment(SLO) for replay in replays),
            hours=statistics.median(replay.replica_hours for replay in replays),
            ttft_p99_s=statistics.median(replay.ttft_s(0.99) for replay in replays),
            targets=replays[0].targets,
            running=replays[0].running,
            last_late_s=max(late_s, default=0.0),
        )


@dataclass(frozen=True)
class Result:
    """What came out: medians over the seeds, then what happened with the first."""

    contender: Contender
    attainment: float
    hours: float
    ttft_p99_s: float
    targets: list[int]
    running: list[int]
    last_late_s: float
    """When the last request came that got its first token too late."""


def queue_and_kv(**arguments: float) -> Contender:
    """This project's policy; `arguments` differ from its defaults."""
    name = _named(arguments) or "defaults"
    return _scaled(name, lambda _: QueueAndKvPolicy(**({"startup_s": SPEED.startup_s} | arguments)), NO_DELAYS)


def serve_default(**settings: float) -> Contender:
    """Ray Serve's default policy with some settings."""
    return _scaled(_named(settings), lambda _: default_autoscaling_policy, settings)


def foresight(load: float, window_s: float) -> Contender:
    """A plan made with knowledge of the trace."""
    name = _named({"load": load, "window_s": window_s})
    return _scaled(name, lambda trace: Foresight(plan(trace, SPEED, load, int(window_s))), NO_DELAYS)


def refined_foresight(trace: Sequence[Arrival], first: Result, rounds: int) -> Contender:
    """A better plan for this very trace, from what one has wanted."""

    def follow(targets: list[int]) -> Contender:
        return _scaled(f"{rounds} rounds", lambda _: Foresight(targets), NO_DELAYS)

    first_plan = [FIRST_REPLICAS, *first.targets]
    return follow(refined(first_plan, lambda targets: follow(targets).start(trace).replay(trace), SLO, rounds))


def fixed_fleet(num_replicas: int) -> Contender:
    """As many replicas all the time."""
    return Contender(f"{num_replicas} replicas", lambda _: Fleet(SPEED, None, num_replicas))


def _scaled(name: str, policy: Callable[[Sequence[Arrival]], Policy], settings: dict[str, Any]) -> Contender:
    config = AutoscalingConfig(**BOUNDS, **settings)
    return Contender(name, lambda trace: Fleet(SPEED, Autoscaler(policy(trace), config), FIRST_REPLICAS))


def _named(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in values.items())


def swept(
    make: Callable[..., Contender], sweep: dict[str, tuple[float, ...]], trace: Sequence[Arrival]
) -> list[Result]:
    """One trace with all combinations of settings."""
    combinations = itertools.product(*sweep.values())
    return [make(**dict(zip(sweep, values, strict=True))).run([trace]) for values in combinations]


def cheapest(results: Iterable[Result], attainment: float) -> Result | None:
    """That with the fewest replica-hours of those that serve at least so well."""
    return min(
        (result for result in results if result.attainment >= attainment), key=lambda found: found.hours, default=None
    )


def reaction_s(result: Result, step_s: float) -> tuple[int, float]:
    """How long a step in the load lasts for those who notice it.

    Returns:
        Seconds from the step until replicas were asked for, and until the last request came that got its first token
        too late.
    """
    before = result.targets[int(step_s) - 1]
    asked = next((index for index, target in enumerate(result.targets[int(step_s) :]) if target > before), -1)
    return asked, max(0.0, result.last_late_s - step_s)


def interpolated_hours(results: Iterable[Result], attainment: float) -> float | None:
    """Replica-hours of exactly this attainment, between neighbours among those that no other beats in both."""
    front: list[Result] = []
    for result in sorted(results, key=lambda found: (found.hours, -found.attainment)):
        if not front or result.attainment > front[-1].attainment:
            front.append(result)
    for worse, better in itertools.pairwise(front):
        if worse.attainment <= attainment <= better.attainment:
            share = (attainment - worse.attainment) / (better.attainment - worse.attainment)
            return worse.hours + share * (better.hours - worse.hours)
    return None


def _rows(results: dict[str, Result], ours: Result, has_step: bool) -> Iterable[str]:
    """A Markdown table."""
    columns = ["policy", "setting", "SLO attainment", "replica-hours", "of ours", "TTFT p99"]
    columns += ["asked after", "late until"] if has_step else []
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    for policy, result in results.items():
        cells = [policy, result.contender.name, f"{result.attainment:.2%}", f"{result.hours:.2f}"]
        cells += [f"{result.hours / ours.hours:.2f}", f"{result.ttft_p99_s:.2f} s"]
        if has_step:
            asked_s, late_s = reaction_s(result, STEP_S)
            cells += [f"{asked_s} s" if asked_s >= 0 else "never", f"{late_s:.0f} s"]
        yield f"| {' | '.join(cells)} |"


def compare(
    title: str, traces: Traces, sweep: Sweep, rounds: int = 0, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Run all on one load and say what came out. Returns the results, by kind, for the plot.

    Args:
        title: of the table.
        traces: the load, with several seeds.
        sweep: settings of Ray Serve's default policy.
        rounds: in which the plan of one who knows the first trace is refined.
        say: takes the lines.
    """
    trace = traces[0]
    ours = queue_and_kv().run([trace])
    others = {
        "Serve's default": swept(serve_default, sweep, trace),
        "fixed fleet": [fixed_fleet(number).run([trace]) for number in range(1, MOST_REPLICAS + 1)],
        "foresight": swept(foresight, FORESIGHT_SWEEP, trace),
    }
    chosen = {"QueueAndKvPolicy": ours}
    for policy, results in others.items():
        equal = cheapest(results, ours.attainment)
        if equal is not None:
            chosen[f"{policy}, no worse"] = equal
        affordable = [result for result in results if result.hours <= ours.hours]
        if affordable and policy != "foresight":
            chosen[f"{policy}, no dearer"] = max(affordable, key=lambda found: found.attainment)
    shown = {policy: result.contender.run(traces) for policy, result in chosen.items()}
    if rounds and "foresight, no worse" in chosen:
        refined_plan = refined_foresight(trace, chosen["foresight, no worse"], rounds)
        shown["foresight, refined"] = refined_plan.run([trace])
    tokens = sum(each.prompt_tokens for each in trace) / len(trace)
    say(f"\n### {title}\n\n{len(trace)} requests in {trace[-1].time_s:.0f} s, {tokens:.0f} prompt tokens on average.")
    say(f"No fleet can do with less than {least_hours(trace, SPEED):.2f} replica-hours.")
    equal_hours = interpolated_hours(others["Serve's default"], ours.attainment)
    if equal_hours is not None:
        say(f"Serve's default, between its settings: {equal_hours:.2f} for exactly our {ours.attainment:.2%}.")
    say("")
    for row in _rows(shown, shown["QueueAndKvPolicy"], title.startswith("Step")):
        say(row)
    return {"title": title, "trace": trace, "ours": ours, "shown": shown, **others}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="*", type=Path, metavar="TRACE.csv")
    parser.add_argument("--copies", type=int, default=3, help="multiply the traces' users (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="of the copies and what is made up (default: %(default)s)")
    parser.add_argument(
        "--refine", type=int, default=0, metavar="ROUNDS", help="refine the plan that knows a trace (default: do not)"
    )
    parser.add_argument("--plot", type=Path, help="draw into this file (.svg, .png); needs matplotlib")
    options = parser.parse_args()
    for name, least in (("copies", 1), ("seeds", 1), ("refine", 0)):
        if getattr(options, name) < least:
            parser.error(f"--{name} is {getattr(options, name)}, expected at least {least}")
    seeds = range(options.seeds)
    loads = [(path.stem, [read_azure_trace(path)] * options.seeds) for path in options.traces]
    if not loads:
        loads = [("Synthetic hour", [synthetic_trace(hour_of_conversations, 3600.0, seed) for seed in seeds])]
    loads.append(("Step of five times the load", [synthetic_trace(step_up, 1800.0, seed) for seed in seeds]))
    results = []
    for title, traces in loads:
        copied = [multiplied(trace, options.copies, seed) for seed, trace in enumerate(traces)]
        results.append(compare(title, copied, SERVE_SWEEP, options.refine))
    if options.plot is not None:
        from cluster.simulation.plot import draw

        draw(results, options.plot)


if __name__ == "__main__":
    main()
