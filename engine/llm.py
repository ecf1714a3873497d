"""LLM: the offline front door. Text or token ids in, completions out."""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError
from torch import Tensor
from tqdm import tqdm

from engine.config import EngineConfig
from engine.detokenizer import Detokenizer, StopStrings
from engine.errors import ConfigError, RequestError
from engine.llm_engine import LLMEngine
from engine.request import EngineRequest, FinishReason, RequestOutput, SamplingParams, TokenLogprobs

Prompt = str | Sequence[int]


@dataclass(slots=True)
class Completion:
    """One prompt's outcome."""

    prompt_token_ids: list[int]
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    """All generated ids, the one that ended the output included."""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or token id that ended the output."""
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    num_cached_tokens: int = 0
    error: str | None = None
    """Why, when the finish reason is `error`."""


class _Reader:
    """Turns one request's outputs into a growing Completion."""

    def __init__(self, llm: "LLM", prompt_token_ids: list[int], params: SamplingParams) -> None:
        self.completion = Completion(prompt_token_ids)
        self._detokenizer = Detokenizer(llm.tokenizer)
        self._stop = StopStrings(params.stop)
        self._min_tokens = params.min_tokens

    def push(self, output: RequestOutput) -> str:
        """Take in an output. Returns the new text; the completion has a finish reason once it is whole."""
        completion = self.completion
        completion.error = output.error
        completion.token_ids += output.token_ids
        completion.num_cached_tokens = output.num_cached_tokens
        if output.logprobs is not None:
            completion.logprobs = (completion.logprobs or []) + output.logprobs
        if output.prompt_logprobs is not None:
            completion.prompt_logprobs = output.prompt_logprobs
        shown = output.token_ids[:-1] if output.stop_token_id is not None else output.token_ids
        num_free = max(0, self._min_tokens - len(completion.token_ids) + len(output.token_ids))
        text = self._detokenizer.push(shown[:num_free])
        found, matched = self._stop.push(self._detokenizer.push(shown[num_free:]))
        text += found
        if matched is None and output.finish_reason is not None:
            rest = self._detokenizer.flush()
            if len(completion.token_ids) > self._min_tokens:
                rest, matched = self._stop.push(rest)
            text += rest if matched is not None else rest + self._stop.flush()
        completion.text += text
        if matched is not None:
            completion.finish_reason, completion.stop_reason = FinishReason.STOP, matched
        elif output.finish_reason is not None:
            completion.finish_reason, completion.stop_reason = output.finish_reason, output.stop_token_id
        return text


class LLM:
    """A model in this process.

    Args:
        model: `demo`, a checkpoint folder, or a hub id.
        config: any other field of EngineConfig.

    Raises:
        ConfigError: an unknown field, a value out of its range, or one that does not fit machine or model.
        CheckpointError: the model cannot be found or used.

    Example:
        >>> LLM("demo").generate(["What is 2 + 3?"], SamplingParams(temperature=0, max_tokens=8))
    """

    def __init__(self, model: str = "demo", **config: Any) -> None:
        self.engine = LLMEngine(_engine_config({"model": model, **config}))
        self.tokenizer = self.engine.tokenizer
        self._num_requests = 0

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        show_progress: bool = False,
        adapter: str | Sequence[str] = "",
    ) -> list[Completion]:
        """Complete prompts, all in one batch. One SamplingParams and one adapter's name for all, or one for each.

        Raises:
            RequestError: a prompt or parameter that cannot work; nothing was run.
        """
        pairs = list(self._pair(prompts, params))
        adapters = [adapter] * len(pairs) if isinstance(adapter, str) else adapter
        if len(adapters) != len(pairs):
            raise RequestError(f"{len(adapters)} adapters for {len(pairs)} prompts, expected one or as many", "adapter")
        requests = [self._request(*pair, name) for pair, name in zip(pairs, adapters, strict=True)]
        for request in requests:
            self.engine.validate(request)
            self.engine.start_grammar(request)
            self.engine.find_adapter(request.adapter)
        readers = {request.request_id: _Reader(self, request.prompt_token_ids, request.params) for request in requests}
        to_come = deque(requests)
        with tqdm(total=len(requests), desc="generating", unit="req", delay=2, disable=not show_progress) as progress:
            try:
                while to_come or self.engine.has_work:
                    for reader in self._step(to_come, readers):
                        progress.update(reader.completion.finish_reason is not None)
            finally:
                for request_id in readers:
                    self.engine.abort(request_id)
        return [readers[request.request_id].completion for request in requests]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, adapter: str = "") -> Iterator[str]:
        """Complete one prompt; yields text as it comes."""
        request = self._request(prompt, params or SamplingParams(), adapter)
        reader = _Reader(self, request.prompt_token_ids, request.params)
        self.engine.add_request(request)
        try:
            while reader.completion.finish_reason is None:
                for output in self.engine.step():
                    if output.request_id == request.request_id:
                        yield reader.push(output)
        finally:
            self.engine.abort(request.request_id)

    def chat(
        self, messages: Sequence[Mapping[str, Any]], params: SamplingParams | None = None, **template_variables: Any
    ) -> Completion:
        """Answer a conversation, rendered with the model's chat template."""
        return self.generate([self.tokenizer.encode_chat(messages, **template_variables)], params)[0]

    def load_adapter(self, name: str, path: str | Path) -> None:
        """Load a LoRA adapter from PEFT's folder; `generate(..., adapter=name)` then uses it.

        Raises:
            CheckpointError: it cannot be used with this model.
            RequestError: the name is taken or no name, or the engine has no room for adapters (`max_loras`).
            QueueFullError: as many adapters are loaded as may be.
        """
        self.engine.load_adapter(name, path)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            RequestError: it is not loaded, or requests use it.
        """
        self.engine.unload_adapter(name)

    def logits(self, prompt: Prompt) -> Tensor:
        """What the model without adapters expects after every token of a prompt.

        Returns:
            [num_tokens, vocab_size] float32, on the CPU.

        Raises:
            RequestError: the prompt is empty, too long, or has an unknown token.
        """
        request = self._request(prompt, SamplingParams(max_tokens=1))
        self.engine.validate(request)
        return self.engine.runner.prompt_logits(request.prompt_token_ids)

    def perplexity(self, text: Prompt, show_progress: bool = False) -> float:
        """e to the mean surprise at the text's tokens, each after those before it in its window of context length.

        Raises:
            RequestError: the text has fewer than two tokens, or an unknown one.
        """
        token_ids = self.tokenizer.encode(text) if isinstance(text, str) else list(text)
        size = self.engine.max_model_len - 1
        windows = [token_ids[start : start + size] for start in range(0, len(token_ids), size)]
        windows = [window for window in windows if len(window) > 1]
        if not windows:
            raise RequestError(f"the text has {len(token_ids)} tokens, expected at least 2", "prompt")
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        completions = self.generate(windows, params, show_progress)
        found = [entry.logprob for completion in completions for entry in completion.prompt_logprobs or ()]
        return math.exp(-sum(found) / len(found))

    def _pair(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> Iterator[tuple[Prompt, SamplingParams]]:
        one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        several = cast("Sequence[Prompt]", [prompts] if one else prompts)
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(several)
        if len(params) != len(several):
            raise RequestError(f"{len(params)} SamplingParams for {len(several)} prompts, expected one or as many")
        return zip(several, params, strict=True)

    def _request(self, prompt: Prompt, params: SamplingParams, adapter: str = "") -> EngineRequest:
        self._num_requests += 1
        token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        name = f"llm-{self._num_requests}"
        return EngineRequest(request_id=name, prompt_token_ids=token_ids, params=params, adapter=adapter)

    def _step(self, to_come: deque[EngineRequest], readers: dict[str, _Reader]) -> Iterator[_Reader]:
        """Queue what there is room for, run one step, and yield the readers that got something."""
        while to_come and self.engine.stats().num_waiting < self.engine.config.max_num_waiting:
            self.engine.add_request(to_come.popleft())
        for output in self.engine.step():
            reader = readers[output.request_id]
            reader.push(output)
            if reader.completion.finish_reason is not None:
                self.engine.abort(output.request_id)
            yield reader


def _engine_config(values: dict[str, Any]) -> EngineConfig:
    try:
        return EngineConfig(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] != "extra_forbidden":
            raise ConfigError(f"{name} is {repr(first['input'])[:100]}: {first['msg']}") from None
        near = get_close_matches(name, EngineConfig.model_fields, n=1)
        hint = f"did you mean {near[0]}?" if near else "docs/configuration.md lists them"
        raise ConfigError(f"the engine has no option {name!r}; {hint}") from None
