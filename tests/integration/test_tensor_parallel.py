"""A replica of two ranks: a placement group with an actor in each bundle, replaced as a whole when one of them dies."""

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from engine import LLM, SamplingParams
from tests.integration.server import MAKE_SERVE, Server

PATIENCE_S = 90.0
PROMPT = "What is 17 + 25?"
ENGINE = {"tensor_parallel_size": 2, "kv_cache_memory": "32MiB", "max_num_seqs": 4, "num_threads": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def divided() -> Iterator[Server]:
    folder = Path(tempfile.mkdtemp(prefix="q3p-"))
    with Server(folder, MAKE_SERVE, ENGINE) as running:
        yield running
    shutil.rmtree(folder)


def answer(server: Server) -> httpx.Response:
    body = {"model": "demo", "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)


def test_it_answers_as_one_rank_does_and_replaces_a_replica_whose_rank_died(divided: Server):
    llm = LLM("demo", kv_cache_memory=2**25, num_threads=1, device="cpu", show_progress=False)
    expected = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))[0].text
    assert answer(divided).json()["choices"][0]["text"] == expected

    [rank] = divided.processes_named("EngineRank")
    [replica] = divided.processes_named("ServeReplica:qwen3:EngineReplica")
    os.kill(rank, signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE_S
    while {rank, replica} & set(divided.processes()) or (found := answer(divided)).status_code != 200:
        assert time.monotonic() < deadline, "the replica was not replaced"
        time.sleep(0.2)
    assert found.json()["choices"][0]["text"] == expected
    assert len(divided.processes_named("EngineRank")) == 1
