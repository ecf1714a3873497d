"""AsyncEngine: the engine on a thread of its own, for asyncio callers.

The event loop hands the thread requests and aborts through one locked list; the thread hands back one batch of outputs
for each step, in one wake-up of the loop. What a slow reader has not read is merged, so nothing piles up.
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum

from engine.block_residency import BlockResidency
from engine.config import EngineConfig
from engine.errors import EngineDeadError, RequestError
from engine.grammar import GrammarState
from engine.llm_engine import LLMEngine
from engine.lora.handle import AdapterHandle
from engine.output_buffer import OutputBuffer
from engine.parallel.processes import StartRank, start_process
from engine.request import EngineRequest, FinishReason, RequestOutput, RequestState
from engine.stats import EngineStats

logger = logging.getLogger(__name__)

_Command = tuple[EngineRequest, GrammarState | None, AdapterHandle | None] | str

STOP_TIMEOUT_S = 30.0
"""How long `stop` waits for the step in flight."""
STEP_TIMEOUT_S = {"cuda": 60.0, "cpu": 600.0}
"""How long a step may take unless told otherwise: a long prompt of a large model takes minutes on few cores."""


class EngineStatus(StrEnum):
    """An engine's life, in order. It never goes back."""

    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED = "stopped"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class StepReport:
    """How an engine is after a step."""

    stats: EngineStats
    stored: list[bytes]
    """Keys of KV blocks that the prefix cache can find since the last report ..."""
    evicted: list[bytes]
    """... and of those that it cannot find any more; none is in both."""


class _Stream:
    """Outputs of one request on their way to its reader."""

    __slots__ = ("_buffer", "_ready")

    def __init__(self) -> None:
        self._buffer = OutputBuffer()
        self._ready = asyncio.Event()

    @property
    def is_finished(self) -> bool:
        return self._buffer.is_finished

    def put(self, output: RequestOutput) -> None:
        self._buffer.put(output)
        self._ready.set()

    async def get(self) -> RequestOutput:
        """Everything since the last call, as one output."""
        await self._ready.wait()
        self._ready.clear()
        return self._buffer.take()


class AsyncEngine:
    """Start it inside a running event loop; all its methods belong to that loop's thread.

    Args:
        config: see EngineConfig. The model is loaded before the constructor returns.
        on_step: called in the event loop after every step, when the step's outputs have been handed over.
        start_rank: see LLMEngine.

    Raises:
        CheckpointError, ConfigError, EngineDeadError: see LLMEngine.
    """

    def __init__(
        self,
        config: EngineConfig,
        on_step: Callable[[StepReport], None] | None = None,
        start_rank: StartRank = start_process,
    ) -> None:
        self._engine = LLMEngine(config, start_rank)
        self._on_step = on_step
        self.config = config
        self.max_model_len = self._engine.max_model_len
        self.vocab_size = self._engine.vocab_size
        self.eos_token_ids = self._engine.eos_token_ids
        self.status = EngineStatus.RUNNING
        self.fatal_error: str | None = None
        self._step_timeout_s = config.step_timeout_s or STEP_TIMEOUT_S[self._engine.runner.device.type]
        self._step_began_at: float | None = None
        """When the step began that the thread is in, by `time.monotonic()`."""
        self._sinks: dict[str, Callable[[RequestOutput], None]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake_up = threading.Condition()
        self._commands: list[_Command] = []
        """Requests to queue and ids to abort, in order."""
        self._compiling = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def generate(self, request: EngineRequest) -> AsyncIterator[RequestOutput]:
        """Run a request; yields what was produced since the last read, ending with the output that has a finish reason.

        Leaving the iteration early, by cancellation too, aborts the request.

        Raises:
            RequestError: the request could never run, or its id is in use.
            QueueFullError: too many requests are waiting.
            EngineDeadError: the engine does not run (any more).
        """
        stream = _Stream()
        await self.submit(request, stream.put)
        try:
            while True:
                output = await stream.get()
                yield output
                if output.finish_reason is not None:
                    return
        finally:
            if not stream.is_finished:
                self.drop(request.request_id)

    async def submit(self, request: EngineRequest, sink: Callable[[RequestOutput], None]) -> None:
        """Queue a request. Its outputs go to `sink`, in the event loop; the last one has the finish reason.

        Raises:
            RequestError, QueueFullError, EngineDeadError: see `generate`.
        """
        self._engine.validate(request)
        # The engine's thread goes on while a new grammar is compiled, and so does this loop.
        grammar = await self._start_grammar(request) if request.params.grammar is not None else None
        adapter = await asyncio.to_thread(self._engine.find_adapter, request.adapter) if request.adapter else None
        self._queue(request, sink, grammar, adapter)

    def drop(self, request_id: str) -> bool:
        """End a request whose outputs are not wanted any more. False if there is no such request."""
        if self._sinks.pop(request_id, None) is None:
            return False
        self._send(request_id)
        return True

    def abort(self, request_id: str) -> bool:
        """End a request: its reader gets a last output with reason `abort`. False if there is no such request."""
        sink = self._sinks.get(request_id)
        if sink is None:
            return False
        sink(RequestOutput(request_id, [], finish_reason=FinishReason.ABORT))
        return self.drop(request_id)

    def request_state(self, request_id: str) -> RequestState | None:
        """A snapshot of a live or recently ended request; None if unknown, or not taken up by the thread yet."""
        return self._engine.request_state(request_id)

    def adapter_names(self) -> list[str]:
        """Of the adapters that requests can name. Reads a folder, so it belongs on a thread."""
        return self._engine.adapter_names()

    def stats(self) -> EngineStats:
        """Load and totals, at most one step old."""
        return self._engine.stats()

    @property
    def block_residency(self) -> BlockResidency:
        """How long KV blocks keep their content."""
        return self._engine.block_residency

    def check_health(self) -> None:
        """Raise EngineDeadError unless the engine runs, and its last step has returned or began lately enough."""
        if self.status is not EngineStatus.RUNNING or not self._thread.is_alive():
            raise EngineDeadError(self.fatal_error or f"the engine is {self.status}")
        self._engine.check_health()
        began_at = self._step_began_at  # read once: the thread may be done with the step any moment
        if began_at is not None and (taken_s := time.monotonic() - began_at) > self._step_timeout_s:
            raise EngineDeadError(
                f"a step has not returned for {taken_s:.0f} s, expected at most {self._step_timeout_s:g} "
                "(step_timeout_s)"
            )

    async def stop(self) -> None:
        """End all requests with reason `abort`, then the thread."""
        if self.status is EngineStatus.RUNNING:
            self.status = EngineStatus.STOPPING
        for request_id in list(self._sinks):
            self.abort(request_id)
        with self._wake_up:
            self._wake_up.notify()
        self._compiling.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._thread.join, STOP_TIMEOUT_S)
        if self._thread.is_alive():
            logger.error("the engine's last step did not end within %.0f s", STOP_TIMEOUT_S)
        elif self.status is EngineStatus.STOPPING:
            self.status = EngineStatus.STOPPED
        await asyncio.to_thread(self._engine.close)

    async def _start_grammar(self, request: EngineRequest) -> GrammarState | None:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._compiling, self._engine.start_grammar, request)

    def _queue(
        self,
        request: EngineRequest,
        sink: Callable[[RequestOutput], None],
        grammar: GrammarState | None,
        adapter: AdapterHandle | None,
    ) -> None:
        self.check_health()
        if request.request_id in self._sinks:
            raise RequestError(f"request id {request.request_id!r} is in use, expected a new one", "request_id")
        self._engine.check_room(request.request_id, num_pending=len(self._commands))
        self._loop = asyncio.get_running_loop()
        self._sinks[request.request_id] = sink
        self._send((request, grammar, adapter))

    def _send(self, command: _Command) -> None:
        with self._wake_up:
            self._commands.append(command)
            self._wake_up.notify()

    def _run(self) -> None:
        """The thread: take up what the loop sent, step, hand back outputs; until stopped."""
        try:
            while self._take_up():
                self._step_began_at = time.monotonic()
                outputs = self._engine.step()
                self._step_began_at = None
                report = None
                if self._on_step is not None:
                    report = StepReport(self._engine.stats(), *self._engine.take_block_events())
                if (outputs or report is not None) and self._loop is not None:
                    self._loop.call_soon_threadsafe(self._deliver, outputs, report)
        except Exception as error:
            logger.exception("the engine stops on a fault")
            self.fatal_error = f"engine fault: {type(error).__name__}: {error}"
            self.status = EngineStatus.DEAD
            if self._loop is not None and not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._fail_all)

    def _take_up(self) -> bool:
        """Wait for work and take up requests and aborts. False when it is time to end."""
        with self._wake_up:
            while not (self._commands or self._engine.has_work):
                if self.status is not EngineStatus.RUNNING:
                    return False
                self._wake_up.wait()
            commands, self._commands = self._commands, []
        for command in commands:
            if isinstance(command, str):
                self._engine.abort(command)
            else:
                self._engine.enqueue(*command)
        return True

    def _deliver(self, outputs: list[RequestOutput], report: StepReport | None) -> None:
        """In the event loop: one step's outputs to their sinks. Requests aborted meanwhile have none."""
        for output in outputs:
            sink = self._sinks.get(output.request_id)
            if sink is None:
                continue
            if output.finish_reason is not None:
                del self._sinks[output.request_id]
            sink(output)
        if self._on_step is not None and report is not None:
            self._on_step(report)

    def _fail_all(self) -> None:
        sinks, self._sinks = self._sinks, {}
        for request_id, sink in sinks.items():
            sink(RequestOutput(request_id, [], finish_reason=FinishReason.ERROR, error=self.fatal_error))
