"""What an endpoint must be able to say, so that one piece of code can answer all of them, streamed or whole."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import msgspec

from engine.errors import RequestError, TooManyTokensError
from engine.lora.handle import NAME as ADAPTER_NAME
from engine.request import EngineRequest
from engine.tokenizer import Tokenizer
from serve_app.config import Limits, ModelConfig
from serve_app.openai.errors import ApiError, bad_request
from serve_app.openai.generation import Delta, TextOptions, Usage
from serve_app.openai.sampling import GenerationDefaults
from serve_app.wire import ModelInfo

_ENCODER = msgspec.json.Encoder()


@dataclass(frozen=True, slots=True)
class Constraint:
    """A form that an output must have."""

    grammar: str
    """See `engine.grammar`."""
    param: str
    """The field that asked for it."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """All that turning a request into token ids, and back, takes."""

    name: str
    created: int
    tokenizer: Tokenizer
    defaults: GenerationDefaults
    limits: Limits
    info: ModelInfo
    has_adapters: bool = False
    """Whether `name:adapter` is a model too."""

    @property
    def names(self) -> list[str]:
        """All that clients may call it."""
        return [self.name, f"{self.name}:ADAPTER"] if self.has_adapters else [self.name]

    @property
    def most_prompt_tokens(self) -> int:
        """A prompt with more is refused."""
        room = self.info.max_model_len - 1
        return room if self.limits.prompt_tokens is None else min(room, self.limits.prompt_tokens)

    @classmethod
    def from_info(cls, config: ModelConfig, info: ModelInfo) -> "ServedModel":
        """Read the files that the replica sent. Takes a second for a large vocabulary.

        Sampling defaults are the configuration's, and where it has none the model's.

        Raises:
            CheckpointError: a file is invalid.
        """
        with TemporaryDirectory(prefix="qwen3-serve-") as folder:
            path = Path(folder)
            for file, content in info.files.items():
                (path / file).write_bytes(content)
            given = config.default_sampling_params.model_dump(exclude_none=True)
            defaults = GenerationDefaults.from_dir(path).model_copy(update=given)
            return cls(
                config.model_name,
                now(),
                Tokenizer.from_dir(path),
                defaults,
                config.limits,
                info,
                has_adapters=config.engine.max_loras > 0,
            )


class Endpoint(Protocol):
    """One HTTP request that generates."""

    requests: list[EngineRequest]
    """For the engine, one for each choice."""
    constraint: Constraint | None
    """The form that their outputs must have; whether it can be had is still to be checked."""
    prompt_tokens: int
    """Of all prompts."""
    stream: bool
    text_options: TextOptions

    def events(self, delta: Delta) -> bytes:
        """The stream's events for what is new of a choice; empty if there is nothing to say."""
        ...

    def last_events(self, usage: Usage) -> bytes:
        """The events that a stream ends with."""
        ...

    def error_event(self, error: ApiError) -> bytes:
        """The event that a stream ends with on a fault."""
        ...

    def whole(self, deltas: list[Delta], usage: Usage) -> dict[str, Any]:
        """The response that is not streamed."""
        ...


class ChunkStream(ABC):
    """The streams of chats and completions: chunks, then `[DONE]`."""

    include_usage: bool
    _is_begun = False

    @abstractmethod
    def first_chunks(self) -> list[dict[str, Any]]:
        """Chunks that a stream begins with."""

    @abstractmethod
    def chunk(self, delta: Delta) -> dict[str, Any] | None:
        """The chunk for what is new of a choice; None if there is nothing to say."""

    @abstractmethod
    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """The chunk that a stream with `include_usage` ends with."""

    def events(self, delta: Delta) -> bytes:
        begin = b"" if self._is_begun else b"".join(map(server_sent_event, self.first_chunks()))
        self._is_begun = True
        chunk = self.chunk(delta)
        return begin if chunk is None else begin + server_sent_event(chunk)

    def last_events(self, usage: Usage) -> bytes:
        last = server_sent_event(self.usage_chunk(usage)) if self.include_usage else b""
        return last + b"data: [DONE]\n\n"

    def error_event(self, error: ApiError) -> bytes:
        return server_sent_event(error.body(), "error")


def server_sent_event(body: dict[str, Any], name: str | None = None) -> bytes:
    """One event of a stream."""
    data = b"data: %b\n\n" % _ENCODER.encode(body)
    return data if name is None else b"event: " + name.encode() + b"\n" + data


def adapter_of(name: str, model: ServedModel) -> str:
    """The adapter that a model's name asks for: `NAME` of `model:NAME`, or none. The engine knows which there are.

    Raises:
        ApiError: 404, it is not the model served here.
    """
    if name == model.name:
        return ""
    adapter = name.removeprefix(f"{model.name}:")
    if model.has_adapters and adapter != name and ADAPTER_NAME.fullmatch(adapter):
        return adapter
    raise model_not_found(name, model.names)


def model_not_found(name: str, known: Iterable[str]) -> ApiError:
    """A 404 that tells the names that are known."""
    expected = " or ".join(repr(each) for each in known)
    message = f"the model {name[:128]!r} does not exist here, expected {expected}"
    return ApiError(404, message, param="model", code="model_not_found")


def check_length(
    num_tokens: int, max_tokens: int | None, model: ServedModel, param: str, max_tokens_param: str = "max_tokens"
) -> None:
    """Raises ApiError 400 if prompt and output do not fit; `param` and `max_tokens_param` name them."""
    check_prompt_tokens(num_tokens, model, param)
    context = model.info.max_model_len
    if num_tokens >= context:
        raise bad_request(
            f"the prompt has {num_tokens} tokens, expected fewer than the model's context of {context}",
            param,
            "context_length_exceeded",
        )
    if max_tokens is not None and num_tokens + max_tokens > context:
        raise bad_request(
            f"{num_tokens} prompt tokens and {max_tokens_param} {max_tokens} make {num_tokens + max_tokens}, "
            f"expected at most the model's context of {context}",
            max_tokens_param,
            "context_length_exceeded",
        )


def not_encoded(error: RequestError, model: ServedModel, param: str) -> ApiError:
    """The 400 for a prompt that could not be encoded, or was not because it is far too long."""
    if not isinstance(error, TooManyTokensError):
        return bad_request(str(error), param)
    is_limited = model.most_prompt_tokens == model.limits.prompt_tokens
    return bad_request(str(error), param, "prompt_too_long" if is_limited else "context_length_exceeded")


def check_prompt_tokens(num_tokens: int, model: ServedModel, param: str) -> None:
    """Raises ApiError 400 if that is too much for all prompts of a request together."""
    most = model.limits.prompt_tokens
    if most is not None and num_tokens > most:
        message = f"{param} has {num_tokens} tokens, expected at most {most}, this service's limit"
        raise bad_request(message, param, "prompt_too_long")


def check_count(name: str, count: int, most: int) -> None:
    """Raises ApiError 400 if there are more than the limits allow."""
    if count > most:
        raise bad_request(f"{name} is {count}, expected at most {most}", name)


def by_choice(deltas: list[Delta], num_choices: int) -> list[list[Delta]]:
    """The deltas of each choice, in order."""
    found: list[list[Delta]] = [[] for _ in range(num_choices)]
    for delta in deltas:
        found[delta.index].append(delta)
    return found


def new_id(prefix: str) -> str:
    """An id as OpenAI and Anthropic write those of responses, messages and calls."""
    return f"{prefix}{'-' if prefix.endswith('cmpl') else '_'}{uuid.uuid4().hex}"


def now() -> int:
    """Unix seconds."""
    return int(time.time())
