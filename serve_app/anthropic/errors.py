"""Errors as Anthropic's clients expect them."""

from typing import Any

import msgspec
from fastapi import Response

from serve_app.openai.errors import ApiError

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_body(error: ApiError) -> dict[str, Any]:
    """`{"type": "error", "error": {"type", "message"}}`."""
    kind = _KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def error_response(error: ApiError) -> Response:
    """The whole HTTP response."""
    response = error.response()
    return Response(
        msgspec.json.encode(error_body(error)),
        error.status,
        {name: value for name, value in response.headers.items() if name == "retry-after"},
        "application/json",
    )
