"""Recorder: takes the samples of a test, tells Locust about them, and at its end writes what was found."""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from loadtest.load.client import Client
from loadtest.load.phases import Shape
from loadtest.load.report import write_report
from loadtest.load.results import Phase, Slo, drift, knee, missed, summarize
from loadtest.load.samples import Outcome, Sample, write_samples

if TYPE_CHECKING:
    from locust.env import Environment


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options that all load tests have."""
    group = parser.add_argument_group("qwen3-serve load test")
    group.add_argument("--out", type=Path, default=Path("build/load"), help="folder for samples.jsonl and report.html")
    group.add_argument("--api-key", env_var="LOADTEST_API_KEY", default="", help="key that requests carry")
    group.add_argument("--slo-ttft-ms", type=float, help="most time to first token of a good request")
    group.add_argument("--slo-tpot-ms", type=float, help="most time per output token after the first")
    group.add_argument("--slo-e2e-ms", type=float, help="most time from sending to the stream's end")
    group.add_argument(
        "--attainment", type=float, default=0.95, help="share of requests that must be good, or it fails"
    )
    group.add_argument("--timeout-s", type=float, default=120, help="most time between two pieces of a stream")
    group.add_argument("--connections", type=int, default=4096, help="most requests open at a time")


@contextmanager
def told_plainly() -> Iterator[None]:
    """What is wrong with options, files or the service ends the process with one line: Locust would go on."""
    try:
        yield
    except (ValueError, RuntimeError, OSError) as error:
        raise SystemExit(f"load test: {error}") from None


def finish(environment: "Environment", **_: Any) -> None:
    """For Locust's `quitting`."""
    environment.recorder.finish()


class Recorder:
    """One test.

    Args:
        kind: the shape, or `replay`.
        phases: parts of it that are looked at one by one.
    """

    def __init__(self, environment: "Environment", kind: Shape | str, phases: list[Phase]) -> None:
        if environment.runner is not None and type(environment.runner).__name__ in ("MasterRunner", "WorkerRunner"):
            raise ValueError("these load tests run in one process: leave --master, --worker and --processes out")
        if not environment.host:
            raise ValueError("--host is missing: give the service's URL without /v1")
        options = environment.parsed_options
        self.kind, self.phases, self.samples, self.is_over = kind, phases, list[Sample](), False
        self._environment, self._options = environment, options
        self._start = time.perf_counter()
        self.slo = Slo(*(_seconds(each) for each in (options.slo_ttft_ms, options.slo_tpot_ms, options.slo_e2e_ms)))
        self.client = Client(
            environment.host, options.api_key, options.connections, self._start, options.timeout_s, self.add
        )

    def add(self, sample: Sample) -> None:
        """Take a request's sample, and show it in Locust's own tables."""
        self.samples.append(sample)
        failure = RuntimeError(sample.error or sample.outcome)
        is_failure = sample.outcome in (Outcome.FAILED, Outcome.REJECTED)
        shown = {"TTFT": sample.ttft_s, "TPOT": sample.tpot_s, "E2E": sample.duration_s}
        for kind, seconds in shown.items():
            if seconds is not None:
                self._environment.events.request.fire(
                    request_type=kind,
                    name=self.kind,
                    response_time=seconds * 1000,
                    response_length=sample.completion_tokens,
                    exception=failure if is_failure and kind == "E2E" else None,
                    context={},
                )

    def phase_summaries(self, before_s: float = float("inf")) -> list[dict[str, Any]]:
        """A summary of each phase that had ended by a time."""
        return [
            {"phase": phase.name, "users": phase.users}
            | summarize([each for each in self.samples if phase.takes(each)], self.slo, phase.end_s - phase.start_s)
            for phase in self.phases
            if phase.end_s <= before_s
        ]

    def finish(self) -> None:
        """Write samples and report, print the one line, and decide how the process exits."""
        now = self.client.now()
        self.phases = [replace(phase, end_s=min(phase.end_s, now)) for phase in self.phases if phase.start_s < now]
        samples = sorted(self.samples, key=lambda sample: sample.sent_s)
        phases = self.phase_summaries()
        summary = {
            "kind": self.kind,
            "url": self._environment.host,
            "slo": {"ttft_ms": self._options.slo_ttft_ms, "tpot_ms": self._options.slo_tpot_ms}
            | {"e2e_ms": self._options.slo_e2e_ms, "attainment": self._options.attainment},
            **summarize(samples, self.slo, now),
            "drift": drift(samples),
            "phases": phases,
        }
        if self.kind == "ramp":
            best = knee(phases, self._options.attainment)
            summary["knee"] = None if best is None else phases[best]
        summary["missed"] = missed(self.kind, self.phases, phases, self._options.attainment)
        self._options.out.mkdir(parents=True, exist_ok=True)
        write_samples(self._options.out / "samples.jsonl", samples)
        write_report(self._options.out / "report.html", summary, samples)
        print(json.dumps(summary), flush=True)
        self._environment.process_exit_code = 1 if summary["missed"] else 0


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000
