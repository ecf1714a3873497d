"""Gate: what every request must pass before any route sees it."""

import re
from collections.abc import Callable, Iterable

from fastapi import Request, Response
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.auth import ApiKeys, Caller
from serve_app.config import ServiceLimits
from serve_app.openai.errors import ApiError, bad_request

_CALLER = "qwen3_serve.caller"
_REQUEST_ID = re.compile(rb"[!-~]{1,128}")


class Gate:
    """ASGI middleware: headers within bounds, a key that is allowed in, and not too many requests with it.

    Closed unless a route is open: it is matched as the router will match it, so neither a spelling of the path nor the
    Host header can make one route look like another.

    Args:
        app: what is behind.
        keys: those that may come in.
        open_routes: routes that take requests without a key; the router tries no other route of their paths before.
        limits: tells the limits of this moment; `header_bytes` is for all names and values together.
        respond: makes the response for an error, in the form that clients of the path expect.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: ApiKeys,
        open_routes: Iterable[BaseRoute],
        limits: Callable[[], ServiceLimits],
        respond: Callable[[Scope, ApiError], Response],
    ) -> None:
        self._app = app
        self._keys = keys
        self._open_routes = tuple(open_routes)
        self._limits = limits
        self._respond = respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})  # no route takes any
            return
        try:
            _check_headers(scope, self._limits().header_bytes)
            if any(route.matches(scope)[0] is Match.FULL for route in self._open_routes):
                await self._app(scope, receive, send)
                return
            caller = self._keys.caller(scope["headers"])
            scope[_CALLER] = caller
            with caller.request():
                await self._app(scope, receive, send)
        except ApiError as error:
            # Nothing was sent: errors from further inside became responses there.
            response = self._respond(scope, error)
            if error.status == 401:
                response.headers["WWW-Authenticate"] = "Bearer"
            await response(scope, receive, send)


def caller_of(request: Request) -> Caller:
    """Who sent a request that came through the gate."""
    return request.scope[_CALLER]


def caller_name(scope: Scope) -> str:
    """The name of the API key of a request that came to the gate; empty without a valid one."""
    return scope[_CALLER].name if _CALLER in scope else ""


def _check_headers(scope: Scope, most_bytes: int) -> None:
    headers = scope["headers"]
    num_bytes = sum(len(name) + len(value) for name, value in headers)
    if num_bytes > most_bytes:
        raise ApiError(
            431, f"the headers have {num_bytes} bytes, expected at most {most_bytes}", code="headers_too_large"
        )
    ids = [value for name, value in headers if name.lower() == b"x-request-id"]
    if any(_REQUEST_ID.fullmatch(value) is None for value in ids):
        raise bad_request(
            "expected 1 to 128 visible ASCII characters in the header X-Request-Id", code="invalid_header"
        )
