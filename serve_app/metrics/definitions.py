"""Every metric of the service, once. Names are vLLM's behind a prefix of our own, wherever vLLM has one for the thing.

No colons in names: clients that speak OpenMetrics turn those of samples into underscores.
"""

from dataclasses import dataclass
from enum import StrEnum

from engine.block_residency import BOUNDS_S

PREFIX = "qwen3_"


class Kind(StrEnum):
    """What Prometheus calls the type."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Process(StrEnum):
    """Who measures. Each of these processes tells about itself alone, under a label with its id."""

    INGRESS = "ingress"
    REPLICA = "replica"
    CONTROLLER = "controller"


@dataclass(frozen=True, slots=True)
class Definition:
    """One metric."""

    name: str
    """Without `qwen3_`. A counter's ends with `_total`."""
    kind: Kind
    process: Process
    help: str
    labels: tuple[str, ...] = ()
    """Besides `model_name`, and the label that names the process."""
    buckets: tuple[float, ...] = ()
    """Upper ends, of a histogram."""
    unused: str = ""
    """Why no panel and no alert shows it; empty if one does."""

    @property
    def full_name(self) -> str:
        return PREFIX + self.name


TTFT_BUCKETS = (
    .001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
"""Seconds, as vLLM's."""
TOKEN_BUCKETS = (
    .001, .0025, .005, .01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
"""Seconds between tokens: vLLM's, and three below for small models."""
REQUEST_BUCKETS = (
    .01, .05, .1, .3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
"""Seconds of a request or of a part of one: vLLM's, and three below."""
COUNT_BUCKETS = (
    1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000,
)  # fmt: skip
N_BUCKETS = (1, 2, 5, 10, 20)

_C, _G, _H = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM
_INGRESS, _REPLICA, _CONTROLLER = Process.INGRESS, Process.REPLICA, Process.CONTROLLER

_ALL = (
    # Requests, as their clients see them.
    Definition(
        "requests_total", _C, _INGRESS, "HTTP requests to generate that ended, by route and outcome: ok, client_error, "
        "shed (429 and 503 before the response began), error, cancelled (the client left).", ("endpoint", "outcome"),
    ),
    Definition("requests_open", _G, _INGRESS, "HTTP requests to generate that have not ended."),
    Definition("requests_shed_total", _C, _INGRESS, "Requests turned away, by the code of their error.", ("reason",)),
    Definition(
        "requests_failed_total", _C, _INGRESS, "Requests that ended on a fault of the service, by the code of their "
        "error.", ("reason",),
    ),
    Definition(
        "requests_cancelled_total", _C, _INGRESS, "Requests whose client left: waiting for a first token, or "
        "streaming.", ("phase",),
    ),
    Definition(
        "request_success_total", _C, _INGRESS, "Outputs (choices of requests) that ended, by OpenAI's finish reason.",
        ("finished_reason",),
    ),
    Definition(
        "time_to_first_token_seconds", _H, _INGRESS, "From a request's arrival at the ingress to the first token of "
        "each of its outputs; includes reading and tokenizing.", buckets=TTFT_BUCKETS,
    ),
    Definition(
        "inter_token_latency_seconds", _H, _INGRESS, "Between one update of an output and the next, as the ingress "
        "gets them; an update has one token, or more where guesses were right or the ingress was late.",
        buckets=TOKEN_BUCKETS,
    ),
    Definition(
        "request_time_per_output_token_seconds", _H, _INGRESS, "Per output of two tokens or more: first token to last, "
        "over the tokens after the first.", buckets=TOKEN_BUCKETS,
    ),
    Definition(
        "e2e_request_latency_seconds", _H, _INGRESS, "From a request's arrival at the ingress to its end, of those "
        "that were answered.", buckets=REQUEST_BUCKETS,
    ),
    Definition(
        "request_framework_time_seconds", _H, _INGRESS, "The part of the time to first token that is not the engine's: "
        "HTTP, tokenization, routing, transport.", buckets=TTFT_BUCKETS,
    ),
    Definition(
        "request_queue_time_seconds", _H, _INGRESS, "From an output's arrival in the engine to its first step, by the "
        "engine's clock.", buckets=REQUEST_BUCKETS,
    ),
    Definition(
        "request_prefill_time_seconds", _H, _INGRESS, "From an output's first step to its first token, by the engine's "
        "clock.", buckets=REQUEST_BUCKETS,
    ),
    Definition(
        "request_decode_time_seconds", _H, _INGRESS, "From an output's first token to its last, as the ingress gets "
        "them.", buckets=REQUEST_BUCKETS,
    ),
    Definition("request_prompt_tokens", _H, _INGRESS, "Prompt tokens of a request.", buckets=COUNT_BUCKETS),
    Definition("request_generation_tokens", _H, _INGRESS, "Tokens of an output.", buckets=COUNT_BUCKETS),
    Definition(
        "request_params_max_tokens", _H, _INGRESS, "The max_tokens of outputs that have one.", buckets=COUNT_BUCKETS,
        unused="for questions about clients; what they get is shown",
    ),
    Definition(
        "request_params_n", _H, _INGRESS, "Outputs of a request.", buckets=N_BUCKETS,
        unused="for questions about clients; most ask for one",
    ),
    # The service level objective.
    Definition(
        "slo_requests_total", _C, _INGRESS, "Requests that the objective counts: answered, failed or turned away for "
        "want of capacity; neither clients' errors, nor limits of keys, nor clients that left.",
    ),
    Definition(
        "slo_good_requests_total", _C, _INGRESS, "Those of them that were answered and met a target: ttft, tpot, or "
        "all (both).", ("objective",),
    ),
    Definition("slo_good_tokens_total", _C, _INGRESS, "Output tokens of requests that met all targets."),
    Definition("slo_target_seconds", _G, _INGRESS, "The configured targets: ttft and tpot.", ("objective",)),
    Definition("slo_target_ratio", _G, _INGRESS, "The share of requests that shall meet all targets."),
    # Keys.
    Definition(
        "key_requests_total", _C, _INGRESS, "Requests to generate that ended, by the key's name and outcome; the name "
        "is empty where there are no keys.", ("key", "outcome"),
    ),
    Definition(
        "key_tokens_total", _C, _INGRESS, "Tokens by the key's name and kind: prompt (cached ones included), cached, "
        "generated.", ("key", "kind"),
    ),
    Definition(
        "key_refused_total", _C, _INGRESS, "Requests that the limits of a key refused, by its name and the limit.",
        ("key", "reason"),
    ),
    # Admission.
    Definition("admission_queued_requests", _G, _INGRESS, "Requests that wait in the ingress for their turn."),
    Definition("admission_queued_tokens", _G, _INGRESS, "Prompt tokens of these."),
    Definition(
        "admission_sent_requests", _G, _INGRESS, "Requests that were sent to replicas and have no token yet.",
    ),
    Definition(
        "admission_tokens_per_second", _G, _INGRESS, "Rate at which the replicas take up this ingress's prompts; what "
        "Retry-After is computed from.",
    ),
    Definition(
        "admission_refused_total", _C, _INGRESS, "Requests refused for want of capacity: queue_full or "
        "waited_too_long.", ("reason",),
    ),
    # Routing and migration.
    Definition(
        "router_decisions_total", _C, _INGRESS, "Requests by why they went where they did: cached (no replica held a "
        "longer prefix), load (another did, but would have taken longer), cold (none held any).", ("reason",),
    ),
    Definition("router_prompt_tokens_total", _C, _INGRESS, "Prompt tokens of requests that were placed."),
    Definition(
        "router_predicted_cached_tokens_total", _C, _INGRESS, "Those of them that the router expected in the chosen "
        "replica's cache.",
    ),
    Definition("router_cached_tokens_total", _C, _INGRESS, "Those of them that were there."),
    Definition(
        "router_predicted_ttft_seconds_total", _C, _INGRESS, "Sum of the router's predictions of the time from "
        "placement to first token.",
    ),
    Definition("router_ttft_seconds_total", _C, _INGRESS, "Sum of the times that it took."),
    Definition(
        "migrations_total", _C, _INGRESS, "Requests sent on to another replica, by what became of the first: died, "
        "silent, engine_fault.", ("reason",),
    ),
    # What runs.
    Definition("build_info", _G, _INGRESS, "1; the labels tell versions.", ("version", "ray")),
    Definition(
        "model_info", _G, _INGRESS, "1; the labels tell the model that is served.", ("fingerprint", "max_model_len"),
    ),
    Definition(
        "process_metrics_age_seconds", _G, _INGRESS, "How old the values of each process are in this answer: 0, unless "
        "some process did not answer in time. Only in /metrics.", ("process", "id"),
    ),
    # The engine: batch.
    Definition("num_requests_running", _G, _REPLICA, "Requests in the running batch."),
    Definition("num_requests_waiting", _G, _REPLICA, "Requests that wait to be scheduled."),
    Definition(
        "num_requests_waiting_by_reason", _G, _REPLICA, "The waiting requests, under what the first of them lacks.",
        ("reason",),
    ),
    Definition("num_tokens_waiting", _G, _REPLICA, "Tokens of waiting requests still to be computed."),
    Definition("num_preemptions_total", _C, _REPLICA, "Requests that gave their KV blocks back and waited again."),
    Definition("engine_steps_total", _C, _REPLICA, "Steps of the engine."),
    Definition(
        "engine_step_seconds_total", _C, _REPLICA, "Time of steps by stage: schedule (choosing who runs), launch "
        "(building batches; on a CPU the model too), wait (for the device), update (taking in the outcome).",
        ("stage",),
    ),
    Definition("prompt_tokens_total", _C, _REPLICA, "Prompt tokens that came in."),
    Definition("generation_tokens_total", _C, _REPLICA, "Tokens that were generated."),
    Definition(
        "engine_requests_total", _C, _REPLICA, "Outputs that ended in the engine, by its reason; abort is a client "
        "that left, or a text that ended before its tokens did.", ("finished_reason",),
    ),
    Definition(
        "prefill_tokens_per_second", _G, _REPLICA, "Rate at which prompts are computed, over the last seconds that "
        "computed any.",
    ),
    # The engine: KV cache.
    Definition("kv_cache_usage_perc", _G, _REPLICA, "KV blocks in use by requests, of all, 0 to 1."),
    Definition("kv_blocks", _G, _REPLICA, "KV blocks by state: free, cached, owned.", ("state",)),
    Definition(
        "cache_config_info", _G, _REPLICA, "1; the labels tell the KV cache.",
        ("block_size", "num_gpu_blocks", "enable_prefix_caching"),
    ),
    Definition("prefix_cache_queries_total", _C, _REPLICA, "Prompt tokens looked up in the prefix cache."),
    Definition("prefix_cache_hits_total", _C, _REPLICA, "Prompt tokens that the prefix cache had."),
    Definition(
        "kv_block_lifetime_seconds", _H, _REPLICA, "Of one KV block in eight: from being taken by a request to having "
        "nothing of use in it, or another's content.", buckets=BOUNDS_S,
    ),
    Definition(
        "kv_block_idle_before_evict_seconds", _H, _REPLICA, "Of one in eight, when its content is given up: since "
        "nobody owned it.", buckets=BOUNDS_S,
    ),
    Definition(
        "kv_block_reuse_gap_seconds", _H, _REPLICA, "Of one in eight, when a request takes up its content again: since "
        "nobody owned it.", buckets=BOUNDS_S,
    ),
    # The engine: speculation.
    Definition("spec_decode_num_draft_tokens_total", _C, _REPLICA, "Tokens guessed and verified."),
    Definition("spec_decode_num_accepted_tokens_total", _C, _REPLICA, "Guessed tokens that were right."),
    # The autoscaler.
    Definition(
        "autoscaler_wanted_replicas", _G, _CONTROLLER, "Engine replicas that each reason calls for, not rounded: "
        "prompts, room, bursts, unreported.", ("reason",),
    ),
    Definition("autoscaler_target_replicas", _G, _CONTROLLER, "Engine replicas that the policy decided on."),
    Definition("autoscaler_running_replicas", _G, _CONTROLLER, "Engine replicas that run."),
    Definition(
        "autoscaler_decisions_total", _C, _CONTROLLER, "Changes of the target: up or down, by the reason that called "
        "for most; and faults of the policy.", ("direction", "reason"),
    ),
)  # fmt: skip

DEFINITIONS = {definition.name: definition for definition in _ALL}
"""By name, in the order in which /metrics shows them."""
