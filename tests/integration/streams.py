"""Streams of completions side by side, what became of each, and whether anything of a fault shows in them."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from itertools import pairwise

import httpx
import pytest

from tests.integration.server import Server

PATIENCE_S = 120.0


class Stream:
    """What came of a completion."""

    def __init__(self, status: int) -> None:
        self.status = status
        self.text = ""
        self.times: list[float] = []
        self.finish_reason: str | None = None
        self.last_line = ""

    @property
    def longest_gap_s(self) -> float:
        return max(second - first for first, second in pairwise(self.times))


async def run_stream(client: httpx.AsyncClient, number: int, num_tokens: int, begun: asyncio.Semaphore) -> Stream:
    """Every other one is greedy; the rest is sampled."""
    sampling = {"temperature": 1, "seed": number} if number % 2 else {"temperature": 0, "repetition_penalty": 1.3}
    body = {"model": "demo", "prompt": f"{number}. The", "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
    async with client.stream("POST", "/v1/completions", json=body | sampling) as response:
        stream = Stream(response.status_code)
        async for data in _data_of(response):
            stream.last_line = data
            if data != "[DONE]":
                choice = json.loads(data)["choices"][0]
                stream.text += choice["text"]
                stream.finish_reason = choice["finish_reason"] or stream.finish_reason
                stream.times.append(time.monotonic())
                if len(stream.times) == 3:
                    begun.release()
    return stream


async def _data_of(response: httpx.Response) -> AsyncIterator[str]:
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")


async def run_streams(
    server: Server, count: int, disturb: Callable[[], None] | None = None, num_tokens: int = 96
) -> list[Stream]:
    """All streams side by side; when each has begun, something happens."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    begun = asyncio.Semaphore(0)
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S, limits=limits) as client:
        tasks = [asyncio.create_task(run_stream(client, number, num_tokens, begun)) for number in range(count)]
        if disturb is not None:
            async with asyncio.timeout(PATIENCE_S):
                for _ in tasks:
                    await begun.acquire()
            disturb()
        return await asyncio.gather(*tasks)


async def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {PATIENCE_S:.0f} s"
        await asyncio.sleep(0.1)


def check(streams: list[Stream], undisturbed: list[str]) -> None:
    assert {(stream.status, stream.finish_reason, stream.last_line) for stream in streams} == {
        (200, "length", "[DONE]")
    }
    assert [stream.text for stream in streams] == undisturbed


def report(capsys: pytest.CaptureFixture[str], what: str, streams: list[Stream]) -> None:
    gaps = sorted(stream.longest_gap_s for stream in streams)
    with capsys.disabled():
        print(f"\n{what} under {len(streams)} streams: stood still {gaps[-1]:.2f} s at most, {gaps[0]:.2f} s at least")
