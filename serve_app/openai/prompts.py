"""Prompts of completions: text or ids → the ids that the model sees."""

from engine.errors import RequestError
from serve_app.openai.completion_protocol import CompletionBody
from serve_app.openai.endpoint import ServedModel, not_encoded
from serve_app.openai.errors import bad_request
from serve_app.openai.protocol import GenerationBody

FILL_PREFIX, FILL_SUFFIX, FILL_MIDDLE = "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"
"""How Qwen's models are told to fill in: prefix, the text before, suffix, the text after, middle; then they write."""
FILL_ENDS = (FILL_PREFIX, FILL_SUFFIX, FILL_MIDDLE, "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")
"""With any of these, something else begins than what was to be filled in."""


def read_prompt(prompt: str | list[int], body: CompletionBody, max_tokens: int | None, model: ServedModel) -> list[int]:
    """The ids of one of the body's prompts, which may be too many for the model's context.

    Raises:
        ApiError: 400, the prompt cannot be tokenized, is empty, or the model knows no filling in.
    """
    most = model.most_prompt_tokens if body.truncate_prompt_tokens is None else None
    token_ids = _encode(prompt, body.add_special_tokens, "prompt", model, most)
    if body.suffix is not None:
        # A fill begins with its own token: text before that, such as a BOS token, has no place in it.
        before = _encode(prompt, False, "prompt", model, most)
        return _fill_in_the_middle(before, _encode(body.suffix, False, "suffix", model, most), model)
    if not token_ids:
        raise bad_request("the prompt is empty, expected at least one token", "prompt")
    return truncate(token_ids, body, max_tokens, model)


def truncate(token_ids: list[int], body: GenerationBody, max_tokens: int | None, model: ServedModel) -> list[int]:
    """What `truncate_prompt_tokens` leaves of a prompt; -1 leaves room for `max_tokens`, and for one without it."""
    most = body.truncate_prompt_tokens
    if most is None:
        return token_ids
    if most == -1:
        most = max(model.info.max_model_len - max(max_tokens or 1, 1), 1)
    if len(token_ids) <= most:
        return token_ids
    return token_ids[-most:] if body.truncation_side == "left" else token_ids[:most]


def fill_end_ids(model: ServedModel) -> list[int]:
    """Ids that end what is filled in, besides the model's own."""
    return [token_id for token in FILL_ENDS if (token_id := model.tokenizer.token_to_id(token)) is not None]


def _fill_in_the_middle(before: list[int], after: list[int], model: ServedModel) -> list[int]:
    marks = [model.tokenizer.token_to_id(token) for token in (FILL_PREFIX, FILL_SUFFIX, FILL_MIDDLE)]
    found = [mark for mark in marks if mark is not None]
    if len(found) < len(marks):
        message = f"this model's tokenizer has no {FILL_PREFIX}, {FILL_SUFFIX} and {FILL_MIDDLE}; leave suffix out"
        raise bad_request(message, "suffix", "unsupported_parameter")
    prefix, suffix, middle = found
    return [prefix, *before, suffix, *after, middle]


def _encode(
    prompt: str | list[int], add_special_tokens: bool, param: str, model: ServedModel, most: int | None
) -> list[int]:
    if not isinstance(prompt, str):
        return prompt
    try:
        return model.tokenizer.encode(prompt, add_special_tokens=add_special_tokens, most_tokens=most)
    except RequestError as error:
        raise not_encoded(error, model, param) from None
