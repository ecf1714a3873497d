"""A node with an engine replica is lost under load: each stream goes on to its end, and says what it would have.

Two nodes with a replica each; the ingress is on the one that stays. Nobody tells that the other is gone: Ray takes
seconds to count a node out. How long the streams stood still is printed.
"""

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.integration.server import Server
from tests.integration.streams import check, report, run_streams, until

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
        parents = {each: _parent(each) for each in self.processes()}
        [raylet] = [each for each in parents if _is_second_raylet(each)]
        found = [raylet]
        for process in found:  # grows meanwhile
            found += [each for each, parent in parents.items() if parent == process]
        return found


def _parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def _is_second_raylet(process: int) -> bool:
    arguments = Path(f"/proc/{process}/cmdline").read_text().split("\0")
    return arguments[0].endswith("raylet") and "--head" not in arguments


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


async def test_a_node_that_is_lost(nodes: TwoNodes, capsys: pytest.CaptureFixture[str]):
    await until(lambda: num_heard(nodes) == 2, "two replicas that the ingress hears from")
    undisturbed = [stream.text for stream in await run_streams(nodes, NUM_STREAMS)]
    victims = nodes.second_node()
    replicas = set(nodes.processes_named(REPLICA))
    assert len(replicas) == 2 and len(replicas & set(victims)) == 1

    def lose() -> None:
        for process in victims:
            os.kill(process, signal.SIGKILL)

    streams = await run_streams(nodes, NUM_STREAMS, lose)
    check(streams, undisturbed)
    report(capsys, "loss of a node", streams)
    assert num_heard(nodes) == 1
    check(await run_streams(nodes, NUM_STREAMS), undisturbed)
