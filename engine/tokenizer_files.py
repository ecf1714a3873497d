"""What a checkpoint folder says about its tokenizer. Every reader raises CheckpointError, which names the file."""

import json
from pathlib import Path
from typing import Any

import tokenizers

from engine.chat_template import ChatTemplate
from engine.errors import CheckpointError

_SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_backend(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer of `tokenizer.json`."""
    file = path / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(f"{path} has no tokenizer.json; expected a Hugging Face checkpoint folder")
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except BaseException as error:
        if not is_library_failure(error):
            raise
        raise CheckpointError(f"{file}: not a tokenizer: {one_line(error)}") from None


def read_chat_template(path: Path) -> ChatTemplate | None:
    """The template of `chat_template.jinja`, or else of `tokenizer_config.json`; None if both have none."""
    file, config_file = path / "chat_template.jinja", path / "tokenizer_config.json"
    special_tokens = read_special_tokens(config_file)
    try:
        return ChatTemplate(file.read_text(encoding="utf-8"), special_tokens, str(file))
    except FileNotFoundError:
        source = read_json(config_file).get("chat_template")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: {one_line(error)}") from None
    if isinstance(source, list):  # several, by name
        named = (item for item in source if isinstance(item, dict) and item.get("name") == "default")
        source = next(named, {}).get("template")
    if source is None:
        return None
    if not isinstance(source, str):
        raise CheckpointError(f"{config_file}: chat_template is a {type(source).__name__}, expected text")
    return ChatTemplate(source, special_tokens, str(config_file))


def read_special_tokens(file: Path) -> dict[str, str]:
    """`bos_token` and the like, of tokenizer_config.json: texts, or objects with the text as their `content`."""
    config, texts = read_json(file), {}
    for name in _SPECIAL_TOKEN_NAMES:
        token = config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            texts[name] = text
        elif token is not None:
            raise CheckpointError(f"{file}: {name} is {repr(token)[:80]}, expected text")
    return texts


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not a JSON object ({one_line(error)})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: holds a {type(value).__name__}, expected a JSON object")
    return value


def is_library_failure(error: BaseException) -> bool:
    """Whether to report `error` as a failure of the tokenizers library, not to pass it on as, say, a key press.

    A panic inside the library, such as its regex engine giving up after millions of spaces, is no `Exception`.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def one_line(error: BaseException) -> str:
    """What a library's error says, for a message of our own: without line breaks, and at most 300 characters."""
    return " ".join(str(error).split())[:300]
