"""AsyncEngine: the engine on a thread of its own, for asyncio callers.

The event loop hands the thread requests and aborts through one locked list; the thread hands back one batch of outputs
for each step, in one wake-up of the loop. What a slow reader has not read is merged, so nothing piles up.
"""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum

from engine.config import EngineConfig
from engine.errors import EngineDeadError, RequestError
from engine.grammar import GrammarState
from engine.llm_engine import LLMEngine
from engine.request import EngineRequest, FinishReason, RequestOutput, RequestState
from engine.stats import EngineStats

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 30.0
"""How long `stop` waits for the step in flight."""


class EngineStatus(StrEnum):
    """An engine's life, in order. It never goes back."""

    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED = "stopped"
    DEAD = "dead"


class _Stream:
    """Outputs of one request on their way to its reader."""

    __slots__ = ("_ready", "_unread")

    def __init__(self) -> None:
        self._unread: RequestOutput | None = None
        self._ready = asyncio.Event()

    def put(self, output: RequestOutput) -> None:
        self._unread = output if self._unread is None else merge_outputs(self._unread, output)
        self._ready.set()

    async def get(self) -> RequestOutput:
        """Everything since the last call, as one output."""
        await self._ready.wait()
        self._ready.clear()
        output, self._unread = self._unread, None
        if output is None:
            raise RuntimeError("a stream was woken with nothing to read")
        return output


def merge_outputs(first: RequestOutput, second: RequestOutput) -> RequestOutput:
    """Two outputs of one request, one after the other, as one."""
    return RequestOutput(
        first.request_id,
        first.token_ids + second.token_ids,
        logprobs=(first.logprobs or []) + (second.logprobs or []) or None,
        prompt_logprobs=first.prompt_logprobs if first.prompt_logprobs is not None else second.prompt_logprobs,
        finish_reason=second.finish_reason,
        stop_token_id=second.stop_token_id,
        error=second.error,
        num_cached_tokens=first.num_cached_tokens,
        error_param=second.error_param,
        timings=first.timings or second.timings,
    )


class AsyncEngine:
    """Start it inside a running event loop; all its methods belong to that loop's thread.

    Args:
        config: see EngineConfig. The model is loaded before the constructor returns.

    Raises:
        CheckpointError, ConfigError: see LLMEngine.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._engine = LLMEngine(config)
        self.config = config
        self.max_model_len = self._engine.max_model_len
        self.vocab_size = self._engine.vocab_size
        self.eos_token_ids = self._engine.eos_token_ids
        self.status = EngineStatus.RUNNING
        self.fatal_error: str | None = None
        self._streams: dict[str, _Stream] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake_up = threading.Condition()
        self._commands: list[tuple[EngineRequest, GrammarState | None] | str] = []
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
        # The engine's thread goes on while a new grammar is compiled, and so does this loop.
        grammar = await self._start_grammar(request) if request.params.grammar is not None else None
        stream = self._submit(request, grammar)
        finished = False
        try:
            while not finished:
                output = await stream.get()
                finished = output.finish_reason is not None
                yield output
        finally:
            self._streams.pop(request.request_id, None)
            if not finished:
                self._send(request.request_id)

    def abort(self, request_id: str) -> bool:
        """End a request: its reader gets a last output with reason `abort`. False if there is no such request."""
        stream = self._streams.pop(request_id, None)
        if stream is None:
            return False
        stream.put(RequestOutput(request_id, [], finish_reason=FinishReason.ABORT))
        self._send(request_id)
        return True

    def request_state(self, request_id: str) -> RequestState | None:
        """A snapshot of a live or recently ended request; None if unknown, or not taken up by the thread yet."""
        return self._engine.request_state(request_id)

    def stats(self) -> EngineStats:
        """Load and totals, at most one step old."""
        return self._engine.stats()

    def check_health(self) -> None:
        """Raise EngineDeadError unless the engine runs."""
        if self.status is not EngineStatus.RUNNING or not self._thread.is_alive():
            raise EngineDeadError(self.fatal_error or f"the engine is {self.status}")

    async def stop(self) -> None:
        """End all requests with reason `abort`, then the thread."""
        if self.status is EngineStatus.RUNNING:
            self.status = EngineStatus.STOPPING
        for request_id in list(self._streams):
            self.abort(request_id)
        with self._wake_up:
            self._wake_up.notify()
        self._compiling.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._thread.join, STOP_TIMEOUT_S)
        if self._thread.is_alive():
            logger.error("the engine's last step did not end within %.0f s", STOP_TIMEOUT_S)
        elif self.status is EngineStatus.STOPPING:
            self.status = EngineStatus.STOPPED

    async def _start_grammar(self, request: EngineRequest) -> GrammarState | None:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._compiling, self._engine.start_grammar, request.params)

    def _submit(self, request: EngineRequest, grammar: GrammarState | None) -> _Stream:
        self.check_health()
        self._engine.validate(request)
        if request.request_id in self._streams:
            raise RequestError(f"request id {request.request_id!r} is in use, expected a new one", "request_id")
        self._engine.check_room(request.request_id, num_pending=len(self._commands))
        self._loop = asyncio.get_running_loop()
        stream = self._streams[request.request_id] = _Stream()
        self._send((request, grammar))
        return stream

    def _send(self, command: tuple[EngineRequest, GrammarState | None] | str) -> None:
        with self._wake_up:
            self._commands.append(command)
            self._wake_up.notify()

    def _run(self) -> None:
        """The thread: take up what the loop sent, step, hand back outputs; until stopped."""
        try:
            while self._take_up():
                outputs = self._engine.step()
                if outputs and self._loop is not None:
                    self._loop.call_soon_threadsafe(self._deliver, outputs)
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

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        """In the event loop: one step's outputs to their streams. Requests aborted meanwhile have none."""
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue
            stream.put(output)
            if output.finish_reason is not None:
                del self._streams[output.request_id]

    def _fail_all(self) -> None:
        streams, self._streams = self._streams, {}
        for request_id, stream in streams.items():
            stream.put(RequestOutput(request_id, [], finish_reason=FinishReason.ERROR, error=self.fatal_error))
