"""What an ingress measures, and the middleware that does so around every request."""

from collections.abc import Iterable
from importlib.metadata import version

from prometheus_client import CollectorRegistry

from serve_app.auth import ApiKeys
from serve_app.config import ModelConfig, Slo
from serve_app.metrics.process import counter, gauge, histogram
from serve_app.wire import ModelInfo

OUTCOMES = ("ok", "client_error", "shed", "error", "cancelled")
"""See `requests_total`."""


class IngressMetrics:
    """What one ingress process measures of one model. Of what happens per token, only `inter_token_latency` is counted.

    Args:
        config: has the objective that requests are held against.
    """

    def __init__(self, config: ModelConfig) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = counter(registry, "requests_total")
        self.open = gauge(registry, "requests_open")
        self.shed = counter(registry, "requests_shed_total")
        self.failed = counter(registry, "requests_failed_total")
        self.cancelled = counter(registry, "requests_cancelled_total")
        self.success = counter(registry, "request_success_total")
        self.ttft = histogram(registry, "time_to_first_token_seconds")
        self.inter_token_latency = histogram(registry, "inter_token_latency_seconds")
        self.tpot = histogram(registry, "request_time_per_output_token_seconds")
        self.e2e = histogram(registry, "e2e_request_latency_seconds")
        self.framework = histogram(registry, "request_framework_time_seconds")
        self.queue = histogram(registry, "request_queue_time_seconds")
        self.prefill = histogram(registry, "request_prefill_time_seconds")
        self.decode = histogram(registry, "request_decode_time_seconds")
        self.prompt_tokens = histogram(registry, "request_prompt_tokens")
        self.generation_tokens = histogram(registry, "request_generation_tokens")
        self.max_tokens = histogram(registry, "request_params_max_tokens")
        self.n = histogram(registry, "request_params_n")
        self.slo_requests = counter(registry, "slo_requests_total")
        self.slo_good = counter(registry, "slo_good_requests_total")
        self.slo_good_tokens = counter(registry, "slo_good_tokens_total")
        self.key_requests = counter(registry, "key_requests_total")
        self.key_tokens = counter(registry, "key_tokens_total")
        self._target = gauge(registry, "slo_target_seconds")
        self._target_ratio = gauge(registry, "slo_target_ratio")
        self.hold_against(config.slo)
        gauge(registry, "build_info").labels(version("qwen3-serve"), version("ray")).set(1)
        self._model_info = gauge(registry, "model_info")
        self._begin_at_zero()

    def expect(self, endpoints: Iterable[str], keys: ApiKeys) -> None:
        """Tell which requests there will be, and whose."""
        for endpoint in endpoints:
            for outcome in OUTCOMES:
                self.requests.labels(endpoint, outcome)
        for name in ("", *(caller.name for caller in keys.callers)):
            for outcome in OUTCOMES:
                self.key_requests.labels(name, outcome)
            for kind in ("prompt", "cached", "generated"):
                self.key_tokens.labels(name, kind)

    def hold_against(self, slo: Slo) -> None:
        """Hold requests that end from now on against this objective."""
        self.slo = slo
        self._target.labels("ttft").set(slo.ttft_s)
        self._target.labels("tpot").set(slo.tpot_s)
        self._target_ratio.set(slo.ratio)

    def describe(self, info: ModelInfo) -> None:
        """Tell which model is served."""
        self._model_info.labels(info.fingerprint, str(info.max_model_len)).set(1)

    def _begin_at_zero(self) -> None:
        """The first failure must be a rise: Prometheus sees none where a series only appears."""
        for objective in ("ttft", "tpot", "all"):
            self.slo_good.labels(objective)
        for phase in ("waiting", "streaming"):
            self.cancelled.labels(phase)
        for code in ("rate_limit_exceeded", "key_limit_exceeded", "service_unavailable"):
            self.shed.labels(code)
        for code in ("internal_error", "service_unavailable"):
            self.failed.labels(code)
        for reason in ("stop", "length", "tool_calls"):
            self.success.labels(reason)
