"""Clients that leave: while they send, while they wait, and while they are being answered."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from fastapi import Request

from engine.request import RequestTimings
from serve_app.http import EventStream, read_body, server_timing, unless_disconnected
from serve_app.openai.errors import ApiError

SCOPE = {"type": "http", "method": "POST", "path": "/", "headers": []}


class Client:
    """What a client sends, event by event; then it leaves when told to."""

    def __init__(self, *parts: dict[str, Any]) -> None:
        self._parts = list(parts)
        self.leaves = asyncio.Event()
        self.received: list[dict[str, Any]] = []

    async def receive(self) -> dict[str, Any]:
        if self._parts:
            return {"type": "http.request"} | self._parts.pop(0)
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        self.received.append(message)

    def request(self) -> Request:
        return Request(SCOPE, self.receive, self.send)


async def test_a_body_comes_in_parts():
    client = Client({"body": b"ab", "more_body": True}, {"body": b"c"})
    assert await read_body(client.request(), 3) == b"abc"


@pytest.mark.parametrize(("most", "status"), [(100, 499), (1, 413)])
async def test_a_body_that_is_cut_off_or_too_long_is_an_error_like_others(most: int, status: int):
    client = Client({"body": b"ab", "more_body": True})
    client.leaves.set()
    with pytest.raises(ApiError) as caught:
        await read_body(client.request(), most)
    assert caught.value.status == status


async def test_work_ends_at_once_when_its_client_leaves():
    client, ended = Client(), asyncio.Event()

    async def work() -> None:
        try:
            client.leaves.set()
            await asyncio.sleep(60)
        finally:
            ended.set()

    with pytest.raises(ApiError) as caught:
        async with asyncio.timeout(60):
            await unless_disconnected(client.request(), work())
    assert caught.value.status == 499 and ended.is_set()


async def test_work_that_is_done_is_not_disturbed():
    async def work() -> int:
        return 7

    assert await unless_disconnected(Client().request(), work()) == 7


async def test_a_stream_is_closed_at_once_and_not_at_its_next_event():
    client, closed = Client(), asyncio.Event()

    async def events() -> AsyncGenerator[bytes, None]:
        try:
            yield b"data: 1\n\n"
            client.leaves.set()
            await asyncio.sleep(60)
            yield b"data: 2\n\n"
        finally:
            closed.set()

    async with asyncio.timeout(60):
        await EventStream(events())(SCOPE, client.receive, client.send)
    assert closed.is_set()
    assert [message.get("body") for message in client.received] == [None, b"data: 1\n\n"]


async def test_a_stream_that_ends_is_whole():
    async def events() -> AsyncGenerator[bytes, None]:
        yield b"data: 1\n\n"
        yield b"data: [DONE]\n\n"

    client = Client()
    await EventStream(events())(SCOPE, client.receive, client.send)
    assert [message.get("body") for message in client.received[1:]] == [b"data: 1\n\n", b"data: [DONE]\n\n", b""]
    assert client.received[-1]["more_body"] is False


def test_a_stream_tells_where_the_time_before_it_went():
    timings = RequestTimings(queue_s=0.01, prefill_s=0.2)
    assert server_timing(timings, 0.2504) == "queue;dur=50.4, prefill;dur=200.0"
    assert server_timing(timings, 0.1) == "queue;dur=0.0, prefill;dur=200.0"  # two clocks may differ
