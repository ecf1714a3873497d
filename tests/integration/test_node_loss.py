"""A node with an engine replica is lost under load: each stream goes on to its end, and says what it would have.

Two nodes with a replica each; the ingress is on the one that stays. The other freezes, as one that the network has cut
off seems to, comes back, and is killed. Nobody tells that it is gone: Ray takes seconds to count a node out. How long
the streams stood still is printed.
"""

import asyncio
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from serve_app.fleet import Loss
from serve_app.metrics.definitions import DEFINITIONS
from tests.integration.server import Server
from tests.integration.streams import PATIENCE_S, check, report, run_streams, until

SERVE = (
    "env",
    "RAY_SERVE_ENABLE_HA_PROXY=1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED=1",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0",
    sys.executable,
    "-m",
    "tests.integration.two_nodes",
    "{}",
)
ENGINE = {"kv_cache_memory": "64MiB", "max_num_seqs": 16, "num_threads": 1, "dtype": "float32", "device": "cpu"}
SERVICE = {"slo": {"ttft_s": 60}}
NUM_STREAMS = 16
NUM_TOKENS = 600
"""So many that no stream has ended when the last one has begun."""
NUM_MIGRATIONS = DEFINITIONS["migrations_total"].full_name
REPLICA = "ServeReplica:qwen3:EngineReplica"


class TwoNodes(Server):
    """A replica on each of two nodes, and the ingress on the first."""

    def _configuration(self, *changes: dict[str, Any]) -> str:
        values = yaml.safe_load(super()._configuration(*changes))
        ingress, engine = values["applications"][0]["deployments"]
        ingress["ray_actor_options"] = {"num_cpus": 0.1, "resources": {"head": 0.1}}
        del engine["autoscaling_config"]
        engine |= {"num_replicas": 2, "max_replicas_per_node": 1, "ray_actor_options": {"num_cpus": 0.1}}
        return yaml.safe_dump(values)

    def second_node(self) -> list[int]:
        """Ids of the processes of the node that can be lost: its raylet first, then all that descend from it."""
        processes = {each: _read(each, "stat") for each in self.processes()}
        parents = {each: int(stat.rpartition(")")[2].split()[1]) for each, stat in processes.items() if stat}
        [raylet] = [each for each in parents if _is_second_raylet(each)]
        found = [raylet]
        for process in found:  # grows meanwhile
            found += [each for each, parent in parents.items() if parent == process]
        return found


def _is_second_raylet(process: int) -> bool:
    arguments = _read(process, "cmdline").split("\0")
    return arguments[0].endswith("raylet") and "--head" not in arguments


def _read(process: int, name: str) -> str:
    """What /proc tells of a process; nothing if it has ended."""
    try:
        return Path(f"/proc/{process}/{name}").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


@pytest.fixture
def nodes() -> Iterator[TwoNodes]:
    folder = Path(tempfile.mkdtemp(prefix="q3n-"))
    with TwoNodes(folder, SERVE, ENGINE, service=SERVICE) as running:
        yield running
    shutil.rmtree(folder)


def num_heard(server: Server) -> int:
    """How many replicas the ingress hears from."""
    replicas = httpx.get(f"{server.url}/status", timeout=30).json()["models"][0]["replicas"]
    return sum(each["age_s"] is not None and each["age_s"] < 2 for each in replicas)


def num_migrations(server: Server, loss: Loss) -> float:
    """How many requests went on at another replica."""
    page = httpx.get(f"{server.url}/metrics", timeout=30).text
    samples = [each for family in text_string_to_metric_families(page) for each in family.samples]
    return sum(each.value for each in samples if each.name == NUM_MIGRATIONS and each.labels["reason"] == loss)


def send(number: signal.Signals, processes: list[int]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):  # one that Ray had no more use for
            os.kill(process, number)


async def test_a_node_that_freezes_and_one_that_is_killed(nodes: TwoNodes, capsys: pytest.CaptureFixture[str]):
    await until(lambda: num_heard(nodes) == 2, "two replicas that the ingress hears from")
    undisturbed = [stream.text for stream in await run_streams(nodes, NUM_STREAMS, num_tokens=NUM_TOKENS)]
    victims = nodes.second_node()
    replicas = set(nodes.processes_named(REPLICA))
    assert len(replicas) == 2 and len(replicas & set(victims)) == 1

    frozen = asyncio.Event()

    def freeze() -> None:
        send(signal.SIGSTOP, victims)
        frozen.set()

    async def thaw() -> None:
        """When its requests are elsewhere. Ray would count the node out some seconds later."""
        await frozen.wait()
        try:
            async with asyncio.timeout(PATIENCE_S):
                # On a thread, as streams are read meanwhile, and /metrics waits for the replica that is frozen.
                while not await asyncio.to_thread(num_migrations, nodes, Loss.SILENT):
                    await asyncio.sleep(0.1)
        finally:
            send(signal.SIGCONT, victims)

    streams, _ = await asyncio.gather(run_streams(nodes, NUM_STREAMS, freeze, NUM_TOKENS), thaw())
    check(streams, undisturbed)
    report(capsys, "SIGSTOP of a node", streams)
    await until(lambda: num_heard(nodes) == 2, "replica that is back")

    streams = await run_streams(nodes, NUM_STREAMS, lambda: send(signal.SIGKILL, nodes.second_node()), NUM_TOKENS)
    check(streams, undisturbed)
    report(capsys, "SIGKILL of a node", streams)
    assert num_migrations(nodes, Loss.DIED) > 0
    assert num_heard(nodes) == 1
    check(await run_streams(nodes, NUM_STREAMS, num_tokens=NUM_TOKENS), undisturbed)
