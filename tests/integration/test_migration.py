"""Replicas are lost under load, in every way there is: each stream goes on to its end, and says what it would have.

Three replicas behind two ingresses. How long the streams stood still is printed.
"""

import asyncio
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.integration.faults import DEADLY_PROMPT
from tests.integration.server import Server, known_by
from tests.integration.streams import PATIENCE_S, check, report, run_streams, until

SERVE = (
    "env",
    "RAY_SERVE_ENABLE_HA_PROXY=1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED=1",
    sys.executable,
    "-m",
    "serve_app.run",
    "{}",
)
ENGINE = {"kv_cache_memory": "64MiB", "max_num_seqs": 64, "num_threads": 1, "dtype": "float32"}
SERVICE = {"slo": {"ttft_s": 60}}
NUM_REPLICAS = 3
NUM_STREAMS = 64
REPLICA = "ServeReplica:qwen3:EngineReplica"


class FleetServer(Server):
    """Three replicas that can be made to fail, and two ingresses, for good."""

    def _configuration(self, *changes: dict[str, Any]) -> str:
        values = yaml.safe_load(super()._configuration(*changes))
        application = values["applications"][0]
        application["import_path"] = "tests.integration.faults:build_app"
        for deployment in application["deployments"]:
            deployment.pop("autoscaling_config", None)
            deployment["num_replicas"] = 2 if deployment["name"] == "Ingress" else NUM_REPLICAS
            deployment["ray_actor_options"] = {"num_cpus": 0.1}
        return yaml.safe_dump(values)


@pytest.fixture(scope="module")
def fleet() -> Iterator[Server]:
    folder = Path(tempfile.mkdtemp(prefix="q3m-"))
    with FleetServer(folder, SERVE, ENGINE, service=SERVICE) as running:
        yield running
    shutil.rmtree(folder)


@pytest.fixture
async def replicas(fleet: Server) -> list[int]:
    """Process ids of the replicas, when all of them answer and every ingress knows them."""
    await until(lambda: known_by(fleet, NUM_REPLICAS), "three replicas that both ingresses know")
    return fleet.processes_named(REPLICA)


@pytest.fixture(scope="module")
def undisturbed(fleet: Server) -> list[str]:
    """What the streams say when nothing happens."""
    return [stream.text for stream in asyncio.run(run_streams(fleet, NUM_STREAMS))]


async def test_a_replica_that_hangs(
    fleet: Server, undisturbed: list[str], replicas: list[int], capsys: pytest.CaptureFixture[str]
):
    victim = replicas[0]
    try:
        streams = await run_streams(fleet, NUM_STREAMS, lambda: os.kill(victim, signal.SIGSTOP))
    finally:
        os.kill(victim, signal.SIGCONT)
    check(streams, undisturbed)
    report(capsys, "SIGSTOP of a replica", streams)


async def test_a_replica_that_is_killed_and_whose_successor_does_not_start(
    fleet: Server, undisturbed: list[str], replicas: list[int], capsys: pytest.CaptureFixture[str]
):
    no_start = fleet.config.parent / "no-start"
    no_start.touch()
    streams = await run_streams(fleet, NUM_STREAMS, lambda: os.kill(replicas[0], signal.SIGKILL))
    check(streams, undisturbed)
    report(capsys, "SIGKILL of a replica", streams)
    await until(lambda: "no device is free" in fleet.log.read_text(), "failed start")
    check(await run_streams(fleet, NUM_STREAMS), undisturbed)
    no_start.unlink()


async def test_a_prompt_that_ends_engines_takes_two_and_no_other_request_with_it(
    fleet: Server, undisturbed: list[str], replicas: list[int], capsys: pytest.CaptureFixture[str]
):
    answers: list[httpx.Response] = []

    def send() -> None:
        body = {"model": "demo", "prompt": DEADLY_PROMPT, "max_tokens": 4}
        answers.append(httpx.post(f"{fleet.url}/v1/completions", json=body, timeout=PATIENCE_S))

    sender = threading.Thread(target=send)
    streams = await run_streams(fleet, NUM_STREAMS, sender.start)
    check(streams, undisturbed)
    sender.join()
    assert answers[0].status_code == 503 and answers[0].json()["error"]["code"] == "service_unavailable"
    report(capsys, "two engine faults", streams)
    assert fleet.log.read_text().count("an illegal memory access was encountered") == 0, "no internals on the terminal"
