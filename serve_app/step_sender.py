"""A replica's side of the step streams: one for each ingress, with the outputs of that ingress's requests."""

import asyncio
from collections.abc import AsyncGenerator

from engine.async_engine import StepReport
from engine.errors import RequestError
from engine.output_buffer import OutputBuffer
from engine.request import RequestOutput
from engine.stats import EngineStats
from serve_app.steps import HEARTBEAT_S, ReplicaLoad, StepUpdate

LOAD_DELAY_S = 0.02
"""For how long news of load and cache may wait for outputs to go with."""


class StepSenders:
    """All step streams of a replica, and the requests that they tell about. Belongs to the event loop.

    Args:
        stats: the engine's, before its first step.
    """

    def __init__(self, stats: EngineStats) -> None:
        self._load = load_of(stats)
        self._block_keys: set[bytes] = set()
        self._senders: dict[str, StepSender] = {}
        self._live: dict[str, dict[str, OutputBuffer]] = {}
        """Requests that run, by ingress and id: what they have produced so far."""

    def begin(self, ingress_id: str, request_id: str) -> OutputBuffer:
        """A request of an ingress is about to run. Raises RequestError if it has one with this id."""
        live = self._live.setdefault(ingress_id, {})
        if request_id in live:
            raise RequestError(f"request id {request_id!r} is in use, expected a new one", "request_id")
        buffer = live[request_id] = OutputBuffer()
        return buffer

    def put(self, ingress_id: str, output: RequestOutput) -> None:
        """Take what a request produced. Before the step's outputs go out, `step_done` is called."""
        buffer = self._live[ingress_id][output.request_id]
        buffer.put(output)
        sender = self._senders.get(ingress_id)
        if sender is not None:
            sender.unsent[output.request_id] = buffer

    def end(self, ingress_id: str, request_id: str) -> None:
        """A request has ended. What was not sent of it yet still will be, if its output came to an end."""
        live = self._live[ingress_id]
        buffer = live.pop(request_id)
        if not live:
            del self._live[ingress_id]
        sender = self._senders.get(ingress_id)
        if sender is not None and not buffer.is_finished:
            sender.unsent.pop(request_id, None)

    def step_done(self, report: StepReport) -> None:
        """A step is over, and its outputs were put."""
        self._load = load_of(report.stats)
        self._block_keys.difference_update(report.evicted)
        self._block_keys.update(report.stored)
        for sender in self._senders.values():
            sender.wake(report.stored, report.evicted)

    async def updates(self, ingress_id: str) -> AsyncGenerator[StepUpdate, None]:
        """The step stream of an ingress, beginning with a snapshot. Ends when the ingress opens another one."""
        sender = StepSender(self._live.get(ingress_id, {}))
        before = self._senders.get(ingress_id)
        if before is not None:
            before.close()
        self._senders[ingress_id] = sender
        try:
            yield sender.take(self._load, list(self._block_keys))
            while await sender.wait():
                yield sender.take(self._load)
        finally:
            sender.close()
            if self._senders.get(ingress_id) is sender:
                del self._senders[ingress_id]


class StepSender:
    """What is on its way to one ingress. It grows with the requests' outputs and the cache, not with the steps.

    Args:
        live: the ingress's running requests; all they have produced is sent first.

    Attributes:
        unsent: requests with outputs that have not been sent, by id.
    """

    def __init__(self, live: dict[str, OutputBuffer]) -> None:
        self.unsent: dict[str, OutputBuffer] = {}
        for request_id, buffer in live.items():
            buffer.rewind()
            if buffer.has_news:
                self.unsent[request_id] = buffer
        self._changes: dict[bytes, bool] = {}
        """Keys of blocks stored (True) or evicted since the last item; a change and its opposite cancel out."""
        self._num_sent = 0
        self._ready = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._is_open = True

    def wake(self, stored: list[bytes], evicted: list[bytes]) -> None:
        """A step is over."""
        for keys, is_stored in ((evicted, False), (stored, True)):
            for key in keys:
                if self._changes.pop(key, None) is None:
                    self._changes[key] = is_stored
        if self.unsent:
            self._ready.set()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LOAD_DELAY_S, self._ready.set)

    async def wait(self) -> bool:
        """Until there is something to send, or a heartbeat is due. False when the stream is over."""
        try:
            async with asyncio.timeout(HEARTBEAT_S):
                await self._ready.wait()
        except TimeoutError:
            pass  # all is quiet, which is worth telling
        return self._is_open

    def take(self, load: ReplicaLoad, block_keys: list[bytes] | None = None) -> StepUpdate:
        """The next item: all there is to tell now. With keys of all cached blocks, it is a snapshot."""
        self._ready.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        outputs = [buffer.take() for buffer in self.unsent.values()]
        self.unsent.clear()
        changes, self._changes = self._changes, {}
        update = StepUpdate(
            self._num_sent,
            outputs,
            load,
            [key for key, is_stored in changes.items() if is_stored] if block_keys is None else block_keys,
            [key for key, is_stored in changes.items() if not is_stored] if block_keys is None else [],
            is_snapshot=block_keys is not None,
        )
        self._num_sent += 1
        return update

    def close(self) -> None:
        """End the stream."""
        self._is_open = False
        self._ready.set()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def load_of(stats: EngineStats) -> ReplicaLoad:
    """What the other processes need of an engine's counters."""
    return ReplicaLoad(
        num_running=stats.num_running,
        num_waiting=stats.num_waiting,
        num_waiting_tokens=stats.num_waiting_tokens,
        num_free_blocks=stats.num_blocks - stats.num_owned_blocks,
        num_blocks=stats.num_blocks,
        step_s=stats.step_s,
        prefill_tokens_per_s=stats.prefill_tokens_per_s,
        num_prefill_tokens=stats.num_prefill_tokens,
    )
