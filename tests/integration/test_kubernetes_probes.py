"""The routes that pods are probed at exist: the running service is asked for them."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.integration.server import Server, free_ports
from tests.kubernetes import pod_templates

NODE_START_S = 60.0


@pytest.fixture
def agent_url() -> Iterator[str]:
    """Ray's agent of a node of its own, as a pod starts it: the service's may have found its fixed port taken."""
    gcs_port, agent_port = free_ports(2)
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--num-cpus=1", f"--port={gcs_port}"]
    command += [f"--dashboard-agent-listen-port={agent_port}", "--include-dashboard=false"]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "t" * 64, "RAY_USAGE_STATS_ENABLED": "0"}
    with tempfile.TemporaryDirectory(prefix="q3p-") as folder:
        environment = os.environ | token | {"RAY_TMPDIR": folder}
        with (Path(folder) / "log").open("wb") as log:
            node = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_for_node(node, f"http://127.0.0.1:{agent_port}", Path(folder) / "log")
            yield f"http://127.0.0.1:{agent_port}"
        finally:
            os.killpg(node.pid, signal.SIGINT)
            node.wait(NODE_START_S)


def _wait_for_node(node: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    deadline = time.monotonic() + NODE_START_S
    while node.poll() is None and time.monotonic() < deadline:
        try:
            httpx.get(url, timeout=30)
            return
        except httpx.TransportError:
            time.sleep(0.2)
    raise RuntimeError(f"Ray's agent does not listen:\n{log.read_text()[-4000:]}")


def test_readiness_is_a_route_of_the_proxy(server: Server):
    [container] = pod_templates("cpu-dev")["ingress"]["spec"]["containers"]
    path = container["readinessProbe"]["httpGet"]["path"]
    assert httpx.get(f"{server.url}{path}", timeout=60).status_code == 200


def test_liveness_is_a_route_of_rays_agent_and_needs_no_token(agent_url: str):
    pods = [pod_templates("cpu-dev")[name]["spec"]["containers"][0] for name in ("head", "ingress", "engine")]
    [path] = {pod[probe]["httpGet"]["path"] for pod in pods for probe in ("startupProbe", "livenessProbe")}
    answer = httpx.get(f"{agent_url}{path}", timeout=60)
    assert answer.status_code == 200 and "success" in answer.text
