"""From samples to numbers: percentiles, goodput against an SLO, the knee of a ramp."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import numpy as np

from loadtest.load.samples import Outcome, Sample

PERCENTILES = (50, 90, 99)


class Slo(msgspec.Struct, frozen=True):
    """What a request must keep to be good, in seconds. None: no limit."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    def is_met(self, sample: Sample) -> bool:
        """Whether a completed request kept all limits. One token has no TPOT, and keeps any limit of it."""
        if sample.outcome is not Outcome.COMPLETED:
            return False
        pairs = ((self.ttft_s, sample.ttft_s), (self.tpot_s, sample.tpot_s), (self.e2e_s, sample.duration_s))
        return all(limit is None or value is None or value <= limit for limit, value in pairs)


class Phase(msgspec.Struct, frozen=True):
    """A part of a test with one number of users, in seconds since its start."""

    name: str
    start_s: float
    end_s: float
    users: int
    is_gated: bool = True
    """Whether the SLO must be kept in it; in a spike it need not."""

    def takes(self, sample: Sample) -> bool:
        """Whether a request was sent in it."""
        return self.start_s <= sample.sent_s < self.end_s


def percentiles_ms(values: Iterable[float | None]) -> dict[str, float]:
    """p50, p90, p99, mean and max in milliseconds of values in seconds; empty where there are none."""
    found = np.array([value for value in values if value is not None])
    if not found.size:
        return {}
    made = {f"p{rank}": float(np.percentile(found, rank)) for rank in PERCENTILES}
    made |= {"mean": float(found.mean()), "max": float(found.max())}
    return {name: round(value * 1000, 3) for name, value in made.items()}


def attainment(samples: Sequence[Sample], slo: Slo) -> float:
    """The share of requests that met the SLO, of all but those that were cancelled on purpose."""
    counted = [each for each in samples if each.outcome is not Outcome.CANCELLED]
    return sum(slo.is_met(each) for each in counted) / len(counted) if counted else 0.0


def summarize(samples: Sequence[Sample], slo: Slo, duration_s: float) -> dict[str, Any]:
    """All numbers of a part of a test.

    Args:
        duration_s: of that part; rates are per second of it.
    """
    completed = [each for each in samples if each.outcome is Outcome.COMPLETED]
    prompt_tokens = sum(each.prompt_tokens for each in completed)
    lags = percentiles_ms(each.lag_s for each in samples)
    return {
        "duration_s": round(duration_s, 3),
        "requests": {str(outcome): count for outcome, count in sorted(Counter(e.outcome for e in samples).items())},
        "errors": dict(Counter(each.error for each in samples if each.error).most_common(10)),
        "requests_per_s": _rate(len(completed), duration_s),
        "output_tokens_per_s": _rate(sum(each.completion_tokens for each in completed), duration_s),
        "prompt_tokens_cached": round(sum(each.cached_tokens for each in completed) / prompt_tokens, 4)
        if prompt_tokens
        else 0.0,
        "ttft_ms": percentiles_ms(each.ttft_s for each in samples),
        "tpot_ms": percentiles_ms(each.tpot_s for each in completed),
        "itl_ms": percentiles_ms(gap for each in samples for gap in each.itl_s),
        "e2e_ms": percentiles_ms(each.duration_s for each in completed),
        "goodput_per_s": _rate(sum(slo.is_met(each) for each in completed), duration_s),
        "slo_attainment": round(attainment(samples, slo), 4),
    } | ({"dispatch_lag_ms": lags} if lags else {})


def knee(summaries: Sequence[dict[str, Any]], wanted: float) -> int | None:
    """Index of the ramp's step with the best goodput among those that keep the SLO; None if none does."""
    keeping = [index for index, each in enumerate(summaries) if each["slo_attainment"] >= wanted]
    return max(keeping, key=lambda index: summaries[index]["goodput_per_s"], default=None)


def drift(samples: Sequence[Sample]) -> dict[str, float]:
    """Median TTFT and TPOT of the test's last third as a multiple of the first's: above 1 it became slower."""
    completed = sorted((each for each in samples if each.outcome is Outcome.COMPLETED), key=lambda each: each.sent_s)
    third = len(completed) // 3
    found = {}
    for name in ("ttft_s", "tpot_s"):
        first, last = (
            percentiles_ms(getattr(each, name) for each in part) for part in (completed[:third], completed[-third:])
        )
        if third and first and last and first["p50"]:
            found[name.removesuffix("_s")] = round(last["p50"] / first["p50"], 3)
    return found


def missed(kind: str, phases: Sequence[Phase], summaries: Sequence[dict[str, Any]], wanted: float) -> str:
    """Why the test fails; empty if it does not."""
    if not any(each["requests"].get(Outcome.COMPLETED) for each in summaries):
        return "no request was completed"
    if kind == "ramp":
        return "" if knee(summaries, wanted) is not None else f"no step had {wanted:.0%} of its requests within the SLO"
    short = [
        f"{summary['phase']}: {summary['slo_attainment']:.1%}"
        for phase, summary in zip(phases, summaries, strict=True)
        if phase.is_gated and summary["slo_attainment"] < wanted
    ]
    return f"less than {wanted:.0%} of requests within the SLO in {', '.join(short)}" if short else ""


def _rate(count: int, duration_s: float) -> float:
    return round(count / duration_s, 3) if duration_s > 0 else 0.0
