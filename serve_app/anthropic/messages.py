"""POST /v1/messages and /v1/messages/count_tokens: a chat in the words of Anthropic's API."""

from typing import Any

from serve_app.anthropic.content import Content
from serve_app.anthropic.errors import error_body
from serve_app.anthropic.protocol import NAMES, CountTokensBody, MessagesBody, chat_values
from serve_app.openai.chat_prompt import render
from serve_app.openai.conversion import as_chat, as_chat_body
from serve_app.openai.endpoint import ServedModel, adapter_of, check_count, new_id, server_sent_event
from serve_app.openai.errors import ApiError
from serve_app.openai.generation import Delta, Usage

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class Messages:
    """One request for a message.

    Raises:
        ApiError: the request cannot be run.
    """

    def __init__(self, body: MessagesBody, model: ServedModel) -> None:
        check_count("messages", len(body.messages), model.limits.messages)
        chat = as_chat(chat_values(body), model, NAMES)
        self.requests = chat.requests
        self.constraint = chat.constraint
        self.prompt_tokens = chat.prompt_tokens
        self.text_options = chat.text_options
        self.stream = body.stream
        self._content = Content()
        self._usage = Usage(chat.prompt_tokens)
        self._is_begun = False
        self._stop: dict[str, Any] = {"stop_reason": None, "stop_sequence": None}
        self._common = {"id": new_id("msg"), "type": "message", "role": "assistant", "model": body.model}

    def events(self, delta: Delta) -> bytes:
        self._usage.add(delta)
        found: list[dict[str, Any]] = []
        if not self._is_begun:
            self._is_begun = True
            usage = _usage(self._usage) | {"output_tokens": 0}
            message = self._common | {"content": [], **self._stop, "usage": usage}
            found.append({"type": "message_start", "message": message})
        found += self._add(delta)
        return b"".join(server_sent_event(event, event["type"]) for event in found)

    def last_events(self, usage: Usage) -> bytes:
        delta = {"type": "message_delta", "delta": self._stop, "usage": _usage(usage)}
        return server_sent_event(delta, "message_delta") + server_sent_event({"type": "message_stop"}, "message_stop")

    def error_event(self, error: ApiError) -> bytes:
        return server_sent_event(error_body(error), "error")

    def whole(self, deltas: list[Delta], usage: Usage) -> dict[str, Any]:
        for delta in deltas:
            self._add(delta)
        return self._common | {"content": self._content.blocks, **self._stop, "usage": _usage(usage)}

    def _add(self, delta: Delta) -> list[dict[str, Any]]:
        """More of the output; returns the events that tell so."""
        found = list(self._content.add(delta.events))
        if delta.finish_reason is not None:
            found += self._content.end()
            self._stop["stop_reason"] = _STOP_REASONS[delta.finish_reason]
            if delta.finish_reason == "stop" and isinstance(delta.stop_reason, str):
                self._stop = {"stop_reason": "stop_sequence", "stop_sequence": delta.stop_reason}
        return found


def count_tokens(body: CountTokensBody, model: ServedModel) -> dict[str, Any]:
    """How many tokens a message's prompt has. They need not fit the model's context.

    Raises:
        ApiError: the chat template refuses the messages.
    """
    adapter_of(body.model, model)
    check_count("messages", len(body.messages), model.limits.messages)
    return {"input_tokens": len(render(as_chat_body(chat_values(body), NAMES), model))}


def _usage(usage: Usage) -> dict[str, Any]:
    """Anthropic counts the part of a prompt that came from the cache by itself."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
    }
