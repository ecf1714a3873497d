"""What makes a request impossible, whatever else is running. No torch here."""

from collections.abc import Sequence

from engine.errors import RequestError
from engine.request import EngineRequest, SamplingParams


class RequestChecks:
    """Checks requests against a model. Has no state, so any thread may use it.

    Args:
        vocab_size: ids that may be named and sampled.
        max_model_len: most tokens of prompt and output.
        eos_token_ids: ids that end an output unless `ignore_eos` is set.
    """

    def __init__(self, vocab_size: int, max_model_len: int, eos_token_ids: Sequence[int]) -> None:
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.eos_token_ids = eos_token_ids

    def check(self, source: EngineRequest) -> None:
        """Raise RequestError if the request could never run; `param` names what is to blame."""
        prompt, params = source.prompt_token_ids, source.params
        if not prompt:
            raise RequestError("the prompt has no tokens, expected at least 1", "prompt")
        self._check_token_ids(prompt, "prompt")
        self._check_token_ids(params.stop_token_ids, "stop_token_ids")
        self._check_token_ids(tuple(params.logit_bias), "logit_bias")
        self._check_token_ids(params.allowed_token_ids or (), "allowed_token_ids")
        self._check_token_ids(params.logprob_token_ids, "logprob_token_ids")
        for word in params.bad_word_ids:
            self._check_token_ids(word, "bad_words")
        self._check_token_ids(params.thinking.closing_ids if params.thinking is not None else (), "thinking")
        self._check_a_token_is_possible(params)
        if len(prompt) >= self.max_model_len:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens, expected fewer than the context of {self.max_model_len}",
                "prompt",
            )
        if params.max_tokens is not None and len(prompt) + params.max_tokens > self.max_model_len:
            raise RequestError(
                f"{len(prompt)} prompt tokens and max_tokens {params.max_tokens} make "
                f"{len(prompt) + params.max_tokens}, expected at most the context of {self.max_model_len}",
                "max_tokens",
            )
        if source.output_token_ids:
            self._check_output(source)

    def _check_token_ids(self, token_ids: Sequence[int], param: str) -> None:
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < self.vocab_size):
            bad = next(token_id for token_id in token_ids if not 0 <= token_id < self.vocab_size)
            raise RequestError(f"{param} has token id {bad}, expected 0 to {self.vocab_size - 1}", param)

    def _check_output(self, source: EngineRequest) -> None:
        """The output so far must be one that goes on."""
        output, params = source.output_token_ids, source.params
        self._check_token_ids(output, "output_token_ids")
        room = self.max_model_len - len(source.prompt_token_ids)
        most = room if params.max_tokens is None else params.max_tokens
        if len(output) >= most:
            raise RequestError(
                f"output_token_ids has {len(output)} tokens, expected fewer than the {most} that may come",
                "output_token_ids",
            )
        ends = set(params.stop_token_ids).union(() if params.ignore_eos else self.eos_token_ids)
        if not ends.isdisjoint(output):
            bad = next(token_id for token_id in output if token_id in ends)
            raise RequestError(f"output_token_ids has token id {bad}, which ends the output", "output_token_ids")
        if params.prompt_logprobs is not None:
            raise RequestError(
                "prompt_logprobs is set for a request that goes on; they came with its first token", "prompt_logprobs"
            )

    def _check_a_token_is_possible(self, params: SamplingParams) -> None:
        """Before `min_tokens` the ids that end the output are banned, and other ids may not be allowed."""
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else self.eos_token_ids)}
        if params.min_tokens and params.allowed_token_ids is not None and ends.issuperset(params.allowed_token_ids):
            raise RequestError(
                f"allowed_token_ids has only ids that end the output, expected others too as min_tokens is "
                f"{params.min_tokens}",
                "allowed_token_ids",
            )
