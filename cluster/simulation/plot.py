"""The picture of docs/autoscaling.md. Needs matplotlib, which the service does not."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BIN_S = 10


def draw(comparisons: list[dict[str, Any]], path: Path) -> None:
    """A row for each trace: replicas over time above the load, and what each setting costs and gets."""
    mpl.rcParams["svg.hashsalt"] = "the same file from the same results"
    figure = Figure(figsize=(11, 3.4 * len(comparisons)), layout="constrained")
    axes = figure.subplots(len(comparisons), 2, width_ratios=(3, 2), squeeze=False)
    for (over_time, trade), comparison in zip(axes, comparisons, strict=True):
        _draw_over_time(over_time, comparison)
        _draw_trade(trade, comparison)
    figure.savefig(path, dpi=100, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw_over_time(axes: Axes, comparison: dict[str, Any]) -> None:
    for name, result in comparison["shown"].items():
        if "no dearer" not in name and "foresight" not in name:
            axes.plot([second / 60 for second in range(len(result.running))], result.running, label=name)
    axes.set(title=comparison["title"], xlabel="minutes", ylabel="replicas that take requests")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small", loc="upper left")
    times = [arrival.time_s for arrival in comparison["trace"]]
    counts = [0] * (int(times[-1] // BIN_S) + 1)
    for time_s in times:
        counts[int(time_s // BIN_S)] += 1
    load = axes.twinx()
    load.fill_between(
        [index * BIN_S / 60 for index in range(len(counts))],
        [count / BIN_S for count in counts],
        color="0.5",
        alpha=0.25,
    )
    load.set_ylabel("requests per second")
    load.set_ylim(0, 2.5 * max(counts) / BIN_S)


def _draw_trade(axes: Axes, comparison: dict[str, Any]) -> None:
    for name, results, mark in (
        ("foresight, swept", comparison["foresight"], "+"),
        ("Serve's default, swept", comparison["Serve's default"], "."),
        ("fixed fleets", comparison["fixed fleet"], "x"),
        ("QueueAndKvPolicy", [comparison["ours"]], "*"),
    ):
        size = 150 if mark == "*" else 25
        hours = [result.hours for result in results]
        axes.scatter(hours, [100 * result.attainment for result in results], marker=mark, s=size, label=name)
    ours = comparison["ours"].attainment
    best = max(ours, *(each.attainment for kind in ("Serve's default", "foresight") for each in comparison[kind]))
    axes.set(xlabel="replica-hours", ylabel="% of requests within the SLO", ylim=(100 * ours - 5, 100 * best + 1))
    axes.set_xlim(0, 2.5 * comparison["ours"].hours)
    axes.legend(fontsize="small", loc="lower right")
    axes.grid(alpha=0.3)
