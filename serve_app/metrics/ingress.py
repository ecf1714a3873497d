"""What an ingress measures, and the middleware that does so around every request."""

from importlib.metadata import version

from prometheus_client import CollectorRegistry

from serve_app.config import ServiceConfig
from serve_app.metrics.process import counter, gauge, histogram
from serve_app.wire import ModelInfo


class IngressMetrics:
    """The metrics of one ingress process. Of what happens per token, only `inter_token_latency` is counted.

    Args:
        config: has the objective that requests are held against.
    """

    def __init__(self, config: ServiceConfig) -> None:
        self.slo = config.slo
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
        target = gauge(registry, "slo_target_seconds")
        target.labels("ttft").set(config.slo.ttft_s)
        target.labels("tpot").set(config.slo.tpot_s)
        gauge(registry, "slo_target_ratio").set(config.slo.ratio)
        gauge(registry, "build_info").labels(version("qwen3-serve"), version("ray")).set(1)
        self._model_info = gauge(registry, "model_info")
        for objective in ("ttft", "tpot", "all"):  # the first failure must be a rise, not a series that appears
            self.slo_good.labels(objective)

    def describe(self, info: ModelInfo) -> None:
        """Tell which model is served."""
        self._model_info.labels(info.fingerprint, str(info.max_model_len)).set(1)
