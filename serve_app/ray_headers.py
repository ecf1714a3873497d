"""Headers as Ray Serve can read them: it decodes some as UTF-8 before the application sees a request, or answers 500.

Ray Serve calls `middlewares` where RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it, and puts them around itself.
"""

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send


class DecodableHeaders:
    """ASGI middleware: values that are not UTF-8 are taken for Latin-1. What they should be, the gate decides.

    Args:
        app: what is behind.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not all(value.isascii() for _, value in scope.get("headers", ())):
            scope = {**scope, "headers": [(name, _as_utf8(value)) for name, value in scope["headers"]]}
        await self._app(scope, receive, send)


def middlewares() -> list[Middleware]:
    """For Ray Serve."""
    return [Middleware(DecodableHeaders)]


def _as_utf8(value: bytes) -> bytes:
    try:
        value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1").encode()
    return value
