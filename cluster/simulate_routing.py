"""Replay a request trace with several ways to route, on modelled replicas with prefix caches, and compare.

python -m cluster.simulate_routing [--replicas 8] [--plot FILE] [TRACE.jsonl ...]

A trace is a file of the Mooncake traces (FAST'25); without any, half an hour of conversations with the same statistics
is made up. Each is replayed as fast as it was, then slower and faster, then on a fleet half of which is half as fast.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from cluster.simulation.replica import ReplicaSpeed
from cluster.simulation.routing import (
    KvAwareRouter,
    MakeRouter,
    PowerOfTwoRouter,
    RandomRouter,
    RoundRobinRouter,
    Routed,
    RoutedFleet,
    SessionHashRouter,
    TextPrefixRouter,
)
from cluster.simulation.trace import MOONCAKE_BLOCK, Arrival, read_mooncake_trace, synthetic_conversations

SPEED = ReplicaSpeed(
    step_s=0.012,
    step_s_per_sequence=0.0002,
    prefill_tokens_per_s=10_000.0,
    max_num_batched_tokens=2048,
    max_num_seqs=128,
    num_blocks=800,
    block_size=MOONCAKE_BLOCK,
)
"""Like an 8B model on a GPU of 80 GB: its KV cache holds 410,000 tokens."""
NUM_INGRESSES = 3
LOADS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
"""How many times as fast as it was a trace is replayed."""
UNEVEN = (4.0, 16.0, 64.0)
"""How uneven text-prefix routing lets the fleet become, in requests; the best for a trace is shown."""
OURS = "KvAwareRouter"


def _text_prefix(most_uneven: float) -> MakeRouter:
    """All ingresses share one: such routers run as one process, or share what they know."""
    shared = TextPrefixRouter(0, most_uneven)
    return lambda ingress: shared


def routers(most_uneven: float) -> dict[str, MakeRouter]:
    """All ways to route, by name; `most_uneven` is for text-prefix routing."""
    return {
        "random": RandomRouter,
        "round robin": RoundRobinRouter,
        "power of two choices": PowerOfTwoRouter,
        "session hash": SessionHashRouter,
        "text prefix": _text_prefix(most_uneven),
        f"{OURS}, load only": partial(KvAwareRouter, block_size=MOONCAKE_BLOCK, sees_caches=False),
        OURS: partial(KvAwareRouter, block_size=MOONCAKE_BLOCK),
    }


@dataclass(frozen=True)
class Comparison:
    """What came of one trace."""

    title: str
    by_load: dict[str, list[Routed]]
    """By router: at each of LOADS."""


def at_load(trace: Sequence[Arrival], load: float) -> list[Arrival]:
    """The same requests, `load` times as fast one after the other."""
    return [replace(each, time_s=each.time_s / load) for each in trace]


def best_text_prefix(trace: Sequence[Arrival], speeds: Sequence[ReplicaSpeed]) -> float:
    """How uneven text-prefix routing should let the fleet become: that with the best TTFT p90."""

    def ttft_s(most_uneven: float) -> float:
        return RoutedFleet(speeds, _text_prefix(most_uneven), NUM_INGRESSES).replay(trace).ttft_s(0.9)

    return min(UNEVEN, key=ttft_s)


def table(results: dict[str, Routed]) -> list[str]:
    """A Markdown table: a row for each router."""
    rows = ["| routing | TTFT p50 | p90 | p99 | hit rate | busiest |", "|---|---|---|---|---|---|"]
    for name, routed in results.items():
        busiest = max(routed.computed_tokens) * len(routed.computed_tokens) / sum(routed.computed_tokens)
        times = " | ".join(f"{routed.ttft_s(share):.2f} s" for share in (0.5, 0.9, 0.99))
        rows.append(f"| {name} | {times} | {routed.hit_rate:.1%} | {busiest:.2f} |")
    return rows


def compare(
    title: str,
    trace: Sequence[Arrival],
    num_replicas: int,
    loads: Sequence[float] = LOADS,
    say: Callable[[str], None] = print,
) -> Comparison:
    """Run every router on one trace and say what came out."""
    equal = [SPEED] * num_replicas
    slow = replace(SPEED, step_s=2 * SPEED.step_s, prefill_tokens_per_s=SPEED.prefill_tokens_per_s / 2)
    most_uneven = best_text_prefix(trace, equal)
    names = list(routers(most_uneven))

    def run(name: str, load: float, speeds: Sequence[ReplicaSpeed]) -> Routed:
        return RoutedFleet(speeds, routers(most_uneven)[name], NUM_INGRESSES).replay(at_load(trace, load))

    by_load = {name: [run(name, load, equal) for load in loads] for name in names}
    whole = replace(SPEED, num_blocks=SPEED.num_blocks * num_replicas)
    largest = RoutedFleet([whole], RandomRouter, 1).replay(trace).hit_rate
    say(f"\n### {title}\n")
    say(
        f"{len(trace)} requests in {trace[-1].time_s:.0f} s, {num_replicas} replicas. One cache of the same size as all"
    )
    say(f"caches together would hit {largest:.1%}. Text-prefix routing at its best lets replicas differ by")
    say(f"{most_uneven:g} requests.")
    for index, load in enumerate(loads):
        say(f"\n{load:g} times the load:\n")
        for row in table({name: found[index] for name, found in by_load.items()}):
            say(row)
    uneven = [slow if index % 2 else SPEED for index in range(num_replicas)]
    say("\nEvery second replica half as fast, 0.75 times the load:\n")
    for row in table({name: run(name, 0.75, uneven) for name in names}):
        say(row)
    return Comparison(title, by_load)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="*", type=Path, metavar="TRACE.jsonl")
    parser.add_argument("--replicas", type=int, default=8, help="how many (default: %(default)s)")
    parser.add_argument("--plot", type=Path, help="draw into this file (.svg, .png); needs matplotlib")
    options = parser.parse_args()
    if options.replicas < 1:
        parser.error(f"--replicas is {options.replicas}, expected at least 1")
    traces = [(path.stem, read_mooncake_trace(path)) for path in options.traces]
    if not traces:
        traces = [("Synthetic conversations", synthetic_conversations(2.1, 1800.0))]
    comparisons = [compare(title, trace, options.replicas) for title, trace in traces]
    if options.plot is not None:
        from cluster.simulation.routing_plot import draw

        draw(comparisons, LOADS, options.plot)


if __name__ == "__main__":
    main()
