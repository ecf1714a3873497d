"""Load tests against the running service: they end, say what they found, and exit by it."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from loadtest.load.samples import Outcome, read_samples
from tests.integration.server import ROOT, Server

pytestmark = pytest.mark.skipif(not find_spec("locust"), reason="the load extra is not installed")

CHAT = ("-m", "loadtest.load", "--run-time", "4s", "--users", "2", "--think-s", "0.1", "--max-tokens", "8")
REPLAY = ("-m", "locust", "--locustfile", "loadtest/load/replay.py", "--headless", "--only-summary")


def run(server: Server, out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Run a load test. Returns its exit status and its line of JSON."""
    command = [sys.executable, *arguments, "--host", server.url, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False)
    assert done.stdout, done.stderr[-2000:]
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


def test_chats_of_several_turns_hit_the_prefix_cache(server: Server, tmp_path: Path):
    status, found = run(server, tmp_path, *CHAT, "--cancel", "0.3")
    assert status == 0 and found["missed"] == "" and set(found["requests"]) <= {"completed", "cancelled"}
    assert found["prompt_tokens_cached"] > 0 and found["phases"][-1]["slo_attainment"] == 1.0
    samples = list(read_samples(tmp_path / "samples.jsonl"))
    assert len(samples) == sum(found["requests"].values()) > 2
    for sample in samples:
        assert 0 < (sample.ttft_s or 0) <= sample.duration_s
        assert sample.outcome is Outcome.CANCELLED or 1 <= sample.completion_tokens <= 8
    assert "<svg" in (tmp_path / "report.html").read_text()


def test_a_missed_slo_is_a_failure(server: Server, tmp_path: Path):
    status, found = run(server, tmp_path, *CHAT, "--slo-ttft-ms", "0.001")
    assert status == 1 and "0.0%" in found["missed"]


def test_a_replay_sends_what_the_trace_says_when_it_says(server: Server, tmp_path: Path):
    trace = tmp_path / "trace.csv"
    rows = [f"2023-11-16 18:00:0{i}.0000000,{20 + i},{3 + i}" for i in range(4)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    status, found = run(server, tmp_path, *REPLAY, "--trace", str(trace), "--speed", "2")
    assert status == 0 and found["requests"] == {"completed": 4}
    samples = list(read_samples(tmp_path / "samples.jsonl"))
    assert [(each.prompt_tokens, each.completion_tokens) for each in samples] == [(20, 3), (21, 4), (22, 5), (23, 6)]
    scheduled = [each.scheduled_s or 0 for each in samples]
    assert [later - scheduled[0] for later in scheduled] == pytest.approx([0, 0.5, 1, 1.5])
    assert 0 <= found["dispatch_lag_ms"]["p50"] <= found["dispatch_lag_ms"]["max"]
