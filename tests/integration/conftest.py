"""One service for all tests, started as a user starts it. They see HTTP, and the engine's counters."""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import OpenAI

from engine.weights.hub import resolve_model
from engine.weights.safetensors_checkpoint import SafetensorsCheckpoint
from tests.adapters import write_adapter
from tests.integration.server import MAKE_SERVE, ROOT, Server

CLUSTER = ROOT / "cluster"

ENGINE: dict[str, Any] = {"kv_cache_memory": "128MiB", "max_num_seqs": 8, "max_num_waiting": 48, "num_threads": 1}
"""Few requests run at once, so that queues and refusals are within a test's reach."""
SLO = {"tpot_s": 1e-6}
"""Nobody can keep that, so that the alert on it fires on every machine. Admission goes by the other target."""
LIMITS = {"body_bytes": 300_000, "grammar_compile_s": 0.5}
PATIENCE_S = 30.0


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    folder = Path(tempfile.mkdtemp(prefix="q3s-"))
    make_demo_adapter(folder / "adapters" / "loud", seed=1)
    adapters = {"max_loras": 2, "lora_folder": str(folder / "adapters")}
    with Server(folder, MAKE_SERVE, ENGINE | adapters, LIMITS, {"slo": SLO}) as running:
        yield running
    shutil.rmtree(folder)


class TwoModels(Server):
    """The service of cluster/multi-model.yaml."""

    source = CLUSTER / "multi-model.yaml"


@pytest.fixture(scope="session")
def two_models() -> Iterator[Server]:
    folder = Path(tempfile.mkdtemp(prefix="q3m-"))
    make_wordy_demo(folder / "model")
    engine = {"model": str(folder / "model"), "kv_cache_memory": "64MiB", "max_num_seqs": 4, "num_threads": 1}
    with TwoModels(folder, MAKE_SERVE, engine, service={"served_model_name": "demo"}) as running:
        yield running
    shutil.rmtree(folder)


def make_wordy_demo(path: Path) -> None:
    """The demo model with as much to tell about its tokenizer as large models have: more than gRPC's 4 MiB."""
    shutil.copytree(resolve_model("demo"), path, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_comment": "x" * 6_000_000}))


def make_demo_adapter(path: Path, seed: int) -> None:
    """A LoRA adapter of the demo model with random weights."""
    torch.manual_seed(seed)
    shapes = SafetensorsCheckpoint(resolve_model("demo")).tensors
    tensors = {}
    for name, info in shapes.items():
        if name.endswith("q_proj.weight"):
            layer = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{layer}.lora_A.weight"] = torch.randn(4, info.shape[1]) * 0.1
            tensors[f"{layer}.lora_B.weight"] = torch.randn(info.shape[0], 4) * 0.1
    write_adapter(path, {"peft_type": "LORA", "r": 4, "lora_alpha": 8}, tensors)


@pytest.fixture(scope="session")
def adapter_folder(server: Server) -> Path:
    """Where the service finds adapters."""
    return server.log.parent / "adapters"


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture(scope="session")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as made:
        yield made


class Engine:
    """The engine's own view, through a driver that is connected to the service's cluster."""

    def __init__(self, probe: "subprocess.Popen[str]") -> None:
        self._probe = probe

    def stats(self) -> dict[str, Any]:
        """Its EngineStats, now."""
        return self._ask("stats")

    def refusal(self, num_tokens: int) -> str:
        """Why it does not run a request with so long a prompt."""
        return self._ask(f"request {num_tokens}")

    def _ask(self, line: str) -> Any:
        if self._probe.stdin is None or self._probe.stdout is None:
            raise RuntimeError("the probe has no pipes")
        self._probe.stdin.write(f"{line}\n")
        self._probe.stdin.flush()
        return json.loads(self._probe.stdout.readline())

    def wait_for(self, condition: Callable[[dict[str, Any]], bool]) -> float:
        """Poll until the counters satisfy a condition. Returns the seconds that took."""
        start = time.monotonic()
        while not condition(stats := self.stats()):
            if time.monotonic() - start > PATIENCE_S:
                raise TimeoutError(f"still {stats}")
            time.sleep(0.005)
        return time.monotonic() - start

    def wait_until_free(self) -> float:
        """Until no request holds blocks or waits."""
        return self.wait_for(
            lambda stats: not (stats["num_owned_blocks"] or stats["num_running"] or stats["num_waiting"])
        )


@pytest.fixture(scope="session")
def engine(server: Server) -> Iterator[Engine]:
    address, environment = server.driver()
    with subprocess.Popen(
        [sys.executable, "-m", "tests.integration.probe", address],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as probe:
        yield Engine(probe)
        if probe.stdin is not None:
            probe.stdin.close()


@pytest.fixture
def free_engine(engine: Engine) -> Iterator[Engine]:
    """The engine, with nothing in it before the test and nothing left in it afterwards."""
    engine.wait_until_free()
    yield engine
    engine.wait_until_free()
