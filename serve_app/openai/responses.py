"""POST /v1/responses: a chat in the words of OpenAI's second API. Stateless."""

from typing import Any

from serve_app.openai.conversion import as_chat
from serve_app.openai.endpoint import ServedModel, new_id, now, server_sent_event
from serve_app.openai.errors import ApiError
from serve_app.openai.generation import Delta, Usage
from serve_app.openai.responses_output import ResponseOutput
from serve_app.openai.responses_protocol import NAMES, ResponsesBody, chat_values


class Responses:
    """One request for a response.

    Raises:
        ApiError: the request cannot be run.
    """

    def __init__(self, body: ResponsesBody, model: ServedModel) -> None:
        chat = as_chat(chat_values(body), model, NAMES)
        self.requests = chat.requests
        self.constraint = chat.constraint
        self.prompt_tokens = chat.prompt_tokens
        self.text_options = chat.text_options
        self.stream = body.stream
        self._output = ResponseOutput()
        self._finish_reason: str | None = None
        self._num_events = 0
        params = self.requests[0].params
        self._common = {
            "id": new_id("resp"),
            "object": "response",
            "created_at": now(),
            "model": body.model,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "tools": [{"description": None, "parameters": None} | tool.model_dump() for tool in body.tools or ()],
            "tool_choice": body.tool_choice if isinstance(body.tool_choice, str) else body.tool_choice.model_dump(),
            "parallel_tool_calls": body.parallel_tool_calls,
            "text": {"format": body.text.format.model_dump(by_alias=True, exclude_none=True)},
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "metadata": body.metadata or {},
            "truncation": body.truncation,
            "service_tier": "default",
            "store": False,
            "background": False,
            "previous_response_id": None,
        }

    def events(self, delta: Delta) -> bytes:
        found = b""
        if self._num_events == 0:
            opening = self._response("in_progress")
            found = self._event("response.created", response=opening)
            found += self._event("response.in_progress", response=opening)
        return found + self._add(delta)

    def last_events(self, usage: Usage) -> bytes:
        response = self._finished(usage)
        return self._event(f"response.{response['status']}", response=response)

    def error_event(self, error: ApiError) -> bytes:
        failure = {"code": "server_error", "message": error.message}
        return self._event("response.failed", response=self._response("failed") | {"error": failure})

    def whole(self, deltas: list[Delta], usage: Usage) -> dict[str, Any]:
        for delta in deltas:
            self._add(delta)
        return self._finished(usage)

    def _add(self, delta: Delta) -> bytes:
        """More of the output; returns the events that tell so."""
        found = list(self._output.add(delta.events))
        if delta.finish_reason is not None:
            self._finish_reason = delta.finish_reason
            found += self._output.end(is_cut_off=delta.finish_reason == "length")
        return b"".join(self._event(kind, **fields) for kind, fields in found)

    def _event(self, kind: str, **fields: Any) -> bytes:
        number = self._num_events
        self._num_events += 1
        return server_sent_event({"type": kind, "sequence_number": number, **fields}, kind)

    def _finished(self, usage: Usage) -> dict[str, Any]:
        is_whole = self._finish_reason != "length"
        return self._response("completed" if is_whole else "incomplete") | {
            "incomplete_details": None if is_whole else {"reason": "max_output_tokens"},
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            },
        }

    def _response(self, status: str) -> dict[str, Any]:
        so_far = {"status": status, "output": self._output.items, "usage": None}
        return self._common | so_far | {"error": None, "incomplete_details": None}
