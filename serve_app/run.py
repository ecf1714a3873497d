"""`python -m serve_app.run cluster/config.yaml`: `serve run`, and an end that lets answers end first.

`serve run` itself drops all connections when it is interrupted, and does not know SIGTERM.
"""

import signal
import sys
from types import FrameType

import ray
from ray import serve
from ray.serve.scripts import cli


class _Stop(BaseException):
    """A signal asked for the end."""


def main(config: str) -> None:
    """Serve what a configuration file describes until SIGINT or SIGTERM.

    Then new requests are refused, and what runs goes on to its end, for `graceful_shutdown_timeout_s` of the file at
    most. A second signal drops it.
    """
    ray.init(namespace="serve")  # first, as it handles SIGTERM itself
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        cli(["run", config], standalone_mode=False)
    except _Stop:
        print("stopping when all answers have ended; Ctrl-C again stops now", flush=True)
        try:
            for name in serve.status().applications:
                serve.delete(name)
        except _Stop:
            print("stopping now", flush=True)
        try:
            serve.shutdown()
        except _Stop:
            sys.exit(130)  # what is left ends with this process


def _stop(number: int, frame: FrameType | None) -> None:
    raise _Stop


if __name__ == "__main__":
    main(sys.argv[1])
