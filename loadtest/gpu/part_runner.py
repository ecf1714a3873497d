"""Runs the groups of a part, each in a process of its own: one that fails, dies or hangs costs no other its results.

After an illegal access to its memory a GPU serves a process no more, and some libraries do not give memory back; a new
process has neither problem. No torch here.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable

from loadtest.gpu.results import Results


def run_groups(
    groups: Iterable[str],
    command: Callable[[str], list[str]],
    results: Results,
    group_limit_s: float,
    part_limit_s: float,
) -> None:
    """Run one group after the other.

    Args:
        groups: their names.
        command: what runs a group and adds its rows to the results; its exit status is 0, or 1 where a row says why.
        results: started; gets a row for each group that was ended or died.
        group_limit_s: seconds after which a group is ended.
        part_limit_s: seconds after which no group is started, and the last one is ended.
    """
    deadline = time.monotonic() + part_limit_s
    for group in groups:
        limit_s = min(group_limit_s, deadline - time.monotonic())
        if limit_s <= 0:
            results.add({"group": group, "skipped": f"the part's {part_limit_s:.0f} s are over"})
            continue
        print(f"--- {group}, at most {limit_s:.0f} s", flush=True)
        start = time.monotonic()
        reason = _run(command(group), limit_s)
        if reason is not None:
            results.add({"group": group, "failed": reason})
        print(f"--- {group}: {reason or 'done'} after {time.monotonic() - start:.0f} s", flush=True)


def _run(command: list[str], limit_s: float) -> str | None:
    """Why the process ended early, if it did."""
    with subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL) as process:
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return f"ended after {limit_s:.0f} s, which is its limit"
        finally:
            _kill_session(process.pid)
    if status < 0:
        return f"killed by signal {-status} ({signal.Signals(-status).name})"
    return None if status in (0, 1) else f"ended with exit status {status}"


def _kill_session(pid: int) -> None:
    """End the process and whatever it started: other engines leave processes that hold the GPU's memory."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:  # all have ended
        return
