"""Request bodies. A field that is not here is a 400 that names it: nothing is accepted and ignored."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from engine.request import MAX_LOGPROB_TOKEN_IDS, MAX_LOGPROBS

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
StopList = Annotated[list[Annotated[str, Field(min_length=1, max_length=1024)]], Field(max_length=4)]
Text = Annotated[str, Field(max_length=4_000_000)]
GrammarText = Annotated[str, Field(min_length=1, max_length=4_000_000)]
Choices = Annotated[list[Annotated[str, Field(max_length=4_000_000)]], Field(min_length=1, max_length=10_000)]
AllowedTokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=2**15, fail_fast=True)]
"""At most as much to keep in memory for a request as a long prompt."""
LogprobTokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_LOGPROB_TOKEN_IDS, fail_fast=True)]
_CLIENTS_OWN = "for the client's own books: it changes nothing here and is not kept"


class Body(BaseModel):
    """Strict: a string is no number, true is no 1, and NaN is nothing. null is the same as leaving a field out."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _given(cls, values: Any) -> Any:
        """The fields that are not null. Of those that do not exist one is enough: a body can have a million."""
        if not isinstance(values, dict):
            return values
        known = dict.fromkeys(field.alias or name for name, field in cls.model_fields.items())
        unknown = (name for name, value in values.items() if value is not None and name not in known)
        names = [*known, *(name for name, _ in zip(unknown, range(1), strict=False))]
        return {name: values[name] for name in names if values.get(name) is not None}


class StreamOptions(Body):
    """What a stream carries besides text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Literal[False] = Field(False, description="chunks are never padded")

    @field_validator("continuous_usage_stats")
    @classmethod
    def _beside_usage(cls, value: bool, info: ValidationInfo) -> bool:
        if value and not info.data.get("include_usage"):
            raise ValueError("needs include_usage: true beside it")
        return value


class JsonSchemaFormat(Body):
    """The schema of a response."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: Text | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool = Field(False, description="a schema is enforced in any case")


class ResponseFormat(Body):
    """The form of a response."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = Field(None, validate_default=True)

    @field_validator("json_schema")
    @classmethod
    def _beside_its_type(cls, value: JsonSchemaFormat | None, info: ValidationInfo) -> JsonSchemaFormat | None:
        if (info.data.get("type", "json_schema") == "json_schema") != (value is not None):
            raise ValueError("must be there if `type` is 'json_schema', and only then")
        return value


class StructuredOutputs(Body):
    """The form of an output, in vLLM's words."""

    json_: GrammarText | dict[str, Any] | None = Field(None, alias="json", description="a JSON schema, or its text")
    regex: GrammarText | None = None
    choice: Choices | None = None
    grammar: GrammarText | None = Field(None, description="Lark as llguidance knows it, or GBNF")
    json_object: bool = False


class GenerationBody(Body):
    """What chats and completions have in common. None stands for the model's default."""

    model: Annotated[str, Field(max_length=512)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    n: Annotated[int, Field(ge=1, le=2**31 - 1)] = 1
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=1024)] | None = None
    allowed_token_ids: AllowedTokenIds | None = None
    bad_words: Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=128)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Annotated[str, Field(min_length=1, max_length=1024)] | StopList | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64, fail_fast=True)] | None = None
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = Field(
        True, description="the text is that of the tokens, which have their own spaces: both values mean the same"
    )
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = Field(
        None, description="use so many of the prompt's tokens at most; -1: as many as leave room for max_tokens"
    )
    truncation_side: Literal["left", "right"] = Field("left", description="where truncate_prompt_tokens leaves out")
    priority: Annotated[int, Field(ge=-(2**31), le=2**31 - 1)] = Field(
        0, description="lower goes first; an API key may have a lowest that it can ask for"
    )
    cache_salt: Annotated[str, Field(max_length=1024)] | None = None
    include_stop_str_in_output: bool = False
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    logprob_token_ids: LogprobTokenIds | None = Field(
        None, description="report these tokens instead of the likeliest; needs logprobs"
    )
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: GrammarText | dict[str, Any] | None = Field(None, description="as structured_outputs.json")
    guided_regex: GrammarText | None = None
    guided_choice: Choices | None = None
    guided_grammar: GrammarText | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = Field(False, description="name tokens in logprobs as in `token_id:123`")
    request_id: Annotated[str, Field(pattern=r"^[!-~]{1,128}$")] | None = Field(
        None, description="part of the response's id; random otherwise"
    )
    user: Annotated[str, Field(max_length=512)] | None = Field(None, description=_CLIENTS_OWN)
    safety_identifier: Annotated[str, Field(max_length=512)] | None = Field(None, description=_CLIENTS_OWN)
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = Field(None, description=_CLIENTS_OWN)
    prompt_cache_key: Annotated[str, Field(max_length=512)] | None = Field(
        None, description="a hint that is not needed: prompts with a common beginning share it in any case"
    )
    service_tier: Literal["auto", "default"] = Field("auto", description="there is one")
    store: Literal[False] = Field(False, description="nothing is stored")

    @field_validator("logit_bias")
    @classmethod
    def _numbers_for_token_ids(cls, value: dict[str, Any]) -> dict[str, float]:
        for key, bias in value.items():
            if not (key.isascii() and key.isdigit() and len(key) < 11):
                raise ValueError(f"has the key {key[:40]!r}, expected token ids")
            if type(bias) not in (int, float) or not -100 <= bias <= 100:
                raise ValueError(f"has {str(bias)[:40]} for {key}, expected numbers from -100 to 100")
        return value

    @field_validator("stream_options")
    @classmethod
    def _only_for_streams(cls, value: StreamOptions, info: ValidationInfo) -> StreamOptions:
        if not info.data.get("stream"):
            raise ValueError("is for streams; expected stream: true beside it")
        return value

    @field_validator("truncate_prompt_tokens")
    @classmethod
    def _some(cls, value: int) -> int:
        if value == 0:
            raise ValueError("is 0, expected at least 1, or -1")
        return value

    @field_validator("prompt_logprobs")
    @classmethod
    def _not_for_streams(cls, value: int, info: ValidationInfo) -> int:
        if info.data.get("stream"):
            raise ValueError("is not for streams; expected stream: false beside it")
        return value


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


BUDGET_NAMES = ("thinking_budget", "thinking_budget_tokens", "reasoning_budget_tokens")
"""What clients of Qwen's own service and of llama.cpp's server call `thinking_token_budget`."""


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
    add_generation_prompt: bool = Field(True, description="begin a new message; not so by default if one is continued")
    add_special_tokens: Literal[False] = Field(False, description="they are the chat template's")
    chat_template_kwargs: TemplateVariables | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    thinking_token_budget: Annotated[int, Field(ge=0, le=2**31 - 2)] | None = Field(
        None, description="reasoning is closed after so many tokens; also by the names in `BUDGET_NAMES`"
    )
    include_reasoning: bool = Field(True, description="false: what the model thinks is left out of the response")
    separate_reasoning: bool = Field(True, description="false: what the model thinks stays in the content, in its tags")

    @model_validator(mode="before")
    @classmethod
    def _one_budget(cls, values: Any) -> Any:
        """Under one name. Two that differ are one too many: the second is left to be refused as unknown."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        for name in BUDGET_NAMES:
            budget = values.get(name)
            if budget is not None and values.get("thinking_token_budget") in (None, budget):
                values["thinking_token_budget"] = values.pop(name)
        return values

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

    @field_validator("add_generation_prompt")
    @classmethod
    def _not_beside_continuing(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("continue_final_message"):
            raise ValueError("is true, expected false beside continue_final_message: true")
        return value

    @field_validator("reasoning_effort")
    @classmethod
    def _as_enable_thinking(cls, value: str, info: ValidationInfo) -> str:
        variables = info.data.get("chat_template_kwargs")
        if variables is not None and variables.enable_thinking is (value == "none"):
            raise ValueError(f"is {value!r}, expected what goes with enable_thinking: {variables.enable_thinking}")
        return value
