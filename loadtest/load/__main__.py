"""Load on the service at a URL, or on one that is started for it and ended with it.

python -m loadtest.load --users 8 --run-time 60s     # options are Locust's and those of loadtest/load/chat.py
"""

import argparse
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

ROOT = Path(__file__).parents[2]
URL = "http://127.0.0.1:8000"
START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 60.0
DEFAULTS = ("--users", "8", "--run-time", "60s", "--stop-timeout", "30", "--only-summary", "--loglevel", "WARNING")


def is_ready(url: str) -> bool:
    """Whether the model can be used there."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


@contextmanager
def service(url: str) -> Iterator[None]:
    """The service at a URL: the one that is there, or `make serve` for as long as this lasts."""
    with nullcontext() if is_ready(url) else make_serve(url):
        yield


@contextmanager
def make_serve(url: str, config: Path | None = None) -> Iterator[int]:
    """`make serve` for as long as this lasts.

    Args:
        url: where it will be.
        config: its configuration file, if another than usual.

    Returns:
        Its process id.

    Raises:
        RuntimeError: it did not start, or did not end.
    """
    log_path = ROOT / "build" / "load" / "serve.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    print(f"starting `make serve` at {url}, which logs to {log_path}", file=sys.stderr)
    with log_path.open("wb") as log:
        started = subprocess.Popen(
            ["make", "serve", *([f"CONFIG={config}"] if config else [])],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        _wait_until_ready(url, started, log_path)
        yield started.pid
    finally:
        _end(started)


def _wait_until_ready(url: str, started: "subprocess.Popen[bytes]", log_path: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not is_ready(url):
        if started.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"`make serve` did not get ready:\n{log_path.read_text(errors='replace')[-2000:]}")
        time.sleep(0.5)


def _end(started: "subprocess.Popen[bytes]") -> None:
    """As Ctrl-C does, which is how `make serve` ends with all that it started."""
    if started.poll() is None:
        os.killpg(started.pid, signal.SIGINT)
    try:
        started.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)
        raise RuntimeError(
            f"`make serve` (process group {started.pid}) did not end within {STOP_TIMEOUT_S} s"
        ) from None


def main() -> None:
    """Run Locust with the arguments of the command line; exit as it does."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--host", default=URL)
    own, arguments = parser.parse_known_args()
    locustfile = str(Path(__file__).with_name("chat.py"))
    command = [sys.executable, "-m", "locust", "--locustfile", locustfile, "--headless", "--host", own.host, *DEFAULTS]
    if {"--help", "-h"} & set(arguments):
        sys.exit(subprocess.run([*command, "--help"], cwd=ROOT, check=False).returncode)
    # What was started is ended also when this is told to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with service(own.host):
        done = subprocess.run([*command, *arguments], cwd=ROOT, check=False)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
