"""What the operator reads in the terminal of `serve run`: where the service is when it is ready, or why it is not."""

import asyncio
import sys
import time
import urllib.error
import urllib.request

from ray import serve
from ray.serve.context import _get_global_client

ANNOUNCE_TIMEOUT_S = 60.0


def say(line: str) -> None:
    """Write a line to the terminal, at every log level: at times Ray Serve makes a log of `sys.stdout` and `print`."""
    if sys.__stdout__ is not None:
        sys.__stdout__.write(f"{line}\n")
        sys.__stdout__.flush()


async def announce(model_name: str) -> None:
    """Say model and URL as soon as that URL answers, from the first ingress replica alone.

    Where this node serves no HTTP there is nothing to announce, and nothing is said.
    """
    rank = serve.get_replica_context().rank
    if rank is None or rank.rank == 0:
        await asyncio.to_thread(_announce, model_name)


def _announce(model_name: str) -> None:
    # Ray has no public way to ask where its proxies listen.
    client = _get_global_client()
    if client is None:
        return
    options = client.http_config
    host = "127.0.0.1" if options.host in ("0.0.0.0", "::", None) else options.host
    url = f"http://{host}:{options.port}"
    deadline = time.monotonic() + ANNOUNCE_TIMEOUT_S
    while time.monotonic() < deadline:
        if _answers(f"{url}/health"):
            say(f"{model_name} is ready at {url}/v1")
            return
        time.sleep(0.1)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False
