"""loadtest/load/client.py against a server whose times are known."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from loadtest.load.__main__ import is_ready, service
from loadtest.load.samples import Outcome, Sample

gevent = pytest.importorskip("gevent", reason="the load extra is not installed")
pytest.importorskip("geventhttpclient", reason="the load extra is not installed")

from loadtest.load.client import Client  # noqa: E402

FIRST_S, GAP_S = 0.06, 0.02
TOLERANCE_S = 0.5
"""Of a machine that does other things as well; only too early is always wrong."""


class Service(BaseHTTPRequestHandler):
    """Three tokens, the first after a while; other models are refused."""

    protocol_version = "HTTP/1.1"
    left = threading.Event()

    def do_GET(self) -> None:
        self._whole(200 if self.path in ("/health", "/v1/models") else 404, {"data": [{"id": "demo"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers.get("Authorization") != "Bearer sesame" or not body["stream"]:
            self._whole(401, {"error": {"code": "invalid_api_key"}})
        elif body["model"] == "busy":
            self._whole(429, {"error": {"code": "overloaded"}})
        else:
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            try:
                self._stream(num_tokens=3 if body["model"] == "demo" else 500)
            except OSError:
                Service.left.set()

    def _stream(self, num_tokens: int) -> None:
        self._event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        time.sleep(FIRST_S)
        for i in range(num_tokens):
            if i:
                time.sleep(GAP_S)
            self._event({"choices": [{"delta": {"content": "x"}}]})
        usage = {"prompt_tokens": 5, "completion_tokens": num_tokens, "prompt_tokens_details": {"cached_tokens": 4}}
        self._event({"choices": [], "usage": usage})
        self._event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def _event(self, value: Any) -> None:
        text = f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n".encode()
        self.wfile.write(f"{len(text):x}\r\n".encode() + text + b"\r\n")
        self.wfile.flush()

    def _whole(self, status: int, value: Any) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.send_header("Retry-After", "3")
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def send(url: str, model: str, *, key: str = "sesame", **options: Any) -> tuple[Sample, str, float]:
    recorded: list[Sample] = []
    client = Client(url, key, concurrency=4, start=time.perf_counter(), timeout_s=60, record=recorded.append)
    sent = client.send("/v1/chat/completions", {"model": model, "messages": []}, **options)
    assert recorded == [sent[0]]
    return sent


def test_times_are_those_of_chunks_with_output(url: str):
    sample, text, _ = send(url, "demo", scheduled_s=-1.0, users=2)
    assert (sample.outcome, sample.status, text) == (Outcome.COMPLETED, 200, "xxx")
    assert (sample.prompt_tokens, sample.cached_tokens, sample.completion_tokens) == (5, 4, 3)
    assert sample.ttft_s is not None and FIRST_S <= sample.ttft_s < FIRST_S + TOLERANCE_S
    assert len(sample.itl_s) == 2 and sample.tpot_s is not None and GAP_S / 2 < sample.tpot_s < GAP_S + TOLERANCE_S
    assert sample.duration_s >= sample.chunk_s[-1] and sample.users == 2 and sample.lag_s is not None


def test_who_leaves_early_closes_the_connection(url: str):
    Service.left.clear()
    sample, text, _ = send(url, "endless", most_chunks=2)
    assert sample.outcome is Outcome.CANCELLED and text == "xx" and len(sample.chunk_s) == 2
    assert Service.left.wait(60)


def test_refusals_and_faults_are_told_apart(url: str):
    sample, _, retry_after_s = send(url, "busy")
    assert (sample.outcome, sample.status, sample.error, retry_after_s) == (Outcome.REJECTED, 429, "overloaded", 3.0)
    sample, _, _ = send(url, "demo", key="wrong")
    assert (sample.outcome, sample.status, sample.error) == (Outcome.FAILED, 401, "invalid_api_key")
    sample, _, _ = send("http://127.0.0.1:9", "demo")
    assert sample.outcome is Outcome.FAILED and sample.status == 0 and "ConnectionRefused" in sample.error


def test_a_request_that_the_end_of_the_test_cuts_is_recorded(url: str):
    recorded: list[Sample] = []
    client = Client(url, "sesame", concurrency=1, start=time.perf_counter(), timeout_s=60, record=recorded.append)
    sending = gevent.spawn(client.send, "/v1/chat/completions", {"model": "endless", "messages": []})
    gevent.sleep(FIRST_S + 3 * GAP_S)
    sending.kill()
    [sample] = recorded
    assert sample.outcome is Outcome.UNFINISHED and sample.status == 200


def test_a_service_that_is_there_is_used_as_it_is(url: str):
    assert is_ready(url) and not is_ready("http://127.0.0.1:9")
    with service(url):
        assert Client(url, None, 1, 0.0, 60, [].append).model() == "demo"
    assert is_ready(url)
