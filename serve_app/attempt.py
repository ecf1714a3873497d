"""One attempt to run a request on a replica: the call, and what comes of it by either way."""

import asyncio
from collections.abc import AsyncGenerator, Mapping

from engine.output_buffer import OutputBuffer
from engine.request import EngineRequest, RequestOutput
from serve_app.fleet import Loss, ReplicaView
from serve_app.openai.errors import ApiError, unavailable


class ReplicaLostError(Exception):
    """A replica cannot go on with a request; another one can."""

    def __init__(self, loss: Loss) -> None:
        super().__init__(f"the replica was lost: {loss}")
        self.loss = loss


class ReplicaAttempt:
    """See `serve_app.fleet.Attempt`. Outputs come by the step stream; the call's result has what that has not told.

    Args:
        request: what to run.
        avoid: replicas that the request has lost, and when, by `time.monotonic()`.
    """

    def __init__(self, request: EngineRequest, avoid: Mapping[str, float]) -> None:
        self.request = request
        self.replica: ReplicaView | None = None
        self.avoid = avoid
        self.failure: ApiError | ReplicaLostError | None = None
        self._buffer = OutputBuffer()
        self._news: asyncio.Future[None] | None = None
        """What the reader waits for."""
        self._accepted = asyncio.Event()

    @property
    def replica_id(self) -> str | None:
        return None if self.replica is None else self.replica.replica_id

    @property
    def num_received(self) -> int:
        return len(self._buffer.token_ids)

    @property
    def is_finished(self) -> bool:
        """Whether all of the request's output is here."""
        return self._buffer.is_finished

    def put(self, output: RequestOutput) -> None:
        if self.failure is None and not self._buffer.is_finished:
            self._buffer.put(output)
            self._wake()

    def put_whole(self, output: RequestOutput) -> None:
        if self.failure is None and self._buffer.put_whole(output):
            self._wake()

    def accept(self) -> None:
        self._accepted.set()

    def lose(self, loss: Loss) -> None:
        self.fail(ReplicaLostError(loss))

    def fail(self, failure: ApiError | ReplicaLostError) -> None:
        """End without the rest of the output."""
        if self.failure is None and not self._buffer.is_finished:
            self.failure = failure
            self._accepted.set()
            self._wake()

    async def outputs(self, patience_s: float) -> AsyncGenerator[RequestOutput, None]:
        """What was received since the last item, up to the output that has a finish reason.

        Args:
            patience_s: how long it may take until a replica has taken the request.

        Raises:
            ReplicaLostError: the rest has to come from another replica.
            ApiError: there will be no rest, or no replica took the request.
        """
        try:
            async with asyncio.timeout(patience_s):
                await self._accepted.wait()
        except TimeoutError:
            raise unavailable() from None
        loop = asyncio.get_running_loop()
        while True:
            if not self._buffer.has_news and self.failure is None:
                self._news = loop.create_future()
                await self._news
            if self._buffer.has_news:
                output = self._buffer.take()
                yield output
                if output.finish_reason is not None:
                    return
            if self.failure is not None:
                raise self.failure

    def _wake(self) -> None:
        news, self._news = self._news, None
        if news is not None and not news.done():  # a reader that was cancelled waits no more
            news.set_result(None)
