"""Request bodies. A field that is not here is a 400 that names it: nothing is accepted and ignored."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from engine.request import MAX_LOGPROB_TOKEN_IDS, MAX_LOGPROBS

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
StopList = Annotated[list[Annotated[str, Field(min_length=1, max_length=1024)]], Field(max_length=4)]
StopPattern = Annotated[str, Field(min_length=1, max_length=256)]
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


SYNONYMS = {
    "thinking_budget": "thinking_token_budget",
    "thinking_budget_tokens": "thinking_token_budget",
    "reasoning_budget_tokens": "thinking_token_budget",
    "n_predict": "max_tokens",
    "repeat_penalty": "repetition_penalty",
    "no_stop_trim": "include_stop_str_in_output",
    "rid": "request_id",
}
"""What clients of Qwen's own service, of llama.cpp's server and of SGLang call some of the fields."""


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
    disable_any_whitespace: bool = Field(False, description="JSON is written without any between its tokens")
    whitespace_pattern: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        None, description="what may be between the tokens of JSON: a regular expression"
    )

    @field_validator("disable_any_whitespace", "whitespace_pattern")
    @classmethod
    def _of_json(cls, value: Any, info: ValidationInfo) -> Any:
        if value and info.data.get("json_") is None and not info.data.get("json_object"):
            raise ValueError("needs json or json_object beside it")
        if info.field_name == "whitespace_pattern" and info.data.get("disable_any_whitespace"):
            raise ValueError("is not for disable_any_whitespace: true")
        return value


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
    use_beam_search: bool = Field(False, description="answer with the n likeliest outputs that a search finds")
    length_penalty: Annotated[float, Field(ge=-10, le=10)] | None = Field(
        None, description="of a beam's score: its log-probability over its length to the power of this; 1 by default"
    )
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Annotated[str, Field(min_length=1, max_length=1024)] | StopList | None = None
    stop_regex: StopPattern | Annotated[list[StopPattern], Field(max_length=4)] | None = Field(
        None, description="expressions that end the output as `stop` does; `stop_reason` is then the expression"
    )
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
    json_schema: GrammarText | dict[str, Any] | None = Field(None, description="the same, in the words of llama.cpp")
    regex: GrammarText | None = Field(None, description="and of SGLang")
    ebnf: GrammarText | None = Field(None, description="as guided_grammar")
    grammar: GrammarText | None = Field(None, description="as guided_grammar")
    return_token_ids: bool = False
    return_prompt_text: bool = Field(False, description="tell in `prompt_text` what the model is given")
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

    @model_validator(mode="before")
    @classmethod
    def _one_name(cls, values: Any) -> Any:
        """Fields by their own names. A synonym beside it that differs is left to be refused as unknown."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        for synonym, name in SYNONYMS.items():
            value = values.get(synonym)
            if value is not None and name in cls.model_fields and values.get(name) in (None, value):
                values[name] = values.pop(synonym)
        return values

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
