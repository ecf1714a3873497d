"""A load test's report: one HTML file with its plots in it, which needs nothing else."""

import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtest.load.samples import Outcome, Sample

COLORS = {
    Outcome.COMPLETED: "tab:blue",
    Outcome.CANCELLED: "tab:gray",
    Outcome.REJECTED: "tab:orange",
    Outcome.FAILED: "tab:red",
    Outcome.UNFINISHED: "lightgray",
}
DEFINITIONS = """TTFT: from sending to the first chunk with output. ITL: gaps between chunks with output, all requests
together. TPOT: (last chunk - first chunk) / (output tokens - 1). E2E: from sending to the stream's end. Goodput:
completed requests a second that kept every limit of the SLO. Attainment: their share of all but the cancelled.
Dispatch lag: how much later than its trace wanted a request was sent."""
STYLE = """body{font:14px system-ui;max-width:70rem;margin:2rem auto;padding:0 1rem}td,th{padding:.2rem .6rem;
text-align:right;white-space:nowrap}th{background:#eee;white-space:normal}svg{max-width:100%}"""


def write_report(path: Path, summary: dict[str, Any], samples: Sequence[Sample]) -> None:
    """Write the file."""
    title = f"Load test: {summary['kind']}, {summary['url']}"
    verdict = f"FAILED: {summary['missed']}" if summary["missed"] else "passed"
    verdict += f". {_objective(summary['slo'])}"
    if summary.get("knee"):
        verdict += f" The knee is {summary['knee']['phase']}, with {summary['knee']['users']} users."
    rows = [_row(each) for each in [{"phase": "all", "users": ""} | summary, *summary["phases"]]]
    head = "".join(f"<th>{name}</th>" for name in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(v))}</td>" for v in row.values()) + "</tr>" for row in rows)
    path.write_text(
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
        f"<h1>{html.escape(title)}</h1><p><b>{html.escape(verdict)}</b></p><p>{DEFINITIONS}</p>"
        f"<table><tr>{head}</tr>{body}</table>{_plots(summary, samples)}"
        "<details><summary>Everything</summary>"
        f"<pre>{html.escape(json.dumps(summary, indent=1))}</pre></details></html>",
        encoding="utf-8",
    )


def _objective(slo: dict[str, float | None]) -> str:
    limits = [f"{name.upper()} within {limit:g} ms" for name in ("ttft", "tpot", "e2e") if (limit := slo[f"{name}_ms"])]
    return f"SLO: {' and '.join(limits) or 'completed'} for {slo['attainment']:.0%} of the requests."


def _row(summary: dict[str, Any]) -> dict[str, Any]:
    row = {"phase": summary["phase"], "users": summary["users"], "requests": sum(summary["requests"].values())}
    row |= {"completed/s": summary["requests_per_s"], "goodput/s": summary["goodput_per_s"]}
    row |= {"attainment": f"{summary['slo_attainment']:.1%}", "output tok/s": summary["output_tokens_per_s"]}
    for name in ("ttft", "tpot", "itl", "e2e"):
        found = summary[f"{name}_ms"]
        row[f"{name} p50 / p99 ms"] = f"{found['p50']:.1f} / {found['p99']:.1f}" if found else ""
    return row


def _plots(summary: dict[str, Any], samples: Sequence[Sample]) -> str:
    """All plots as one SVG."""
    with mpl.rc_context({"svg.hashsalt": "report", "font.size": 9}):
        figure = Figure(figsize=(12, 10))
        figure.subplots_adjust(left=0.06, right=0.98, bottom=0.06, top=0.96, hspace=0.35)
        axes = figure.subplots(3, 2)
        _times(axes[0, 0], samples, "ttft_s", "TTFT by time of sending")
        _distributions(axes[0, 1], samples)
        _rates(axes[1, 0], samples)
        _open(axes[1, 1], samples)
        _phases(axes[2, 0], summary)
        if any(each.lag_s is not None for each in samples):
            _times(axes[2, 1], samples, "lag_s", "dispatch lag")
        else:
            _times(axes[2, 1], samples, "tpot_s", "TPOT by time of sending")
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg")
    return drawn.getvalue().partition("<svg")[1] + drawn.getvalue().partition("<svg")[2]


def _times(axes: Axes, samples: Sequence[Sample], name: str, title: str) -> None:
    for outcome, color in COLORS.items():
        points = [(s.sent_s, getattr(s, name) * 1000) for s in samples if s.outcome is outcome and getattr(s, name)]
        if points:
            axes.plot(*zip(*points, strict=True), ".", markersize=4, color=color, label=str(outcome))
    axes.set(title=title, xlabel="s", ylabel="ms", ylim=(0, None))
    if axes.has_data():
        axes.legend()


def _distributions(axes: Axes, samples: Sequence[Sample]) -> None:
    completed = [each for each in samples if each.outcome is Outcome.COMPLETED]
    gaps = [gap for each in samples for gap in each.itl_s]
    series = {
        "TTFT": [each.ttft_s for each in samples if each.ttft_s],
        "ITL": gaps,
        "TPOT": [each.tpot_s for each in completed if each.tpot_s],
        "E2E": [each.duration_s for each in completed],
    }
    for name, values in series.items():
        if values:
            axes.plot(np.sort(values) * 1000, np.linspace(0, 1, len(values)), label=name)
    axes.set(title="share of values below", xlabel="ms", xscale="log", ylim=(0, 1))
    if axes.has_data():
        axes.legend()


def _rates(axes: Axes, samples: Sequence[Sample]) -> None:
    ends = np.array([each.sent_s + each.duration_s for each in samples if each.outcome is Outcome.COMPLETED])
    tokens = np.array([each.completion_tokens for each in samples if each.outcome is Outcome.COMPLETED])
    if ends.size:
        edges = np.arange(0, ends.max() + 1)
        axes.step(edges, np.histogram(ends, [*edges, edges[-1] + 1], weights=tokens)[0], where="post")
    axes.set(title="output tokens a second, counted when a request ends", xlabel="s", ylim=(0, None))


def _open(axes: Axes, samples: Sequence[Sample]) -> None:
    changes = sorted([(s.sent_s, 1) for s in samples] + [(s.sent_s + s.duration_s, -1) for s in samples])
    if changes:
        axes.step([at for at, _ in changes], np.cumsum([change for _, change in changes]), where="post")
    axes.set(title="requests open", xlabel="s", ylim=(0, None))


def _phases(axes: Axes, summary: dict[str, Any]) -> None:
    phases = summary["phases"]
    labels = [f"{each['phase']}\n{each['users'] or ''}" for each in phases]
    axes.bar(labels, [each["requests_per_s"] for each in phases], color="lightgray", label="completed/s")
    axes.bar(labels, [each["goodput_per_s"] for each in phases], width=0.5, label="goodput/s")
    axes.set(title="by phase (and users)")
    axes.legend()
