"""The service around its main routes: what it tells about itself, where it listens, what it writes down, its end."""

import hashlib
import json
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from openai import AuthenticationError, OpenAI

from cluster.prometheus.server import Prometheus
from tests.integration.conftest import ENGINE, Engine
from tests.integration.server import SERVE_RUN, START_TIMEOUT_S, Server, free_ports

SECRET = "xyzzy plugh"
KEY = "sesame"
OWNER = {"Authorization": f"Bearer {KEY}"}


def test_models(client: OpenAI, http: httpx.Client):
    listed, *_ = client.models.list().data  # its adapters are listed after it
    assert listed.id == "demo" and listed.object == "model" and listed.owned_by
    assert client.models.retrieve("demo") == listed
    assert http.get("/v1/models").json()["data"][0]["max_model_len"] == 4096


def test_health_and_version(http: httpx.Client):
    assert http.get("/health").status_code == 200
    assert http.get("/version").json()["version"]


def test_a_request_of_more_than_grpcs_4_mib_reaches_the_engine(engine: Engine):
    assert engine.refusal(3 * 2**20).startswith("the prompt has 3145728 tokens")


def test_a_request_id_is_echoed_or_made(http: httpx.Client):
    assert http.get("/version", headers={"X-Request-Id": "job-17"}).headers.get_list("x-request-id") == ["job-17"]
    made = [http.get("/version").headers.get_list("x-request-id") for _ in range(2)]
    assert all(len(found) == 1 and found[0] for found in made) and made[0] != made[1]


def test_equal_request_ids_do_not_meet_in_the_engine(http: httpx.Client):
    body = {"model": "demo", "prompt": ["a", "b"], "max_tokens": 3}
    for _ in range(2):
        assert http.post("/v1/completions", json=body, headers={"X-Request-Id": "same"}).status_code == 200


def test_http_is_served_on_loopback_only(server: Server):
    """Of what else Ray opens to the network, nothing speaks HTTP."""
    for host, port in server.listening():
        if host.removeprefix("::ffff:") == "127.0.0.1":
            continue
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{port}/", timeout=2)


def test_no_text_of_a_prompt_is_written_down(http: httpx.Client, server: Server):
    messages = [{"role": "user", "content": SECRET}]
    for fields in ({}, {"temperature": SECRET}, {SECRET: 1}, {"tools": SECRET}):
        http.post("/v1/chat/completions", json={"model": "demo", "messages": messages, "max_tokens": 2, **fields})
    http.post("/tokenize", json={"prompt": SECRET, "model": SECRET})
    http.post("/v1/responses", json={"model": "demo", "input": SECRET, "max_output_tokens": 2})
    http.post("/v1/messages", json={"model": "demo", "messages": messages, "max_tokens": 2})
    logs = [server.log, *(path for path in server.log.parent.glob("ray/session_latest/logs/**/*") if path.is_file())]
    assert len(logs) > 10
    assert [path for path in logs if SECRET.encode() in path.read_bytes()] == []


def test_it_says_when_it_is_ready_and_where(server: Server):
    lines = [line for line in server.log.read_text().splitlines() if server.url in line]
    assert len(lines) == 1 and lines[0].endswith(f" demo is ready at {server.url}/v1")


@pytest.fixture(scope="module")
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """Where spans are sent to, and what was sent."""
    arrived: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            arrived.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", free_ports(1)[0]), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", arrived
        server.shutdown()


@pytest.fixture(scope="module")
def plain(collector: tuple[str, list[bytes]]) -> Iterator[Server]:
    """`serve run` with no variables set: Ray Serve's own HTTP proxy. It wants a key, and has sampling of its own."""
    folder = Path(tempfile.mkdtemp(prefix="q3p-"))
    keys = [{"name": "owner", "sha256": hashlib.sha256(KEY.encode()).hexdigest()}]
    service = {"api_keys": keys, "default_sampling_params": {"temperature": 0.25}}
    service |= {"tracing": {"otlp_endpoint": collector[0], "sample_ratio": 0}}
    with Server(folder, SERVE_RUN, ENGINE, service=service) as running:
        yield running
    shutil.rmtree(folder)


def test_it_works_the_same_behind_ray_serves_own_proxy(plain: Server):
    body = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0}
    whole = httpx.post(f"{plain.url}/v1/chat/completions", json=body, headers=OWNER, timeout=60)
    assert len(whole.headers.get_list("x-request-id")) == 1
    text = ""
    with httpx.stream(
        "POST", f"{plain.url}/v1/chat/completions", json=body | {"stream": True}, headers=OWNER, timeout=60
    ) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    text += choice["delta"].get("content", "")
    assert text == whole.json()["choices"][0]["message"]["content"] != ""
    wrong = httpx.post(f"{plain.url}/v1/chat/completions", json=body | {"n": "x"}, headers=OWNER, timeout=60)
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "n"
    assert {host.removeprefix("::ffff:") for host, port in plain.listening() if f":{port}" in plain.url} == {
        "127.0.0.1"
    }


def test_only_the_owner_of_a_key_comes_in(plain: Server):
    for path in ("/v1/models", "/v1/models/demo", "/version", "/openapi.json", "/nothing"):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Host": "x/health?"}):
            assert httpx.get(f"{plain.url}{path}", headers=headers, timeout=60).status_code == 401
    assert httpx.get(f"{plain.url}/health", timeout=60).status_code == 200
    assert httpx.get(f"{plain.url}/v1/models", headers={"X-Api-Key": KEY}, timeout=60).status_code == 200
    stranger = OpenAI(base_url=f"{plain.url}/v1", api_key="wrong", max_retries=0)
    with stranger, pytest.raises(AuthenticationError, match="not valid here"):
        stranger.models.list()
    with OpenAI(base_url=f"{plain.url}/v1", api_key=KEY, max_retries=0) as owner:
        assert [model.id for model in owner.models.list()] == ["demo"]


@pytest.mark.skipif(not shutil.which("prometheus"), reason="prometheus is not on PATH")
def test_prometheus_comes_in_with_a_key_and_sees_what_the_key_used(plain: Server, tmp_path: Path):
    body = {"model": "demo", "prompt": "Hello", "max_tokens": 5, "ignore_eos": True}
    assert httpx.get(f"{plain.url}/metrics", timeout=60).status_code == 401
    [port] = free_ports(1)
    with Prometheus(tmp_path, port, plain.url.removeprefix("http://"), api_key=KEY) as prometheus:
        before = used_tokens(prometheus)
        httpx.post(f"{plain.url}/v1/completions", json=body, headers=OWNER, timeout=60).raise_for_status()
        deadline = time.monotonic() + 30
        while used_tokens(prometheus) != before + 5:
            assert time.monotonic() < deadline, (before, used_tokens(prometheus))
            time.sleep(0.2)
    assert KEY not in (tmp_path / "prometheus.log").read_text()


def test_a_request_is_in_its_callers_trace(plain: Server, collector: tuple[str, list[bytes]]):
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    headers = OWNER | {"traceparent": f"00-{trace_id}-00f067aa0ba902b7-01"}
    body = {"model": "demo", "prompt": SECRET, "max_tokens": 5, "ignore_eos": True}
    answer = httpx.post(f"{plain.url}/v1/completions", json=body, headers=headers, timeout=60)
    assert answer.headers["traceparent"].split("-")[1] == trace_id
    deadline = time.monotonic() + 60
    while not collector[1]:
        assert time.monotonic() < deadline, "no spans came"
        time.sleep(0.1)
    sent = b"".join(collector[1])
    assert sent.count(bytes.fromhex(trace_id)) == 4 and SECRET.encode() not in sent
    assert all(name in sent for name in (b"POST /v1/completions", b"queue", b"prefill", b"decode"))


def used_tokens(prometheus: Prometheus) -> float:
    """What the owner of the key has had generated, once Prometheus knows."""
    deadline = time.monotonic() + 30
    while not (found := prometheus.query('qwen3_key_tokens_total{key="owner", kind="generated"}')):
        assert time.monotonic() < deadline, prometheus.query("up")
        time.sleep(0.2)
    return float(found[0]["value"][1])


def test_sampling_is_the_configurations_where_it_says_and_else_the_models(plain: Server, http: httpx.Client):
    def defaults(found: httpx.Response) -> dict[str, float]:
        return found.json()["default_sampling_params"]

    models = defaults(http.get("/v1/models/demo"))
    assert models["temperature"] != 0.25
    assert defaults(httpx.get(f"{plain.url}/v1/models/demo", headers=OWNER, timeout=60)) == models | {
        "temperature": 0.25
    }


def test_a_replica_that_dies_is_replaced_and_nobody_waits_for_it_in_vain(plain: Server):
    body = {"model": "demo", "prompt": "Hello", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{plain.url}/v1/completions", json=body, headers=OWNER, timeout=60) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("data: {")
        [replica] = plain.processes_named("ServeReplica:qwen3:EngineReplica")
        os.kill(replica, signal.SIGKILL)
        deadline = time.monotonic() + START_TIMEOUT_S
        short = body | {"stream": False, "max_tokens": 2}
        while (
            again := httpx.post(f"{plain.url}/v1/completions", json=short, headers=OWNER, timeout=60)
        ).status_code != 200:
            assert again.status_code == 503 and int(again.headers["retry-after"]) >= 1
            assert again.json()["error"]["code"] == "service_unavailable"
            assert httpx.get(f"{plain.url}/health", timeout=60).status_code in (200, 503)
            assert time.monotonic() < deadline
            time.sleep(0.2)
        rest = [line for line in lines if line]  # the stream has waited for the new replica
    assert rest[-1] == "data: [DONE]" and "event: error" not in rest


def test_ctrl_c_ends_all_of_it(plain: Server):
    assert plain.interrupt(), f"still there: {plain.processes()}"
