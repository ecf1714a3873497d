"""POST /v1/completions: prompts → engine requests; deltas → completions."""

from dataclasses import dataclass
from math import fsum, inf
from typing import Any

import msgspec

from engine.request import EngineRequest, TokenLogprobs
from serve_app.openai.completion_protocol import CompletionBody
from serve_app.openai.endpoint import (
    ChunkStream,
    ServedModel,
    adapter_of,
    by_choice,
    check_count,
    check_length,
    check_prompt_tokens,
    new_id,
    now,
)
from serve_app.openai.errors import bad_request
from serve_app.openai.generation import Delta, TextOptions, Usage
from serve_app.openai.logprobs import CompletionLogprobs, prompt_logprobs
from serve_app.openai.parsing.output import Channel
from serve_app.openai.prompts import fill_end_ids, read_prompt
from serve_app.openai.sampling import beam_options, choice_params, sampling_params, stop_expressions
from serve_app.openai.structured import constraint

DEFAULT_MAX_TOKENS = 16


class Completions(ChunkStream):
    """One completion request; choice `prompt · n + i` is the i-th of its prompt.

    Where `best_of` makes more choices than are answered with, requests and deltas count `prompt · best_of + i`.

    Raises:
        ApiError: the request cannot be run.
    """

    def __init__(self, body: CompletionBody, model: ServedModel) -> None:
        self._adapter = adapter_of(body.model, model)
        if body.max_tokens == 0 and not body.echo:
            raise bad_request("max_tokens is 0, expected at least 1, or echo: true beside it", "max_tokens")
        self._num_made = body.best_of or body.n
        check_count("n" if self._num_made == body.n else "best_of", self._num_made, model.limits.choices)
        check_count("prompt", len(body.prompts), model.limits.prompts)
        if (total := len(body.prompts) * self._num_made) > model.limits.outputs:
            message = f"{len(body.prompts)} prompts with {self._num_made} choices each make {total} outputs"
            raise bad_request(f"{message}, expected at most {model.limits.outputs}", "prompt")
        self._body = body
        self._model = model
        self.stream = body.stream
        self.include_usage = body.stream_options is not None and body.stream_options.include_usage
        self._always_usage = body.stream_options is not None and body.stream_options.continuous_usage_stats
        self.text_options = TextOptions(
            body.skip_special_tokens,
            body.include_stop_str_in_output,
            stop_expressions(body),
            is_silent=body.max_tokens == 0,
            beams=beam_options(body, len(body.prompts), model.info),
            choices_per_prompt=self._num_made,
        )
        self._key = new_id("cmpl")
        """Names the requests in the engine; what a client chooses may be another's choice too."""
        self._common = {
            "id": self._key if body.request_id is None else f"cmpl-{body.request_id}",
            "object": "text_completion",
            "created": now(),
            "model": body.model,
            "system_fingerprint": model.info.fingerprint,
        }
        self._prompts = [_read(prompt, body, model) for prompt in body.prompts]
        self.prompt_tokens = sum(len(prompt.token_ids) for prompt in self._prompts)
        check_prompt_tokens(self.prompt_tokens, model, "prompt")
        self.constraint = constraint(body, Channel.CONTENT, model.limits)
        self.requests = self._make_requests()
        self._choices = [_Choice(prompt, body, model) for prompt in self._prompts for _ in range(self._num_made)]

    def first_chunks(self) -> list[dict[str, Any]]:
        return []

    def chunk(self, delta: Delta) -> dict[str, Any] | None:
        choice = self._choices[delta.index]
        found = choice.read([delta])
        scores = found["logprobs"] or {"tokens": []}
        if not (found["text"] or scores["tokens"] or found.get("token_ids") or delta.finish_reason):
            return None
        chunk = self._common | {"choices": [{"index": delta.index} | found]}
        return chunk | {"usage": choice.usage.body()} if self._always_usage else chunk

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return self._common | {"choices": [], "usage": usage.body()}

    def whole(self, deltas: list[Delta], usage: Usage) -> dict[str, Any]:
        made = by_choice(deltas, len(self._choices))
        choices = []
        for start in range(0, len(made), self._num_made):
            of_prompt = list(range(start, start + self._num_made))
            if self._num_made > self._body.n:
                of_prompt.sort(key=lambda index: -_mean_logprob(made[index]))
            # The prompt's log-probabilities come with its first choice, so that is read first.
            found = {index: self._choices[index].read(made[index]) for index in sorted(of_prompt)}
            choices += [found[index] for index in of_prompt[: self._body.n]]
        if self._body.prompt_logprobs is not None:
            for index, choice in enumerate(choices):
                scores = self._prompts[index // self._body.n].scores
                choice["prompt_logprobs"] = prompt_logprobs(
                    _with_top(scores, self._body.prompt_logprobs), self._model.tokenizer
                )
        numbered = [{"index": index} | choice for index, choice in enumerate(choices)]
        return self._common | {"choices": numbered, "usage": usage.body()}

    def _make_requests(self) -> list[EngineRequest]:
        body, model = self._body, self._model
        needs_logprobs = body.logprobs is not None or self._num_made > body.n
        params = sampling_params(
            body,
            model.defaults,
            model.tokenizer,
            max_tokens=None,
            logprobs=(body.logprobs or 0) if needs_logprobs else None,
        )
        changes: dict[str, Any] = {"grammar": self.constraint and self.constraint.grammar}
        if body.suffix is not None and not body.ignore_eos:
            changes["stop_token_ids"] = (*params.stop_token_ids, *fill_end_ids(model))
        echoed = body.logprobs if body.echo else None
        scored = max((count for count in (body.prompt_logprobs, echoed) if count is not None), default=None)
        requests = []
        for position, prompt in enumerate(self._prompts):
            check_length(len(prompt.token_ids), body.max_tokens, model, "prompt")
            room = model.info.max_model_len - len(prompt.token_ids)
            default = model.defaults.max_tokens_within(room, DEFAULT_MAX_TOKENS)
            # The engine makes one token at least; it is not shown if none is wanted.
            changes["max_tokens"] = default if body.max_tokens is None else body.max_tokens or 1
            for index in range(self._num_made):
                changes["prompt_logprobs"] = scored if index == 0 else None  # they are the same for all choices
                requests.append(
                    EngineRequest(
                        request_id=f"{self._key}-{position}-{index}",
                        prompt_token_ids=prompt.token_ids,
                        params=choice_params(params, index, **changes),
                        priority=body.priority,
                        cache_salt=body.cache_salt or "",
                        adapter=self._adapter,
                    )
                )
        return requests


@dataclass(slots=True)
class _Prompt:
    """A prompt, and what the engine says about it."""

    token_ids: list[int]
    echo: str
    """What its choices begin with."""
    scores: list[TokenLogprobs]
    """Of its tokens but the first, once they are known."""


class _Choice:
    """One choice as it is made. What `read` returns for its deltas, one after the other, is the choice."""

    def __init__(self, prompt: _Prompt, body: CompletionBody, model: ServedModel) -> None:
        self.usage = Usage(len(prompt.token_ids))
        self._prompt = prompt
        self._body = body
        self._tokenizer = model.tokenizer
        self._logprobs = CompletionLogprobs(model.tokenizer, body.skip_special_tokens, body.return_tokens_as_token_ids)
        self._begins = True

    def read(self, deltas: list[Delta]) -> dict[str, Any]:
        """The next deltas as one: the choice without its index."""
        for delta in deltas:
            self.usage.add(delta)
            if delta.prompt_logprobs is not None:
                self._prompt.scores = delta.prompt_logprobs
        begins, self._begins = self._begins, False
        found: dict[str, Any] = {
            "text": (self._prompt.echo if begins else "") + "".join(delta.text for delta in deltas),
            "logprobs": self._read_logprobs(deltas, begins) if self._body.logprobs is not None else None,
            "finish_reason": deltas[-1].finish_reason,
            "stop_reason": deltas[-1].stop_reason,
        }
        if self._body.return_token_ids:
            found["token_ids"] = [token_id for delta in deltas for token_id in delta.token_ids]
            if begins:
                found["prompt_token_ids"] = self._prompt.token_ids
        if self._body.return_prompt_text and begins:
            found["prompt_text"] = self._tokenizer.decode(self._prompt.token_ids, skip_special_tokens=False)
        return found

    def _read_logprobs(self, deltas: list[Delta], begins: bool) -> dict[str, Any]:
        parts = []
        if begins and self._body.echo:
            scores = _with_top(self._prompt.scores, self._body.logprobs or 0)
            parts.append(self._logprobs.add_prompt(self._prompt.token_ids[0], scores))
        parts.append(self._logprobs.add([entry for delta in deltas for entry in delta.logprobs]))
        return {name: [item for part in parts for item in part[name]] for name in parts[-1]}


def _read(prompt: str | list[int], body: CompletionBody, model: ServedModel) -> _Prompt:
    default = model.defaults.max_tokens_within(model.info.max_model_len, DEFAULT_MAX_TOKENS)
    max_tokens = default if body.max_tokens is None else body.max_tokens
    token_ids = read_prompt(prompt, body, max_tokens, model)
    echo = ""
    if body.echo:
        # Offsets of logprobs point into the text of the tokens; a tokenizer may have normalized what was sent.
        as_sent = isinstance(prompt, str) and body.logprobs is None and body.truncate_prompt_tokens is None
        echo = str(prompt) if as_sent else model.tokenizer.decode(token_ids, skip_special_tokens=False)
    return _Prompt(token_ids, echo, [])


def _with_top(entries: list[TokenLogprobs], count: int) -> list[TokenLogprobs]:
    """Log-probabilities beside only so many of the likeliest tokens: others may have been asked for elsewhere."""
    return [
        msgspec.structs.replace(
            entry, top_token_ids=entry.top_token_ids[:count], top_logprobs=entry.top_logprobs[:count]
        )
        for entry in entries
    ]


def _mean_logprob(deltas: list[Delta]) -> float:
    """How likely a choice's tokens were; one without tokens comes last."""
    logprobs = [entry.logprob for delta in deltas for entry in delta.logprobs]
    return fsum(logprobs) / len(logprobs) if logprobs else -inf
