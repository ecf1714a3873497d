"""What a parser finds → an assistant's message in OpenAI's shapes, whole or in pieces."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from serve_app.openai.endpoint import new_id
from serve_app.openai.parsing.events import (
    ContentText,
    ParserEvent,
    ReasoningText,
    ToolCallArguments,
    ToolCallStart,
)


def message_delta(events: Iterable[ParserEvent], include_reasoning: bool) -> dict[str, Any]:
    """What is new of a message: the `delta` of a chunk. Reasoning has both of the names that clients look for."""
    content, reasoning = [], []
    calls: dict[int, dict[str, Any]] = {}
    arguments: dict[int, list[str]] = defaultdict(list)
    for event in events:
        match event:
            case ContentText(text):
                content.append(text)
            case ReasoningText(text):
                reasoning.append(text)
            case ToolCallStart(index, name):
                calls[index] = {"index": index, "id": new_id("call"), "type": "function", "function": {"name": name}}
            case ToolCallArguments(index, text):
                arguments[index].append(text)
    for index in calls.keys() | arguments.keys():
        call = calls.setdefault(index, {"index": index, "function": {}})
        call["function"]["arguments"] = "".join(arguments[index])
    delta: dict[str, Any] = {}
    if content:
        delta["content"] = "".join(content)
    if reasoning and include_reasoning:
        delta["reasoning"] = delta["reasoning_content"] = "".join(reasoning)
    if calls:
        delta["tool_calls"] = [calls[index] for index in sorted(calls)]
    return delta


def message(events: Iterable[ParserEvent], include_reasoning: bool, no_content: str | None) -> dict[str, Any]:
    """The whole message: what its deltas add up to. `no_content` is the content if there is none."""
    found = message_delta(events, include_reasoning)
    calls = [{key: value for key, value in call.items() if key != "index"} for call in found.get("tool_calls", ())]
    return {
        "role": "assistant",
        "content": found.get("content", no_content),
        "refusal": None,
        "reasoning": found.get("reasoning"),
        "reasoning_content": found.get("reasoning_content"),
    } | ({"tool_calls": calls} if calls else {})
