"""OutputBuffer: one request's outputs on their way to a reader who may be slow. No torch here."""

import msgspec

from engine.request import RequestOutput, TokenLogprobs


class OutputBuffer:
    """All that a request has produced. A reader takes what is new as one output, however many came meanwhile.

    Attributes:
        token_ids: of all outputs, in order.
    """

    __slots__ = ("_first", "_is_taken", "_last", "_logprobs", "_num_taken", "token_ids")

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._first: RequestOutput | None = None
        self._last: RequestOutput | None = None
        self._num_taken = 0
        self._is_taken = False

    @property
    def has_news(self) -> bool:
        """Whether anything was put that the reader has not taken."""
        return self._first is not None and not self._is_taken

    @property
    def is_finished(self) -> bool:
        """Whether the output with the finish reason is here."""
        return self._last is not None and self._last.finish_reason is not None

    def put(self, output: RequestOutput) -> None:
        """Add what the request produced since the last time."""
        self._first = self._first or output
        self._last = output
        self._is_taken = False
        self.token_ids += output.token_ids
        if output.logprobs is not None:
            self._logprobs += output.logprobs

    def put_whole(self, output: RequestOutput) -> bool:
        """Add what is new in an output that tells all from the request's start. Returns whether anything is."""
        num_known = len(self.token_ids)
        if self.is_finished or (len(output.token_ids) <= num_known and output.finish_reason is None):
            return False
        logprobs = None if output.logprobs is None else output.logprobs[num_known:]
        self.put(msgspec.structs.replace(output, token_ids=output.token_ids[num_known:], logprobs=logprobs))
        return True

    def take(self) -> RequestOutput:
        """What is new since the last call. There must be something."""
        output = self._since(self._num_taken)
        self._num_taken, self._is_taken = len(self.token_ids), True
        return output

    def rewind(self) -> None:
        """The reader has lost what it took: all is new again."""
        self._num_taken, self._is_taken = 0, False

    def whole(self) -> RequestOutput:
        """All from the request's start. There must be something."""
        return self._since(0)

    def _since(self, start: int) -> RequestOutput:
        first, last = self._first, self._last
        if first is None or last is None:
            raise ValueError("the buffer is empty, expected an output to have been put")
        return RequestOutput(
            last.request_id,
            self.token_ids[start:],
            logprobs=self._logprobs[start:] if self._logprobs else None,
            prompt_logprobs=None if start else first.prompt_logprobs,
            finish_reason=last.finish_reason,
            stop_token_id=last.stop_token_id,
            error=last.error,
            num_cached_tokens=first.num_cached_tokens,
            error_param=last.error_param,
            timings=None if start else first.timings,
        )
