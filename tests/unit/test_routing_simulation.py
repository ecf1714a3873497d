"""serve_app/placement.py on modelled replicas with the engine's block pool: what a fleet makes of traffic."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from cluster.simulate_routing import OURS, compare
from cluster.simulation.caching_replica import CachingReplica
from cluster.simulation.replica import Outcome, ReplicaSpeed
from cluster.simulation.routing import (
    KvAwareRouter,
    PowerOfTwoRouter,
    RandomRouter,
    RoundRobinRouter,
    Routed,
    RoutedFleet,
    SessionHashRouter,
    TextPrefixRouter,
)
from cluster.simulation.trace import MOONCAKE_BLOCK, Arrival, read_mooncake_trace, synthetic_conversations

BLOCK = 64
SPEED = ReplicaSpeed(block_size=BLOCK, num_blocks=1000, max_num_seqs=128)
"""10,000 prompt tokens per second, and room for 64,000 tokens."""


def route(trace: Sequence[Arrival], speeds: Sequence[ReplicaSpeed], num_ingresses: int = 1) -> Routed:
    return RoutedFleet(speeds, partial(KvAwareRouter, block_size=BLOCK), num_ingresses).replay(trace)


def shared_prefixes(
    rate_per_s: float, count: int, num_prefixes: int, prefix_blocks: int = 50, tail_tokens: int = 320, seed: int = 0
) -> list[Arrival]:
    """Poisson arrivals; each prompt is one of some prefixes, drawn at random, and a tail of its own."""
    source = random.Random(seed)
    prefixes = [[source.randbytes(16) for _ in range(prefix_blocks)] for _ in range(num_prefixes)]
    time_s, found = 0.0, []
    for _ in range(count):
        time_s += source.expovariate(rate_per_s)
        keys = (*source.choice(prefixes), *(source.randbytes(16) for _ in range(tail_tokens // BLOCK)))
        found.append(Arrival(time_s, prefix_blocks * BLOCK + tail_tokens, 20, keys))
    return found


def test_shared_prefixes_hit_as_in_one_large_cache_and_the_load_is_even():
    # 40 prefixes of 3,200 tokens are twice what one replica holds, and half of what four do.
    trace = shared_prefixes(40.0, 3000, num_prefixes=40)
    one = replace(SPEED, num_blocks=4000, prefill_tokens_per_s=40_000.0)
    combined, ours = route(trace, [one]), route(trace, [SPEED] * 4)
    assert combined.hit_rate > 0.85
    assert ours.hit_rate >= 0.95 * combined.hit_rate
    assert ours.imbalance <= 1.3
    assert max(ours.computed_tokens) <= 1.3 * sum(ours.computed_tokens) / 4


def test_a_hot_prefix_spreads_over_as_many_replicas_as_it_takes():
    # One prefix; the tails alone are twice what one replica can compute.
    trace = shared_prefixes(60.0, 2000, num_prefixes=1)
    ours = route(trace, [SPEED] * 4)
    assert ours.imbalance <= 1.3 and ours.hit_rate > 0.85
    assert ours.ttft_s(0.9) < 0.5 and ours.ttft_s(0.99) < 1.2  # in the first second all have to compute the prefix
    assert route(trace, [SPEED]).ttft_s(0.5) > 5


def test_a_prefix_that_one_replica_can_serve_stays_there():
    ours = route(shared_prefixes(2.0, 200, num_prefixes=1, tail_tokens=64), [SPEED] * 4)
    assert Counter(ours.replicas).most_common(1)[0][1] > 180


def test_several_ingresses_do_not_herd():
    trace = shared_prefixes(60.0, 2000, num_prefixes=1000, prefix_blocks=1)  # hardly anything to hit
    one, three = (route(trace, [SPEED] * 4, num_ingresses) for num_ingresses in (1, 3))
    blind = RoutedFleet([SPEED] * 4, RandomRouter, 3).replay(trace)
    assert three.imbalance <= 1.1
    assert three.ttft_s(0.99) <= min(1.5 * one.ttft_s(0.99), blind.ttft_s(0.99))
    assert _most_of_twenty(three) < _most_of_twenty(blind)


def _most_of_twenty(routed: Routed) -> float:
    """How many of twenty requests in a row go to the same replica, on average."""
    rows = [routed.replicas[start : start + 20] for start in range(0, len(routed.replicas), 20)]
    return sum(Counter(row).most_common(1)[0][1] for row in rows) / len(rows)


def test_unequal_replicas_get_what_they_can_do():
    slow = replace(SPEED, prefill_tokens_per_s=5_000.0)
    trace = shared_prefixes(20.0, 2000, num_prefixes=1000, prefix_blocks=1, tail_tokens=1024)
    speeds = [slow, SPEED, SPEED, slow]
    ours = route(trace, speeds, num_ingresses=3)
    counts = [count for _, count in sorted(Counter(ours.replicas).items())]
    assert 0.3 < (counts[0] + counts[3]) / (counts[1] + counts[2]) < 0.7
    even = RoutedFleet(speeds, RoundRobinRouter, 3).replay(trace)
    assert ours.ttft_s(0.99) < 0.5 * even.ttft_s(0.99)


def test_evicted_prefixes_are_not_chased():
    # Three times as many prefixes as the fleet holds: what is believed to be cached must be.
    trace = shared_prefixes(12.0, 1500, num_prefixes=240)
    ours = route(trace, [SPEED] * 4, num_ingresses=3)
    counters = [router.placement.counters for router in ours.routers if isinstance(router, KvAwareRouter)]
    predicted = sum(each.num_predicted_cached_tokens for each in counters)
    found = sum(each.num_cached_tokens for each in counters)
    assert 0.1 < ours.hit_rate < 0.6
    assert found == sum(outcome.num_cached_tokens for outcome in ours.outcomes)
    assert predicted == pytest.approx(found, rel=0.15)  # some are evicted while the request waits
    assert ours.imbalance <= 1.3
    assert sum(each.predicted_ttft_s for each in counters) == pytest.approx(
        sum(each.ttft_s for each in counters), rel=0.3
    )
    assert not any(router.placement.num_in_flight for router in ours.routers if isinstance(router, KvAwareRouter))


def test_the_modelled_replica_caches_as_the_engine_does():
    keys = tuple(bytes([index]) * 16 for index in range(10))
    replica = CachingReplica(replace(SPEED, num_blocks=16), 0.0)
    first, again, longer = Arrival(0.0, 640, 10, keys), Arrival(5.0, 640, 10, keys), Arrival(10.0, 1000, 10, ())
    last = Arrival(15.0, 640, 10, keys)
    outcomes = [Outcome(arrival) for arrival in (first, again, longer, last)]
    for outcome in outcomes:
        replica.submit(outcome)
    replica.advance(20.0)
    # The last token of a prompt is always computed; 16 blocks for 1,010 tokens leave nothing of the others.
    assert [outcome.num_cached_tokens for outcome in outcomes] == [0, 576, 0, 0]
    assert replica.num_computed_tokens == 640 + 64 + 1000 + 640
    assert outcomes[0].ttft_s > 2 * outcomes[1].ttft_s
    reports = list(replica.reports)
    known: set[bytes] = set()
    for report in reports:
        known.difference_update(report.evicted)
        known.update(report.stored)
    assert known == set(keys) and [each for report in reports for each in report.begun] == outcomes


def test_every_router_serves_every_request():
    trace = synthetic_conversations(2.0, 60.0)
    speed = replace(SPEED, block_size=MOONCAKE_BLOCK, num_blocks=600)
    shared = TextPrefixRouter(0, most_uneven=4)
    routers = (RandomRouter, RoundRobinRouter, PowerOfTwoRouter, SessionHashRouter, lambda ingress: shared)
    rates = []
    for make_router in (*routers, partial(KvAwareRouter, block_size=MOONCAKE_BLOCK)):
        routed = RoutedFleet([speed] * 3, make_router, 2).replay(trace)
        assert len(routed.outcomes) == len(trace) and routed.ttft_s(1.0) < 1000
        assert sum(routed.computed_tokens) == sum(each.prompt_tokens for each in trace) * (1 - routed.hit_rate)
        rates.append(routed.hit_rate)
    assert rates[-1] > max(rates[:3])


def test_a_comparison_is_a_table_for_each_load_and_one_for_an_uneven_fleet():
    lines: list[str] = []
    found = compare("Quiet", synthetic_conversations(1.0, 60.0), 2, loads=(1.0,), say=lines.append)
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 2 * (2 + len(found.by_load)) and len({line.count("|") for line in rows}) == 1
    assert all(len(routed) == 1 for routed in found.by_load.values())
    hits = {name: routed[0].hit_rate for name, routed in found.by_load.items()}
    assert hits[OURS] > hits[f"{OURS}, load only"]


def test_a_comparison_is_a_picture(tmp_path: Path):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    from cluster.simulation.routing_plot import draw

    found = compare("Quiet", synthetic_conversations(1.0, 20.0), 2, loads=(1.0,), say=lambda line: None)
    draw([found], (1.0,), tmp_path / "plot.svg")
    assert "</svg>" in (tmp_path / "plot.svg").read_text()


def test_a_mooncake_trace_is_read_and_a_wrong_one_named(tmp_path: Path):
    path = tmp_path / "trace.jsonl"
    row = '{"timestamp": %d, "input_length": %d, "output_length": 7, "hash_ids": [0, 1, %d]}\n'
    path.write_text(row % (0, 1100, 2) + row % (0, 1536, 3) + row % (3000, 1100, 4))
    found = read_mooncake_trace(path)
    assert [each.time_s for each in found] == [0.0, 1.5, 3.0]
    assert [len(each.keys) for each in found] == [2, 3, 2] and found[0].keys == found[1].keys[:2]
    path.write_text(row % (0, 1100, 2) + '{"timestamp": 1}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_mooncake_trace(path)


def test_synthetic_conversations_have_the_statistics_they_claim():
    trace = synthetic_conversations(2.0, 1200.0)
    prompts = sorted(each.prompt_tokens for each in trace)
    assert 6000 < prompts[len(prompts) // 2] < 8000 and 10_500 < sum(prompts) / len(prompts) < 13_500
    known: set[bytes] = set()
    num_shared = 0
    for each in trace:
        num_shared += next((i for i, key in enumerate(each.keys) if key not in known), len(each.keys))
        known.update(each.keys)
    assert 0.3 < num_shared * MOONCAKE_BLOCK / sum(prompts) < 0.45
    assert trace == synthetic_conversations(2.0, 1200.0) != synthetic_conversations(2.0, 1200.0, seed=1)
