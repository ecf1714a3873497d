"""A launched step's outcome: on its way from the device, and on the host."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from torch import Tensor

from engine.request import Request, TokenLogprobs
from engine.sampling.batch import SampledTokens, SamplingBatch
from engine.sampling.logprobs import RawLogprobs, to_token_logprobs
from engine.staging import Readback


@dataclass(slots=True)
class StepResult:
    """On the host. Lists have one entry for each of `Step.sampling`, in its order."""

    token_ids: list[int]
    is_finite: list[bool]
    """False where the logits were no numbers: the token means nothing and the request must end."""
    logprobs: list[TokenLogprobs | None]
    prompt_logprobs: list[tuple[Request, list[TokenLogprobs]]]
    """What this step adds to the prompt log-probabilities of requests that asked for them."""


@dataclass(slots=True)
class PromptPart:
    """Log-probabilities of some of a request's prompt tokens, on the device."""

    request: Request
    num_top: int
    targets: Tensor  # [n] int64
    raw: RawLogprobs


class LaunchedStep:
    """A step that the device works on.

    Args:
        sampled: None if no request gets a token.
        batch: what the tokens were sampled with; None if no request wants logprobs.
        prompts: log-probabilities of prompt tokens.
    """

    def __init__(
        self, sampled: SampledTokens | None, batch: SamplingBatch | None = None, prompts: Sequence[PromptPart] = ()
    ) -> None:
        self._has_tokens = sampled is not None
        self._batch = batch
        self._prompts = prompts
        tensors = [tensor for part in prompts for tensor in (part.targets, *part.raw)]
        if sampled is not None:
            tensors += [sampled.token_ids, sampled.is_finite, *(sampled.logprobs or ())]
        self._readback = Readback(tensors)

    def result(self) -> StepResult:
        """Wait for the step's end and read its outcome."""
        tensors = iter(self._readback.wait())
        prompt_logprobs = []
        for part in self._prompts:
            targets, *raw = islice(tensors, 1 + len(RawLogprobs._fields))
            entries = to_token_logprobs(RawLogprobs(*raw), targets, part.num_top)
            prompt_logprobs.append((part.request, entries))
        if not self._has_tokens:
            return StepResult([], [], [], prompt_logprobs)
        token_ids, is_finite, *raw = tensors
        logprobs: list[TokenLogprobs | None] = [None] * len(token_ids)
        if self._batch is not None:
            sampled = SampledTokens(token_ids, is_finite, RawLogprobs(*raw) if raw else None)
            logprobs = self._batch.token_logprobs(sampled)
        return StepResult(token_ids.tolist(), is_finite.tolist(), logprobs, prompt_logprobs)
