"""Tracing: an OpenTelemetry span for each request that generates, and below it where its time went."""

import time

from opentelemetry import trace
from opentelemetry.propagators.textmap import Getter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.errors import ConfigError
from serve_app.config import Tracing
from serve_app.metrics.process import process_id
from serve_app.metrics.requests import Output, RequestMeter, meter_in


def make_provider(config: Tracing, exporter: SpanExporter | None = None) -> TracerProvider:
    """Where spans are made and sent from; they are sent by a thread of its own, and dropped where it cannot keep up.

    Args:
        config: says where to, and how many.
        exporter: another way out, for whoever wants to look at them here.

    Raises:
        ConfigError: the package that sends them is missing.
    """
    resource = Resource.create({"service.name": "qwen3-serve", "service.instance.id": process_id()})
    provider = TracerProvider(sampler=ParentBased(TraceIdRatioBased(config.sample_ratio)), resource=resource)
    provider.add_span_processor(BatchSpanProcessor(exporter or _otlp_exporter(config.otlp_endpoint)))
    return provider


def _otlp_exporter(endpoint: str) -> SpanExporter:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise ConfigError("tracing needs the extra: pip install '.[tracing]', or take out `tracing`") from None
    return OTLPSpanExporter(endpoint)


class _ScopeHeaders(Getter[Headers]):
    """How the propagator reads a request's headers."""

    def get(self, carrier: Headers, key: str) -> list[str] | None:
        return carrier.getlist(key) or None

    def keys(self, carrier: Headers) -> list[str]:
        return carrier.keys()


class Traced:
    """ASGI middleware, inside Metered and Gate: a span around every request that is measured and came in.

    The span is current while the request is worked on, so that Ray's own spans, where its tracing is on, are below it.

    Args:
        app: what is behind.
        provider: makes the spans.
    """

    def __init__(self, app: ASGIApp, provider: TracerProvider) -> None:
        self._app = app
        self._tracer = provider.get_tracer("qwen3_serve")
        self._propagator = TraceContextTextMapPropagator()
        self._getter = _ScopeHeaders()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        meter = meter_in(scope)
        if meter is None:
            await self._app(scope, receive, send)
            return
        parent = self._propagator.extract(Headers(scope=scope), getter=self._getter)
        span = self._tracer.start_span(f"POST {meter.endpoint}", parent, SpanKind.SERVER)

        async def send_with_context(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._propagator.inject(MutableHeaders(scope=message))
                span.set_attribute("http.response.status_code", message["status"])
            await send(message)

        with trace.use_span(span, end_on_exit=True):
            try:
                await self._app(scope, receive, send_with_context)
            finally:
                self._describe(span, meter)

    def _describe(self, span: Span, meter: RequestMeter) -> None:
        """Say what came of a request, now that it is over."""
        if not span.is_recording():
            return
        span.set_attributes(
            {
                "http.request.method": "POST",
                "http.route": meter.endpoint,
                "gen_ai.usage.input_tokens": meter.usage.prompt_tokens,
                "gen_ai.usage.output_tokens": meter.usage.completion_tokens,
                "qwen3_serve.cached_tokens": meter.usage.cached_tokens,
                "qwen3_serve.outcome": meter.outcome,
            }
        )
        if meter.outcome == "error":
            span.set_status(StatusCode.ERROR)
        for index, output in meter.outputs.items():
            self._add_phases(index, output)

    def _add_phases(self, index: int, output: Output) -> None:
        """Spans of one output's life. Its times are of a clock without a date, so they are counted back from now."""
        now_s, now_ns = time.monotonic(), time.time_ns()

        def add(name: str, start_s: float, end_s: float) -> None:
            start_ns, end_ns = (now_ns - int((now_s - at) * 1e9) for at in (start_s, end_s))
            attributes = {"gen_ai.choice.index": index}
            self._tracer.start_span(name, start_time=start_ns, attributes=attributes).end(end_ns)

        if output.timings is not None:
            scheduled_s = output.first_at - output.timings.prefill_s
            add("queue", scheduled_s - output.timings.queue_s, scheduled_s)
            add("prefill", scheduled_s, output.first_at)
        add("decode", output.first_at, output.last_at)
