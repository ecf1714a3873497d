"""Placer: places a process's attempts by what its Fleet knows of the replicas, and follows what comes of them."""

import asyncio
import time
from collections.abc import Sequence
from functools import cache

from engine.block_pool import extend_block_keys
from engine.request import EngineRequest, RequestOutput, prefix_salt
from serve_app.fleet import Attempt, Fleet, ReplicaView, fleet_of
from serve_app.placement import Candidate, Placement, PlacementCounters, Prompt

TOKENS_AT_ONCE = 16_384
"""Tokens whose keys are made without letting others run: a millisecond."""


class Placer:
    """One for each Fleet, which tells it of first tokens and ends.

    Args:
        fleet: the replicas, and the attempts to place on them.
        seed: see Placement.
    """

    def __init__(self, fleet: Fleet, seed: int | None = None) -> None:
        self._fleet = fleet
        self._placement = Placement(seed)
        self._asked: dict[str, tuple[Prompt, Sequence[Candidate]]] = {}
        """By request id, as long as an attempt has no token: its prompt, and what was predicted last."""
        fleet.observer = self

    @property
    def counters(self) -> PlacementCounters:
        """How good the decisions were."""
        return self._placement.counters

    async def rank(self, attempt: Attempt, views: Sequence[ReplicaView]) -> list[ReplicaView]:
        """Replicas, the best for an attempt first; it counts as sent there until `sent` says otherwise."""
        request_id = attempt.request.request_id
        prompt = self._asked[request_id][0] if request_id in self._asked else await self._prompt_of(attempt.request)
        by_id = {view.replica_id: view for view in views}
        now_s = time.monotonic()
        candidates = self._placement.rank(prompt, by_id, now_s)
        if candidates and request_id in self._fleet.attempts:  # it may have ended while keys were made
            self._asked[request_id] = prompt, candidates
            self._placement.place(request_id, prompt, candidates, candidates[0].replica_id, now_s)
        return [by_id[candidate.replica_id] for candidate in candidates]

    def sent(self, request_id: str, replica_id: str) -> None:
        """A replica took an attempt: the first one, or, where that was full, another."""
        if request_id in self._asked:
            prompt, candidates = self._asked[request_id]
            self._placement.place(request_id, prompt, candidates, replica_id, time.monotonic())

    def first_token(self, attempt: Attempt, output: RequestOutput) -> None:
        """For Fleet: an attempt's prompt is computed."""
        request_id = attempt.request.request_id
        self._asked.pop(request_id, None)
        self._placement.first_token(request_id, output.num_cached_tokens, time.monotonic())

    def ended(self, attempt: Attempt) -> None:
        """For Fleet: an attempt is over."""
        self._asked.pop(attempt.request.request_id, None)
        self._placement.remove(attempt.request.request_id)

    async def _prompt_of(self, request: EngineRequest) -> Prompt:
        token_ids = request.prompt_token_ids + request.output_token_ids
        block_size = self._fleet.block_size
        if block_size is None or request.params.prompt_logprobs is not None:  # such prompts are computed in any case
            return Prompt((), len(token_ids), block_size or 1)
        keys: list[bytes] = []
        salt = prefix_salt(request.cache_salt, request.adapter)
        for end in range(TOKENS_AT_ONCE, len(token_ids) + TOKENS_AT_ONCE, TOKENS_AT_ONCE):
            if keys:
                await asyncio.sleep(0)
            extend_block_keys(keys, token_ids[:end], block_size, salt)
        return Prompt(keys, len(token_ids), block_size)


@cache
def placer_of(app_name: str, deployment_name: str) -> Placer:
    """The one Placer of a deployment in this process: the router asks it, /metrics shows its counters."""
    return Placer(fleet_of(app_name, deployment_name))
