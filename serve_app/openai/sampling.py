"""A request's fields, the model's defaults and OpenAI's, in this order of precedence, as SamplingParams."""

import json
from pathlib import Path
from typing import Any

import msgspec
from pydantic import BaseModel, ConfigDict

from engine.bad_words import bad_word_ids
from engine.errors import CheckpointError, RequestError
from engine.request import SamplingParams
from engine.tokenizer import Tokenizer
from serve_app.openai.beam_search import MAX_BEAMS, BeamOptions
from serve_app.openai.errors import bad_request
from serve_app.openai.protocol import GenerationBody
from serve_app.openai.stop_patterns import StopExpressions
from serve_app.wire import ModelInfo

_BESIDE_BEAMS = frozenset(
    "model messages prompt n max_tokens max_completion_tokens use_beam_search length_penalty ignore_eos "
    "temperature seed priority cache_salt user metadata safety_identifier prompt_cache_key request_id "
    "return_token_ids return_prompt_text skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens "
    "truncation_side add_special_tokens add_generation_prompt continue_final_message chat_template_kwargs "
    "include_reasoning separate_reasoning modalities".split()
)
"""Fields that a beam search knows. All others are about sampling, or about outputs that are seen as they grow."""


class GenerationDefaults(BaseModel):
    """Sampling where a request does not say: a checkpoint's generation_config.json; the rest is OpenAI's."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_tokens: int | None = None
    """`max_new_tokens` in the file. None leaves it to the endpoint."""

    def max_tokens_within(self, room: int, otherwise: int | None = None) -> int | None:
        """How many tokens to make at most where `room` is left in the context; None goes on to its end.

        Args:
            otherwise: where these defaults do not say either.
        """
        most = otherwise if self.max_tokens is None else self.max_tokens
        return None if most is None else min(most, room)

    @classmethod
    def from_dir(cls, path: Path) -> "GenerationDefaults":
        """Read the file in a checkpoint folder; without it, OpenAI's defaults.

        Raises:
            CheckpointError: the file is invalid.
        """
        file = path / "generation_config.json"
        if not file.is_file():
            return cls()
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            given = {key: value for key, value in values.items() if value is not None}
            given["max_tokens"] = given.get("max_new_tokens")
            found = cls.model_validate(given | ({} if given.get("do_sample", True) else {"temperature": 0.0}))
            SamplingParams(**found.model_dump())
        except (ValueError, AttributeError) as error:
            raise CheckpointError(f"{file}: {' '.join(str(error).split())[:300]}") from None
        return found


def sampling_params(
    body: GenerationBody,
    defaults: GenerationDefaults,
    tokenizer: Tokenizer,
    *,
    max_tokens: int | None,
    logprobs: int | None,
) -> SamplingParams:
    """What all choices have in common.

    Raises:
        ApiError: 400 for what no field's own type can catch.
    """
    try:
        return SamplingParams(
            temperature=_or(body.temperature, defaults.temperature),
            top_p=_or(body.top_p, defaults.top_p),
            top_k=int(_or(body.top_k, defaults.top_k)),
            min_p=_or(body.min_p, defaults.min_p),
            repetition_penalty=_or(body.repetition_penalty, defaults.repetition_penalty),
            presence_penalty=_or(body.presence_penalty, defaults.presence_penalty),
            frequency_penalty=_or(body.frequency_penalty, defaults.frequency_penalty),
            logit_bias={int(key): float(bias) for key, bias in (body.logit_bias or {}).items()},
            allowed_token_ids=None if body.allowed_token_ids is None else tuple(body.allowed_token_ids),
            bad_word_ids=bad_word_ids(tokenizer, body.bad_words or ()),
            seed=body.seed,
            max_tokens=max_tokens,
            min_tokens=body.min_tokens,
            stop=_as_tuple(body.stop),
            stop_token_ids=tuple(body.stop_token_ids or ()),
            ignore_eos=body.ignore_eos,
            logprobs=logprobs,
            logprob_token_ids=tuple(dict.fromkeys(body.logprob_token_ids or ())),
        )
    except RequestError as error:
        raise bad_request(str(error), error.param) from None


def stop_expressions(body: GenerationBody) -> StopExpressions | None:
    """What ends the output's text where `stop` alone does not say. Raises ApiError 400 for a wrong expression."""
    if not body.stop_regex:
        return None
    try:
        return StopExpressions(_as_tuple(body.stop), _as_tuple(body.stop_regex))
    except RequestError as error:
        raise bad_request(str(error), error.param) from None


def beam_options(body: GenerationBody, num_prompts: int, info: ModelInfo) -> BeamOptions | None:
    """How to search for the choices; None if they are sampled.

    Raises:
        ApiError: 400, a field does not go together with beam search.
    """
    if not body.use_beam_search:
        if body.length_penalty is not None:
            raise bad_request("length_penalty needs use_beam_search: true beside it", "length_penalty")
        return None
    fields = type(body).model_fields
    for name in sorted(body.model_fields_set - _BESIDE_BEAMS):
        if getattr(body, name) not in (fields[name].default, []):
            raise bad_request(f"{name} is not supported together with use_beam_search", name)
    if body.temperature:
        raise bad_request(f"temperature is {body.temperature}, expected 0 beside use_beam_search", "temperature")
    if body.n > MAX_BEAMS:
        raise bad_request(f"n is {body.n}, expected at most {MAX_BEAMS} beside use_beam_search", "n")
    if num_prompts > 1:
        raise bad_request(f"there are {num_prompts} prompts, expected one beside use_beam_search", "prompt")
    penalty = 1.0 if body.length_penalty is None else body.length_penalty
    return BeamOptions(penalty, frozenset(() if body.ignore_eos else info.eos_token_ids), info.max_model_len)


def choice_params(params: SamplingParams, index: int, **changes: Any) -> SamplingParams:
    """Those of a request's index-th choice, with other values for some fields.

    Raises:
        ApiError: 400, the values do not go together.
    """
    try:
        return msgspec.structs.replace(params, seed=choice_seed(params.seed, index), **changes)
    except RequestError as error:
        raise bad_request(str(error), error.param) from None


def choice_seed(seed: int | None, index: int) -> int | None:
    """The seed of a request's index-th choice: the first is the request's own, so n changes nothing for it."""
    return None if seed is None else (seed + index * 0x9E3779B97F4A7C15) % 2**64


def _as_tuple(texts: str | list[str] | None) -> tuple[str, ...]:
    return (texts,) if isinstance(texts, str) else tuple(texts or ())


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
