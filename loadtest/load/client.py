"""Client: sends one request and measures it."""

import time
from collections.abc import Callable
from typing import Any

import msgspec
from geventhttpclient import HTTPClient

from loadtest.load.samples import Outcome, Sample
from loadtest.load.stream import Reply, read_reply

REJECTIONS = (429, 503)
MOST_BODY_BYTES = 64 * 1024
"""Read of the body of an error."""


class Client:
    """Sends requests to one service, any number at a time.

    Args:
        url: of the service, without /v1.
        api_key: None for none.
        concurrency: most connections at a time; a request waits for one in its TTFT.
        start: `time.perf_counter()` of the test's start.
        timeout_s: most time between two pieces of a response.
        record: takes the sample of every request, also of one that the end of the test cuts.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None,
        concurrency: int,
        start: float,
        timeout_s: float,
        record: Callable[[Sample], None],
    ) -> None:
        headers = {"Content-Type": "application/json"}
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        self._http = HTTPClient.from_url(
            url, concurrency=concurrency, headers=headers, network_timeout=timeout_s, connection_timeout=10
        )
        self._start, self._record = start, record

    def now(self) -> float:
        """Seconds since the test's start."""
        return time.perf_counter() - self._start

    def model(self) -> str:
        """The name of the model that the service has.

        Raises:
            RuntimeError: it did not tell.
        """
        try:
            response = self._http.request("GET", "/v1/models")
            body = response.read()
        except OSError as error:
            raise RuntimeError(f"{self._http.host}:{self._http.port} cannot be reached: {error}") from None
        if response.status_code != 200:
            raise RuntimeError(f"GET /v1/models answered {response.status_code}: {body[:200]!r}")
        return msgspec.json.decode(bytes(body))["data"][0]["id"]

    def send(
        self,
        path: str,
        body: dict[str, Any],
        *,
        most_chunks: int | None = None,
        scheduled_s: float | None = None,
        users: int = 0,
    ) -> tuple[Sample, str, float]:
        """Send one request and read its stream.

        Args:
            body: without `stream` and `stream_options`.
            most_chunks: leave after so many chunks with output; None: never.

        Returns:
            The sample, the text that came, and the seconds that a refusal's Retry-After asks for (else 0).
        """
        encoded = msgspec.json.encode(body | {"stream": True, "stream_options": {"include_usage": True}})
        reply, outcome, status, retry_after_s = Reply(), Outcome.UNFINISHED, 0, 0.0
        response = None
        sent = time.perf_counter()
        try:
            response = self._http.request("POST", path, encoded)
            status = response.status_code
            if status == 200:
                outcome = read_reply(response, reply, lambda: time.perf_counter() - sent, most_chunks)
            else:
                outcome = Outcome.REJECTED if status in REJECTIONS else Outcome.FAILED
                reply.error = _error_code(bytes(response.read(MOST_BODY_BYTES)))
                wanted = str(response.get("retry-after"))
                retry_after_s = float(wanted) if wanted.isdecimal() else 0.0
        except (OSError, ConnectionError, ValueError, msgspec.DecodeError) as error:
            outcome, reply.error = Outcome.FAILED, f"{type(error).__name__}: {error}"[:200]
        finally:
            # Closes the connection of a stream that is not at its end, which is how a client cancels.
            if response is not None:
                response.release()
            usage = reply.usage
            sample = Sample(
                sent_s=sent - self._start,
                outcome=outcome,
                status=status,
                duration_s=time.perf_counter() - sent,
                scheduled_s=scheduled_s,
                users=users,
                error=reply.error,
                chunk_s=tuple(reply.chunk_s),
                prompt_tokens=usage.get("prompt_tokens", 0),
                cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
                completion_tokens=usage.get("completion_tokens", 0),
            )
            self._record(sample)
        return sample, reply.text, retry_after_s


def _error_code(body: bytes) -> str:
    """The code in an OpenAI error, or the body's beginning."""
    try:
        return str(msgspec.json.decode(body)["error"]["code"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return body[:100].decode(errors="replace")
