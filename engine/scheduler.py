"""Who runs in the next step, and with how many tokens. No torch here.

There are no phases. A request has `num_tokens` tokens of which `num_computed_tokens` are in the KV cache; a step
computes some of the rest. Decode is the case where one is missing, a prefill chunk the case where many are, and a
request whose last token is computed in a step gets a new one from it.

Steps overlap: `schedule` may be called again before `update` has told the outcome of the step before. What a launched
step computes counts as computed, and the token it samples as one of the request's tokens, though only the device knows
which (`num_pending_tokens`). Blocks and slots are given back at once, not when the launched steps are done: the device
runs steps in order, so whoever gets them next writes after the last step that used them.
"""

import time
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.block_forecast import BlockForecast
from engine.block_pool import BlockPool, extend_block_keys
from engine.lora.handle import AdapterPlaces
from engine.request import FinishReason, Request
from engine.speculation import look_up
from engine.stats import SchedulerCounters, WaitingFor

OUTPUT_LENGTH_MEMORY = 64
"""How many finished requests the expected output length remembers, as an exponential mean."""
FIRST_EXPECTED_OUTPUT = 256.0
"""Expected output length before any request has finished."""


@dataclass(slots=True)
class Step:
    """One step's work. `requests[i]` computes `num_new_tokens[i]` ≥ 1 tokens, from position `starts[i]` on."""

    requests: list[Request] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    num_new_tokens: list[int] = field(default_factory=list)
    sampling: list[int] = field(default_factory=list)
    """Rising indices into `requests`, of those that reach their last token and get a new one. A request with guesses is
    named once more for each of these: it samples after its last token and after every guess."""
    guesses: dict[Request, list[int]] = field(default_factory=dict)
    """Tokens that may come next, computed as the last of the request's `num_new_tokens`."""
    admitted: list[Request] = field(default_factory=list)
    """Those that enter the running set, with a slot of their own from now on."""
    grown: list[Request] = field(default_factory=list)
    """Those that were running and got more blocks."""


class Scheduler:
    """Continuous batching over a block pool.

    Running requests come first, in the order they were admitted; then waiting ones by priority and arrival.
    When blocks run out, the running request of lowest priority that arrived last gives its blocks back and waits again;
    what it had computed is computed anew, or found in the prefix cache.

    Args:
        pool: the KV blocks.
        block_size: tokens in a block.
        max_num_seqs: most running requests.
        max_num_batched_tokens: most tokens in a step.
        watermark: fraction of blocks that the expected need of the running set must leave free.
        num_speculative_tokens: most guesses for a request in a step. With any, steps must not overlap.
        max_loras: most adapters of running requests.
    """

    def __init__(
        self,
        pool: BlockPool,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        watermark: float = 0.01,
        num_speculative_tokens: int = 0,
        max_loras: int = 0,
    ) -> None:
        self.pool = pool
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.num_speculative_tokens = num_speculative_tokens
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.num_waiting_tokens = 0
        """Tokens of the waiting requests."""
        self.waiting_for: WaitingFor | None = None
        """What the first waiting request lacked in the last step, if one waits."""
        self._has_prefill = False
        """Whether any running request may have got no token from the last step."""
        self.counters = SchedulerCounters()
        self._block_limit = pool.num_blocks - int(watermark * pool.num_blocks)
        self.adapter_places = AdapterPlaces(max_loras)
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._num_arrivals = 0
        self._expected_output = FIRST_EXPECTED_OUTPUT

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens that running requests have still to compute, but for each one's last."""
        if not self._has_prefill:
            return 0
        return sum(max(0, len(request.token_ids) - 1 - request.num_computed_tokens) for request in self.running)

    def add(self, request: Request) -> None:
        """Queue a new request."""
        request.arrival_index = self._num_arrivals
        self._num_arrivals += 1
        self.counters.num_prompt_tokens += request.num_tokens
        self._queue(request)

    def finish(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        """End a request between steps, wherever it is, and give back all it holds."""
        request.finish(reason, error)
        self.counters.num_finished[reason] += 1
        if request.running:
            self.running.remove(request)
            self._release(request)
        else:
            self._unqueue(bisect_left(self.waiting, _order(request), key=_order))

    def discard(self, request: Request, error: str) -> list[int]:
        """End a running request whose keys and values may be bad. Returns the blocks that only it owned."""
        blocks = self.pool.discard(request.block_table)
        request.block_table = []
        self.finish(request, FinishReason.ERROR, error)
        return blocks

    def schedule(self) -> Step:
        """Choose the next step's work and own the blocks for it. Empty only when there is nothing to do."""
        step = Step()
        budget, num_preempted = self._schedule_running(step)
        self.waiting_for = None
        if self.waiting:
            self.waiting_for = WaitingFor.BLOCKS if num_preempted else self._schedule_waiting(step, budget)
        num_sampling = 0
        for index, (request, num_new) in enumerate(zip(step.requests, step.num_new_tokens, strict=True)):
            start = request.num_computed_tokens
            step.starts.append(start)
            request.num_computed_tokens = start + num_new
            num_guesses = len(step.guesses[request]) if request in step.guesses else 0
            if start + num_new - num_guesses == len(request.token_ids) + request.num_pending_tokens:
                request.num_pending_tokens += 1
                step.sampling += [index] * (1 + num_guesses)
                num_sampling += 1
        self._has_prefill = num_sampling < len(self.running)
        return step

    def take_back(self, step: Step) -> None:
        """Undo `schedule` for a step whose launch failed, after the step before it has been taken in.

        Requests that it admitted or gave blocks wait to be admitted anew: the runner may not have noted what they got.
        """
        is_sampling = set(step.sampling)
        self._has_prefill = True
        for index, (request, start) in enumerate(zip(step.requests, step.starts, strict=True)):
            if request.finish_reason is not None:
                continue
            request.num_pending_tokens -= index in is_sampling
            request.num_computed_tokens = start
            if request in step.admitted or request in step.grown:
                self._preempt(request)

    def update(self, step: Step, sampled_token_ids: Sequence[int]) -> list[Request | None]:
        """Take in a step's outcome: `sampled_token_ids[i]` is the new token of request `step.sampling[i]`.

        Returns:
            The requests that got these tokens; None where the request had ended before, or where the token comes after
            a wrong guess.
        """
        now = time.monotonic()
        block_size = self.block_size
        if step.guesses:
            self._drop_wrong_guesses(step, sampled_token_ids)
        for request, start, num_new in zip(step.requests, step.starts, step.num_new_tokens, strict=True):
            first, last = start // block_size, (start + num_new) // block_size
            if first != last and request.running:
                self._register_blocks(request, first, last, step.guesses.get(request))
        updated: list[Request | None] = []
        before = -1
        for index, token_id in zip(step.sampling, sampled_token_ids, strict=True):
            request = step.requests[index]
            if index != before:
                before = index
                num_kept = 1 + len(step.guesses[request]) if request in step.guesses else 1
                request.num_pending_tokens -= request.finish_reason is None
            if request.finish_reason is not None or not num_kept:
                updated.append(None)
                continue
            num_kept -= 1
            updated.append(request)
            request.token_ids.append(token_id)
            self.counters.num_generated_tokens += 1
            if request.first_token_time is None:
                request.first_token_time = now
            is_last = token_id in request.stop_token_ids or len(request.token_ids) >= request.max_num_tokens
            if is_last or request.grammar is not None:
                self._end_if_done(request, token_id)
        return updated

    def _end_if_done(self, request: Request, token_id: int) -> None:
        """End a request if the token that it got is its last."""
        error = None if request.grammar is None else request.grammar.advance(token_id)
        if error is not None:
            self._end(request, FinishReason.ERROR, error)
        elif token_id in request.stop_token_ids:
            request.stop_token_id = token_id
            self._end(request, FinishReason.STOP)
        elif request.grammar is not None and request.grammar.is_complete:
            self._end(request, FinishReason.STOP)
        elif len(request.token_ids) >= request.max_num_tokens:
            self._end(request, FinishReason.LENGTH)

    def _end(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        self.finish(request, reason, error)
        self._expected_output += (request.num_output_tokens - self._expected_output) / OUTPUT_LENGTH_MEMORY

    def _drop_wrong_guesses(self, step: Step, sampled_token_ids: Sequence[int]) -> None:
        """Leave only those guesses in the step that were right, and take back what was computed for the others."""
        sampled_at = dict(zip(reversed(step.sampling), range(len(step.sampling) - 1, -1, -1), strict=True))
        for index, request in enumerate(step.requests):
            guesses = step.guesses.get(request)
            if guesses is None:
                continue
            sampled = sampled_token_ids[sampled_at[index] : sampled_at[index] + len(guesses)]
            pairs = enumerate(zip(guesses, sampled, strict=True))
            num_right = next((place for place, (guess, token_id) in pairs if guess != token_id), len(guesses))
            self.counters.num_guessed_tokens += len(guesses)
            self.counters.num_right_guesses += num_right
            step.num_new_tokens[index] -= len(guesses) - num_right
            if request.running:
                request.num_computed_tokens -= len(guesses) - num_right
            del guesses[num_right:]

    def _schedule_running(self, step: Step) -> tuple[int, int]:
        """Give running requests their tokens. Returns the token budget left and how many requests were preempted."""
        budget = self.max_num_batched_tokens
        num_preempted = 0
        position = 0
        while position < len(self.running) and budget:
            request = self.running[position]
            num_tokens = len(request.token_ids) + request.num_pending_tokens
            if num_tokens >= request.max_num_tokens:  # its last token is on the way
                position += 1
                continue
            num_new = min(num_tokens - request.num_computed_tokens, budget)
            if self.num_speculative_tokens and num_new == 1:
                num_new += self._guess(step, request, min(budget - 1, request.max_num_tokens - num_tokens - 1))
            num_missing = self._num_missing_blocks(request, num_new)
            while num_missing > self.pool.num_available:
                victim = max(self.running, key=_order)
                if self.running.index(victim) < position:
                    position -= 1
                budget += _unschedule(step, victim)
                self._preempt(victim)
                num_preempted += 1
                if victim is request:
                    break
            else:
                if num_missing > 0:
                    request.block_table += self.pool.allocate(num_missing)
                    step.grown.append(request)
                step.requests.append(request)
                step.num_new_tokens.append(num_new)
                budget -= num_new
                position += 1
        return budget, num_preempted

    def _guess(self, step: Step, request: Request, room: int) -> int:
        """Note guesses for a request that is about to decode, as far as there are blocks. Returns how many."""
        if request.grammar is not None:  # it cannot tell what may follow a guess
            return 0
        guesses = look_up(request.token_ids, min(self.num_speculative_tokens, room))
        while guesses and self._num_missing_blocks(request, 1 + len(guesses)) > self.pool.num_available:
            guesses.pop()
        if guesses:
            step.guesses[request] = guesses
        return len(guesses)

    def _schedule_waiting(self, step: Step, budget: int) -> WaitingFor | None:
        """Admit waiting requests while tokens, slots and the expected need for blocks allow. Returns what ran out."""
        forecast = None
        while self.waiting and budget and self._free_slots:
            request = self.waiting[0]
            prefix = self._find_prefix(request)
            num_unowned = self.pool.num_cached_among(prefix)
            num_shared = len(prefix) - num_unowned
            if self.running:
                forecast = forecast or BlockForecast(self.running, self.block_size, self._expected_output)
                if forecast.peak_with(request, num_shared) > self._block_limit:
                    return WaitingFor.BLOCKS
            num_computed = len(prefix) * self.block_size
            num_new = min(request.num_tokens - num_computed, budget)
            num_missing = -(-(num_computed + num_new) // self.block_size) - len(prefix)
            if num_missing + num_unowned > self.pool.num_available:
                return WaitingFor.BLOCKS
            if not self._pin_adapter(request):
                return WaitingFor.ADAPTERS
            self._unqueue(0)
            self._admit(request, prefix, num_shared, num_missing)
            if forecast:
                forecast.add(request)
            step.admitted.append(request)
            step.requests.append(request)
            step.num_new_tokens.append(num_new)
            budget -= num_new
        if not self.waiting:
            return None
        return WaitingFor.SEQS if budget else WaitingFor.TOKENS

    def _find_prefix(self, request: Request) -> list[int]:
        if not self.pool.enable_prefix_caching or request.needs_prompt_logits:
            return []
        extend_block_keys(request.block_keys, request.token_ids, self.block_size, request.cache_salt)
        # Never the last token: there must be one to compute, or there are no logits to sample from.
        return self.pool.find_prefix(request.block_keys[: (request.num_tokens - 1) // self.block_size])

    def _admit(self, request: Request, prefix: list[int], num_shared: int, num_missing: int) -> None:
        self.pool.share(prefix)
        request.block_table = prefix + self.pool.allocate(num_missing)
        request.num_shared_blocks = num_shared
        request.num_computed_tokens = len(prefix) * self.block_size
        if request.first_scheduled_time is None:
            request.first_scheduled_time = time.monotonic()
            request.num_cached_tokens = min(request.num_computed_tokens, request.num_prompt_tokens)
            self.counters.num_cached_prompt_tokens += request.num_computed_tokens
        request.slot = self._free_slots.pop()
        request.running = True
        self.running.append(request)

    def _pin_adapter(self, request: Request) -> bool:
        """Whether the request's adapter is on the device. Where others take all places, it waits in line for one."""
        if request.adapter is not None:
            request.adapter_place = self.adapter_places.pin(request.adapter)
        return request.adapter is None or request.adapter_place > 0

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        request.num_preemptions += 1
        self.counters.num_preemptions += 1
        self._queue(request)

    def _queue(self, request: Request) -> None:
        insort(self.waiting, request, key=_order)
        self.num_waiting_tokens += request.num_tokens

    def _unqueue(self, position: int) -> None:
        self.num_waiting_tokens -= self.waiting.pop(position).num_tokens

    def _release(self, request: Request) -> None:
        self.pool.release(request.block_table)
        self._free_slots.append(request.slot)
        if request.adapter is not None:
            self.adapter_places.unpin(request.adapter)
            request.adapter_place = 0
        request.block_table = []
        request.num_computed_tokens = 0
        request.slot = -1
        request.running = False

    def _num_missing_blocks(self, request: Request, num_new: int) -> int:
        return -(-(request.num_computed_tokens + num_new) // self.block_size) - len(request.block_table)

    def _register_blocks(self, request: Request, start: int, end: int, guesses: list[int] | None) -> None:
        """Put blocks that are full now into the prefix cache; `guesses` are right and no part of the request yet."""
        if not self.pool.enable_prefix_caching:
            return
        token_ids = request.token_ids if guesses is None else request.token_ids + guesses
        extend_block_keys(request.block_keys, token_ids, self.block_size, request.cache_salt)
        for index in range(start, end):
            self.pool.register(request.block_table[index], request.block_keys[index])


def _order(request: Request) -> tuple[int, int]:
    return request.priority, request.arrival_index


def _unschedule(step: Step, request: Request) -> int:
    """Take a preempted request out of the step again. Returns the tokens it had in it."""
    if request not in step.requests:
        return 0
    index = step.requests.index(request)
    del step.requests[index]
    step.guesses.pop(request, None)
    if request in step.grown:
        step.grown.remove(request)
    return step.num_new_tokens.pop(index)
