"""Writes the dashboards' JSON files: `python -m cluster.grafana`."""

import json
from pathlib import Path
from typing import Any

from cluster.grafana import engine, fleet, service
from cluster.grafana.build import dashboard

FOLDER = Path(__file__).parent


def dashboards() -> dict[str, dict[str, Any]]:
    """All of them, by the name of their file."""
    return {
        "service.json": dashboard(
            "qwen3-service", "qwen3-serve: service", "What clients get, against the objective.", service.ROWS
        ),
        "engine.json": dashboard(
            "qwen3-engine", "qwen3-serve: engine", "Batch, KV cache and steps of the engine replicas.", engine.ROWS
        ),
        "fleet.json": dashboard(
            "qwen3-fleet", "qwen3-serve: fleet", "Replicas, autoscaler, admission, routing, migration.", fleet.ROWS
        ),
    }


def text(found: dict[str, Any]) -> str:
    """A dashboard as its file has it."""
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name, found in dashboards().items():
        (FOLDER / name).write_text(text(found), encoding="utf-8")
