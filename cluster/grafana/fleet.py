"""The dashboard of the fleet: replicas, the autoscaler, admission, routing, migration."""

from cluster.grafana.build import Panel, Row
from cluster.grafana.promql import mean, rate, ratio, selected, total

_SCALING = Row(
    "Replicas and the autoscaler",
    (
        Panel(
            "Engine replicas",
            "What the policy decided on, and what runs.",
            "short",
            {
                "target": "max(qwen3_autoscaler_target_replicas)",
                "running": "max(qwen3_autoscaler_running_replicas)",
                "telling metrics": f"count({selected('num_requests_running')})",
            },
        ),
        Panel(
            "Wanted, by reason",
            "What each reason calls for, not rounded: prompts that arrive and wait, room in the KV cache or batch, "
            "requests at replicas that have not reported.",
            "short",
            {"{{reason}}": "max by (reason) (qwen3_autoscaler_wanted_replicas)"},
        ),
        Panel(
            "Decisions",
            "Changes of the target within an hour; fault is a fault of the policy.",
            "short",
            {"{{direction}} {{reason}}": "sum by (direction, reason) (increase(qwen3_autoscaler_decisions_total[1h]))"},
        ),
        Panel(
            "Ingresses",
            "Ingress processes that tell metrics.",
            "short",
            {"ingresses": f"count({selected('build_info')})"},
        ),
        Panel(
            "Yield",
            "Generated tokens per second for each replica: what a replica costs, turned round.",
            "short",
            {"tokens/s a replica": f"{rate('generation_tokens_total')} / count({selected('num_requests_running')})"},
        ),
        Panel(
            "Age of values",
            "Of each process, in /metrics; above 0 one of them does not answer.",
            "s",
            {"{{process}} {{id}}": f"max by (process, id) ({selected('process_metrics_age_seconds')})"},
        ),
    ),
)
_ADMISSION = Row(
    "Admission",
    (
        Panel(
            "Queue in the ingress",
            "Requests that wait for their turn, and those sent that have no token yet.",
            "short",
            {"queued": total("admission_queued_requests"), "sent": total("admission_sent_requests")},
        ),
        Panel(
            "Queued tokens",
            "Prompt tokens that wait in the ingresses.",
            "short",
            {"tokens": total("admission_queued_tokens")},
        ),
        Panel(
            "Rate of take-up",
            "Prompt tokens per second, as each ingress sees it; Retry-After goes by it.",
            "short",
            {"{{ingress}}": total("admission_tokens_per_second", "ingress")},
        ),
        Panel(
            "Refused",
            "For want of capacity, by reason.",
            "reqps",
            {"{{reason}}": rate("admission_refused_total", "reason")},
        ),
        Panel(
            "Framework time by ingress",
            "Mean part of the time to first token that is not the engine's.",
            "s",
            {"{{ingress}}": mean("request_framework_time_seconds", "ingress")},
        ),
    ),
)
_ROUTING = Row(
    "Routing",
    (
        Panel(
            "Decisions",
            "Why requests went where they did: cached, load (a longer prefix elsewhere, but slower), cold.",
            "reqps",
            {"{{reason}}": rate("router_decisions_total", "reason")},
            stacked=True,
        ),
        Panel(
            "Cached share of prompts",
            "As the router expected it, and as it was.",
            "percentunit",
            {
                "expected": ratio("router_predicted_cached_tokens_total", "router_prompt_tokens_total"),
                "found": ratio("router_cached_tokens_total", "router_prompt_tokens_total"),
            },
            most=1,
        ),
        Panel(
            "Time to first token",
            "Mean from placement on, as the router predicted it, and as it was.",
            "s",
            {
                "predicted": f"{rate('router_predicted_ttft_seconds_total')} / {rate('router_decisions_total')}",
                "real": f"{rate('router_ttft_seconds_total')} / {rate('router_decisions_total')}",
            },
        ),
        Panel(
            "Balance: requests",
            "Running at each replica.",
            "short",
            {"{{replica}}": total("num_requests_running", "replica")},
        ),
        Panel(
            "Balance: prompts",
            "Waiting tokens at each replica.",
            "short",
            {"{{replica}}": total("num_tokens_waiting", "replica")},
        ),
        Panel(
            "Migrations",
            "Requests that went on at another replica, by what became of the first.",
            "reqps",
            {"{{reason}}": rate("migrations_total", "reason")},
        ),
    ),
)
ROWS = (_SCALING, _ADMISSION, _ROUTING)
