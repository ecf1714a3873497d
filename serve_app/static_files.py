"""The web page at `/`: a fixed set of files, read once. What is not in the set cannot be asked for."""

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI, Request, Response
from starlette.routing import BaseRoute

FOLDER = Path(__file__).with_name("playground")
PREFIX = "/playground/"

CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
    ".txt": "text/plain; charset=utf-8",
}
"""By suffix. A file in the folder with another suffix is not served."""

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "font-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # No string ever becomes markup or code: the page builds its elements one by one.
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
SECURITY_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


def add_page(app: FastAPI) -> list[BaseRoute]:
    """Serve the page. Returns its routes, one for each file: they hold nothing secret and must work without a key."""
    before = len(app.routes)
    for path in sorted(FOLDER.iterdir()):
        if path.suffix in CONTENT_TYPES:
            location = "/" if path.name == "index.html" else PREFIX + path.name
            app.add_api_route(location, _answer(path), methods=["GET"], include_in_schema=False)
    return app.routes[before:]


def _answer(path: Path) -> Callable[[Request], Awaitable[Response]]:
    """What answers requests for one file. Browsers keep it and ask each time whether it is still the same."""
    content = path.read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = SECURITY_HEADERS | {"ETag": tag, "Cache-Control": "no-cache"}
    content_type = CONTENT_TYPES[path.suffix]

    async def answer(request: Request) -> Response:
        # The W/ is what proxies put before the tags of what they compressed.
        known = [each.strip().removeprefix("W/") for each in request.headers.get("if-none-match", "").split(",")]
        if tag in known or known == ["*"]:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers | {"Content-Type": content_type})

    return answer
