"""A conversation → the ids that the model sees, and what the model is in the middle of after them."""

from typing import Any

import msgspec

from engine.errors import RequestError
from engine.request import ThinkingBudget
from engine.tokenizer import Tokenizer
from serve_app.openai.chat_protocol import ChatBody, Message, ToolCall
from serve_app.openai.endpoint import ServedModel, not_encoded
from serve_app.openai.errors import bad_request
from serve_app.openai.parsing.output import END_OF_THINK, THINK, Channel
from serve_app.openai.tools import ToolUse

EFFORT_TOKENS = {"minimal": 512, "low": 2_048, "medium": 8_192}
"""What `reasoning_effort` lets a model think, in tokens; more than that is no limit."""


def render(body: ChatBody, model: ServedModel, most_tokens: int | None = None) -> list[int]:
    """The conversation as token ids.

    Args:
        body: the request.
        model: the one served.
        most_tokens: a conversation that has far more is refused before it is read to its end; None: any number.

    Raises:
        ApiError: the chat template refuses it, or the model knows no tool calls.
    """
    tools = ToolUse.of(body, model)
    variables = body.chat_template_kwargs.model_dump(exclude_none=True) if body.chat_template_kwargs else {}
    if body.reasoning_effort is not None:
        variables["enable_thinking"] = body.reasoning_effort != "none"
    as_objects = tools.format is not None and tools.format.takes_objects
    try:
        return model.tokenizer.encode_chat(
            [_turn(message, f"messages.{index}", as_objects) for index, message in enumerate(body.messages)],
            tools=[tool.model_dump(exclude_none=True) for tool in tools.offered] or None,
            add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
            continue_final_message=body.continue_final_message,
            most_tokens=most_tokens,
            **variables,
        )
    except RequestError as error:
        raise not_encoded(error, model, "messages") from None


def open_channel(token_ids: list[int], tokenizer: Tokenizer, is_continued: bool) -> Channel:
    """What a rendered prompt leaves open.

    Only what comes after its last special token says so: all before that is other turns, which can hold any text.

    Args:
        token_ids: the prompt.
        tokenizer: the model's.
        is_continued: whether the prompt ends within an answer.
    """
    opening, closing = tokenizer.token_to_id(THINK), tokenizer.token_to_id(END_OF_THINK)
    if opening is None or closing is None:
        return Channel.CONTENT
    for token_id in reversed(token_ids):
        if token_id == opening:
            return Channel.REASONING
        if token_id == closing:
            return Channel.CONTENT
        if token_id in tokenizer.special_token_ids:
            break
    return Channel.CONTENT if is_continued else Channel.UNDECIDED


def thinking_budget(body: ChatBody, channel: Channel, tokenizer: Tokenizer) -> ThinkingBudget | None:
    """How long the model may think; None if there is no limit, or nothing to limit."""
    num_tokens = body.thinking_token_budget
    if num_tokens is None:
        num_tokens = EFFORT_TOKENS.get(body.reasoning_effort or "")
    opening, closing = tokenizer.token_to_id(THINK), tokenizer.token_to_id(END_OF_THINK)
    if num_tokens is None or channel is Channel.CONTENT or opening is None or closing is None:
        return None
    is_open = channel is Channel.REASONING
    line_break = tokenizer.encode("\n") if num_tokens else []
    own_tokens = max(num_tokens - len(line_break), 0)
    return ThinkingBudget(
        num_tokens=own_tokens if is_open else own_tokens + 1,  # the tag that opens the block does not count
        closing_ids=(*line_break, closing),
        opening_id=opening,
        closing_id=closing,
        is_open=is_open,
    )


def _turn(message: Message, where: str, as_objects: bool) -> dict[str, Any]:
    turn = message.model_dump(exclude_none=True)
    if message.role == "developer":
        turn["role"] = "system"
    if as_objects:
        for index, call in enumerate(message.tool_calls or ()):
            arguments = _object(call, f"{where}.tool_calls.{index}.function.arguments")
            turn["tool_calls"][index]["function"]["arguments"] = arguments
    return turn


def _object(call: ToolCall, param: str) -> dict[str, Any]:
    """The arguments of an earlier call, for templates that write them one by one."""
    try:
        return msgspec.json.decode(call.function.arguments or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        found = call.function.arguments[:64]
        raise bad_request(f"{param} is {found!r}, expected a JSON object, which this model needs", param) from None
