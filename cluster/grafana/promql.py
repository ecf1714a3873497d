"""PromQL that panels have in common. Names are those of serve_app/metrics/definitions.py."""

ONE_MODEL = 'model_name=~"$model_name"'
BUDGET = f"max(qwen3:slo_budget:ratio{{{ONE_MODEL}}})"
"""The share of requests that may miss the objective. With `spent`, from cluster/prometheus/rules.yaml."""


def selected(metric: str, labels: str = "") -> str:
    """The series of a metric, of the chosen model."""
    return f"qwen3_{metric}{{{ONE_MODEL}{', ' + labels if labels else ''}}}"


def rate(metric: str, by: str = "", labels: str = "") -> str:
    """A counter's rise per second, summed over all processes, or for each value of a label."""
    return f"sum{_by(by)}(rate({selected(metric, labels)}[$__rate_interval]))"


def total(metric: str, by: str = "", labels: str = "") -> str:
    """A gauge, summed over all processes, or for each value of a label."""
    return f"sum{_by(by)}({selected(metric, labels)})"


def ratio(part: str, whole: str) -> str:
    """Of two counters, how much of the one there is for the other."""
    return f"{rate(part)} / {rate(whole)}"


def mean(histogram: str, by: str = "") -> str:
    """A histogram's mean over the last while."""
    return f"{rate(histogram + '_sum', by)} / {rate(histogram + '_count', by)}"


def quantile(histogram: str, share: float) -> str:
    """A quantile of all that was observed over the last while."""
    return f"histogram_quantile({share:g}, {rate(histogram + '_bucket', 'le')})"


def quantiles(histogram: str, *shares: float) -> dict[str, str]:
    """Lines of some quantiles and the mean, by legend."""
    return {f"p{share * 100:g}": quantile(histogram, share) for share in shares} | {"mean": mean(histogram)}


def spent(window: str) -> str:
    """The share of requests that missed the objective over one of the rules' windows."""
    return f"max(qwen3:slo_error_ratio:rate{window}{{{ONE_MODEL}}})"


def resolve(expression: str, interval_s: int) -> str:
    """A panel's expression as Prometheus takes it: all models, and rates over so many seconds."""
    return expression.replace("$__rate_interval", f"{interval_s}s").replace("$model_name", ".*")


def _by(label: str) -> str:
    return f" by ({label}) " if label else ""
