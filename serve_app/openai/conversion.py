"""Requests of other APIs → a chat: they differ in their words, not in what they ask for."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from serve_app.http import validate
from serve_app.openai.chat import Chat
from serve_app.openai.chat_protocol import ChatBody
from serve_app.openai.endpoint import ServedModel
from serve_app.openai.errors import ApiError


def as_chat(values: dict[str, Any], model: ServedModel, names: Mapping[str, str]) -> Chat:
    """The chat that a request of another API asks for.

    Args:
        values: a chat's body.
        model: the one served.
        names: for a chat's fields those of the other API, in which errors are told.

    Raises:
        ApiError: the request cannot be run.
    """
    try:
        chat = Chat(as_chat_body(values, names), model)
    except ApiError as error:
        raise _renamed(error, names) from None
    if chat.constraint is not None:
        param = _theirs(chat.constraint.param, names) or chat.constraint.param
        chat.constraint = replace(chat.constraint, param=param)
    return chat


def as_chat_body(values: dict[str, Any], names: Mapping[str, str]) -> ChatBody:
    """The same, only the body: what the model would be told. Raises ApiError 400."""
    try:
        return validate(values, ChatBody)
    except ApiError as error:
        raise _renamed(error, names) from None


def _renamed(error: ApiError, names: Mapping[str, str]) -> ApiError:
    """The error with the name of the field that the client knows."""
    if error.param is None:
        return error
    param = _theirs(error.param, names)
    if param is None:
        return error
    message = error.message.replace(error.param, param)
    return ApiError(error.status, message, param=param, code=error.code, retry_after_s=error.retry_after_s)


def _theirs(param: str, names: Mapping[str, str]) -> str | None:
    """The name of a chat's field, or of a part of it, in the other API; None if it is the same."""
    for own, theirs in names.items():
        if param == own or param.startswith(f"{own}."):
            return theirs + param.removeprefix(own)
    return None
