"""The routes that pods are probed at and that the gateway passes on exist: the running service is asked for them."""

import time

import httpx

from tests.integration.server import AGENT_PORT, Server
from tests.kubernetes import of_kind, pod_templates

AGENT_START_S = 20.0


def test_readiness_is_a_route_of_the_proxy(server: Server):
    [container] = pod_templates("cpu-dev")["ingress"]["spec"]["containers"]
    path = container["readinessProbe"]["httpGet"]["path"]
    assert httpx.get(f"{server.url}{path}", timeout=10).status_code == 200


def test_liveness_is_a_route_of_rays_agent_and_needs_no_token(server: Server):
    pods = [pod_templates("cpu-dev")[name]["spec"]["containers"][0] for name in ("head", "ingress", "engine")]
    [path] = {pod[probe]["httpGet"]["path"] for pod in pods for probe in ("startupProbe", "livenessProbe")}
    deadline = time.monotonic() + AGENT_START_S
    while AGENT_PORT not in {port for _, port in server.listening()}:
        assert time.monotonic() < deadline, "Ray's agent does not listen"
        time.sleep(0.5)
    answer = httpx.get(f"http://127.0.0.1:{AGENT_PORT}{path}", timeout=10)
    assert answer.status_code == 200 and "raylet: success" in answer.text


def test_the_gateway_passes_on_routes_that_there_are(server: Server):
    [route] = of_kind("gpu-8b", "HTTPRoute")
    paths = {match["path"]["value"] for rule in route["spec"]["rules"] for match in rule["matches"]}
    for path in paths - {"/v1"} | {"/v1/models"}:
        assert httpx.get(f"{server.url}{path}", timeout=10).status_code == 200
