"""Replicas come under load, go when it is over, and come back from none; nobody who calls meanwhile is turned away."""

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.integration.server import MAKE_SERVE, Server

ENGINE = {"kv_cache_memory": "32MiB", "max_num_seqs": 2, "num_threads": 1}
"""Two requests fill a replica."""
SCALING = {"min_replicas": 0, "initial_replicas": 1, "max_replicas": 3, "downscale_to_zero_delay_s": 8}
POLICY = {"ttft_target_s": 1, "startup_s": 5, "hold_s": 4, "burst_memory_s": 0}
NUM_CLIENTS = 12
NUM_TOKENS = 48
BODY = {"model": "demo", "prompt": "Hello", "max_tokens": NUM_TOKENS, "ignore_eos": True, "temperature": 0}
PATIENCE_S = 150.0
REPLICA = "ServeReplica:qwen3:EngineReplica"


class ScalingServer(Server):
    """The service with cluster/config.yaml's policy, but other bounds and quicker."""

    def _configuration(self, *changes: dict[str, Any]) -> str:
        values = yaml.safe_load(super()._configuration(*changes))
        deployments = {each["name"]: each for each in values["applications"][0]["deployments"]}
        scaling = deployments["EngineReplica"]["autoscaling_config"]
        scaling |= SCALING
        scaling["policy"]["policy_kwargs"] |= POLICY
        return yaml.safe_dump(values)


@pytest.fixture(scope="module")
def scaling() -> Iterator[Server]:
    folder = Path(tempfile.mkdtemp(prefix="q3a-"))
    with ScalingServer(folder, MAKE_SERVE, ENGINE) as running:
        yield running
    shutil.rmtree(folder)


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {PATIENCE_S:.0f} s"
        time.sleep(0.1)


def num_replicas(server: Server) -> int:
    return len(server.processes_named(REPLICA))


def complete(client: httpx.Client) -> httpx.Response:
    return client.post("/v1/completions", json=BODY, timeout=PATIENCE_S)


def call_until(stop: threading.Event, url: str) -> list[httpx.Response]:
    """A client that sends a request after the other."""
    with httpx.Client(base_url=url) as client:
        answers = []
        while not stop.is_set():
            answers.append(complete(client))
        return answers


def test_one_to_three_to_one_and_no_request_fails(scaling: Server):
    assert num_replicas(scaling) == 1
    stop = threading.Event()
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        try:
            clients = [pool.submit(call_until, stop, scaling.url) for _ in range(NUM_CLIENTS)]
            wait_for(lambda: num_replicas(scaling) == 3, "third replica")
            time.sleep(5)  # so that all three take part
        finally:
            stop.set()
        answers = [answer for client in clients for answer in client.result()]
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.json()["usage"]["completion_tokens"] for answer in answers} == {NUM_TOKENS}
    wait_for(lambda: num_replicas(scaling) == 1, "return to one replica")
    with httpx.Client(base_url=scaling.url) as client:
        assert complete(client).status_code == 200


def test_to_zero_and_back(scaling: Server):
    """A request wakes a replica. It may have to come again, after the time that it is told."""
    wait_for(lambda: num_replicas(scaling) == 0, "end of the last replica")
    wait_for(lambda: httpx.get(f"{scaling.url}/health", timeout=60).status_code == 200, "health without replicas")
    assert num_replicas(scaling) == 0  # nor has the probe woken one
    deadline = time.monotonic() + PATIENCE_S
    with httpx.Client(base_url=scaling.url) as client:
        while (answer := complete(client)).status_code != 200:
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "service_unavailable"
            assert time.monotonic() < deadline
            time.sleep(int(answer.headers["retry-after"]))
    assert answer.json()["usage"]["completion_tokens"] == NUM_TOKENS
    assert num_replicas(scaling) == 1
