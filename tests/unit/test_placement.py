"""Placement: the replica that is predicted to be the fastest gets a request, each predicted for itself."""

from dataclasses import dataclass, field

import pytest

from engine.block_pool import block_keys
from serve_app.placement import FIRST_RATE, Candidate, Placement, Prompt, Reason
from serve_app.steps import ReplicaLoad

BLOCK = 16


@dataclass
class Replica:
    load: ReplicaLoad | None
    block_keys: set[bytes] = field(default_factory=set)
    updated_s: float = 0.0


def load(**changes: float) -> ReplicaLoad:
    idle = {"num_running": 0, "num_waiting": 0, "num_waiting_tokens": 0, "num_free_blocks": 10_000}
    idle |= {"num_blocks": 10_000, "step_s": 0.02, "prefill_tokens_per_s": 10_000.0, "num_prefill_tokens": 0}
    return ReplicaLoad(**(idle | changes))  # type: ignore[arg-type]


def prompt(num_tokens: int, first: int = 0) -> Prompt:
    token_ids = range(first, first + num_tokens)
    return Prompt(block_keys(token_ids, BLOCK, ""), num_tokens, BLOCK)


def ranked(placement: Placement, asked: Prompt, now_s: float = 0.0, **replicas: Replica) -> list[Candidate]:
    return placement.rank(asked, replicas, now_s)


def place(placement: Placement, name: str, asked: Prompt, now_s: float = 0.0, **replicas: Replica) -> str:
    candidates = placement.rank(asked, replicas, now_s)
    placement.place(name, asked, candidates, candidates[0].replica_id, now_s)
    return candidates[0].replica_id


def test_a_cached_prefix_draws_a_request_until_its_replica_is_busier_than_the_prefix_is_worth():
    asked = prompt(8000)
    warm = set(asked.keys[:400])  # 6,400 tokens: 0.64 s of computing, which costs others as much again
    for waiting, expected in ((0, "warm"), (6_000, "warm"), (16_000, "cold")):
        warm_load = load(num_waiting_tokens=waiting, num_waiting=1)
        found = ranked(Placement(0), asked, warm=Replica(warm_load, warm), cold=Replica(load()))
        assert found[0].replica_id == expected
        assert {each.replica_id: each.num_cached_tokens for each in found} == {"warm": 6400, "cold": 0}


def test_a_prediction_counts_what_is_ahead_and_what_is_not_cached():
    asked = prompt(3200)
    state = Replica(load(num_prefill_tokens=5_000, num_waiting_tokens=1_000, num_waiting=1), set(asked.keys[:100]))
    [found] = ranked(Placement(0), asked, one=state)
    # 5,000 of running requests, 1,000 that wait, half of 3,200; and a little for the KV cache
    assert found.ttft_s == pytest.approx(0.76, abs=0.02)


def test_the_last_prompt_token_is_never_cached():
    asked = prompt(160)
    [found] = ranked(Placement(0), asked, one=Replica(load(), set(asked.keys)))
    assert found.num_cached_tokens == 144


def test_decided_for_each_candidate_an_uneven_fleet_keeps_affinity():
    asked = prompt(8000)
    busy = Replica(load(num_waiting_tokens=10**6, num_waiting=100))
    warm = Replica(load(num_waiting_tokens=2_000, num_waiting=1), set(asked.keys))
    assert place(Placement(0), "a", asked, busy=busy, warm=warm, idle=Replica(load())) == "warm"


def test_requests_of_this_process_count_before_any_report_does():
    placement, replicas = Placement(0), {name: Replica(load()) for name in "abcd"}
    chosen = [place(placement, str(i), prompt(1000, 10_000 * i), **replicas) for i in range(8)]
    assert sorted(chosen) == sorted("aabbccdd")


def test_a_request_is_not_counted_twice_once_the_report_tells_of_it():
    placement = Placement(0)
    place(placement, "a", prompt(10_000), one=Replica(load()))
    waits = load(num_waiting_tokens=10_000, num_waiting=1)
    computed = load(num_prefill_tokens=4_000, num_running=1)
    for state, expected_s in ((Replica(waits, updated_s=1.0), 1.1), (Replica(computed, updated_s=1.0), 0.5)):
        [found] = ranked(placement, prompt(1000, 50_000), 1.0, one=state)
        assert found.ttft_s == pytest.approx(expected_s, abs=0.02)


def test_requests_of_others_count_beside_ours():
    placement = Placement(0)
    place(placement, "a", prompt(10_000), one=Replica(load()))
    waiting = Replica(load(num_waiting_tokens=30_000, num_waiting=3), updated_s=1.0)
    [found] = ranked(placement, prompt(1000, 50_000), 1.0, one=waiting)
    assert found.ttft_s == pytest.approx(3.1, abs=0.05)  # so far all of ours missed the cache, so theirs do


def test_waiting_requests_of_others_miss_the_cache_as_often_as_ours():
    placement, shared = Placement(0), prompt(8000)
    warm = Replica(load(), set(shared.keys))
    for _ in range(1000):
        place(placement, "a", shared, one=warm)
        placement.first_token("a", 7984, 0.0)
    queued = Replica(load(num_waiting_tokens=80_000, num_waiting=10), warm.block_keys)
    [found] = ranked(placement, shared, one=queued)
    assert found.ttft_s < 0.2


def test_a_burst_with_one_new_prefix_stays_together_while_that_is_faster():
    placement, replicas = Placement(0), {name: Replica(load()) for name in "abcd"}
    chosen = [place(placement, str(i), prompt(4000), **replicas) for i in range(20)]
    assert len(set(chosen)) == 1


def test_a_hot_prefix_spreads_when_its_replica_has_a_queue():
    placement, shared = Placement(0), prompt(4000)
    replicas = {name: Replica(load()) for name in "abcd"}
    replicas["a"].block_keys.update(shared.keys)
    chosen = []
    for index in range(200):
        tail = block_keys(range(10**6 + index * 400, 10**6 + (index + 1) * 400), BLOCK, "")
        asked = Prompt([*shared.keys, *tail], 4400, BLOCK)
        chosen.append(place(placement, str(index), asked, **replicas))
    assert set(chosen[:15]) == {"a"}
    assert all(chosen.count(name) > 30 for name in "abcd")


def test_ties_without_a_block_are_broken_at_random_and_by_the_seed():
    replicas = {name: Replica(load()) for name in "abcd"}

    def chosen(seed: int) -> str:
        return Placement(seed).rank(prompt(BLOCK - 1), replicas, 0.0)[0].replica_id

    found = [chosen(seed) for seed in range(40)]
    assert set(found) == set("abcd") and found == [chosen(seed) for seed in range(40)]


def test_a_new_prefix_goes_the_same_way_from_every_process_and_others_go_elsewhere():
    replicas = {name: Replica(load()) for name in "abcd"}
    chosen = []
    for first in range(0, 10_000_000, 50_000):
        ways = {Placement(seed).rank(prompt(100, first), replicas, 0.0)[0].replica_id for seed in range(3)}
        assert len(ways) == 1
        chosen += ways
    assert all(35 <= chosen.count(name) <= 65 for name in "abcd")


def test_an_evicted_prefix_is_not_chased():
    placement, asked = Placement(0), prompt(8000)
    warm, other = Replica(load(), set(asked.keys)), Replica(load(num_free_blocks=9_900))
    assert ranked(placement, asked, warm=warm, other=other)[0].replica_id == "warm"
    warm.block_keys.difference_update(asked.keys[300:])  # the tail goes first
    assert max(each.num_cached_tokens for each in ranked(placement, asked, warm=warm, other=other)) == 4800
    warm.block_keys.clear()
    warm.load = load(num_waiting_tokens=3000, num_waiting=1)
    assert ranked(placement, asked, warm=warm, other=other)[0].replica_id == "other"


def test_a_faster_replica_gets_more():
    placement = Placement(0)
    replicas = {
        "slow": Replica(load(prefill_tokens_per_s=5_000.0)),
        "fast": Replica(load(prefill_tokens_per_s=20_000.0)),
    }
    chosen = [place(placement, str(i), prompt(1000, 10_000 * i), **replicas) for i in range(50)]
    assert 33 <= chosen.count("fast") <= 43  # four fifths would be its share


def test_a_replica_without_a_rate_is_taken_for_a_typical_one():
    known = {str(rate): Replica(load(prefill_tokens_per_s=float(rate))) for rate in (1_000, 8_000, 9_000)}
    asked = prompt(8000)
    ttft_s = {each.replica_id: each.ttft_s for each in ranked(Placement(0), asked, new=Replica(None), **known)}
    assert ttft_s["new"] == pytest.approx(1.0, abs=0.05)
    [alone] = ranked(Placement(0), asked, new=Replica(None))
    assert alone.ttft_s == pytest.approx(8000 / FIRST_RATE, abs=0.05)


def test_a_replica_that_says_nothing_is_less_trusted_the_longer_it_does():
    asked = prompt(8000)
    warm = Replica(load(), set(asked.keys), updated_s=10.0)
    for now_s, expected in ((10.5, "warm"), (14.0, "other")):
        found = ranked(Placement(0), asked, now_s, warm=warm, other=Replica(load(), updated_s=now_s))
        assert found[0].replica_id == expected
    # Long steps are no silence.
    slow = Replica(load(step_s=5.0, num_running=1), set(asked.keys), updated_s=10.0)
    assert ranked(Placement(0), asked, 18.0, warm=slow, other=Replica(load(), updated_s=18.0))[0].replica_id == "warm"


def test_of_equal_replicas_that_with_more_free_kv_is_better_and_a_full_one_is_avoided():
    asked = prompt(4000)
    half, full = Replica(load(num_free_blocks=5_000)), Replica(load(num_free_blocks=100), set(asked.keys[:125]))
    found = ranked(Placement(0), asked, full=full, half=half, empty=Replica(load()))
    assert [each.replica_id for each in found] == ["empty", "half", "full"]


def test_the_ledger_forgets_what_has_a_token_has_ended_or_went_elsewhere():
    placement, asked = Placement(0), prompt(4000)
    replicas = {"a": Replica(load()), "b": Replica(load())}
    for name in "ab":  # both have something else to do
        other = prompt(100, 10**6)
        placement.place(f"other at {name}", other, placement.rank(other, replicas, 0.0), name, 0.0)
    candidates = placement.rank(asked, replicas, 0.0)
    for name in ("first", "ended", "moved"):
        placement.place(name, asked, candidates, "a", 0.0)
    placement.place("moved", asked, candidates, "b", 0.1)
    assert placement.num_in_flight == 5
    placement.first_token("first", 0, 1.0)
    placement.remove("ended")
    placement.remove("ended")
    found = {each.replica_id: each for each in placement.rank(asked, replicas, 1.0)}
    assert (found["a"].num_cached_tokens, found["b"].num_cached_tokens) == (0, 3984)
    placement.first_token("moved", 0, 1.0)
    placement.first_token("unknown", 0, 1.0)
    assert placement.num_in_flight == 2
    assert {each.num_cached_tokens for each in placement.rank(asked, replicas, 1.0)} == {0}


def test_counters_compare_what_was_predicted_with_what_came():
    placement, asked = Placement(0), prompt(8000)
    warm = Replica(load(), set(asked.keys))
    busy = Replica(load(num_waiting_tokens=10**6, num_waiting=9), set(asked.keys))
    fleets = {"cold": {"a": Replica(load())}, "cached": {"a": warm}, "load": {"a": busy, "b": Replica(load())}}
    for name, replicas in fleets.items():
        place(placement, name, asked, **replicas)
        placement.first_token(name, 100, 2.0)
    counters = placement.counters
    assert counters.by_reason == {Reason.COLD: 1, Reason.CACHED: 1, Reason.LOAD: 1}
    assert (counters.num_prompt_tokens, counters.num_cached_tokens) == (24_000, 300)
    assert counters.num_predicted_cached_tokens == 7984
    assert counters.ttft_s == 6.0 and 1.6 < counters.predicted_ttft_s < 1.8


def test_no_replicas_no_candidates_and_short_prompts_have_no_keys():
    assert ranked(Placement(0), prompt(5)) == []
    assert place(Placement(0), "a", prompt(5), one=Replica(load())) == "one"
