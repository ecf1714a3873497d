"""What a stream of server-sent events says, timed chunk by chunk as it comes."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import msgspec

from loadtest.load.samples import Outcome

OUTPUT_FIELDS = ("content", "reasoning", "reasoning_content", "tool_calls", "refusal")
"""Of a chat's delta: with none of these a chunk, such as the first with the role, is no output."""


class Lines(Protocol):
    """What events are read from."""

    def readline(self, sep: bytes) -> bytes:
        """The next line with its end; empty after the last."""


class Reply:
    """What has been read of a stream."""

    def __init__(self) -> None:
        self.text = ""
        self.chunk_s: list[float] = []
        self.usage: dict[str, Any] = {}
        self.error = ""
        self.done = False


def events(lines: Lines) -> Iterator[tuple[str, bytes]]:
    """Name (`message` unless given) and data of each server-sent event, as soon as its empty line is there.

    The separator must be given: without it the reader waits for lines that end as HTTP's do, and there are none.
    """
    name, data = "message", []
    while line := lines.readline(b"\n"):
        field, _, value = line.strip(b"\r\n").partition(b":")
        if field == b"event":
            name = value.strip().decode()
        elif field == b"data":
            data.append(value.removeprefix(b" "))
        elif not field and data:
            yield name, b"\n".join(data)
            name, data = "message", []


def output_text(chunk: dict[str, Any]) -> str | None:
    """The text in a chunk of a chat or a completion: None where the chunk carries no output at all."""
    for choice in chunk.get("choices", ()):
        delta = choice.get("delta", choice)
        if choice.get("text") or any(delta.get(field) for field in OUTPUT_FIELDS):
            return choice.get("text") or delta.get("content") or ""
    return None


def read_reply(lines: Lines, reply: Reply, seconds: Callable[[], float], most_chunks: int | None = None) -> Outcome:
    """Read a stream to its end, or until `most_chunks` chunks with output have come.

    Args:
        seconds: time since the request was sent.
    """
    for name, data in events(lines):
        if data == b"[DONE]":
            reply.done = True
            return Outcome.COMPLETED
        now = seconds()
        chunk = msgspec.json.decode(data)
        if name == "error" or "error" in chunk:
            reply.error = str(chunk.get("error", {}).get("code"))
            return Outcome.FAILED
        reply.usage = chunk.get("usage") or reply.usage
        if (text := output_text(chunk)) is not None:
            reply.text += text
            reply.chunk_s.append(now)
            if most_chunks is not None and len(reply.chunk_s) >= most_chunks:
                return Outcome.CANCELLED
    reply.error = "the stream ended without [DONE]"
    return Outcome.FAILED
