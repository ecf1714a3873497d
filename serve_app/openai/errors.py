"""Errors as OpenAI's clients expect them: `{"error": {"message", "type", "param", "code"}}`, code a string or null."""

from typing import Any

import msgspec
from fastapi import Response

KEY_LIMIT = "key_limit_exceeded"
"""Code of errors that the limits of an API key cause."""


class ApiError(Exception):
    """A request's failure, on its way to the client.

    Args:
        status: HTTP status.
        message: what was found, what was expected, what to do; no internals.
        param: the offending field, if there is one.
        code: a stable word for programs.
        retry_after_s: seconds after which to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """The error object that goes into a response or an SSE event."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The whole HTTP response."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        return Response(msgspec.json.encode(self.body()), self.status, headers, "application/json")


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """A 400."""
    return ApiError(400, message, param=param, code=code)


def overloaded(message: str = "too many requests are waiting; try again later", retry_after_s: int = 1) -> ApiError:
    """A 429 with Retry-After."""
    return ApiError(429, message, code="rate_limit_exceeded", retry_after_s=retry_after_s)


def key_limited(message: str, retry_after_s: int = 1) -> ApiError:
    """A 429 for which the limits of an API key are to blame, and not the service."""
    return ApiError(429, message, code=KEY_LIMIT, retry_after_s=retry_after_s)


def unavailable(message: str = "no replica of the model is ready; try again later") -> ApiError:
    """A 503 with Retry-After."""
    return ApiError(503, message, code="service_unavailable", retry_after_s=5)


def internal_error() -> ApiError:
    """A 500 that tells nothing; the log has the rest."""
    return ApiError(500, "the server failed to answer this request", code="internal_error")
