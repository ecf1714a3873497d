"""Metrics: what a request counts as, how the values of processes are put together, and who measures what."""

import asyncio
import shutil
import subprocess
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from cluster.autoscaling import QueueAndKvPolicy
from cluster.autoscaling_metrics import AutoscalerMetrics
from engine.block_residency import BlockResidency
from engine.request import EngineRequest, RequestTimings, SamplingParams
from engine.stats import EngineStats
from serve_app.admission_queue import AdmissionQueue
from serve_app.auth import ApiKeys
from serve_app.config import AdmissionConfig, ApiKey, ServiceConfig, Slo
from serve_app.fleet import Loss
from serve_app.metrics import requests
from serve_app.metrics.definitions import DEFINITIONS, Kind, Process
from serve_app.metrics.engine import replica_registry
from serve_app.metrics.exposition import render
from serve_app.metrics.ingress import IngressMetrics
from serve_app.metrics.process import Snapshot, samples_of
from serve_app.metrics.requests import Metered, RequestMeter, note_error
from serve_app.metrics.service import AdmissionCollector, KeyCollector, RoutingCollector
from serve_app.openai.errors import ApiError, bad_request, internal_error, key_limited, overloaded, unavailable
from serve_app.openai.generation import Delta, Usage
from serve_app.placement import PlacementCounters
from serve_app.wire import ModelInfo

REQUEST = EngineRequest(request_id="r", prompt_token_ids=[1, 2], params=SamplingParams(max_tokens=7))
ROUTE = "/v1/completions"


class Clock:
    """`time`, as far as the meter uses it."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(requests, "time", made)
    return made


def values(registry: CollectorRegistry) -> dict[str, float]:
    """All of a registry, as `name{label values}`; zeros left out."""
    found = {}
    for sample in samples_of(registry):
        labels = ",".join(value for name, value in sample.labels.items())
        if sample.value:
            found[sample.metric + sample.suffix + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


class Request:
    """A request with a meter, whose deltas come at the times they are told to."""

    def __init__(self, clock: Clock, slo: Slo | None = None) -> None:
        self.metrics = IngressMetrics(ServiceConfig(slo=slo or Slo()))
        self.meter = RequestMeter(self.metrics, ROUTE)
        self.usage = Usage(prompt_tokens=2)
        self._clock = clock

    async def run(self, *steps: tuple[float, Delta] | ApiError, leaves_after: int | None = None) -> None:
        async def deltas() -> AsyncGenerator[Delta, None]:
            for step in steps:
                if isinstance(step, ApiError):
                    raise step
                self._clock.now += step[0]
                self.usage.completion_tokens += len(step[1].token_ids)
                yield step[1]

        watched = self.meter.watch(deltas(), [REQUEST], self.usage)
        count = 0
        try:
            async for _ in watched:
                count += 1
                if count == leaves_after:
                    break
        except ApiError:
            pass
        await watched.aclose()

    def count(self, key: str = "") -> dict[str, float]:
        self.meter.end(key)
        return values(self.metrics.registry)


def delta(num_tokens: int, finish: str | None = None, timings: RequestTimings | None = None, index: int = 0) -> Delta:
    return Delta(index, token_ids=[5] * num_tokens, finish_reason=finish, timings=timings)


async def test_a_request_that_is_answered(clock: Clock):
    request = Request(clock, Slo(ttft_s=1.0, tpot_s=0.5))
    await request.run((0.8, delta(1, timings=RequestTimings(0.25, 0.5))), (0.25, delta(1)), (0.5, delta(3, "stop")))
    found = request.count("alice")
    assert found["requests_total{/v1/completions,ok}"] == found["key_requests_total{alice,ok}"] == 1
    assert found["time_to_first_token_seconds_sum"] == pytest.approx(0.8)
    assert found["request_queue_time_seconds_sum"] == 0.25 and found["request_prefill_time_seconds_sum"] == 0.5
    assert found["request_framework_time_seconds_sum"] == pytest.approx(0.05)
    assert found["inter_token_latency_seconds_count"] == 2
    assert found["request_decode_time_seconds_sum"] == pytest.approx(0.75)
    assert found["request_time_per_output_token_seconds_sum"] == pytest.approx(0.75 / 4)
    assert found["e2e_request_latency_seconds_sum"] == pytest.approx(1.55)
    assert found["request_success_total{stop}"] == found["request_generation_tokens_count"] == 1
    assert found["request_params_max_tokens_sum"] == 7 and found["request_prompt_tokens_sum"] == 2
    assert found["key_tokens_total{alice,generated}"] == 5 and found["key_tokens_total{alice,prompt}"] == 2
    assert found["slo_requests_total"] == found["slo_good_requests_total{all}"] == 1
    assert found["slo_good_tokens_total"] == 5


@pytest.mark.parametrize(("slo", "met"), [(Slo(ttft_s=0.5), ["tpot"]), (Slo(tpot_s=0.1), ["ttft"])])
async def test_a_target_that_is_missed(clock: Clock, slo: Slo, met: list[str]):
    request = Request(clock, slo)
    await request.run((0.8, delta(1)), (0.15, delta(1, "length")))
    found = request.count()
    assert found["slo_requests_total"] == 1
    assert [name for name in ("ttft", "tpot", "all") if f"slo_good_requests_total{{{name}}}" in found] == met
    assert "slo_good_tokens_total" not in found


@pytest.mark.parametrize(
    ("error", "outcome", "counts"),
    [
        (bad_request("?"), "client_error", False),
        (overloaded(), "shed", True),
        (unavailable(), "shed", True),
        (key_limited("?"), "shed", False),
        (internal_error(), "error", True),
        (ApiError(499, "?"), "cancelled", False),
    ],
)
async def test_requests_without_an_answer(clock: Clock, error: ApiError, outcome: str, counts: bool):
    request = Request(clock)
    await request.run(error)
    found = request.count()
    assert found[f"requests_total{{{ROUTE},{outcome}}}"] == 1
    assert found.get("slo_requests_total", 0) == counts and "slo_good_requests_total{all}" not in found
    assert sum(value for name, value in found.items() if name.startswith("requests_shed")) == (outcome == "shed")
    assert "e2e_request_latency_seconds_count" not in found


async def test_a_stream_that_breaks_has_failed_and_was_not_turned_away(clock: Clock):
    request = Request(clock)
    await request.run((0.1, delta(1)), unavailable())
    found = request.count()
    assert found["requests_failed_total{service_unavailable}"] == 1
    assert found["time_to_first_token_seconds_count"] == 1 and "request_decode_time_seconds_count" not in found


async def test_a_client_that_leaves(clock: Clock):
    request = Request(clock)
    await request.run((0.1, delta(1)), (0.1, delta(1, "stop")), leaves_after=1)
    found = request.count()
    assert found["requests_cancelled_total{streaming}"] == 1 and "slo_requests_total" not in found


async def test_one_that_leaves_while_it_waits(clock: Clock):
    request = Request(clock)

    async def nothing() -> AsyncGenerator[Delta, None]:
        await asyncio.Event().wait()
        yield delta(1)

    task = asyncio.ensure_future(anext(request.meter.watch(nothing(), [REQUEST], request.usage)))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert request.count()["requests_cancelled_total{waiting}"] == 1


async def test_choices_are_outputs_of_their_own(clock: Clock):
    request = Request(clock)
    first, second = delta(1, "stop"), delta(1, "length", index=1)
    await request.run((0.1, first), (0.1, second))
    found = request.count()
    assert found["time_to_first_token_seconds_count"] == 2 and found["requests_total{/v1/completions,ok}"] == 1
    assert found["request_success_total{stop}"] == found["request_success_total{length}"] == 1
    assert "inter_token_latency_seconds_count" not in found


async def test_a_request_counts_for_its_own_model_alone(clock: Clock):
    request, own = Request(clock), IngressMetrics(ServiceConfig())
    assert values(request.metrics.registry)["requests_open"] == 1
    request.meter.belongs_to(own)
    assert values(own.registry)["requests_open"] == 1
    request.meter.fail(unavailable())
    assert not any(name.startswith(("requests_", "slo_requests")) for name in request.count())
    found = values(own.registry)
    assert found["slo_requests_total"] == found[f"requests_total{{{ROUTE},shed}}"] == 1
    assert "requests_open" not in found


async def test_the_middleware_counts_posts_to_its_routes_once():
    metrics = IngressMetrics(ServiceConfig())

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert metrics.open._value.get() == (scope["method"] == "POST" and scope["path"] == ROUTE)
        note_error(scope, overloaded())
        note_error(scope, internal_error())
        if scope["path"] == ROUTE and scope["method"] == "POST":
            raise ValueError("a fault")

    metered = Metered(app, metrics, [ROUTE])
    for method, path in (("GET", ROUTE), ("POST", "/tokenize")):
        await metered({"type": "http", "method": method, "path": path}, None, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fault"):
        await metered({"type": "http", "method": "POST", "path": ROUTE}, None, None)  # type: ignore[arg-type]
    found = {name: value for name, value in values(metrics.registry).items() if name.startswith("requests_")}
    assert found == {f"requests_total{{{ROUTE},shed}}": 1, "requests_shed_total{rate_limit_exceeded}": 1}


def engine_stats(**changes: Any) -> EngineStats:
    zeros = dict.fromkeys(EngineStats.__struct_fields__, 0)
    return EngineStats(**(zeros | {"num_finished": {}, "waiting_for": None, "num_blocks": 10} | changes))


def snapshots() -> list[tuple[float, Snapshot]]:
    ingresses = []
    for name in ("a", "b"):
        metrics = full_ingress()
        metrics.requests.labels(ROUTE, "ok").inc(3)
        metrics.ttft.observe(0.05)
        ingresses.append(Snapshot("ingress", name, "demo", samples_of(metrics.registry)))
    replica = replica_registry(ServiceConfig().engine, lambda: engine_stats(num_owned_blocks=4), BlockResidency())
    return [(0.0, ingresses[0]), (7.5, ingresses[1]), (0.0, Snapshot("replica", "r", "demo", samples_of(replica)))]


def full_ingress() -> IngressMetrics:
    """With everything that an ingress registers."""
    metrics = IngressMetrics(ServiceConfig())
    key = ApiKey(name="alice", sha256="0" * 64, max_concurrent_requests=1)
    keys = ApiKeys([key])
    metrics.expect([ROUTE], keys)
    metrics.registry.register(KeyCollector(keys))
    metrics.describe(ModelInfo(4096, 10, (1,), "fp", {}))
    metrics.registry.register(AdmissionCollector(AdmissionQueue(AdmissionConfig(), 2.0)))
    metrics.registry.register(RoutingCollector(PlacementCounters(), dict.fromkeys(Loss, 0)))
    return metrics


def test_all_processes_are_in_one_text_each_series_once():
    body = render(snapshots()).decode()
    series = [line.rpartition(" ")[0] for line in body.splitlines() if not line.startswith("#")]
    assert len(set(series)) == len(series)
    families = {family.name: family for family in text_string_to_metric_families(body)}
    ok = [sample for sample in families["qwen3_requests"].samples if sample.value]
    assert {sample.labels["ingress"]: sample.value for sample in ok} == {"a": 3, "b": 3}
    assert {sample.labels["model_name"] for family in families.values() for sample in family.samples} == {"demo"}
    [usage] = families["qwen3_kv_cache_usage_perc"].samples
    assert usage.labels["replica"] == "r" and usage.value == 0.4
    ages = {sample.labels["id"]: sample.value for sample in families["qwen3_process_metrics_age_seconds"].samples}
    assert ages == {"a": 0, "b": 7.5, "r": 0}


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not on PATH")
def test_prometheus_finds_no_fault_with_the_text():
    command = ["promtool", "check", "metrics"]
    done = subprocess.run(command, input=render(snapshots()), capture_output=True, timeout=120, check=False)
    faults = [line for line in done.stdout.decode().splitlines() + done.stderr.decode().splitlines() if line]
    vllms = ("qwen3_kv_cache_usage_perc", "qwen3_num_preemptions")  # names are vLLM's
    assert [line for line in faults if not line.startswith(vllms)] == []


def test_every_metric_that_is_defined_is_measured():
    """By the process that its definition says."""
    measured = {
        Process.INGRESS: {sample.metric for sample in samples_of(full_ingress().registry)},
        Process.REPLICA: {
            sample.metric
            for sample in samples_of(
                replica_registry(
                    ServiceConfig().engine, lambda: engine_stats(num_finished={"stop": 1}), BlockResidency()
                )
            )
        },
        Process.CONTROLLER: {sample.metric for sample in samples_of(AutoscalerMetrics(("room",)).registry)},
    }
    measured[Process.INGRESS].add("process_metrics_age_seconds")  # by whoever answers
    for process, names in measured.items():
        defined = {name for name, definition in DEFINITIONS.items() if definition.process is process}
        # Labels without a value yet have no samples.
        assert names == defined, process


def test_the_autoscaler_tells_its_decisions_and_the_reason():
    metrics = AutoscalerMetrics(("prompts", "room"))
    metrics.decided({"prompts": 2.4, "room": 1.0}, before=1, target=3, running=1)
    metrics.decided({"prompts": 2.4, "room": 1.0}, before=3, target=3, running=2)
    metrics.decided({"prompts": 0.2, "room": 1.0}, before=3, target=1, running=3)
    assert values(metrics.registry) == {
        "autoscaler_wanted_replicas{prompts}": 0.2,
        "autoscaler_wanted_replicas{room}": 1.0,
        "autoscaler_target_replicas": 1,
        "autoscaler_running_replicas": 3,
        "autoscaler_decisions_total{up,prompts}": 1,
        "autoscaler_decisions_total{down,spare}": 1,
    }


def test_a_fault_of_the_policy_is_told():
    policy = QueueAndKvPolicy()
    broken: Any = SimpleNamespace(
        app_name="a", deployment_name="d", current_time=None, config=None, target_num_replicas=2
    )
    assert policy(broken) == (2, {})
    assert values(policy.metrics.registry)["autoscaler_decisions_total{none,fault}"] == 1


def test_definitions_keep_prometheus_rules():
    for name, definition in DEFINITIONS.items():
        assert ":" not in definition.full_name
        assert (definition.kind is Kind.COUNTER) == name.endswith("_total")
        assert bool(definition.buckets) == (definition.kind is Kind.HISTOGRAM)
        assert list(definition.buckets) == sorted(definition.buckets)
        assert definition.help.endswith(".") or definition.help.startswith("1;")
