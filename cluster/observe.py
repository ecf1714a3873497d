"""Watch a running service: starts Prometheus and writes a page with every panel of the dashboards, again and again.

python -m cluster.observe --url http://127.0.0.1:8000            until Ctrl-C; the page is observe/index.html
"""

import argparse
import base64
import html
import io
import math
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from matplotlib.figure import Figure

from cluster.grafana.__main__ import dashboards
from cluster.grafana.promql import resolve
from cluster.prometheus.server import Prometheus

PORT = 9090
PERIOD_S = 300
"""How much of the past panels show."""
EVERY_S = 10
STYLE = """
body { font: 14px system-ui, sans-serif; margin: 1.5rem; background: #f6f7f9; color: #1d2530 }
section { display: grid; grid-template-columns: repeat(auto-fill, minmax(23rem, 1fr)); gap: .8rem }
figure { margin: 0; padding: .6rem; background: #fff; border: 1px solid #dde1e7; border-radius: 6px; overflow-x: auto }
figcaption { font-weight: 600 } figcaption small { display: block; font-weight: 400; color: #5b6675 }
img { width: 100% } .number { font-size: 1.8rem } table { font-size: 12px }
"""


def page(prometheus: Prometheus, period_s: float, interval_s: int) -> str:
    """All panels of all dashboards as one HTML page that needs no other file.

    Args:
        prometheus: to be asked.
        period_s: seconds up to now that panels show.
        interval_s: seconds over which rates are taken.
    """
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>qwen3-serve</title>",
        f"<meta http-equiv=refresh content={EVERY_S}><style>{STYLE}</style>",
        f"<p>{time.strftime('%Y-%m-%d %H:%M:%S')}, the last {period_s / 60:g} minutes",
    ]
    for found in dashboards().values():
        parts.append(f"<h1>{html.escape(found['title'])}</h1>")
        for panel in found["panels"]:
            if panel["type"] == "row":
                parts.append(f"</section><h2>{html.escape(panel['title'])}</h2><section>")
            else:
                parts.append(_figure(prometheus, panel, period_s, interval_s))
        parts.append("</section>")
    return "\n".join(parts)


def _figure(prometheus: Prometheus, panel: dict[str, Any], period_s: float, interval_s: int) -> str:
    end_s = time.time()
    lines: list[tuple[str, list[list[Any]]]] = []
    labels: list[dict[str, str]] = []
    for target in panel["targets"]:
        series = prometheus.query_range(
            resolve(target["expr"], interval_s), end_s - period_s, end_s, max(1.0, period_s / 200)
        )
        lines += [(_legend(target["legendFormat"], each["metric"]), each["values"]) for each in series]
        labels += [each["metric"] for each in series]
    caption = f"{html.escape(panel['title'])}<small>{html.escape(panel['description'])}</small>"
    if not lines:
        body = "no data yet"
    elif panel["type"] == "stat":
        body = _number(lines)
    else:
        body = _table(labels) if panel["type"] == "table" else _plot(panel, lines, end_s)
    return f"<figure><figcaption>{caption}</figcaption>{body}</figure>"


def _number(lines: list[tuple[str, list[list[Any]]]]) -> str:
    return " ".join(
        f"<span class=number>{float(values[-1][1]):.4g}</span> {html.escape(name)}" for name, values in lines
    )


def _table(labels: list[dict[str, str]]) -> str:
    rows = ("".join(f"<td>{html.escape(f'{key}: {value}')}" for key, value in each.items()) for each in labels)
    return "<table>" + "".join(f"<tr>{row}" for row in rows) + "</table>"


def _plot(panel: dict[str, Any], lines: list[tuple[str, list[list[Any]]]], end_s: float) -> str:
    """A picture: lines, areas on top of each other, or of a heatmap the bars of its buckets at the end."""
    figure = Figure(figsize=(5.2, 2.6), layout="constrained")
    axes = figure.subplots()
    if panel["type"] == "heatmap":
        ends = sorted(lines, key=lambda line: float(line[0]))
        totals = [float(values[-1][1]) for _, values in ends]
        counts = [high - low for low, high in zip([0.0, *totals], totals, strict=False)]
        axes.bar([name.removesuffix(".0") for name, _ in ends], counts)
        axes.tick_params(axis="x", rotation=60)
    else:
        is_stacked = panel["fieldConfig"]["defaults"]["custom"]["stacking"]["mode"] == "normal"
        bottom: dict[float, float] = {}
        for name, values in lines:
            known = [(float(at), float(value)) for at, value in values if math.isfinite(float(value))]
            low = [bottom.get(at, 0.0) if is_stacked else 0.0 for at, _ in known]
            high = [base + value for base, (_, value) in zip(low, known, strict=True)]
            at = [(moment - end_s) / 60 for moment, _ in known]
            axes.plot(at, high, linewidth=1.2, label=name or "(none)")
            if is_stacked:
                axes.fill_between(at, low, high, alpha=0.3)
                bottom |= {moment: value for (moment, _), value in zip(known, high, strict=True)}
        axes.set_xlabel("minutes")
        axes.set_ylim(bottom=0)
        figure.legend(fontsize=7, loc="outside lower center", ncols=4)
    axes.set_ylabel(panel["fieldConfig"]["defaults"]["unit"])
    axes.grid(alpha=0.3)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    data = base64.b64encode(image.getvalue()).decode()
    return f'<img alt="{html.escape(panel["title"])}" src="data:image/png;base64,{data}">'


def _legend(form: str, labels: dict[str, str]) -> str:
    """Grafana's `{{label}}`, filled in."""
    return re.sub(r"{{(\w+)}}", lambda found: labels.get(found[1], ""), form)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description="Prometheus and a page of panels beside a running service")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the service")
    parser.add_argument("--key-file", type=Path, help="holds an API key, where the service has keys")
    parser.add_argument("--port", type=int, default=PORT, help="of Prometheus, on loopback")
    parser.add_argument("--out", type=Path, default=Path("observe"), help="folder for the page")
    parser.add_argument("--seconds", type=float, default=math.inf, help="end after so long")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or Prometheus would stay behind
    key = options.key_file.read_text(encoding="utf-8").strip() if options.key_file else None
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "index.html"
    deadline = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory(prefix="observe-") as folder:
        try:
            with Prometheus(Path(folder), options.port, urlsplit(options.url).netloc, key) as prometheus:
                print(f"Prometheus is at {prometheus.url}, the panels are in {file.resolve()}", flush=True)
                while time.monotonic() < deadline:
                    time.sleep(min(EVERY_S, max(0.0, deadline - time.monotonic())))
                    unfinished = file.with_suffix(".new")
                    unfinished.write_text(page(prometheus, PERIOD_S, 15), encoding="utf-8")
                    os.replace(unfinished, file)
        except RuntimeError as error:
            sys.exit(str(error))
        except KeyboardInterrupt:
            print(f"the last panels are in {file.resolve()}")


if __name__ == "__main__":
    main()
