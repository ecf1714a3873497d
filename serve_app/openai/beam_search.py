"""Beam search over an engine that only samples: each step asks it for one more token of every beam.

Costs a round trip to the engine for each token; what the beams have in common comes from its prefix cache.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from engine.request import MAX_LOGPROBS, EngineRequest, FinishReason, RequestOutput, SamplingParams
from serve_app.engine_client import EngineClient

MAX_BEAMS = MAX_LOGPROBS // 2


@dataclass(frozen=True, slots=True)
class BeamOptions:
    """How to search."""

    length_penalty: float
    """A beam's score is the sum of its log-probabilities over its length, to the power of this."""
    end_token_ids: frozenset[int]
    """Tokens that a beam ends with; they do not count in its length."""
    max_model_len: int


@dataclass(frozen=True, slots=True)
class _Beam:
    token_ids: tuple[int, ...] = ()
    logprob: float = 0.0
    is_ended: bool = False

    def score(self, length_penalty: float) -> float:
        return self.logprob / max(len(self.token_ids) - self.is_ended, 1) ** length_penalty


async def beam_search(
    client: EngineClient, requests: Sequence[EngineRequest], options: BeamOptions
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """Search for the likeliest outputs of a prompt. Leaving early aborts what runs.

    A step extends every beam by each of its likeliest tokens, twice as many as there are beams. Those that end are put
    aside, and the likeliest of the others are the beams of the next step.

    Args:
        client: the way to the engine.
        requests: equal but for their ids, one for each beam.
        options: how to search.

    Yields:
        Places in `requests` and their outputs: empty ones after the first step, whole ones in the end, best first; or
        the one that tells how the engine failed.

    Raises:
        ApiError: the engine refused a step.
    """
    first, penalty = requests[0], options.length_penalty
    room = options.max_model_len - len(first.prompt_token_ids)
    most_tokens = min(room, first.params.max_tokens or room)
    beams, ended = [_Beam()], list[_Beam]()
    for step in range(most_tokens):
        outputs = await _next_tokens(client, requests, beams, step)
        failed = next((output for output in outputs if output.logprobs is None), None)
        if failed is not None:
            yield 0, failed
            return
        if step == 0:
            cached, timings = outputs[0].num_cached_tokens, outputs[0].timings
            for index, request in enumerate(requests):
                yield index, RequestOutput(request.request_id, [], num_cached_tokens=cached, timings=timings)
        longer = [
            each for beam, output in zip(beams, outputs, strict=True) for each in _extended(beam, output, options)
        ]
        ended += [beam for beam in longer if beam.is_ended]
        ended = sorted(ended, key=lambda beam: -beam.score(penalty))[: len(requests)]
        going_on = [beam for beam in longer if not beam.is_ended]
        beams = sorted(going_on, key=lambda beam: -beam.logprob)[: len(requests)]
        # With every token a beam becomes less likely; its score gains by its length alone.
        best = max((beam.logprob / most_tokens ** max(penalty, 0.0) for beam in beams), default=0.0)
        if not beams or (len(ended) == len(requests) and ended[-1].score(penalty) >= best):
            break
    found = sorted([*ended, *beams], key=lambda beam: -beam.score(penalty))
    for index, (request, beam) in enumerate(zip(requests, found, strict=False)):
        yield index, _whole(request.request_id, beam)


async def _next_tokens(
    client: EngineClient, requests: Sequence[EngineRequest], beams: Sequence[_Beam], step: int
) -> list[RequestOutput]:
    """One token after each beam, with the log-probabilities of the likeliest."""
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, logprobs=2 * len(requests))

    async def next_token(request: EngineRequest, beam: _Beam) -> RequestOutput:
        extended = EngineRequest(
            request_id=f"{request.request_id}-{step}",
            prompt_token_ids=[*request.prompt_token_ids, *beam.token_ids],
            params=params,
            priority=request.priority,
            cache_salt=request.cache_salt,
            adapter=request.adapter,
        )
        async with aclosing(client.generate(extended)) as outputs:
            return [output async for output in outputs][-1]

    tasks = [asyncio.ensure_future(next_token(*pair)) for pair in zip(requests, beams, strict=False)]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _extended(beam: _Beam, output: RequestOutput, options: BeamOptions) -> list[_Beam]:
    [entry] = output.logprobs or []
    return [
        _Beam((*beam.token_ids, token_id), beam.logprob + logprob, token_id in options.end_token_ids)
        for token_id, logprob in zip(entry.top_token_ids, entry.top_logprobs, strict=True)
    ]


def _whole(request_id: str, beam: _Beam) -> RequestOutput:
    reason = FinishReason.STOP if beam.is_ended else FinishReason.LENGTH
    last = beam.token_ids[-1] if beam.is_ended else None
    return RequestOutput(request_id, list(beam.token_ids), finish_reason=reason, stop_token_id=last)
