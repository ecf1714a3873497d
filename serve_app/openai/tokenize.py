"""POST /tokenize and /detokenize, in the forms that vLLM gave them."""

from typing import Annotated, Any

from pydantic import Field, ValidationInfo, field_validator

from engine.errors import RequestError
from serve_app.openai.chat_prompt import render
from serve_app.openai.chat_protocol import ChatBody, Message, TemplateVariables, Tool, not_beside_continuing
from serve_app.openai.endpoint import ServedModel, adapter_of, check_count
from serve_app.openai.errors import bad_request
from serve_app.openai.protocol import Body, Text, TokenId


class TokenizeBody(Body):
    """A prompt, or a conversation as in a chat."""

    model: Annotated[str, Field(max_length=512)] | None = None
    prompt: Text | None = None
    add_special_tokens: bool = True
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = Field(None, validate_default=True)
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    continue_final_message: bool = False
    add_generation_prompt: bool = Field(True, description="not so by default if the last message is continued")
    chat_template_kwargs: TemplateVariables | None = None
    return_token_strs: bool = False

    @field_validator("messages")
    @classmethod
    def _one_of_two(cls, value: list[Message] | None, info: ValidationInfo) -> list[Message] | None:
        if "prompt" in info.data and (value is None) == (info.data["prompt"] is None):
            found = "neither" if value is None else "both"
            raise ValueError(f"there are {found} of prompt and messages, expected one of the two")
        return value

    _prompts_or_continues = field_validator("add_generation_prompt")(not_beside_continuing)

    @field_validator("tools", "chat_template_kwargs", "continue_final_message")
    @classmethod
    def _for_chats(cls, value: Any, info: ValidationInfo) -> Any:
        if info.data.get("prompt") is not None:
            raise ValueError("is for messages, not for a prompt")
        return value


class DetokenizeBody(Body):
    """Token ids."""

    model: Annotated[str, Field(max_length=512)] | None = None
    tokens: Annotated[list[TokenId], Field(max_length=2**20, fail_fast=True)]


def tokenize(body: TokenizeBody, model: ServedModel) -> dict[str, Any]:
    """The token ids that the model would see, and how many there are. They need not fit the model's context.

    Raises:
        ApiError: the text cannot be tokenized.
    """
    adapter_of(body.model or model.name, model)
    if body.messages is not None:
        check_count("messages", len(body.messages), model.limits.messages)
        chat = ChatBody.model_construct(
            model=model.name,
            messages=body.messages,
            tools=body.tools,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            chat_template_kwargs=body.chat_template_kwargs,
        )
        tokens = render(chat, model)
    else:
        try:
            tokens = model.tokenizer.encode(body.prompt or "", add_special_tokens=body.add_special_tokens)
        except RequestError as error:
            raise bad_request(str(error), "prompt") from None
    strings = None
    if body.return_token_strs:
        strings = [model.tokenizer.token_bytes(token).decode("utf-8", "replace") for token in tokens]
    return {
        "count": len(tokens),
        "max_model_len": model.info.max_model_len,
        "tokens": tokens,
        "token_strs": strings,
    }


def detokenize(body: DetokenizeBody, model: ServedModel) -> dict[str, Any]:
    """The text of token ids, special tokens included.

    Raises:
        ApiError: an id is not in the vocabulary.
    """
    adapter_of(body.model or model.name, model)
    for index, token_id in enumerate(body.tokens):
        if token_id >= model.info.vocab_size:
            message = f"tokens.{index} is {token_id}, expected less than the vocabulary's {model.info.vocab_size}"
            raise bad_request(message, "tokens")
    return {"prompt": model.tokenizer.decode(body.tokens, skip_special_tokens=False)}
