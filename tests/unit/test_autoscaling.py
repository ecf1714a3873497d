"""QueueAndKvPolicy, turn by turn, in the contexts that Ray Serve gives it, and the reports of replicas it reads."""

import logging
import math
import time
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from cluster.autoscaling import REPORTED, QueueAndKvPolicy, sum_reports
from cluster.simulation.replica import ReplicaStats
from serve_app.load_report import LoadReport

IDLE = dict.fromkeys(REPORTED, 0.0)
CONFIG = AutoscalingConfig(min_replicas=0, max_replicas=20, target_ongoing_requests=10)


def context(
    reports: list[dict[str, float]],
    now_s: float = 0.0,
    target: int | None = None,
    running: int | None = None,
    num_requests: float = 0.0,
) -> AutoscalingContext:
    """Of a turn in which replicas have reported."""
    metrics: dict[str, dict[Any, Any]] = {}
    for replica, report in enumerate(reports):
        for name, value in report.items():
            metrics.setdefault(name, {})[replica] = [SimpleNamespace(value=-1.0), SimpleNamespace(value=value)]
    running = len(reports) if running is None else running
    return AutoscalingContext(
        deployment_id=None,  # type: ignore[arg-type]
        deployment_name="EngineReplica",
        app_name=None,
        current_num_replicas=running,
        target_num_replicas=running if target is None else target,
        running_replicas=[],
        total_num_requests=num_requests,
        total_queued_requests=0.0,
        aggregated_metrics=None,
        raw_metrics=metrics,
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=20,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=now_s,
        config=CONFIG,
    )


def policy(**changes: float) -> QueueAndKvPolicy:
    """1000 prompt tokens a second; a queue is to be taken up within 10 seconds; no margin, but 60 seconds of hold."""
    values = {
        "prefill_tokens_per_s": 1000,
        "ttft_target_s": 2,
        "startup_s": 8,
        "target_utilization": 0.5,
        "target_load": 0.5,
    }
    return QueueAndKvPolicy(**(values | {"hold_s": 60, "margin": 0} | changes))


def busy(**changes: float) -> dict[str, float]:
    return IDLE | {"num_running": 1.0} | changes


def test_waiting_prompts_call_for_as_many_as_take_them_up_in_time():
    assert policy()(context([busy(num_waiting=3, num_waiting_tokens=30_000)])) == (3, {})
    assert policy()(context([busy(num_waiting=3, num_waiting_tokens=30_001)])) == (4, {})


def test_prompts_that_arrive_call_for_as_many_as_keep_up():
    assert policy()(context([busy(arrival_tokens_per_s=1500)]))[0] == 3


def test_kv_blocks_in_use_call_for_room():
    assert policy()(context([busy(kv_utilization=0.9), busy(kv_utilization=0.9)]))[0] == 4


def test_a_full_batch_counts_as_no_room_too_and_the_larger_need_decides():
    full = busy(sequence_utilization=1.0, kv_utilization=0.1)
    assert policy()(context([full]))[0] == 2
    assert policy()(context([full | {"arrival_tokens_per_s": 2000.0}]))[0] == 4
    assert policy()(context([full | {"arrival_tokens_per_s": 100.0}]))[0] == 2


def test_replicas_on_their_way_are_not_asked_for_again():
    """The number wanted is absolute, and compared with the target: running ones may be fewer for minutes."""
    made = policy()
    reports = [busy(num_waiting=3, num_waiting_tokens=30_000)]
    assert [made(context(reports, now_s=second, target=3))[0] for second in range(5)] == [3] * 5


def test_fewer_only_after_they_were_enough_for_a_while():
    made = policy()
    busy_reports = [busy(kv_utilization=0.5)] * 3
    assert made(context(busy_reports, 0.0))[0] == 3
    calm = [busy(kv_utilization=0.2)] * 3
    decided = [made(context(calm, float(second)))[0] for second in range(1, 63)]
    assert decided[:60] == [3] * 60 and decided[60:] == [2] * 2


def test_the_most_of_the_last_while_is_kept_and_a_short_calm_does_not_count_from_its_start():
    made = policy()
    for second in range(0, 200):
        reports = [busy(kv_utilization=0.5 if second % 50 == 0 else 0.1)] * 3
        assert made(context(reports, float(second)))[0] == 3


def test_a_margin_keeps_a_replica_that_is_only_just_not_needed():
    def after(margin: float, kv_utilization: float) -> int:
        made = policy(margin=margin, hold_s=0)
        return made(context([busy(kv_utilization=kv_utilization)] * 3))[0]

    assert after(0, 0.33) == 2 and after(0.1, 0.33) == 3 and after(0.1, 0.3) == 2


def turns(made: QueueAndKvPolicy, kv_utilization: float, start_s: int, end_s: int) -> list[int]:
    """What is decided every five seconds, by a service of ten replicas that all are as full."""
    reports = [busy(kv_utilization=kv_utilization)] * 10
    return [made(context(reports, float(second)))[0] for second in range(start_s, end_s, 5)]


def test_once_load_has_come_again_replicas_are_kept_for_the_next_burst():
    made = policy(hold_s=10, arrival_memory_s=1, burst_memory_s=300)
    assert turns(made, 0.3, 0, 60)[-1] == 6
    assert turns(made, 0.05, 60, 160)[-1] == 1  # a first burst is no reason
    assert turns(made, 0.25, 160, 220)[-1] == 6  # the most of late, at once
    assert turns(made, 0.05, 220, 320)[-1] == 6
    assert turns(made, 0.05, 320, 700)[-1] == 1


@pytest.mark.parametrize(
    "loads",
    [
        [0.3, 0.05, 0.05, 0.05, 0.05, 0.3, 0.05],  # comes again too late
        [0.3, 0.2, 0.3, 0.2, 0.3, 0.05],  # goes by less than half
        [0.04, 0.01, 0.04, 0.01],  # comes by less than a replica
        [0.05, 0.1, 0.2, 0.3, 0.2, 0.1, 0.05],  # rises and falls once
    ],
)
def test_other_loads_keep_nothing_for_bursts(loads: list[float]):
    made = policy(hold_s=10, arrival_memory_s=1, burst_memory_s=300)
    for index, load in enumerate(loads):
        decided = turns(made, load, 100 * index, 100 * index + 100)
    assert decided[-1] == max(1, math.ceil(loads[-1] * 10 / 0.5))


def test_without_a_memory_of_bursts_nothing_is_kept_for_them():
    made = policy(hold_s=10, arrival_memory_s=1, burst_memory_s=0)
    for index in range(6):
        decided = turns(made, 0.3 if index % 2 == 0 else 0.05, 100 * index, 100 * index + 100)
    assert decided[-1] == 1


def test_a_policy_that_has_just_started_takes_nothing_away():
    """After a restart of Ray Serve's controller it knows nothing about the minutes before."""
    made = policy()
    assert made(context([IDLE] * 5, 1000.0))[0] == 5
    assert made(context([IDLE] * 5, 1059.0))[0] == 5
    assert made(context([IDLE] * 5, 1060.0))[0] == 0


def test_to_zero_without_any_request_and_one_while_there_is_one():
    made = policy(hold_s=0, margin=0.1)
    assert made(context([busy()] * 2, 1.0))[0] == 1
    assert made(context([IDLE] * 2, 2.0, num_requests=0.5))[0] == 1
    assert made(context([IDLE], 3.0))[0] == 0


@pytest.mark.parametrize("target", [0, 1])
def test_from_zero_ray_serve_wakes_the_first_and_the_policy_lets_it_come(target: int):
    assert policy(hold_s=0)(context([], running=0, target=target))[0] == target


def test_without_reports_ray_serves_own_counts_decide():
    assert policy()(context([], running=1, num_requests=35))[0] == 4
    # One replica of two has reported 15 of the requests.
    assert policy()(context([busy(num_running=15)], running=2, num_requests=40))[0] == 3


def test_no_more_than_the_most_allowed_are_remembered_as_wanted():
    made = policy(hold_s=10)
    assert made(context([busy(num_waiting=1, num_waiting_tokens=1e12)]))[0] == 20


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_a_report_that_makes_no_sense_counts_as_none(bad: float):
    reports = [busy(kv_utilization=bad), busy(kv_utilization=0.9)]
    assert sum_reports(context(reports).raw_metrics).num_reports == 1  # type: ignore[arg-type]
    incomplete = {name: 1.0 for name in REPORTED if name != "queued_s"}
    assert sum_reports(context([incomplete]).raw_metrics).num_reports == 0  # type: ignore[arg-type]
    assert policy()(context(reports))[0] == 2


def test_it_never_raises_and_says_so_once(caplog: pytest.LogCaptureFixture):
    made = policy()
    broken = context([IDLE] * 3, target=7)
    broken.current_time = None  # type: ignore[assignment]
    with caplog.at_level(logging.ERROR, "ray.serve"):
        assert [made(broken)[0] for _ in range(3)] == [7, 7, 7]
    assert len({id(record) for record in caplog.records if "autoscaling keeps 7" in record.message}) == 1
    assert made(context([IDLE] * 3, target=7))[0] == 7


def test_the_drain_rate_follows_replicas_at_full_load():
    made = policy()
    full = busy(num_waiting=1, num_waiting_tokens=19_500, taken_tokens_per_s=2000, queued_s=40)
    decided = [made(context([full] * 2, second / 10, target=4))[0] for second in range(3000)]
    assert decided[0] == 4 and decided[-1] == 2  # 39,000 tokens in 10 seconds, at 1000 a second, then at 2000


def test_without_a_queue_the_drain_rate_only_rises():
    made = policy()
    made(context([busy(taken_tokens_per_s=3000)]))
    made(context([busy(taken_tokens_per_s=10)]))
    assert made(context([busy(arrival_tokens_per_s=0, num_waiting=1, num_waiting_tokens=30_000)]))[0] == 1


def test_now_and_then_one_that_waits_is_not_full_load():
    made = policy()
    for second in range(100):
        waits = busy(num_waiting=1, num_waiting_tokens=1, taken_tokens_per_s=1, queued_s=20.0)
        made(context([waits], float(second)))
    assert made(context([busy(num_waiting=1, num_waiting_tokens=10_000)], 100.0))[0] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ttft_target_s": 0}, "ttft_target_s is 0, expected a number above 0"),
        ({"prefill_tokens_per_s": -1}, "prefill_tokens_per_s is -1"),
        ({"target_utilization": 1.5}, "target_utilization is 1.5, expected a number above 0 and at most 1"),
        ({"hold_s": math.nan}, "hold_s is nan, expected a number at least 0"),
        ({"startup_s": math.inf}, "startup_s is inf"),
        ({"burst_memory_s": -1}, "burst_memory_s is -1, expected a number at least 0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        QueueAndKvPolicy(**arguments)


def test_a_call_with_many_replicas_takes_less_than_a_millisecond():
    made = policy()
    contexts = [context([busy(kv_utilization=0.5)] * 16, second / 10) for second in range(200)]
    seconds = []
    for each in contexts:
        start = time.thread_time()  # others who compete for the cores do not count
        made(each)
        seconds.append(time.thread_time() - start)
    assert sorted(seconds)[len(seconds) // 2] < 0.001


def test_ray_serve_can_make_it_from_a_configuration_file():
    found = AutoscalingPolicy(policy_function="cluster.autoscaling:QueueAndKvPolicy", policy_kwargs={"hold_s": 5})
    made = found.get_policy()(**found.policy_kwargs)
    assert made(context([IDLE]))[0] == 1


def stats(waiting: int = 0, waiting_tokens: int = 0, prompt_tokens: int = 0, running: int = 0) -> ReplicaStats:
    return ReplicaStats(running, waiting, waiting_tokens, 100, 25, prompt_tokens)


def test_a_report_has_all_that_the_policy_reads():
    report = LoadReport(8).measure(stats(waiting=2, waiting_tokens=30, running=2), 5.0)
    assert set(report) == set(REPORTED) and all(isinstance(value, int | float) for value in report.values())
    assert report["kv_utilization"] == 0.25 and report["sequence_utilization"] == 0.25
    assert report["num_waiting"] == 2 and report["num_waiting_tokens"] == 30 and report["num_running"] == 2


def test_a_report_measures_what_came_and_what_left_the_queue():
    load = LoadReport(8)
    load.measure(stats(1, 100, 1000), 0.0)
    report = load.measure(stats(1, 300, 2000), 2.0)
    assert report["arrival_tokens_per_s"] == 500
    assert report["taken_tokens_per_s"] == 0  # too early to tell
    report = load.measure(stats(1, 300, 6000), 12.0)
    assert report["taken_tokens_per_s"] == pytest.approx(400)
    for second in range(13, 300):
        report = load.measure(stats(1, 300, 6000 + 700 * (second - 12)), float(second))
    assert report["taken_tokens_per_s"] == pytest.approx(700, rel=0.02)


def test_a_report_tells_for_how_long_requests_have_been_waiting():
    load = LoadReport(8)
    told = [
        load.measure(stats(waiting), float(second))["queued_s"] for second, waiting in enumerate((1, 2, 1, 0, 1, 1))
    ]
    assert told == [0, 1, 2, 0, 0, 1]


def test_two_reports_in_the_same_moment_are_no_rate():
    load = LoadReport(8)
    load.measure(stats(), 1.0)
    assert load.measure(stats(prompt_tokens=10), 1.0)["arrival_tokens_per_s"] == 0
