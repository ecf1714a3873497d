"""The dashboard of the engines: batch, KV cache, steps."""

from cluster.grafana.build import Panel, Row
from cluster.grafana.promql import quantile, quantiles, rate, ratio, selected, total

STEP = rate("engine_steps_total")
_BATCH = Row(
    "Batch",
    (
        Panel(
            "Running and waiting",
            "Requests, of all replicas.",
            "short",
            {"running": total("num_requests_running"), "waiting": total("num_requests_waiting")},
        ),
        Panel(
            "Waiting for",
            "What the first waiting request of each replica lacks: tokens (the step is full), seqs (as many run as "
            "may), blocks (KV cache).",
            "short",
            {"{{reason}}": total("num_requests_waiting_by_reason", "reason")},
            stacked=True,
        ),
        Panel(
            "Waiting tokens",
            "Tokens of waiting requests still to be computed.",
            "short",
            {"tokens": total("num_tokens_waiting")},
        ),
        Panel(
            "Tokens",
            "Prompt tokens that came in, and tokens generated, per second.",
            "short",
            {"prompt": rate("prompt_tokens_total"), "generated": rate("generation_tokens_total")},
        ),
        Panel(
            "Rate of prefill",
            "Prompt tokens per second while prompts are computed, of each replica.",
            "short",
            {"{{replica}}": total("prefill_tokens_per_second", "replica")},
        ),
        Panel(
            "Ends",
            "Outputs that ended in the engine.",
            "reqps",
            {"{{finished_reason}}": rate("engine_requests_total", "finished_reason")},
            stacked=True,
        ),
    ),
)
_CACHE = Row(
    "KV cache",
    (
        Panel(
            "In use",
            "KV blocks in use by requests, of each replica's.",
            "percentunit",
            {"{{replica}}": f"max by (replica) ({selected('kv_cache_usage_perc')})"},
            most=1,
        ),
        Panel(
            "Blocks",
            "Owned by requests; cached: nobody's, but findable; free.",
            "short",
            {"{{state}}": total("kv_blocks", "state")},
            stacked=True,
        ),
        Panel(
            "Prefix cache",
            "Share of prompt tokens that were cached.",
            "percentunit",
            {"hits": ratio("prefix_cache_hits_total", "prefix_cache_queries_total")},
            most=1,
        ),
        Panel(
            "Prompt tokens by source",
            "Computed, and found in the cache, per second.",
            "short",
            {
                "computed": f"{rate('prefix_cache_queries_total')} - {rate('prefix_cache_hits_total')}",
                "cached": rate("prefix_cache_hits_total"),
            },
            stacked=True,
        ),
        Panel(
            "Idle blocks",
            "How long cached content that nobody owns waits: until it is given up, or until it is wanted again. Where "
            "the first is shorter than the second, more memory would give more hits.",
            "s",
            {
                "given up: p50": quantile("kv_block_idle_before_evict_seconds", 0.5),
                "wanted again: p50": quantile("kv_block_reuse_gap_seconds", 0.5),
                "wanted again: p90": quantile("kv_block_reuse_gap_seconds", 0.9),
            },
        ),
        Panel(
            "Lifetime of blocks",
            "From being taken to being given to another request.",
            "s",
            quantiles("kv_block_lifetime_seconds", 0.5, 0.9),
        ),
        Panel(
            "Preemptions",
            "Requests that gave their blocks back and waited again, per second.",
            "ops",
            {"{{replica}}": rate("num_preemptions_total", "replica")},
        ),
        Panel(
            "Configuration",
            "Of each replica's KV cache.",
            "short",
            {"{{replica}}": selected("cache_config_info")},
            kind="table",
        ),
    ),
)
_STEPS = Row(
    "Steps",
    (
        Panel(
            "Time of a step by stage",
            "Means: choosing who runs, building and launching (on a CPU the model runs here), waiting for the device, "
            "taking in the outcome.",
            "s",
            {"{{stage}}": f"{rate('engine_step_seconds_total', 'stage')} / scalar({STEP})"},
            stacked=True,
        ),
        Panel(
            "Busy",
            "Seconds of steps per second, of each replica.",
            "percentunit",
            {"{{replica}}": rate("engine_step_seconds_total", "replica")},
            most=1,
        ),
        Panel("Steps", "Per second, of each replica.", "ops", {"{{replica}}": rate("engine_steps_total", "replica")}),
        Panel(
            "Tokens a step",
            "Generated tokens, on average.",
            "short",
            {"tokens": f"{rate('generation_tokens_total')} / {STEP}"},
        ),
        Panel(
            "Guesses",
            "Tokens guessed, and those that were right, per second.",
            "short",
            {
                "guessed": rate("spec_decode_num_draft_tokens_total"),
                "right": rate("spec_decode_num_accepted_tokens_total"),
            },
        ),
    ),
)
ROWS = (_BATCH, _CACHE, _STEPS)
