"""The bodies of POST /v1/messages and /v1/messages/count_tokens, and the chat that they ask for."""

import json
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator

from serve_app.openai.protocol import Body, StopList, Text

Id = Annotated[str, Field(max_length=256)]
_NO_NEED = "a hint that is not needed: prompts with a common beginning share it in any case"


class CacheControl(Body):
    """Where to cache a prompt: everywhere, always."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class Block(Body):
    """A part of a message."""

    cache_control: CacheControl | None = Field(None, description=_NO_NEED)


class TextBlock(Block):
    """Text."""

    type: Literal["text"]
    text: Text
    citations: Annotated[list[Any], Field(max_length=0)] | None = None


class ThinkingBlock(Body):
    """What the model thought."""

    type: Literal["thinking"]
    thinking: Text
    signature: Annotated[str, Field(max_length=0)] = Field("", description="there are none here")


class ToolUseBlock(Block):
    """A tool that the model used."""

    type: Literal["tool_use"]
    id: Id
    name: Id
    input: dict[str, Any]


class ToolResultBlock(Block):
    """What a tool gave back."""

    type: Literal["tool_result"]
    tool_use_id: Id
    content: Text | Annotated[list[TextBlock], Field(max_length=1024, fail_fast=True)] = ""
    is_error: bool = Field(False, description="the model reads it as text: `Error: …`")


def _kind(block: Any) -> str:
    kind = block.get("type") if isinstance(block, dict) else None
    return f"tag-{kind}" if isinstance(kind, str) else "tag-text"


ContentBlock = Annotated[
    Annotated[TextBlock, Tag("tag-text")]
    | Annotated[ThinkingBlock, Tag("tag-thinking")]
    | Annotated[ToolUseBlock, Tag("tag-tool_use")]
    | Annotated[ToolResultBlock, Tag("tag-tool_result")],
    Discriminator(
        _kind,
        custom_error_type="block_type",
        custom_error_message="expected a block of the type text, thinking, tool_use or tool_result",
    ),
]


class Turn(Body):
    """One message."""

    role: Literal["user", "assistant"]
    content: Text | Annotated[list[ContentBlock], Field(max_length=4096, fail_fast=True)]

    @field_validator("content")
    @classmethod
    def _of_its_role(cls, value: Any, info: ValidationInfo) -> Any:
        own = ToolResultBlock if info.data.get("role") == "user" else (ThinkingBlock, ToolUseBlock)
        for index, block in enumerate(value if isinstance(value, list) else ()):
            if not isinstance(block, (TextBlock, own)):
                raise ValueError(f"has at {index} a {block.type} block, which is not for the {info.data.get('role')}")
        return value


class ToolDefinition(Block):
    """A tool that the model may use."""

    type: Literal["custom"] = "custom"
    name: Id
    description: Text | None = None
    input_schema: dict[str, Any]
    strict: bool = False


class ToolChoice(Body):
    """Whether to use a tool, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: Id | None = Field(None, validate_default=True)
    disable_parallel_tool_use: bool = False

    @field_validator("name")
    @classmethod
    def _where_one_is_named(cls, value: str | None, info: ValidationInfo) -> str | None:
        if (value is None) == (info.data.get("type") == "tool"):
            raise ValueError("expected the name of a tool beside the type 'tool', and beside no other")
        return value


class Thinking(Body):
    """Whether the model thinks before it answers."""

    type: Literal["enabled", "adaptive", "disabled"]
    display: Literal["summarized"] = Field("summarized", description="what the model thinks is told as it is")
    budget_tokens: Annotated[int, Field(ge=1, le=2**31 - 2)] | None = Field(None, validate_default=True)

    @field_validator("budget_tokens")
    @classmethod
    def _where_it_is_enabled(cls, value: int | None, info: ValidationInfo) -> int | None:
        if (value is None) == (info.data.get("type") == "enabled"):
            raise ValueError("expected a number beside the type 'enabled', and beside no other")
        return value


class OutputFormat(Body):
    """The form of the answer's text."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    """How the answer is made."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description="how much the model thinks; needs thinking of the type 'adaptive'"
    )
    format: OutputFormat | None = None


class Metadata(Body):
    """About the request."""

    user_id: Annotated[str, Field(max_length=512)] | None = Field(None, description="for the client's own books")


class CountTokensBody(Body):
    """POST /v1/messages/count_tokens."""

    model: Annotated[str, Field(max_length=512)]
    messages: Annotated[list[Turn], Field(min_length=1, fail_fast=True)]
    system: Text | Annotated[list[TextBlock], Field(max_length=1024, fail_fast=True)] | None = None
    tools: Annotated[list[ToolDefinition], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: ToolChoice = ToolChoice(type="auto")
    thinking: Thinking = Thinking(type="disabled")
    output_config: OutputConfig = OutputConfig()
    cache_control: CacheControl | None = Field(None, description=_NO_NEED)

    @field_validator("output_config")
    @classmethod
    def _where_it_thinks(cls, value: OutputConfig, info: ValidationInfo) -> OutputConfig:
        thinking = info.data.get("thinking")
        if value.effort is not None and thinking is not None and thinking.type != "adaptive":
            raise ValueError(f"has an effort, which is for thinking of the type 'adaptive', not {thinking.type!r}")
        return value


class MessagesBody(CountTokensBody):
    """POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)]
    stop_sequences: StopList | None = None
    stream: bool = False
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] = Field("auto", description="there is one")


NAMES = {
    "stop": "stop_sequences",
    "thinking_token_budget": "thinking.budget_tokens",
    "continue_final_message": "messages",
    "response_format.json_schema": "output_config.format",
    "reasoning_effort": "output_config.effort",
}
"""For a chat's fields those of a message."""


def chat_values(body: CountTokensBody) -> dict[str, Any]:
    """The body of the chat that a message is made of."""
    values: dict[str, Any] = {"model": body.model, "messages": _messages(body)}
    values["chat_template_kwargs"] = {"enable_thinking": body.thinking.type != "disabled"}
    values["thinking_token_budget"] = body.thinking.budget_tokens
    if body.output_config.effort is not None:
        values["reasoning_effort"] = "xhigh" if body.output_config.effort == "max" else body.output_config.effort
    if body.output_config.format is not None:
        schema = {"name": "answer", "schema": body.output_config.format.schema_}
        values["response_format"] = {"type": "json_schema", "json_schema": schema}
    values["continue_final_message"] = body.messages[-1].role == "assistant"
    values["parallel_tool_calls"] = not body.tool_choice.disable_parallel_tool_use
    if body.tools:
        values["tools"] = [_tool(tool) for tool in body.tools]
    choice = body.tool_choice
    values["tool_choice"] = {"any": "required"}.get(choice.type, choice.type)
    if choice.type == "tool":
        values["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    if isinstance(body, MessagesBody):
        values["stop"] = body.stop_sequences
        values |= {name: getattr(body, name) for name in ("max_tokens", "temperature", "top_p", "top_k")}
    return values


def _tool(tool: ToolDefinition) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": function | {"strict": tool.strict}}


def _messages(body: CountTokensBody) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if body.system is not None:
        messages.append({"role": "system", "content": _text(body.system)})
    for turn in body.messages:
        blocks = turn.content if isinstance(turn.content, list) else [TextBlock(type="text", text=turn.content)]
        messages += _user_turns(blocks) if turn.role == "user" else [_assistant_turn(blocks)]
    return messages


def _user_turns(blocks: list[Any]) -> list[dict[str, Any]]:
    """The results of tools, each a message of its own, and then what the user says."""
    turns = [
        {
            "role": "tool",
            "tool_call_id": block.tool_use_id,
            "content": ("Error: " if block.is_error else "") + _text(block.content),
        }
        for block in blocks
        if isinstance(block, ToolResultBlock)
    ]
    texts = [block for block in blocks if isinstance(block, TextBlock)]
    return turns if turns and not texts else [*turns, {"role": "user", "content": _text(texts)}]


def _assistant_turn(blocks: list[Any]) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": "assistant"}
    texts = [block for block in blocks if isinstance(block, TextBlock)]
    thoughts = [block.thinking for block in blocks if isinstance(block, ThinkingBlock)]
    calls = [block for block in blocks if isinstance(block, ToolUseBlock)]
    if texts or not calls:
        turn["content"] = _text(texts)
    if thoughts:
        turn["reasoning"] = "".join(thoughts)
    if calls:
        turn["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": json.dumps(call.input)}}
            for call in calls
        ]
    return turn


def _text(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content)
