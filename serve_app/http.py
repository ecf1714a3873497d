"""The HTTP edge: bounded bodies, strict JSON, disconnects that are noticed, server-sent events."""

import asyncio
import re
from collections.abc import AsyncGenerator, Awaitable
from typing import Any, TypeVar

import msgspec
from fastapi import Request, Response
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from engine.request import RequestTimings
from serve_app.openai.errors import ApiError, bad_request

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

CLIENT_CLOSED_REQUEST = 499
_UNION_MEMBER = re.compile(r"constrained-|list\[|function-|literal\[|tag-|Named(Tool|Function)$")
"""How the members of a union are called in an error's path, by pydantic or, with `tag-`, by us."""


async def read_body(request: Request, most_bytes: int) -> bytes:
    """The request's body. Raises ApiError 413 as soon as it is too long, 499 if the client leaves before its end."""
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > most_bytes:
                raise ApiError(413, f"the body is over {most_bytes} bytes, the most allowed", code="body_too_large")
    except ClientDisconnect:
        raise _client_left() from None
    return bytes(body)


def parse_body(body: bytes, model: type[M]) -> M:
    """The body as a model. Raises ApiError 400 that names the first offending field."""
    try:
        values = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise bad_request(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(values, dict):
        raise bad_request("the body is not a JSON object", code="invalid_json")
    return validate(values, model)


def validate(values: dict[str, Any], model: type[M]) -> M:
    """Values as a model. Raises ApiError 400 that names the first offending field."""
    try:
        return model.model_validate(values)
    except RecursionError:
        raise bad_request("the body is nested too deeply", code="invalid_json") from None
    except ValidationError as error:
        raise _as_bad_request(error) from None


def _as_bad_request(error: ValidationError) -> ApiError:
    """The error that is deepest and furthest in the body: of a union's members, it is of the one that was meant."""
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    worst = max(errors, key=lambda found: _progress(found["loc"]))
    param = _path(worst["loc"])
    kind = worst["type"]
    if kind == "extra_forbidden":
        return bad_request(f"the field {param!r} is unknown or not supported", param, "unknown_parameter")
    if kind == "missing":
        return bad_request(f"the field {param!r} is missing", param, "missing_required_parameter")
    # Unions have an error for each member.
    messages = [found["msg"].removeprefix("Value error, ") for found in errors if _path(found["loc"]) == param]
    return bad_request(f"{param}: {', or '.join(dict.fromkeys(messages))}", param)


def _progress(location: tuple[int | str, ...]) -> tuple[int, list[int]]:
    """How far a validator came before it met an error."""
    return len(location), [part for part in location if isinstance(part, int)]


def _path(location: tuple[int | str, ...]) -> str:
    """Where an error is, as in `messages.0.content`. A union's members are no place, and a field can have any name."""
    parts = [str(part)[:64] for part in location if not _UNION_MEMBER.match(str(part))]
    return ".".join(parts)


async def unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """The work's result; if the client goes away first, the work is cancelled at once.

    Raises:
        ApiError: 499, for nobody to see.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.create_task(_disconnect(request.receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _client_left()
        return task.result()
    finally:
        await _end(task, watcher)


def _client_left() -> ApiError:
    return ApiError(CLIENT_CLOSED_REQUEST, "the client closed the connection")


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def server_timing(timings: RequestTimings, elapsed_s: float) -> str:
    """The Server-Timing header of a stream, as browsers' tools show it.

    Args:
        timings: the engine's.
        elapsed_s: from the request's admission to its first token, on this side.

    Returns:
        In milliseconds, `prefill`: from the first step to the first token; `queue`: all before, here and in the engine.
    """
    queue_s = max(0.0, elapsed_s - timings.prefill_s)
    return f"queue;dur={1000 * queue_s:.1f}, prefill;dur={1000 * timings.prefill_s:.1f}"


class EventStream(Response):
    """Server-sent events. When the client goes away the generator is closed at once, not at its next event.

    Args:
        events: each a whole event, `data: …` and the empty line included.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send_all(send))
        watcher = asyncio.create_task(_disconnect(receive))
        try:
            await asyncio.wait({sending, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            await _end(sending, watcher)
            await self._events.aclose()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
