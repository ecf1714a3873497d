"""A client that goes away frees what its request held in the engine, long before the request would have ended.

How long that takes is printed: from the closing of the connection until the engine's counters, which are asked for over
and over, show that nothing is held. Asking takes a few milliseconds itself. A step that runs is not interrupted: with a
long prompt, it takes a few hundred on a CPU.
"""

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPResponse
from statistics import median
from typing import Any

import pytest

from tests.integration.conftest import Engine
from tests.integration.server import Server

ENDLESS = {"model": "demo", "prompt": "Hello", "max_tokens": 4000, "ignore_eos": True}
"""Takes many seconds, if nobody stops it."""
LONG_PROMPT = "the quick brown fox " * 200
SOON_S = 5.0
"""Far above what it takes (a few hundredths of a second), far below what the request would."""
NUM_TIMES = 5
"""How often each way to leave is measured."""

Record = Callable[[float], None]


@pytest.fixture
def record(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Iterator[Record]:
    """Takes the seconds until all was free, and prints them in the end."""
    times: list[float] = []

    def take(seconds: float) -> None:
        times.append(seconds * 1000)
        assert seconds < SOON_S

    yield take
    with capsys.disabled():
        print(f"\n{request.node.name}: free after {median(times):.0f} ms, at most {max(times):.0f} ms", end="")


@contextmanager
def connection(server: Server, **fields: Any) -> Iterator[socket.socket]:
    """Send a request and leave the connection open; closed, it looks like a client that was killed."""
    body = json.dumps(ENDLESS | fields).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Length: {len(body)}\r\n\r\n"
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as opened:
        opened.sendall(head.encode() + body)
        yield opened


@pytest.mark.parametrize("fields", [{}, {"n": 4}, {"prompt": ["Hello", "Hi"], "n": 2}], ids=["one", "n", "prompts"])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_blocks_are_free_soon_after(
    server: Server, free_engine: Engine, record: Record, stream: bool, fields: dict[str, Any]
):
    for _ in range(NUM_TIMES):
        with connection(server, stream=stream, **fields) as client:
            free_engine.wait_for(lambda stats: stats["num_running"] >= 1 and stats["num_owned_blocks"] > 0)
            if stream:
                assert client.recv(4096).startswith(b"HTTP/1.1 200")
        record(free_engine.wait_until_free())


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_prompt_that_is_being_computed_is_given_up(server: Server, free_engine: Engine, record: Record, stream: bool):
    for trial in range(NUM_TIMES):
        with connection(server, stream=stream, prompt=LONG_PROMPT, max_tokens=2000, cache_salt=f"{stream} {trial}"):
            free_engine.wait_for(lambda stats: stats["num_running"] >= 1)
        record(free_engine.wait_until_free())


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_request_that_waits_leaves_the_queue(server: Server, free_engine: Engine, record: Record, stream: bool):
    with ExitStack() as others:
        for _ in range(2):
            others.enter_context(connection(server, n=4))
        free_engine.wait_for(lambda stats: stats["num_running"] == 8)
        for _ in range(NUM_TIMES):
            with connection(server, stream=stream, n=2):
                free_engine.wait_for(lambda stats: stats["num_waiting"] == 2)
            record(free_engine.wait_for(lambda stats: stats["num_waiting"] == 0))
        assert free_engine.stats()["num_running"] == 8
    assert free_engine.wait_until_free() < SOON_S


def test_a_stop_string_ends_the_request_in_the_engine_too(server: Server, free_engine: Engine):
    """The engine knows nothing of text: it would go on for thousands of tokens."""
    with connection(server, stop=["e", "a", "o", " "]) as client:
        response = HTTPResponse(client)
        response.begin()
        assert json.load(response)["choices"][0]["finish_reason"] == "stop"
        assert free_engine.wait_until_free() < SOON_S
