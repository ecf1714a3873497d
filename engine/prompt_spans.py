"""Which rows of a step give the log-probabilities of prompt tokens."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from engine.batch import HostBatch
from engine.request import Request
from engine.scheduler import Step

PROMPT_LOGIT_ROWS = 256
"""Prompt positions whose logits exist at one time: a long prompt's [tokens, vocabulary] never does."""


class PromptSpan(NamedTuple):
    """Tokens of a prompt whose log-probabilities a step tells, and where from."""

    request: Request
    start: int
    """First row of the hidden states that predict them ..."""
    stop: int
    """... and the one after the last."""
    targets: np.ndarray
    """int64, the tokens."""


def prompt_spans(step: Step, batch: HostBatch) -> list[PromptSpan]:
    """Of all requests that asked for them and do not have them yet."""
    return [
        span
        for index, row in zip(batch.order.tolist(), batch.query_starts.tolist(), strict=True)
        if step.requests[index].needs_prompt_logits
        for span in _of_request(step.requests[index], step.starts[index], step.num_new_tokens[index], row)
    ]


def _of_request(request: Request, start: int, num_new_tokens: int, row: int) -> Iterator[PromptSpan]:
    """Row `row + i` is the token at `start + i` and predicts the one after it."""
    first = max(start, len(request.prompt_logprobs or ()))
    last = min(start + num_new_tokens, request.num_prompt_tokens - 1)
    for position in range(first, last, PROMPT_LOGIT_ROWS):
        end = min(position + PROMPT_LOGIT_ROWS, last)
        targets = np.array(request.token_ids[position + 1 : end + 1])
        yield PromptSpan(request, row + position - start, row + end - start, targets)
