"""`python -m loadtest.soak --minutes 30`: load, faults, and a report in build/soak/. Exits with 1 if anything is lost,
wrong or leaked."""

import argparse
import asyncio
import json
import sys
import time
from typing import Any

import httpx

from loadtest.load.__main__ import make_serve
from loadtest.soak.config import ROOT, write_config
from loadtest.soak.processes import Processes
from loadtest.soak.traffic import Traffic

FOLDER = ROOT / "build" / "soak"
MEASURE_EVERY_S = 5.0
IDLE_WITHIN_S = 60.0
MOST_SLOPE_MIB_PER_HOUR = 60.0
"""Of resident memory of one process: more counts as a leak. Caches still fill in the first minutes."""


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="how long")
    parser.add_argument("--clients", type=int, default=16, help="requests at a time")
    parser.add_argument("--fault-every-s", type=float, default=90.0, help="seconds from a fault to the next")
    parser.add_argument("--port", type=int, default=8000, help="for the service")
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    config = FOLDER / "config.yaml"
    write_config(config, options.port)
    url = f"http://127.0.0.1:{options.port}"
    with make_serve(url, config) as pid:
        report = asyncio.run(_soak(url, Processes(pid), options))
    (FOLDER / "report.json").write_text(json.dumps(report, indent=1))
    text = _as_text(report)
    (FOLDER / "report.md").write_text(text)
    print(text)
    return 0 if report["passed"] else 1


async def _soak(url: str, processes: Processes, options: argparse.Namespace) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        traffic = Traffic(client, seed=0)
        await traffic.learn()
        start = time.monotonic()
        clients = asyncio.create_task(traffic.run(options.clients))
        faults = await _disturb(processes, start, options)
        traffic.is_over = True
        await clients
        fleet = await _idle_fleet(client)
    loads = [replica["load"] for replica in fleet if replica["load"]]
    num_leaked = sum(load["num_blocks"] - load["num_free_blocks"] for load in loads)
    slopes = {
        f"{use.kind} {pid}": round(use.slope_mib_per_hour(), 1)
        for pid, use in processes.uses.items()
        if use.seconds[-1] - use.seconds[0] > 600
    }
    return {
        "minutes": round((time.monotonic() - start) / 60, 1),
        "requests": dict(sorted(traffic.counts.items())),
        "faults": faults,
        "problems": traffic.problems,
        "leaked_blocks": num_leaked,
        "rss_slope_mib_per_hour": slopes,
        "open_files": {
            f"{use.kind} {pid}": [use.files[0], max(use.files), use.files[-1]] for pid, use in processes.uses.items()
        },
        "rss_mib": {
            f"{use.kind} {pid}": [round(use.rss_mib[0]), round(max(use.rss_mib)), round(use.rss_mib[-1])]
            for pid, use in processes.uses.items()
        },
        "passed": not (traffic.problems or num_leaked or not loads)
        and all(slope <= MOST_SLOPE_MIB_PER_HOUR for slope in slopes.values()),
    }


async def _disturb(processes: Processes, start: float, options: argparse.Namespace) -> list[str]:
    """Measure and do harm until time is up. Half a minute before the end there is no more of it."""
    kinds = (processes.kill_replica, processes.stop_replica)
    faults: list[str] = []
    while (elapsed := time.monotonic() - start) < options.minutes * 60:
        processes.measure()
        if elapsed >= (len(faults) + 1) * options.fault_every_s and elapsed < options.minutes * 60 - 30:
            faults.append(f"{elapsed:.0f} s: {kinds[len(faults) % len(kinds)]()}")
            print(faults[-1], flush=True)
        await asyncio.sleep(MEASURE_EVERY_S)
    return faults


async def _idle_fleet(client: httpx.AsyncClient) -> list[dict[str, Any]]:
    """The replicas, once nothing runs on them, or as they are after a minute."""
    deadline = time.monotonic() + IDLE_WITHIN_S
    while True:
        status = (await client.get("/status")).json()
        replicas = [replica for model in status["models"] for replica in model["replicas"]]
        loads = [replica["load"] for replica in replicas if replica["load"]]
        idle = loads and all(load["num_blocks"] == load["num_free_blocks"] for load in loads)
        if idle or time.monotonic() > deadline:
            return replicas
        await asyncio.sleep(0.5)


def _as_text(report: dict[str, Any]) -> str:
    lines = [f"# Soak of {report['minutes']} minutes: {'passed' if report['passed'] else 'FAILED'}", ""]
    lines += [f"- {kind}: {count:,}" for kind, count in report["requests"].items()]
    lines += ["", f"Blocks leaked: {report['leaked_blocks']}. Problems: {len(report['problems'])}.", ""]
    lines += [f"- {problem}" for problem in report["problems"][:20]]
    lines += ["", "Faults:", "", *(f"- {fault}" for fault in report["faults"]), ""]
    lines += [
        "| process | RSS MiB: first, most, last | slope MiB/h | open files: first, most, last |",
        "|---|---|---|---|",
    ]
    for name, sizes in report["rss_mib"].items():
        slope = report["rss_slope_mib_per_hour"].get(name, "")
        lines.append(f"| {name} | {_row(sizes)} | {slope} | {_row(report['open_files'][name])} |")
    return "\n".join(lines) + "\n"


def _row(values: list[int]) -> str:
    return ", ".join(map(str, values))


if __name__ == "__main__":
    sys.exit(main())
