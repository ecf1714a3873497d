"""cluster/simulate.py: the modelled replica is a queue that obeys its speed, and the fleet does what Ray Serve does."""

import math
from pathlib import Path

import pytest
from ray.serve.autoscaling_policy import default_autoscaling_policy
from ray.serve.config import AutoscalingConfig

from cluster import simulate
from cluster.simulation.fleet import Autoscaler, Fleet, Replay, Slo
from cluster.simulation.foresight import Foresight, least_hours, plan, refined
from cluster.simulation.replica import ModelledReplica, Outcome, ReplicaSpeed
from cluster.simulation.trace import (
    Arrival,
    hour_of_conversations,
    multiplied,
    read_azure_trace,
    step_up,
    synthetic_trace,
)

SPEED = ReplicaSpeed(
    step_s=0.01,
    step_s_per_sequence=0.001,
    prefill_tokens_per_s=1000,
    max_num_batched_tokens=100,
    max_num_seqs=2,
    num_blocks=100,
    block_size=10,
    startup_s=20,
)


def run(
    *arrivals: Arrival, speed: ReplicaSpeed = SPEED, until_s: float = 1000.0
) -> tuple[list[Outcome], ModelledReplica]:
    replica = ModelledReplica(speed, 0.0)
    outcomes = [Outcome(arrival) for arrival in arrivals]
    for outcome in outcomes:
        replica.submit(outcome)
    replica.advance(until_s)
    return outcomes, replica


def test_a_request_alone_takes_its_prompt_and_a_step_for_each_token():
    [outcome], replica = run(Arrival(1.0, 50, 11))
    assert outcome.ttft_s == pytest.approx(0.06)
    assert outcome.tpot_s == pytest.approx(0.011)
    assert (replica.num_requests, replica.stats().num_owned_blocks) == (0, 0)


def test_long_prompts_take_several_steps_and_decoding_goes_on_meanwhile():
    outcomes, _ = run(Arrival(0.0, 100, 100), Arrival(0.0, 300, 2))
    assert outcomes[0].ttft_s == pytest.approx(0.11)
    # 99, 99, 99 and 3 tokens beside the first one's decoding
    assert outcomes[1].ttft_s == pytest.approx(0.11 + 4 * 0.011 + 0.3)


def test_more_than_fit_into_the_batch_wait():
    outcomes, _ = run(*[Arrival(0.0, 10, 50)] * 3)
    assert outcomes[2].first_token_s > outcomes[0].finish_s
    _, replica = run(*[Arrival(0.0, 10, 50)] * 3, until_s=0.1)
    stats = replica.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_waiting_tokens) == (2, 1, 10)
    assert (stats.num_prompt_tokens, stats.num_blocks) == (30, 100) and stats.num_owned_blocks >= 3


def test_without_kv_space_they_wait_too_and_one_that_never_fits_runs_alone():
    outcomes, _ = run(Arrival(0.0, 90, 510), Arrival(0.0, 90, 510), Arrival(0.0, 2000, 5))
    assert outcomes[1].first_token_s > outcomes[0].finish_s
    assert math.isfinite(outcomes[2].finish_s)


def test_when_it_is_advanced_makes_no_difference():
    arrivals = [Arrival(each * 0.05, 10 + each * 7 % 90, 1 + each * 13 % 40) for each in range(40)]
    whole, _ = run(*arrivals)
    replica = ModelledReplica(SPEED, 0.0)
    pieces = [Outcome(arrival) for arrival in arrivals]
    for outcome in pieces:
        replica.submit(outcome)
    for tick in range(1, 4000):
        replica.advance(tick * 0.037)
    assert [each.finish_s for each in pieces] == pytest.approx([each.finish_s for each in whole])


def fleet(target: float, delay_s: float = 0.0, first: int = 1) -> Fleet:
    config = AutoscalingConfig(
        min_replicas=1,
        max_replicas=4,
        target_ongoing_requests=target,
        upscale_delay_s=delay_s,
        downscale_delay_s=30,
        look_back_period_s=2,
        metrics_interval_s=1,
    )
    return Fleet(SPEED, Autoscaler(default_autoscaling_policy, config), first)


BURST = [Arrival(10.0 + each / 100, 50, 100) for each in range(60)] + [Arrival(200.0, 10, 10)]


def test_a_fleet_grows_after_delay_and_start_and_shrinks_when_it_is_calm():
    replay = fleet(target=2, delay_s=5).replay(BURST)
    asked = next(index for index, target in enumerate(replay.targets) if target > 1)
    running = next(index for index, number in enumerate(replay.running) if number > 1)
    assert 14 <= asked <= 18 and running == asked + SPEED.startup_s
    assert max(replay.targets) == 4 and replay.targets[-1] == 1
    assert all(math.isfinite(outcome.finish_s) for outcome in replay.outcomes)
    held_s = sum(replay.targets)
    assert held_s <= replay.replica_hours * 3600 <= held_s + 60  # and a little for those that drain


def test_a_fixed_fleet_costs_its_replicas():
    replay = Fleet(SPEED, None, 3).replay([Arrival(0.0, 10, 10), Arrival(99.0, 10, 10)])
    assert replay.replica_hours == pytest.approx(300 / 3600, rel=0.02)
    assert replay.attainment(Slo()) == 1.0


def test_attainment_counts_both_first_token_and_the_rest():
    good, late, slow = (Outcome(Arrival(0.0, 1, 11), first, end) for first, end in ((1, 2), (3, 4), (1, 3)))
    assert [Slo().met_by(each) for each in (good, late, slow)] == [True, False, False]


def test_this_policy_is_cheaper_than_a_fixed_fleet_that_serves_as_well():
    trace = synthetic_trace(lambda time_s: 10.0 if 300 < time_s < 450 else 2.0, 900.0)
    ours = simulate.queue_and_kv().run([trace])
    fixed = simulate.cheapest([simulate.fixed_fleet(number).run([trace]) for number in (2, 3, 4)], ours.attainment)
    assert fixed is not None and ours.hours < fixed.hours
    assert ours.attainment > 0.7


def test_a_comparison_is_a_table_and_a_picture(tmp_path: Path):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    from cluster.simulation.plot import draw

    lines: list[str] = []
    sweep = {"target_ongoing_requests": (16.0,), "look_back_period_s": (3.0,)}
    traces = [synthetic_trace(lambda time_s: 1.0, 60.0, seed) for seed in range(2)]
    draw([simulate.compare("Quiet", traces, sweep, 1, lines.append)], tmp_path / "plot.svg")
    assert any(line.startswith("| QueueAndKvPolicy | defaults |") for line in lines)
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert "</svg>" in (tmp_path / "plot.svg").read_text()


def test_reaction_counts_from_the_step():
    result = simulate.Contender("burst", lambda _: fleet(target=2)).run([BURST])
    asked_s, late_s = simulate.reaction_s(result, 10.0)
    assert 0 <= asked_s <= 3 and 0 < late_s < 1


def test_cost_is_interpolated_between_what_nothing_else_beats():
    def result(hours: float, attainment: float) -> simulate.Result:
        return simulate.Result(simulate.fixed_fleet(1), attainment, hours, 0.0, [], [], 0.0)

    results = [result(8, 0.9), result(4, 0.5), result(6, 0.45), result(10, 0.9)]
    assert simulate.interpolated_hours(results, 0.7) == pytest.approx(6)
    assert simulate.interpolated_hours(results, 0.95) is simulate.interpolated_hours(results, 0.4) is None


def test_foresight_has_replicas_ready_when_load_comes_and_uses_no_less_than_it_takes():
    trace = [Arrival(100 + each / 20, 50, 2) for each in range(1200)]  # one second of prompts a second
    config = AutoscalingConfig(min_replicas=1, max_replicas=4, upscale_delay_s=0, downscale_delay_s=0)
    replay = Fleet(SPEED, Autoscaler(Foresight(plan(trace, SPEED, 0.5, 10)), config), 1).replay(trace)
    assert replay.running[60] == 1 and replay.running[106] == 3 and replay.targets[-1] < 3
    assert least_hours(trace, SPEED) == pytest.approx(1200 * (0.05 + 2 * 0.006) / 3600)
    assert least_hours(trace, SPEED) < replay.replica_hours


def test_a_plan_is_refined_by_what_pays():
    """Four replicas where one is enough: the rounds find some of what can go, and no request suffers."""
    trace = [Arrival(float(each), 50, 2) for each in range(300)]

    def replay(targets: list[int]) -> Replay:
        config = AutoscalingConfig(min_replicas=1, max_replicas=4, upscale_delay_s=0, downscale_delay_s=0)
        return Fleet(SPEED, Autoscaler(Foresight(targets), config), 4).replay(trace)

    better = refined([4] * 301, replay, Slo(), rounds=5)
    assert replay(better).attainment(Slo()) == 1.0 and sum(better) < 4 * 301 and min(better) >= 1


def test_synthetic_traces_have_the_statistics_they_claim():
    trace = synthetic_trace(hour_of_conversations, 1800.0)
    assert 5.0 < len(trace) / 1800 < 7.5
    prompts = sorted(arrival.prompt_tokens for arrival in trace)
    assert 700 < prompts[len(prompts) // 2] < 900 and 0.02 < sum(each > 4096 for each in prompts) / len(prompts) < 0.06
    assert trace == sorted(trace) == synthetic_trace(hour_of_conversations, 1800.0)


def test_copies_keep_the_load_in_place():
    trace = synthetic_trace(step_up, 1800.0)
    tripled = multiplied(trace, 3)
    assert len(tripled) == 3 * len(trace) and tripled == sorted(tripled) and multiplied(trace, 1) == trace
    before = sum(arrival.time_s < 600 for arrival in tripled)
    assert before == pytest.approx(3 * sum(arrival.time_s < 600 for arrival in trace), rel=0.05)


def test_an_azure_trace_is_read_and_a_wrong_one_named(tmp_path: Path):
    path = tmp_path / "trace.csv"
    rows = "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
    path.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{rows}")
    first, second = read_azure_trace(path)
    assert first == Arrival(0.0, 374, 44) and second.time_s == pytest.approx(4.314579)
    path.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{rows}yesterday,1,2\n")
    with pytest.raises(ValueError, match="line 4"):
        read_azure_trace(path)
    path.write_text("time,tokens\n1,2\n")
    with pytest.raises(ValueError, match="expected TIMESTAMP"):
        read_azure_trace(path)
