"""Traces: spans of requests as a collector gets them, through the real middleware and the real exporter's interface."""

import asyncio
import re
import time
from collections.abc import AsyncGenerator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, Response
from opentelemetry import trace
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from engine.request import RequestTimings
from serve_app.config import ServiceConfig, Tracing
from serve_app.metrics.ingress import IngressMetrics
from serve_app.metrics.requests import Metered, meter_of
from serve_app.openai.errors import internal_error
from serve_app.openai.generation import Delta, Usage
from serve_app.tracing import Traced, make_provider

ROUTE = "/v1/completions"
CALLER = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
PREFILL_S, QUEUE_S = 0.25, 0.5


class Service:
    """An application whose one route generates two tokens, behind the middleware."""

    def __init__(self, sample_ratio: float = 1.0) -> None:
        self.exporter = InMemorySpanExporter()
        config = Tracing(otlp_endpoint="http://127.0.0.1:1/v1/traces", sample_ratio=sample_ratio)
        self.provider = make_provider(config, self.exporter)
        self.fails = False
        self.current: trace.SpanContext | None = None
        app = FastAPI()
        app.add_api_route(ROUTE, self.generate, methods=["POST"])
        app.add_api_route("/version", self.version, methods=["GET"])
        app.add_middleware(Traced, provider=self.provider)
        app.add_middleware(Metered, metrics=IngressMetrics(ServiceConfig()), endpoints=[ROUTE])
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here")

    async def version(self) -> Response:
        return Response("1")

    async def generate(self, request: Request) -> Response:
        self.current = trace.get_current_span().get_span_context()
        usage = Usage(prompt_tokens=3)

        async def deltas() -> AsyncGenerator[Delta, None]:
            yield Delta(0, token_ids=[5], timings=RequestTimings(QUEUE_S, PREFILL_S))
            await asyncio.sleep(0.01)
            if self.fails:
                raise internal_error()
            usage.completion_tokens = 2
            yield Delta(0, token_ids=[5], finish_reason="stop")

        try:
            async for _ in meter_of(request).watch(deltas(), [], usage):
                pass
        except Exception:
            return Response(status_code=500)
        return Response("done")

    def spans(self) -> dict[str, Any]:
        self.provider.force_flush()
        return {span.name: span for span in self.exporter.get_finished_spans()}


def is_sampled(response: httpx.Response) -> bool:
    """By the flags that it tells."""
    return bool(int(response.headers["traceparent"][-2:], 16) & 1)


async def test_a_request_is_a_span_with_its_phases_below_it():
    service = Service()
    before = time.time_ns()
    response = await service.http.post(ROUTE)
    spans = service.spans()
    assert set(spans) == {f"POST {ROUTE}", "queue", "prefill", "decode"}
    root = spans[f"POST {ROUTE}"]
    assert root.parent is None and root.kind is trace.SpanKind.SERVER
    assert before <= root.start_time <= root.end_time <= time.time_ns()
    assert root.attributes["gen_ai.usage.input_tokens"] == 3 and root.attributes["gen_ai.usage.output_tokens"] == 2
    assert root.attributes["qwen3_serve.outcome"] == "ok" and root.attributes["http.response.status_code"] == 200
    queue, prefill, decode = spans["queue"], spans["prefill"], spans["decode"]
    for span in (queue, prefill, decode):
        assert span.parent.span_id == root.context.span_id and span.context.trace_id == root.context.trace_id
    assert queue.end_time == prefill.start_time and abs(prefill.end_time - decode.start_time) < 1e6
    assert (queue.end_time - queue.start_time) / 1e9 == pytest.approx(QUEUE_S, abs=1e-3)
    assert (prefill.end_time - prefill.start_time) / 1e9 == pytest.approx(PREFILL_S, abs=1e-3)
    assert (decode.end_time - decode.start_time) / 1e9 >= 0.009 and decode.end_time <= root.end_time
    assert response.headers["traceparent"].startswith(f"00-{root.context.trace_id:032x}-{root.context.span_id:016x}-")
    assert is_sampled(response)


async def test_the_callers_trace_goes_on_and_what_is_called_is_in_it():
    service = Service(sample_ratio=0.0)
    response = await service.http.post(ROUTE, headers={"traceparent": CALLER})
    root = service.spans()[f"POST {ROUTE}"]
    assert f"{root.context.trace_id:032x}" == CALLER.split("-")[1]
    assert f"{root.parent.span_id:016x}" == CALLER.split("-")[2]
    assert service.current == root.context
    assert response.headers["traceparent"].startswith(CALLER[:36])


@pytest.mark.parametrize("header", [None, CALLER[:-2] + "00"])
async def test_what_is_not_sampled_leaves_no_span(header: str | None):
    service = Service(sample_ratio=0.0 if header is None else 1.0)
    headers = {} if header is None else {"traceparent": header}
    response = await service.http.post(ROUTE, headers=headers)
    assert service.spans() == {} and not is_sampled(response)


@pytest.mark.parametrize("header", ["", "00-0-0-01", "x" * 4096, CALLER.replace("4bf92f", "zzzzzz"), f"{CALLER}-more"])
async def test_a_traceparent_that_is_none_begins_a_trace(header: str):
    service = Service()
    response = await service.http.post(ROUTE, headers={"traceparent": header})
    assert response.status_code == 200
    assert service.spans()[f"POST {ROUTE}"].parent is None


async def test_a_fault_is_marked():
    service = Service()
    service.fails = True
    await service.http.post(ROUTE)
    root = service.spans()[f"POST {ROUTE}"]
    assert root.status.status_code is trace.StatusCode.ERROR
    assert root.attributes["qwen3_serve.outcome"] == "error"


async def test_other_routes_have_no_span():
    service = Service()
    response = await service.http.get("/version")
    assert service.spans() == {} and "traceparent" not in response.headers


def test_spans_arrive_at_a_collector():
    arrived: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            arrived.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        provider = make_provider(Tracing(otlp_endpoint=f"http://127.0.0.1:{server.server_port}/v1/traces"))
        provider.get_tracer("t").start_span("a-span").end()
        provider.shutdown()
        server.shutdown()
    [(path, body)] = arrived
    assert path == "/v1/traces" and re.search(rb"a-span", body) and b"qwen3-serve" in body
