"""The body of a chat request: messages, tools, and what is to become of them."""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from engine.request import MAX_LOGPROBS
from serve_app.openai.protocol import Body, GenerationBody, Text


class TextPart(Body):
    """A piece of a message's content."""

    type: Literal["text"]
    text: Text


class FunctionCall(Body):
    """The function that an assistant called."""

    name: Annotated[str, Field(max_length=256)]
    arguments: Text


class ToolCall(Body):
    """One of an assistant's calls."""

    index: int | None = Field(None, exclude=True, description="its place in the list, as in a stream; not needed")
    id: Annotated[str, Field(max_length=256)]
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(max_length=1024, fail_fast=True)] | None = Field(
        None, validate_default=True
    )
    name: Annotated[str, Field(max_length=256)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128, fail_fast=True)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
    reasoning: Text | None = None
    reasoning_content: Text | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = Field(None, exclude=True, description="none here")

    @property
    def text(self) -> str:
        """All of its content."""
        parts = self.content or ()
        return parts if isinstance(parts, str) else "".join(part.text for part in parts)

    @field_validator("content")
    @classmethod
    def _only_assistants_are_silent(cls, value: Any, info: ValidationInfo) -> Any:
        role = info.data.get("role", "assistant")
        if value is None and role != "assistant":
            raise ValueError(f"is missing, expected the text of the {role} message")
        return value


class FunctionDefinition(Body):
    """A function that the model may call."""

    name: Annotated[str, Field(max_length=256, pattern=r"^[A-Za-z0-9_.:/-]+$")]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = Field(False, exclude=True, description="whether the arguments must be what `parameters` describes")

    @field_validator("parameters")
    @classmethod
    def _of_an_object(cls, value: dict[str, Any]) -> dict[str, Any]:
        if value.get("type", "object") != "object":
            raise ValueError(f"has the type {str(value['type'])[:40]!r}, expected 'object'")
        if not isinstance(value.get("properties", {}), dict):
            raise ValueError("has properties that are no object")
        return value


class Tool(Body):
    """A tool that the model may call."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(Body):
    """A function, by its name."""

    name: Annotated[str, Field(max_length=256)]


class NamedTool(Body):
    """`tool_choice`: the one function to call."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(Body):
    """Some of the tools, and whether one of them has to be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=128, fail_fast=True)]


class AllowedToolsChoice(Body):
    """`tool_choice`: the tools that may be called. The model sees no others."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class TemplateVariables(Body):
    """`chat_template_kwargs`: what a request may tell the chat template."""

    enable_thinking: bool | None = None


def not_beside_continuing(value: bool, info: ValidationInfo) -> bool:
    """Validates `add_generation_prompt`: an answer that goes on begins with nothing new."""
    if value and info.data.get("continue_final_message"):
        raise ValueError("is true, expected false beside continue_final_message: true")
    return value


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedToolsChoice = "auto"
    parallel_tool_calls: bool = Field(True, description="false: one call at most; the output ends with it")
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    continue_final_message: bool = Field(False, description="go on with the last message, which is the assistant's")
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = Field(None, description="there is text")
    echo: bool = Field(False, description="begin the answer with the last message if that is the assistant's")
    add_generation_prompt: bool = Field(True, description="begin a new message; not so by default if one is continued")
    add_special_tokens: Literal[False] = Field(False, description="they are the chat template's")
    chat_template_kwargs: TemplateVariables | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    thinking_token_budget: Annotated[int, Field(ge=0, le=2**31 - 2)] | None = Field(
        None, description="reasoning is closed after so many tokens"
    )
    include_reasoning: bool = Field(True, description="false: what the model thinks is left out of the response")
    separate_reasoning: bool = Field(True, description="false: what the model thinks stays in the content, in its tags")

    @field_validator("top_logprobs")
    @classmethod
    def _beside_logprobs(cls, value: int, info: ValidationInfo) -> int:
        if not info.data.get("logprobs"):
            raise ValueError("needs logprobs: true beside it")
        return value

    @field_validator("max_completion_tokens")
    @classmethod
    def _as_max_tokens(cls, value: int, info: ValidationInfo) -> int:
        if info.data.get("max_tokens") not in (None, value):
            raise ValueError(f"is not max_tokens, which is {info.data['max_tokens']}; expected one of the two")
        return value

    @field_validator("tools")
    @classmethod
    def _told_apart(cls, value: list[Tool]) -> list[Tool]:
        names = [tool.function.name for tool in value]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"has {names.count(name)} functions of the name {name[:64]!r}, expected one")
        return value

    @field_validator("tool_choice")
    @classmethod
    def _one_of_the_tools(
        cls, value: str | NamedTool | AllowedToolsChoice, info: ValidationInfo
    ) -> str | NamedTool | AllowedToolsChoice:
        names = [tool.function.name for tool in info.data.get("tools") or ()]
        if value == "required" and not names:
            raise ValueError("is 'required', expected tools beside it")
        named = value.allowed_tools.tools if isinstance(value, AllowedToolsChoice) else [value]
        for tool in named:
            if isinstance(tool, NamedTool) and tool.function.name not in names:
                raise ValueError(f"names the function {tool.function.name[:64]!r}, expected one of the tools")
        return value

    @field_validator("continue_final_message")
    @classmethod
    def _of_the_assistant(cls, value: bool, info: ValidationInfo) -> bool:
        messages = info.data.get("messages")
        if value and messages and (messages[-1].role != "assistant" or messages[-1].tool_calls):
            raise ValueError("needs a last message that is the assistant's and has no tool calls")
        return value

    _prompts_or_continues = field_validator("add_generation_prompt")(not_beside_continuing)

    @field_validator("reasoning_effort")
    @classmethod
    def _as_enable_thinking(cls, value: str, info: ValidationInfo) -> str:
        variables = info.data.get("chat_template_kwargs")
        if variables is not None and variables.enable_thinking is (value == "none"):
            raise ValueError(f"is {value!r}, expected what goes with enable_thinking: {variables.enable_thinking}")
        return value
