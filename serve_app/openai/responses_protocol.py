"""The body of POST /v1/responses, and the chat that it asks for."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator

from serve_app.openai.chat_protocol import TemplateVariables
from serve_app.openai.protocol import Body, Text

Id = Annotated[str, Field(max_length=256)]
Status = Literal["in_progress", "completed", "incomplete"]
_PLACE = "an output's, as it was given back; nothing depends on it"
_CLIENTS_OWN = "for the client's own books: it changes nothing here and is not kept"


class ContentPart(Body):
    """A piece of text in a message."""

    type: Literal["input_text", "output_text"]
    text: Text
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: Annotated[list[Any], Field(max_length=0)] | None = None


Parts = Annotated[list[ContentPart], Field(max_length=1024, fail_fast=True)]


class MessageItem(Body):
    """One turn."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Parts
    id: Id | None = Field(None, description=_PLACE)
    status: Status | None = Field(None, description=_PLACE)


class FunctionCallItem(Body):
    """A function that the model called."""

    type: Literal["function_call"]
    call_id: Id
    name: Id
    arguments: Text
    id: Id | None = Field(None, description=_PLACE)
    status: Status | None = Field(None, description=_PLACE)


class FunctionCallOutputItem(Body):
    """What a function gave back."""

    type: Literal["function_call_output"]
    call_id: Id
    output: Text | Parts
    id: Id | None = Field(None, description=_PLACE)
    status: Status | None = Field(None, description=_PLACE)


class ReasoningText(Body):
    """A piece of what the model thought."""

    type: Literal["reasoning_text"]
    text: Text


class ReasoningItem(Body):
    """What the model thought."""

    type: Literal["reasoning"]
    content: Annotated[list[ReasoningText], Field(max_length=1024, fail_fast=True)] | None = None
    summary: Annotated[list[Any], Field(max_length=0)] | None = Field(None, description="the models here make none")
    id: Id | None = Field(None, description=_PLACE)
    status: Status | None = Field(None, description=_PLACE)


def _kind(item: Any) -> str:
    kind = item.get("type") if isinstance(item, dict) else None
    return f"tag-{kind}" if isinstance(kind, str) else "tag-message"


InputItem = Annotated[
    Annotated[MessageItem, Tag("tag-message")]
    | Annotated[FunctionCallItem, Tag("tag-function_call")]
    | Annotated[FunctionCallOutputItem, Tag("tag-function_call_output")]
    | Annotated[ReasoningItem, Tag("tag-reasoning")],
    Discriminator(
        _kind,
        custom_error_type="item_type",
        custom_error_message="expected an item of the type message, function_call, function_call_output or reasoning",
    ),
]


class FunctionTool(Body):
    """A function that the model may call."""

    type: Literal["function"]
    name: Id
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = False


class NamedFunction(Body):
    """`tool_choice`: the one function to call."""

    type: Literal["function"]
    name: Id


class AllowedFunctions(Body):
    """`tool_choice`: the functions that may be called. The model sees no others."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunction], Field(min_length=1, max_length=128, fail_fast=True)]


class TextFormat(Body):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: Id | None = None
    description: Text | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    @field_validator("name", "description", "json_schema", "strict")
    @classmethod
    def _of_a_schema(cls, value: Any, info: ValidationInfo) -> Any:
        if info.data.get("type", "json_schema") != "json_schema":
            raise ValueError(f"is for the type 'json_schema', not for {info.data['type']!r}")
        return value


class TextOptions(Body):
    """How the answer is written."""

    format: TextFormat = TextFormat(type="text")


class ReasoningOptions(Body):
    """How much the model thinks."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: Literal["auto"] | None = Field(None, description="the models here make none")


class ResponseStreamOptions(Body):
    """What a stream carries."""

    include_obfuscation: Literal[False] = Field(False, description="events are never padded")


class ResponsesBody(Body):
    """POST /v1/responses. Nothing is kept: a conversation goes on by sending all of its items."""

    model: Annotated[str, Field(max_length=512)]
    input: Text | Annotated[list[InputItem], Field(min_length=1, max_length=4096, fail_fast=True)]
    instructions: Text | None = None
    stream: bool = False
    stream_options: ResponseStreamOptions | None = None
    include: list[Literal["reasoning.encrypted_content"]] | None = Field(
        None, description="reasoning is never encrypted here: its items have the text, and go in again"
    )
    max_output_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | AllowedFunctions = "auto"
    parallel_tool_calls: bool = True
    text: TextOptions = TextOptions()
    reasoning: ReasoningOptions | None = None
    chat_template_kwargs: TemplateVariables | None = None
    priority: Annotated[int, Field(ge=-(2**31), le=2**31 - 1)] = Field(
        0, description="lower goes first; an API key may have a lowest that it can ask for"
    )
    cache_salt: Annotated[str, Field(max_length=128)] | None = None
    store: Literal[False] = Field(False, description="nothing is stored")
    background: Literal[False] = Field(False, description="the answer comes at once")
    truncation: Literal["disabled"] = Field("disabled", description="an input that is too long is an error")
    service_tier: Literal["auto", "default"] = Field("auto", description="there is one")
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = Field(None, description="given back")
    user: Annotated[str, Field(max_length=512)] | None = Field(None, description=_CLIENTS_OWN)
    safety_identifier: Annotated[str, Field(max_length=512)] | None = Field(None, description=_CLIENTS_OWN)
    prompt_cache_key: Annotated[str, Field(max_length=512)] | None = Field(
        None, description="a hint that is not needed: prompts with a common beginning share it in any case"
    )


NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
"""For a chat's fields those of a response."""
_SAME = (
    "model", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "seed", "parallel_tool_calls", "priority", "cache_salt",
)  # fmt: skip


def chat_values(body: ResponsesBody) -> dict[str, Any]:
    """The body of the chat that a response is made of."""
    values: dict[str, Any] = {name: getattr(body, name) for name in _SAME}
    values["messages"] = _messages(body)
    values["max_completion_tokens"] = body.max_output_tokens
    if body.tools:
        values["tools"] = [_tool(tool) for tool in body.tools]
    values["tool_choice"] = body.tool_choice
    if isinstance(body.tool_choice, NamedFunction):
        values["tool_choice"] = _named(body.tool_choice)
    elif isinstance(body.tool_choice, AllowedFunctions):
        tools = [_named(tool) for tool in body.tool_choice.tools]
        values["tool_choice"] = {
            "type": "allowed_tools",
            "allowed_tools": {"mode": body.tool_choice.mode, "tools": tools},
        }
    if body.text.format.type != "text":
        values["response_format"] = _response_format(body.text.format)
    if body.reasoning is not None:
        values["reasoning_effort"] = body.reasoning.effort
    if body.chat_template_kwargs is not None:
        values["chat_template_kwargs"] = body.chat_template_kwargs.model_dump()
    return values


def _tool(tool: FunctionTool) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}


def _response_format(wanted: TextFormat) -> dict[str, Any]:
    if wanted.type == "json_object":
        return {"type": "json_object"}
    schema = {"name": wanted.name, "description": wanted.description, "schema": wanted.json_schema}
    return {"type": "json_schema", "json_schema": schema | {"strict": wanted.strict}}


def _named(tool: NamedFunction) -> dict[str, Any]:
    return {"type": "function", "function": {"name": tool.name}}


def _messages(body: ResponsesBody) -> list[dict[str, Any]]:
    """Items as messages: reasoning, text and calls that follow one another are one turn of the assistant."""
    messages: list[dict[str, Any]] = []
    if body.instructions is not None:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    turn: dict[str, Any] | None = None
    """The assistant's, if it may go on."""
    for item in body.input:
        if isinstance(item, FunctionCallOutputItem):
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
            turn = None
        elif isinstance(item, MessageItem) and item.role != "assistant":
            messages.append({"role": item.role, "content": _text(item.content)})
            turn = None
        else:
            if turn is None or not _goes_on(turn, item):
                turn = {"role": "assistant"}
                messages.append(turn)
            _add(turn, item)
    return messages


def _goes_on(turn: dict[str, Any], item: MessageItem | FunctionCallItem | ReasoningItem) -> bool:
    """Whether an item is more of the assistant's turn, not the first of another."""
    if isinstance(item, FunctionCallItem):
        return True
    later = ("content", "tool_calls") if isinstance(item, ReasoningItem) else ("content",)
    return not any(field in turn for field in later)


def _add(turn: dict[str, Any], item: MessageItem | FunctionCallItem | ReasoningItem) -> None:
    if isinstance(item, MessageItem):
        turn["content"] = _text(item.content)
    elif isinstance(item, ReasoningItem):
        turn["reasoning"] = turn.get("reasoning", "") + "".join(part.text for part in item.content or ())
    else:
        function = {"name": item.name, "arguments": item.arguments}
        turn.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})


def _text(content: str | list[ContentPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
