"""One HTTP request that generates: watched from its first byte to its outcome, and counted once."""

import time
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.request import EngineRequest, RequestTimings
from serve_app.gate import caller_name
from serve_app.http import CLIENT_CLOSED_REQUEST
from serve_app.metrics.ingress import IngressMetrics
from serve_app.openai.errors import KEY_LIMIT, ApiError, internal_error
from serve_app.openai.generation import Delta, Usage

_METER = "qwen3_serve.meter"


class Output:
    """One choice of a request, as far as its times go. Times are `time.monotonic()` seconds."""

    __slots__ = ("first_at", "last_at", "num_tokens", "timings", "finish_reason")

    def __init__(self) -> None:
        self.first_at = 0.0
        """Of its first tokens; 0 before."""
        self.last_at = 0.0
        self.num_tokens = 0
        self.timings: RequestTimings | None = None
        self.finish_reason = ""

    @property
    def tpot_s(self) -> float:
        """Mean time per token after the first; 0 where there is none."""
        return (self.last_at - self.first_at) / (self.num_tokens - 1) if self.num_tokens > 1 else 0.0


class RequestMeter:
    """Measures one request.

    Args:
        metrics: of the process.
        endpoint: its route.
    """

    def __init__(self, metrics: IngressMetrics, endpoint: str) -> None:
        self.endpoint = endpoint
        self.arrived_at = time.monotonic()
        self.outputs: dict[int, Output] = {}
        """By index, of those that have something."""
        self.usage = Usage()
        self.error: ApiError | None = None
        self._metrics = metrics
        self._requests: Sequence[EngineRequest] = ()
        self._is_cancelled = False
        metrics.open.inc()

    async def watch(
        self, deltas: AsyncGenerator[Delta, None], requests: Sequence[EngineRequest], usage: Usage
    ) -> AsyncGenerator[Delta, None]:
        """The deltas of the request, unchanged. Leaving early counts as the client's leaving."""
        self._requests, self.usage = requests, usage
        try:
            async with aclosing(deltas):
                async for delta in deltas:
                    self._add(delta)
                    yield delta
        except ApiError as error:
            self.fail(error)
            raise
        except Exception:
            self.fail(internal_error())
            raise
        except BaseException:  # the generator was closed, or its task cancelled
            self._is_cancelled = True
            raise

    def belongs_to(self, metrics: IngressMetrics) -> None:
        """Count it there: its model is known now."""
        self._metrics.open.dec()
        metrics.open.inc()
        self._metrics = metrics

    def fail(self, error: ApiError) -> None:
        """Note what the client is told. The first error is the one that counts."""
        self.error = self.error or error

    @property
    def outcome(self) -> str:
        """See `requests_total`."""
        if self._is_cancelled or (self.error is not None and self.error.status == CLIENT_CLOSED_REQUEST):
            return "cancelled"
        if self.error is None:
            return "ok"
        if self.error.status in (429, 503) and not self.outputs:
            return "shed"
        return "error" if self.error.status >= 500 else "client_error"

    def end(self, key: str) -> None:
        """Count the request.

        Args:
            key: name of the API key; empty without one, and for requests that did not get through the gate.
        """
        metrics, outcome = self._metrics, self.outcome
        metrics.open.dec()
        metrics.requests.labels(self.endpoint, outcome).inc()
        metrics.key_requests.labels(key, outcome).inc()
        reason = "" if self.error is None else self.error.code or str(self.error.status)
        if outcome == "shed":
            metrics.shed.labels(reason).inc()
        elif outcome == "error":
            metrics.failed.labels(reason).inc()
        elif outcome == "cancelled":
            metrics.cancelled.labels("streaming" if self.outputs else "waiting").inc()
        for output in self.outputs.values():
            self._count_output(output)
        if self.outputs:
            self._count_usage(key)
        if outcome == "ok":
            metrics.e2e.observe(time.monotonic() - self.arrived_at)
        if outcome in ("ok", "shed", "error") and reason != KEY_LIMIT:
            self._hold_against_objective(outcome)

    def _add(self, delta: Delta) -> None:
        """Runs for every update of every output."""
        now = time.monotonic()
        output = self.outputs.get(delta.index)
        if output is None:
            output = self.outputs[delta.index] = Output()
            output.first_at, output.timings = now, delta.timings
        else:
            self._metrics.inter_token_latency.observe(now - output.last_at)
        output.last_at = now
        output.num_tokens += len(delta.token_ids)
        if delta.finish_reason is not None:
            output.finish_reason = delta.finish_reason

    def _count_output(self, output: Output) -> None:
        metrics = self._metrics
        ttft_s = output.first_at - self.arrived_at
        metrics.ttft.observe(ttft_s)
        if output.timings is not None:
            queue_s, prefill_s = output.timings.queue_s, output.timings.prefill_s
            metrics.queue.observe(queue_s)
            metrics.prefill.observe(prefill_s)
            metrics.framework.observe(max(0.0, ttft_s - queue_s - prefill_s))
        if output.finish_reason:
            metrics.success.labels(output.finish_reason).inc()
            metrics.decode.observe(output.last_at - output.first_at)
            metrics.generation_tokens.observe(output.num_tokens)
            if output.num_tokens > 1:
                metrics.tpot.observe(output.tpot_s)

    def _count_usage(self, key: str) -> None:
        metrics, usage = self._metrics, self.usage
        metrics.prompt_tokens.observe(usage.prompt_tokens)
        metrics.n.observe(len(self._requests))
        for request in self._requests:
            if request.params.max_tokens is not None:
                metrics.max_tokens.observe(request.params.max_tokens)
        metrics.key_tokens.labels(key, "prompt").inc(usage.prompt_tokens)
        metrics.key_tokens.labels(key, "cached").inc(usage.cached_tokens)
        metrics.key_tokens.labels(key, "generated").inc(usage.completion_tokens)

    def _hold_against_objective(self, outcome: str) -> None:
        metrics, slo = self._metrics, self._metrics.slo
        metrics.slo_requests.inc()
        if outcome != "ok":
            return
        outputs = self.outputs.values()
        in_ttft = all(output.first_at - self.arrived_at <= slo.ttft_s for output in outputs)
        in_tpot = all(output.tpot_s <= slo.tpot_s for output in outputs)
        if in_ttft:
            metrics.slo_good.labels("ttft").inc()
        if in_tpot:
            metrics.slo_good.labels("tpot").inc()
        if in_ttft and in_tpot:
            metrics.slo_good.labels("all").inc()
            metrics.slo_good_tokens.inc(self.usage.completion_tokens)


class Metered:
    """ASGI middleware, the outermost: measures every POST to the routes that generate.

    Args:
        app: what is behind.
        metrics: of the process.
        endpoints: paths of those routes.
    """

    def __init__(self, app: ASGIApp, metrics: IngressMetrics, endpoints: Collection[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._endpoints = frozenset(endpoints)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = scope["path"].removeprefix(scope.get("root_path", "")) if scope["type"] == "http" else ""
        if endpoint not in self._endpoints or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        meter = scope[_METER] = RequestMeter(self._metrics, endpoint)
        try:
            await self._app(scope, receive, send)
        except Exception:
            meter.fail(internal_error())
            raise
        finally:
            meter.end(caller_name(scope))


def meter_of(connection: HTTPConnection) -> RequestMeter:
    """What measures a request that came through the middleware."""
    return connection.scope[_METER]


def meter_in(scope: Scope) -> RequestMeter | None:
    """The same, of any request; None if it is not measured."""
    return scope.get(_METER)


def note_error(scope: Scope, error: ApiError) -> None:
    """Tell a request's meter, if it has one, what the client is told."""
    if (meter := meter_in(scope)) is not None:
        meter.fail(error)
