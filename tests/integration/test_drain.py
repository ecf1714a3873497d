"""Ends that answers do not notice: a new version in place of the old one, and SIGTERM to `make serve`."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml

from tests.integration.server import MAKE_SERVE, Server

ENGINE = {"kv_cache_memory": "64MiB", "max_num_seqs": 8, "num_threads": 1}
NUM_STREAMS = 4
NUM_TOKENS = 800
PATIENCE_S = 90.0


@pytest.fixture(scope="module")
def own() -> Iterator[Server]:
    folder = Path(tempfile.mkdtemp(prefix="q3d-"))
    with Server(folder, MAKE_SERVE, ENGINE) as running:
        yield running
    shutil.rmtree(folder)


def stream(url: str, started: "Future[None]") -> int:
    """The number of tokens of a stream that ends properly."""
    body = {"model": "demo", "prompt": "Hello", "max_tokens": NUM_TOKENS, "ignore_eos": True, "stream": True}
    body["stream_options"] = {"include_usage": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=PATIENCE_S) as response:
        lines = []
        for line in response.iter_lines():
            lines += [line] if line else []
            if not started.done():
                started.set_result(None)
    assert lines[-1] == "data: [DONE]"
    return int(re.findall(r'"completion_tokens":(\d+)', lines[-2])[0])


@contextmanager
def streams(url: str) -> Iterator[None]:
    """Around something that happens while streams run; they all end whole."""
    with ThreadPoolExecutor(NUM_STREAMS) as threads:
        started: list[Future[None]] = [Future() for _ in range(NUM_STREAMS)]
        counts = [threads.submit(stream, url, each) for each in started]
        for each in started:
            each.result(PATIENCE_S)
        yield
        assert [each.result(PATIENCE_S) for each in counts] == [NUM_TOKENS] * NUM_STREAMS


def test_a_new_version_in_place_of_the_old_one(own: Server):
    values = yaml.safe_load(own.config.read_text())
    values["applications"][0]["args"]["engine"]["max_num_seqs"] = 9
    new = own.config.with_name("new.yaml")
    new.write_text(yaml.safe_dump(values))
    dashboard = re.search(r"http://127\.0\.0\.1:\d+", own.log.read_text())
    assert dashboard is not None
    before = set(own.processes_named("ServeReplica:qwen3"))
    serve = str(Path(sys.executable).with_name("serve"))
    with streams(own.url):
        command = [serve, "deploy", "--address", dashboard.group(), str(new)]
        subprocess.run(command, env=own.driver()[1], check=True, capture_output=True, timeout=PATIENCE_S)
    deadline = time.monotonic() + PATIENCE_S
    while before & set(own.processes_named("ServeReplica:qwen3")):
        assert time.monotonic() < deadline, "the old ones are still there"
        time.sleep(0.2)
    while httpx.get(f"{own.url}/health", timeout=60).status_code != 200:
        assert time.monotonic() < deadline, "the new version is not ready"
        time.sleep(0.2)


def test_sigterm_lets_answers_end(own: Server):
    with streams(own.url):
        os.kill(own.pid, signal.SIGTERM)
    deadline = time.monotonic() + PATIENCE_S
    while own.processes():
        assert time.monotonic() < deadline, "processes are left"
        time.sleep(0.2)
