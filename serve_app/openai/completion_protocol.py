"""The body of a completion request."""

from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator

from engine.request import MAX_LOGPROBS
from serve_app.openai.protocol import GenerationBody, Text, TokenIds


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, fail_fast=True)]
        | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
    )
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool = False
    best_of: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = Field(
        None, description="make so many choices for a prompt, and answer with the n whose tokens were likeliest"
    )
    suffix: Text | None = Field(None, description="what comes after the text to be filled in; empty: nothing does")
    add_special_tokens: bool = Field(True, description="begin a prompt that is text as the tokenizer wants it")

    @field_validator("best_of")
    @classmethod
    def _enough_to_choose_from(cls, value: int, info: ValidationInfo) -> int:
        n = info.data.get("n", 1)
        if value < n:
            raise ValueError(f"is {value}, expected at least n, which is {n}")
        if value > n and info.data.get("stream"):
            raise ValueError(f"is {value}, expected {n} as n, because the best are known only when all are whole")
        return value

    @field_validator("suffix")
    @classmethod
    def _alone(cls, value: str, info: ValidationInfo) -> str | None:
        if value and info.data.get("echo"):
            raise ValueError("is not supported together with echo")
        if value and info.data.get("truncate_prompt_tokens") is not None:
            raise ValueError("is not supported together with truncate_prompt_tokens")
        return value or None

    @property
    def prompts(self) -> "list[str] | list[list[int]]":
        """The prompts, also where there is only one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt
