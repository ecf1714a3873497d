"""The dashboard for whoever answers for the service: what clients get, against the objective."""

from cluster.grafana.build import Panel, Row
from cluster.grafana.promql import BUDGET, mean, quantiles, rate, selected, spent, total

GOOD, TTFT, TPOT = 'objective="all"', 'objective="ttft"', 'objective="tpot"'
_OBJECTIVE = Row(
    "Objective",
    (
        Panel(
            "Requests within the objective",
            "Share of requests that were answered and met both targets, of those that the objective counts.",
            "percentunit",
            {"good": f"{rate('slo_good_requests_total', labels=GOOD)} / {rate('slo_requests_total')}"},
            kind="stat",
            most=1,
            width=4,
        ),
        Panel(
            "Objective",
            "The share that was promised.",
            "percentunit",
            {"promised": f"min({selected('slo_target_ratio')})"},
            kind="stat",
            width=4,
        ),
        Panel(
            "Requests",
            "Requests that ended, per second.",
            "reqps",
            {"all": rate("requests_total")},
            kind="stat",
            width=4,
        ),
        Panel(
            "Open requests",
            "Requests that have not ended.",
            "short",
            {"open": total("requests_open")},
            kind="stat",
            width=4,
        ),
        Panel(
            "Output",
            "Tokens generated per second.",
            "short",
            {"tokens/s": rate("generation_tokens_total")},
            kind="stat",
            width=4,
        ),
        Panel(
            "Goodput",
            "Output tokens of requests that met both targets, per second.",
            "short",
            {"tokens/s": rate("slo_good_tokens_total")},
            kind="stat",
            width=4,
        ),
        Panel(
            "Goodput in requests",
            "Requests that the objective counts, and those of them that met each target.",
            "reqps",
            {"all": rate("slo_requests_total"), "within {{objective}}": rate("slo_good_requests_total", "objective")},
        ),
        Panel(
            "Share outside the objective",
            "Over windows of the alerts; the budget is what was promised.",
            "percentunit",
            {
                "5 min": spent("5m"),
                "30 min": spent("30m"),
                "1 h": spent("1h"),
                "6 h": spent("6h"),
                "budget": BUDGET,
            },
        ),
        Panel(
            "Burn rate",
            "How many times faster than allowed the budget is spent. Over 14.4 for an hour spends 2 % of a month's.",
            "none",
            {
                "5 min": f"{spent('5m')} / {BUDGET}",
                "1 h": f"{spent('1h')} / {BUDGET}",
                "1 d": f"{spent('1d')} / {BUDGET}",
            },
        ),
    ),
)
_LATENCY = Row(
    "Latency",
    (
        Panel(
            "Time to first token",
            "From arrival at the ingress; the target is of the objective.",
            "s",
            {
                **quantiles("time_to_first_token_seconds", 0.5, 0.9, 0.99),
                "target": f"max({selected('slo_target_seconds', TTFT)})",
            },
        ),
        Panel(
            "Time per output token",
            "Of each output, on average over its tokens.",
            "s",
            {
                **quantiles("request_time_per_output_token_seconds", 0.5, 0.9, 0.99),
                "target": f"max({selected('slo_target_seconds', TPOT)})",
            },
        ),
        Panel(
            "Whole request",
            "From arrival to end, of requests that were answered.",
            "s",
            quantiles("e2e_request_latency_seconds", 0.5, 0.9, 0.99),
        ),
        Panel(
            "Between tokens",
            "Each gap between two updates of an output.",
            "s",
            quantiles("inter_token_latency_seconds", 0.5, 0.9, 0.99),
        ),
        Panel(
            "Time to first token: where it goes",
            "Means. Framework is all that is not the engine: HTTP, tokenization, admission, routing, transport.",
            "s",
            {
                "framework": mean("request_framework_time_seconds"),
                "engine: queue": mean("request_queue_time_seconds"),
                "engine: prefill": mean("request_prefill_time_seconds"),
            },
            stacked=True,
        ),
        Panel("Decode", "From first token to last.", "s", quantiles("request_decode_time_seconds", 0.5, 0.9, 0.99)),
    ),
)
_OUTCOMES = Row(
    "Outcomes",
    (
        Panel(
            "Requests by outcome",
            "Requests that ended.",
            "reqps",
            {"{{outcome}}": rate("requests_total", "outcome")},
            stacked=True,
        ),
        Panel(
            "Turned away, failed, cancelled",
            "By reason; of cancelled ones, when the client left.",
            "reqps",
            {
                "shed: {{reason}}": rate("requests_shed_total", "reason"),
                "failed: {{reason}}": rate("requests_failed_total", "reason"),
                "cancelled: {{phase}}": rate("requests_cancelled_total", "phase"),
            },
        ),
        Panel(
            "Finish reasons",
            "Of outputs.",
            "reqps",
            {"{{finished_reason}}": rate("request_success_total", "finished_reason")},
            stacked=True,
        ),
        Panel(
            "Prompt lengths", "Tokens.", "short", {"{{le}}": rate("request_prompt_tokens_bucket", "le")}, kind="heatmap"
        ),
        Panel(
            "Output lengths",
            "Tokens.",
            "short",
            {"{{le}}": rate("request_generation_tokens_bucket", "le")},
            kind="heatmap",
        ),
        Panel(
            "What runs",
            "Versions and models.",
            "short",
            {
                "{{version}}": f"count by (version, ray) ({selected('build_info')})",
                "{{model_name}}": f"count by (model_name, fingerprint, max_model_len) ({selected('model_info')})",
            },
            kind="table",
        ),
    ),
)
_KEYS = Row(
    "API keys",
    (
        Panel(
            "Requests by key",
            "Requests that ended.",
            "reqps",
            {"{{key}}": rate("key_requests_total", "key")},
            stacked=True,
        ),
        Panel(
            "Tokens by key",
            "Prompts (cached ones too) and outputs.",
            "short",
            {"{{key}} {{kind}}": rate("key_tokens_total", "key, kind", 'kind!="cached"')},
            stacked=True,
        ),
        Panel(
            "Refused by limits of keys",
            "By key and limit.",
            "reqps",
            {"{{key}} {{reason}}": rate("key_refused_total", "key, reason")},
        ),
    ),
)
ROWS = (_OBJECTIVE, _LATENCY, _OUTCOMES, _KEYS)
