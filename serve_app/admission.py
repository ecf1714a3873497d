"""Admission in one ingress process: requests wait here until the queue lets them go, or tells them to come back."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from engine.request import EngineRequest
from serve_app.admission_queue import REQUEST_TOKENS, AdmissionQueue, Entry
from serve_app.config import AdmissionConfig
from serve_app.fleet import Fleet
from serve_app.openai.errors import overloaded

RECHECK_S = 0.02
"""How often what waits is looked at, if nothing else happens."""


def entry_of(key: str, requests: Sequence[EngineRequest], prompt_tokens: int) -> Entry:
    """What the queue has to know of an HTTP request.

    Args:
        key: name of its API key.
        requests: one for each choice.
        prompt_tokens: of all its prompts.
    """
    tokens = prompt_tokens + REQUEST_TOKENS * len(requests)
    return Entry(key, requests[0].priority, tokens, hash((key, tokens, *requests[0].prompt_token_ids)))


class Admission:
    """The queue of one ingress process for one model, and whoever waits in it.

    Args:
        config: how much may wait.
        ttft_s: seconds to the first token that requests should keep.
        fleet: tells the replicas' loads.
    """

    def __init__(self, config: AdmissionConfig, ttft_s: float, fleet: Fleet) -> None:
        self.queue = AdmissionQueue(config, ttft_s)
        self._fleet = fleet
        self._waiting: dict[Entry, asyncio.Future[int | None]] = {}
        """Each is told to go on, or the seconds after which to come back."""
        self._recheck: asyncio.TimerHandle | None = None

    @asynccontextmanager
    async def admitted(self, entry: Entry) -> AsyncIterator[None]:
        """Around a request from here to its end; entered when it may be sent. Leaving early frees its place.

        Raises:
            ApiError: 429, with the time after which it will be admitted.
        """
        self._waiting[entry] = decided = asyncio.get_running_loop().create_future()
        self.queue.offer(entry, time.monotonic())
        try:
            self._step()
            if (seconds := await decided) is not None:
                raise overloaded(f"more is asked of the model than it can do now; try again in {seconds} s", seconds)
            yield
        finally:
            self._waiting.pop(entry, None)
            self.queue.ended(entry)
            self._step()

    def received(self, entry: Entry, num_tokens: int) -> None:
        """To be called with each part of a request's output: with the first, it waits no longer."""
        self.queue.charge(entry.key, num_tokens)
        if entry.is_sent:
            self.queue.started(entry, time.monotonic())
            self._step()

    def _step(self) -> None:
        views = self._fleet.replicas.values()
        loads = [view.load for view in views if view.load is not None and not (view.is_leaving or view.is_silent)]
        sent, refused = self.queue.step(time.monotonic(), loads)
        for entry, seconds in [*((entry, None) for entry in sent), *refused]:
            decided = self._waiting.pop(entry)
            if not decided.done():  # its client may leave at the same moment
                decided.set_result(seconds)
        if self._recheck is None and self.queue.num_queued:
            self._recheck = asyncio.get_running_loop().call_later(RECHECK_S, self._check_again)

    def _check_again(self) -> None:
        self._recheck = None
        self._step()
