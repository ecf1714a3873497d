"""Sample: what one request of a load test did, as measured by its client. Kept as JSON lines."""

from collections.abc import Iterable, Iterator
from enum import StrEnum
from pathlib import Path

import msgspec


class Outcome(StrEnum):
    """How a request ended."""

    COMPLETED = "completed"
    """Its stream came to its end."""
    CANCELLED = "cancelled"
    """The client left, on purpose."""
    REJECTED = "rejected"
    """429 or 503: the service would not take it now."""
    FAILED = "failed"
    """Any other status, a broken connection, or an error in the stream."""
    UNFINISHED = "unfinished"
    """The load test was over before the request was."""


class Sample(msgspec.Struct, frozen=True, omit_defaults=True):
    """One request. Times are in seconds.

    Attributes:
        sent_s: when it was sent, since the test's start.
        scheduled_s: when a trace wanted it to be sent; None where users send when they are done with the last one.
        users: how many users there were when it was sent.
        status: of the HTTP response; 0 if there was none.
        error: the error's code or text.
        chunk_s: for each chunk with output, when it arrived, since the request was sent. The first is TTFT.
        duration_s: from sending to the end of the stream.
        completion_tokens: of the response's usage; 0 where the stream did not get there.
    """

    sent_s: float
    outcome: Outcome
    status: int
    duration_s: float
    scheduled_s: float | None = None
    users: int = 0
    error: str = ""
    chunk_s: tuple[float, ...] = ()
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    @property
    def ttft_s(self) -> float | None:
        """Time to first token: from sending to the first chunk with output.

        Tokens may have no text, such as special ones. An answer of nothing else came at its end at the latest.
        """
        if self.chunk_s:
            return self.chunk_s[0]
        return self.duration_s if self.outcome is Outcome.COMPLETED else None

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first, of a completed request with at least two."""
        if self.completion_tokens < 2 or len(self.chunk_s) < 2:
            return None
        return (self.chunk_s[-1] - self.chunk_s[0]) / (self.completion_tokens - 1)

    @property
    def itl_s(self) -> list[float]:
        """Gaps between chunks with output: what a reader sees. A chunk may hold several tokens."""
        return [later - earlier for earlier, later in zip(self.chunk_s, self.chunk_s[1:], strict=False)]

    @property
    def lag_s(self) -> float | None:
        """How much later than its trace wanted it was sent."""
        return None if self.scheduled_s is None else self.sent_s - self.scheduled_s


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    """Write JSON lines."""
    path.write_bytes(b"".join(msgspec.json.encode(sample) + b"\n" for sample in samples))


def read_samples(path: Path) -> Iterator[Sample]:
    """What `write_samples` wrote.

    Raises:
        ValueError: a line is no sample; the message has its number.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield msgspec.json.decode(line, type=Sample)
            except msgspec.DecodeError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
