"""POST /v1/chat/completions: a conversation → engine requests; deltas → chat completions."""

from functools import partial
from typing import Any

from engine.request import EngineRequest, TokenLogprobs
from serve_app.openai.chat_message import message, message_delta
from serve_app.openai.chat_prompt import open_channel, render, thinking_budget
from serve_app.openai.chat_protocol import ChatBody
from serve_app.openai.endpoint import (
    ChunkStream,
    ServedModel,
    adapter_of,
    by_choice,
    check_count,
    check_length,
    new_id,
    now,
)
from serve_app.openai.generation import Delta, TextOptions, Usage
from serve_app.openai.logprobs import chat_logprobs, prompt_logprobs
from serve_app.openai.parsing.events import ContentText
from serve_app.openai.parsing.output import Channel, OutputParser
from serve_app.openai.prompts import truncate
from serve_app.openai.sampling import beam_options, choice_params, sampling_params, stop_expressions
from serve_app.openai.structured import constraint
from serve_app.openai.tools import ToolUse


class Chat(ChunkStream):
    """One chat request.

    Raises:
        ApiError: the request cannot be run.
    """

    def __init__(self, body: ChatBody, model: ServedModel) -> None:
        adapter = adapter_of(body.model, model)
        check_count("n", body.n, model.limits.choices)
        check_count("messages", len(body.messages), model.limits.messages)
        self.stream = body.stream
        self.include_usage = body.stream_options is not None and body.stream_options.include_usage
        self._model = model
        self._tools = ToolUse.of(body, model)
        self._include_reasoning = body.include_reasoning
        self._always_usage = body.stream_options is not None and body.stream_options.continuous_usage_stats
        self._wants_logprobs = body.logprobs
        self._wants_token_ids = body.return_token_ids
        self._wants_prompt_text = body.return_prompt_text
        self._echo = body.messages[-1].text if body.echo and body.messages[-1].role == "assistant" else ""
        self._names_are_ids = body.return_tokens_as_token_ids
        self._num_choices = body.n
        key = new_id("chatcmpl")  # names the requests in the engine: what a client chooses may be another's choice too
        self._common = {
            "id": key if body.request_id is None else f"chatcmpl-{body.request_id}",
            "created": now(),
            "model": body.model,
            "system_fingerprint": model.info.fingerprint,
        }

        max_tokens = body.max_completion_tokens or body.max_tokens
        most_tokens = model.most_prompt_tokens if body.truncate_prompt_tokens is None else None
        prompt = truncate(render(body, model, most_tokens), body, max_tokens, model)
        self.prompt_tokens = len(prompt)
        self._usages = [Usage(len(prompt)) for _ in range(body.n)]
        self._channel = open_channel(prompt, model.tokenizer, body.continue_final_message)
        self.text_options = self._text_options(body)
        spelling = "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
        check_length(len(prompt), max_tokens, model, "messages", spelling)
        params = sampling_params(
            body,
            model.defaults,
            model.tokenizer,
            max_tokens=max_tokens or model.defaults.max_tokens_within(model.info.max_model_len - len(prompt)),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        self.constraint = constraint(body, self._channel, model.limits, self._tools)
        changes = {
            "thinking": thinking_budget(body, self._channel, model.tokenizer),
            "grammar": self.constraint and self.constraint.grammar,
        }
        self.requests = [
            EngineRequest(
                request_id=f"{key}-{index}",
                prompt_token_ids=prompt,
                params=choice_params(
                    params, index, prompt_logprobs=body.prompt_logprobs if index == 0 else None, **changes
                ),
                priority=body.priority,
                cache_salt=body.cache_salt or "",
                adapter=adapter,
            )
            for index in range(body.n)
        ]

    def first_chunks(self) -> list[dict[str, Any]]:
        opening = {"role": "assistant", "content": self._no_content}
        chunks = [self._chunk(index, opening) for index in range(self._num_choices)]
        chunks[0] |= self._told_prompt()
        if self._echo:
            chunks += [self._chunk(index, {"content": self._echo}) for index in range(self._num_choices)]
        return chunks

    def chunk(self, delta: Delta) -> dict[str, Any] | None:
        self._usages[delta.index].add(delta)
        has_token_ids = self._wants_token_ids and delta.token_ids
        found = message_delta(delta.events, self._include_reasoning)
        if not (found or delta.logprobs or has_token_ids or delta.finish_reason):
            return None
        return self._chunk(delta.index, found, delta)

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return self._common | {"object": "chat.completion.chunk", "choices": [], "usage": usage.body()}

    def whole(self, deltas: list[Delta], usage: Usage) -> dict[str, Any]:
        choices = []
        for index, own in enumerate(by_choice(deltas, self._num_choices)):
            entries = [entry for delta in own for entry in delta.logprobs]
            events = [event for delta in own for event in delta.events]
            if self._echo:
                events = [ContentText(self._echo), *events]
            choices.append(
                {
                    "index": index,
                    "message": message(events, self._include_reasoning, self._no_content),
                    "logprobs": self._logprobs(entries) if self._wants_logprobs else None,
                    "finish_reason": self._finish_reason(own[-1]),
                    "stop_reason": own[-1].stop_reason,
                }
            )
            if self._wants_token_ids:
                choices[-1]["token_ids"] = [token_id for delta in own for token_id in delta.token_ids]
        response = self._common | {"object": "chat.completion", "choices": choices, "usage": usage.body()}
        response |= self._told_prompt()
        scores = next((delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs is not None), None)
        if scores is not None:
            response["prompt_logprobs"] = prompt_logprobs(scores, self._model.tokenizer)
        return response

    def _told_prompt(self) -> dict[str, Any]:
        """What the model is given, in the forms asked for."""
        token_ids, told = self.requests[0].prompt_token_ids, dict[str, Any]()
        if self._wants_token_ids:
            told["prompt_token_ids"] = token_ids
        if self._wants_prompt_text:
            told["prompt_text"] = self._model.tokenizer.decode(token_ids, skip_special_tokens=False)
        return told

    @property
    def _no_content(self) -> str | None:
        """The content of a message that has none: with tools it is null, as it is known before the first token."""
        return "" if self._tools.format is None else None

    def _finish_reason(self, delta: Delta) -> str | None:
        """OpenAI's: a call that the request named is no surprise, and so the output just stops."""
        return "stop" if delta.finish_reason == "tool_calls" and self._tools.is_named else delta.finish_reason

    def _text_options(self, body: ChatBody) -> TextOptions:
        channel = self._channel if body.separate_reasoning else Channel.CONTENT
        return TextOptions(
            body.skip_special_tokens,
            body.include_stop_str_in_output,
            stop_expressions(body),
            beams=beam_options(body, 1, self._model.info),
            choices_per_prompt=body.n,
            make_parser=partial(OutputParser, channel, self._tools.format, self._tools.schemas),
            most_calls=self._tools.most_calls,
        )

    def _chunk(self, index: int, content: dict[str, Any], delta: Delta | None = None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "delta": content, "logprobs": None, "finish_reason": None}
        if delta is not None:
            if self._wants_logprobs:
                choice["logprobs"] = self._logprobs(delta.logprobs)
            if self._wants_token_ids:
                choice["token_ids"] = delta.token_ids
            if delta.finish_reason is not None:
                choice |= {"finish_reason": self._finish_reason(delta), "stop_reason": delta.stop_reason}
        chunk = self._common | {"object": "chat.completion.chunk", "choices": [choice]}
        return chunk | {"usage": self._usages[index].body()} if self._always_usage else chunk

    def _logprobs(self, entries: list[TokenLogprobs]) -> dict[str, Any]:
        return chat_logprobs(entries, self._model.tokenizer, self._names_are_ids)
