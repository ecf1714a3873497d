"""The picture of docs/routing.md. Needs matplotlib, which the service does not."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from cluster.simulate_routing import OURS, Comparison


def draw(comparisons: Sequence[Comparison], loads: Sequence[float], path: Path) -> None:
    """A row for each trace: the time to first token at the 90th percentile and the hit rate, over the load."""
    mpl.rcParams["svg.hashsalt"] = "the same file from the same results"
    figure = Figure(figsize=(11, 3.6 * len(comparisons)), layout="constrained")
    axes = figure.subplots(len(comparisons), 2, squeeze=False)
    for (left, right), comparison in zip(axes, comparisons, strict=True):
        for name, found in comparison.by_load.items():
            style = {"linewidth": 2.5, "color": "black"} if name == OURS else {"linewidth": 1.2}
            left.plot(loads, [routed.ttft_s(0.9) for routed in found], marker="o", markersize=3, label=name, **style)
            right.plot(loads, [100 * routed.hit_rate for routed in found], marker="o", markersize=3, **style)
        left.set(title=comparison.title, xlabel="load, times the trace's", ylabel="TTFT p90, seconds", yscale="log")
        right.set(xlabel="load, times the trace's", ylabel="% of prompt tokens cached")
        right.set_ylim(bottom=0)
        left.legend(fontsize="small")
        for each in (left, right):
            each.grid(alpha=0.3)
    figure.savefig(path, dpi=100, metadata={"Date": None} if path.suffix == ".svg" else None)
