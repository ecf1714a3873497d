"""tests/gpu: every kernel over many shapes, and the engine, against their references. A group for each file."""

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from loadtest.gpu.results import Group, Record

TESTS = Path(__file__).parents[2] / "tests" / "gpu"
PROCESSES = 8 if find_spec("xdist") is not None else 0
"""Most of the time goes to compiling kernels, so several processes share the GPU where pytest-xdist is installed."""


def groups() -> dict[str, Group]:
    """By file name."""
    return {path.stem: partial(run_file, path) for path in sorted(TESTS.glob("test_*.py"))}


class Recorder:
    """A plugin that records tests that fail as they do, and in the end counts all."""

    def __init__(self, file: str, record: Record) -> None:
        self._file, self._record = file, record
        self._counts = {"passed": 0, "failed": 0, "skipped": 0}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        self._counts[report.outcome] += 1
        if report.failed:
            self._record({"test": report.nodeid, "failed": str(report.longrepr)[-2000:]})

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._record({"test": report.nodeid, "failed": str(report.longrepr)[-2000:]})

    def pytest_sessionfinish(self) -> None:
        counts = {f"num_{outcome}": count for outcome, count in self._counts.items()}
        self._record({"tests": self._file} | counts)


def run_file(path: Path, surroundings: dict[str, Any], record: Record) -> None:
    """Run the tests of a file."""
    del surroundings
    arguments = [str(path), "-q", "--tb=short", "-p", "no:cacheprovider"]
    if PROCESSES:
        arguments += ["-n", str(PROCESSES)]
    status = pytest.main(arguments, plugins=[Recorder(path.stem, record)])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with {status!r}")
