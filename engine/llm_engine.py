"""LLMEngine: requests in, outputs out, one step at a time. Not safe for threads; AsyncEngine and LLM build on it."""

import logging
import time
from collections import OrderedDict
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from engine.block_pool import BlockPool
from engine.block_residency import BlockResidency
from engine.config import EngineConfig
from engine.device import is_out_of_memory
from engine.errors import QueueFullError, RequestError
from engine.grammar import GrammarCompiler, GrammarState
from engine.lora.handle import AdapterHandle
from engine.lora.registry import AdapterRegistry
from engine.model_config import ModelConfig
from engine.outcome import LaunchedStep, StepResult
from engine.parallel.leader import create_runner
from engine.parallel.processes import StartRank, start_process
from engine.request import (
    EngineRequest,
    FinishReason,
    Request,
    RequestOutput,
    RequestState,
    TokenLogprobs,
)
from engine.request_checks import RequestChecks
from engine.scheduler import Scheduler, Step
from engine.stats import EngineStats, PrefillRate, StageSeconds
from engine.tokenizer import Tokenizer, read_eos_token_ids
from engine.weights.hub import resolve_model

logger = logging.getLogger(__name__)

MAX_FAILED_STEPS = 16
"""So many steps in a row may run out of memory, each at the cost of a request; with one more the engine is broken."""
NUM_FINISHED_STATES = 1024
"""How many ended requests can still be asked about."""


class LLMEngine:
    """The engine.

    Args:
        config: see EngineConfig.
        start_rank: starts another rank of the model, where it has several.

    Raises:
        CheckpointError: the model cannot be found or used.
        ConfigError: the configuration does not fit machine or model.
        EngineDeadError: another rank ended while it started.
    """

    def __init__(self, config: EngineConfig, start_rank: StartRank = start_process) -> None:
        self.config = config
        path = resolve_model(config.model, config.revision)
        self.model_config = ModelConfig.from_dir(path)
        self.tokenizer = Tokenizer.from_dir(path)
        self.eos_token_ids = read_eos_token_ids(path, self.tokenizer)
        self.vocab_size = self.model_config.vocab_size
        if config.load_format != "dummy":  # rows past the tokenizer's last id are padding in real checkpoints
            self.vocab_size = min(self.vocab_size, self.tokenizer.vocab_size)
        self._grammars = GrammarCompiler(self.tokenizer.to_json(), self.vocab_size, self.eos_token_ids)
        self.runner = create_runner(config, self.model_config, path, self.vocab_size, start_rank)
        self.max_model_len = self.runner.max_model_len
        self._checks = RequestChecks(self.vocab_size, self.max_model_len, self.eos_token_ids)
        self._pool = BlockPool(self.runner.num_blocks, config.enable_prefix_caching)
        self._scheduler = Scheduler(
            self._pool,
            config.block_size,
            config.max_num_seqs,
            self.runner.max_num_batched_tokens,
            num_speculative_tokens=config.num_speculative_tokens,
            max_loras=config.max_loras,
        )
        self._adapters: AdapterRegistry | None = None
        if self.runner.adapters is not None:
            self._adapters = AdapterRegistry(config, self.runner.adapters.parts, self.runner.dtype)
        self._requests: dict[str, Request] = {}
        self._finished: OrderedDict[str, RequestState] = OrderedDict()
        self._overlap = self.runner.device.type == "cuda" if config.overlap_steps is None else config.overlap_steps
        if config.num_speculative_tokens:  # guesses are looked up in tokens that the host has
            self._overlap = False
        self._in_flight: tuple[Step, LaunchedStep, float] | None = None
        self._num_steps = 0
        self._num_failed_steps = 0
        self._step_s = 0.0
        self._stages = StageSeconds()
        self._prefill_rate = PrefillRate()
        self._taken_in_at = 0.0

    def validate(self, source: EngineRequest) -> None:
        """Raise RequestError if the request could never run. Safe to call from any thread."""
        self._checks.check(source)

    def add_request(self, source: EngineRequest) -> None:
        """Queue a request.

        Raises:
            RequestError: it could never run, or its id is in use.
            QueueFullError: `max_num_waiting` requests wait already.
        """
        self.validate(source)
        self.check_room(source.request_id)
        self.enqueue(source, self.start_grammar(source), self.find_adapter(source.adapter))

    def start_grammar(self, source: EngineRequest) -> GrammarState | None:
        """What `enqueue` needs to know about the grammar of a request that `validate` passed, if it has one.

        See GrammarCompiler.start.

        Raises:
            RequestError: the grammar cannot be used, or the output so far does not fit it or is all that may be.
        """
        if source.params.grammar is None:
            return None
        state = self._grammars.start(source.params.grammar)
        for index, token_id in enumerate(source.output_token_ids):
            if (error := state.advance(token_id)) is not None:
                raise RequestError(f"output_token_ids[{index}] does not fit the grammar: {error}", "output_token_ids")
        if source.output_token_ids and state.is_complete:
            raise RequestError("output_token_ids fulfils the grammar, expected an output to go on", "output_token_ids")
        return state

    def check_room(self, request_id: str, num_pending: int = 0) -> None:
        """Raise if `enqueue` must not follow: the id is in use, or too many requests wait, `num_pending` besides."""
        if request_id in self._requests:
            raise RequestError(f"request id {request_id!r} is in use, expected a new one", "request_id")
        num_waiting = len(self._scheduler.waiting) + num_pending
        if num_waiting >= self.config.max_num_waiting:
            raise QueueFullError(f"{num_waiting} requests are waiting, the most that may (max_num_waiting)")

    def find_adapter(self, name: str) -> AdapterHandle | None:
        """What `enqueue` needs to know about the adapter of a request; None for no name. Safe to call from any thread.

        Raises:
            RequestError: there is no such adapter, or it cannot be used.
            QueueFullError: as many adapters as may be in memory are in use.
        """
        return self._registry().find(name) if name else None

    def load_adapter(self, name: str, path: str | Path) -> None:
        """Make an adapter known under a name, until `unload_adapter`. See AdapterRegistry.load."""
        self._registry().load(name, path)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter that no request uses. See AdapterRegistry.unload."""
        self._scheduler.adapter_places.drop(self._registry().unload(name))

    def adapter_names(self) -> list[str]:
        """Of the adapters that requests can name. Safe to call from any thread."""
        return [] if self._adapters is None else self._adapters.names()

    def enqueue(
        self, source: EngineRequest, grammar: GrammarState | None, adapter: AdapterHandle | None = None
    ) -> None:
        """Queue a request that `validate` and `check_room` passed, with what `start_grammar` and `find_adapter` say."""
        request = Request(source, self.eos_token_ids, self.max_model_len, grammar, adapter)
        if adapter is not None:
            adapter.num_requests += 1
        self._requests[request.request_id] = request
        self._scheduler.add(request)

    def abort(self, request_id: str) -> bool:
        """End a request now and free all it holds. False if there is no such request (any more)."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        self._scheduler.finish(request, FinishReason.ABORT)
        self._forget(request)
        return True

    def check_health(self) -> None:
        """Raise EngineDeadError if another rank of the model has failed. Safe to call from any thread."""
        self.runner.check()

    def close(self) -> None:
        """End the other ranks of the model, if there are any; no step may follow."""
        self.runner.close()

    @property
    def has_work(self) -> bool:
        return bool(self._requests) or self._in_flight is not None

    def step(self) -> list[RequestOutput]:
        """Launch a step and take in the outcome of one: this one, or with overlapped steps the one before.

        Returns:
            An output for every request that got a token or ended.
        """
        stages, start = self._stages, time.monotonic()
        step = self._scheduler.schedule()
        scheduled = time.monotonic()
        stages.schedule += scheduled - start
        outputs: list[RequestOutput] = []

        def finish_in_flight() -> None:
            """Take in the step before, while the device works on this one's forward pass."""
            if self._in_flight is not None:
                outputs.extend(self._take_in(*self._in_flight))
                self._in_flight = None

        before = stages.wait + stages.update
        launched = None
        if step.requests:
            try:
                launched = (step, self.runner.launch(step, finish_in_flight), scheduled)
                self._num_failed_steps = 0
            except Exception as error:
                self._num_failed_steps += 1
                if not is_out_of_memory(error) or self._num_failed_steps > MAX_FAILED_STEPS:
                    raise
                finish_in_flight()
                outputs += self._make_room(step, error)
        stages.launch += time.monotonic() - scheduled - (stages.wait + stages.update - before)
        if self._overlap:
            finish_in_flight()
            self._in_flight = launched
        elif launched is not None:
            outputs += self._take_in(*launched)
        self._step_s = time.monotonic() - start
        return outputs

    def request_state(self, request_id: str) -> RequestState | None:
        """A snapshot of a live or recently ended request."""
        request = self._requests.get(request_id)
        return self._finished.get(request_id) if request is None else request.state()

    def stats(self) -> EngineStats:
        scheduler, pool, stages = self._scheduler, self._pool, self._stages
        counters = scheduler.counters
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_waiting_tokens=scheduler.num_waiting_tokens,
            num_prefill_tokens=scheduler.num_prefill_tokens,
            waiting_for=scheduler.waiting_for if scheduler.waiting else None,
            num_blocks=pool.num_blocks,
            num_free_blocks=pool.num_free,
            num_cached_blocks=pool.num_cached,
            num_owned_blocks=pool.num_owned,
            num_steps=self._num_steps,
            num_preemptions=counters.num_preemptions,
            num_finished=dict(counters.num_finished),
            num_prompt_tokens=counters.num_prompt_tokens,
            num_cached_prompt_tokens=counters.num_cached_prompt_tokens,
            num_generated_tokens=counters.num_generated_tokens,
            num_guessed_tokens=counters.num_guessed_tokens,
            num_right_guesses=counters.num_right_guesses,
            prefill_tokens_per_s=self._prefill_rate.tokens_per_s,
            step_s=self._step_s,
            schedule_s=stages.schedule,
            launch_s=stages.launch,
            wait_s=stages.wait,
            update_s=stages.update,
        )

    @property
    def block_residency(self) -> BlockResidency:
        """How long KV blocks keep their content. Safe to read from any thread."""
        return self._pool.residency

    def take_block_events(self) -> tuple[list[bytes], list[bytes]]:
        """Keys of KV blocks (`engine.block_pool.block_keys`) stored and evicted since the last call: none is in both.

        Nothing is recorded before the first call, which tells all keys there are. To be called between steps, by the
        thread that makes them.
        """
        return self._pool.take_events()

    def _take_in(self, step: Step, launched: LaunchedStep, launched_at: float) -> list[RequestOutput]:
        """Wait for a launched step, tell the scheduler its outcome and make the outputs."""
        waiting_since = time.monotonic()
        result = self.runner.wait(launched)
        now = time.monotonic()
        self._stages.wait += now - waiting_since
        # The device began with this step when it was launched, or when it had done the one before.
        began_at, self._taken_in_at = max(launched_at, self._taken_in_at), now
        num_prompt_tokens = sum(step.num_new_tokens) - len(step.sampling)  # all but the one that gives the next token
        if num_prompt_tokens and now > began_at:
            self._prefill_rate.add(num_prompt_tokens, now - began_at)
        outputs = self._update(step, result)
        self._num_steps += 1
        self._stages.update += time.monotonic() - now
        return outputs

    def _update(self, step: Step, result: StepResult) -> list[RequestOutput]:
        """Tell the scheduler a step's outcome and make the outputs."""
        for prompt_of, entries in result.prompt_logprobs:
            prompt_of.prompt_logprobs = (prompt_of.prompt_logprobs or []) + entries
        outputs = [] if all(result.is_finite) else self._fail_bad_requests(step, result)
        requests = self._scheduler.update(step, result.token_ids)
        if step.guesses:
            return outputs + self._outputs_with_guesses(step, result, requests)
        for request, token_id, logprobs in zip(requests, result.token_ids, result.logprobs, strict=True):
            if request is not None:
                outputs.append(self._output(request, [token_id], None if logprobs is None else [logprobs]))
        return outputs

    def _outputs_with_guesses(
        self, step: Step, result: StepResult, requests: Sequence[Request | None]
    ) -> list[RequestOutput]:
        """One output for each request, whose tokens are next to each other; those after wrong guesses are nobody's."""
        outputs = []
        entries = zip(step.sampling, requests, result.token_ids, result.logprobs, strict=True)
        for _, group in groupby(entries, key=itemgetter(0)):
            kept = [(request, token_id, logprobs) for _, request, token_id, logprobs in group if request is not None]
            if kept:
                request, token_ids, logprobs = kept[0][0], [token_id for _, token_id, _ in kept], kept[0][2]
                found = None if logprobs is None else [entry for _, _, entry in kept if entry is not None]
                outputs.append(self._output(request, token_ids, found))
        return outputs

    def _make_room(self, step: Step, error: Exception) -> list[RequestOutput]:
        """Take back a step that ran out of memory, and end its largest request, of equal ones the newest.

        The model's peak was measured before the first request, so this is for peaks that nobody foresaw.
        """
        self.runner.forget()
        self._scheduler.take_back(step)
        live = [pair for pair in zip(step.num_new_tokens, step.requests, strict=True) if pair[1].finish_reason is None]
        if not live:
            return []
        num_new, request = max(live, key=lambda pair: (pair[0], pair[1].priority, pair[1].arrival_index))
        reason = (
            f"out of memory in a step of {sum(step.num_new_tokens)} tokens, {num_new} of them this request's: "
            f"{' '.join(str(error).split())[:200]}"
        )
        logger.error("request %s ends: %s", request.request_id, reason)
        self._scheduler.finish(request, FinishReason.ERROR, reason)
        self._forget(request)
        return [RequestOutput(request.request_id, [], finish_reason=FinishReason.ERROR, error=reason)]

    def _fail_bad_requests(self, step: Step, result: StepResult) -> list[RequestOutput]:
        """End the requests whose logits are no numbers. The others go on."""
        outputs = []
        for index, is_finite in zip(step.sampling, result.is_finite, strict=True):
            request = step.requests[index]
            if is_finite or request.finish_reason is not None:
                continue
            error = "the model's logits are not finite numbers"
            logger.error("request %s ends: %s", request.request_id, error)
            self.runner.clear_blocks(self._scheduler.discard(request, error))
            self._forget(request)
            outputs.append(RequestOutput(request.request_id, [], finish_reason=FinishReason.ERROR, error=error))
        return outputs

    def _output(self, request: Request, token_ids: list[int], logprobs: list[TokenLogprobs] | None) -> RequestOutput:
        if request.finish_reason is not None:
            self._forget(request)
        if request.finish_reason is FinishReason.ERROR:
            return RequestOutput(
                request.request_id, [], finish_reason=FinishReason.ERROR, error=request.error, error_param="grammar"
            )
        return RequestOutput(
            request.request_id,
            token_ids,
            logprobs=logprobs,
            prompt_logprobs=request.prompt_logprobs if request.num_output_tokens == len(token_ids) else None,
            finish_reason=request.finish_reason,
            stop_token_id=request.stop_token_id,
            num_cached_tokens=request.num_cached_tokens,
            timings=request.timings() if request.num_output_tokens == len(token_ids) else None,
        )

    def _registry(self) -> AdapterRegistry:
        if self._adapters is None:
            raise RequestError("the engine has no room for adapters, expected max_loras of at least 1", "adapter")
        return self._adapters

    def _forget(self, request: Request) -> None:
        if request.adapter is not None:
            request.adapter.num_requests -= 1
        del self._requests[request.request_id]
        self._finished[request.request_id] = request.state()
        if len(self._finished) > NUM_FINISHED_STATES:
            self._finished.popitem(last=False)
