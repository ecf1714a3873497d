"""Log-probabilities in OpenAI's shapes, with the true bytes of each token."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from engine.detokenizer import Detokenizer
from engine.request import TokenLogprobs
from engine.tokenizer import Tokenizer

IMPOSSIBLE = -9999.0
"""Stands for minus infinity, which JSON cannot write."""


def chat_logprobs(entries: Sequence[TokenLogprobs], tokenizer: Tokenizer, as_ids: bool = False) -> dict[str, Any]:
    """The `logprobs` of a chat choice. `as_ids`: see `token_name`."""
    content = [
        _chat_entry(tokenizer, entry.token_id, entry.logprob, as_ids)
        | {
            "top_logprobs": [
                _chat_entry(tokenizer, token_id, logprob, as_ids)
                for token_id, logprob in zip(entry.top_token_ids, entry.top_logprobs, strict=True)
            ]
        }
        for entry in entries
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """The `logprobs` of a completion choice, which count text offsets from the choice's beginning.

    A token that is part of a character begins where that character does. `as_ids`: see `token_name`.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, as_ids: bool = False) -> None:
        self._name = partial(token_name, tokenizer, as_id=as_ids)
        self._offset = 0
        self._prompt_text = Detokenizer(tokenizer, skip_special_tokens=False)
        self._output_text = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)

    def add_prompt(self, first_token_id: int, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """An echoed prompt; its first token has no log-probability. To be called before `add`."""
        found = _empty()
        found["tokens"].append(self._name(first_token_id))
        found["token_logprobs"].append(None)
        found["top_logprobs"].append(None)
        found["text_offset"].append(0)
        self._offset += len(self._prompt_text.push([first_token_id]))
        self._extend(found, entries, self._prompt_text)
        self._offset += len(self._prompt_text.flush())
        return found

    def add(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """The next tokens of the output."""
        found = _empty()
        self._extend(found, entries, self._output_text)
        return found

    def _extend(self, found: dict[str, list[Any]], entries: Sequence[TokenLogprobs], text: Detokenizer) -> None:
        for entry in entries:
            token = self._name(entry.token_id)
            top = zip(entry.top_token_ids, entry.top_logprobs, strict=True)
            found["tokens"].append(token)
            found["token_logprobs"].append(_finite(entry.logprob))
            # The token itself is always among them, with the same float.
            found["top_logprobs"].append(
                {self._name(other): _finite(logprob) for other, logprob in top} | {token: _finite(entry.logprob)}
            )
            found["text_offset"].append(self._offset)
            self._offset += len(text.push([entry.token_id]))


def prompt_logprobs(entries: Sequence[TokenLogprobs], tokenizer: Tokenizer) -> list[dict[str, Any] | None]:
    """The `prompt_logprobs` of a response, as vLLM has them: by token id, for each prompt token but the first."""
    return [None, *(_prompt_entry(entry, tokenizer) for entry in entries)]


def token_name(tokenizer: Tokenizer, token_id: int, *, as_id: bool = False) -> str:
    """A token's text, or `bytes:\\xe2\\x80` where that is no whole characters; so different tokens have other names.

    Args:
        as_id: `token_id:123` instead.
    """
    if as_id:
        return f"token_id:{token_id}"
    token = tokenizer.token_bytes(token_id)
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def _prompt_entry(entry: TokenLogprobs, tokenizer: Tokenizer) -> dict[str, Any]:
    found = {
        str(token_id): {"logprob": _finite(logprob), "rank": rank, "decoded_token": token_name(tokenizer, token_id)}
        for rank, (token_id, logprob) in enumerate(zip(entry.top_token_ids, entry.top_logprobs, strict=True), 1)
    }
    name = token_name(tokenizer, entry.token_id)
    found[str(entry.token_id)] = {"logprob": _finite(entry.logprob), "rank": entry.rank, "decoded_token": name}
    return found


def _chat_entry(tokenizer: Tokenizer, token_id: int, logprob: float, as_ids: bool) -> dict[str, Any]:
    token = tokenizer.token_bytes(token_id)
    name = token_name(tokenizer, token_id, as_id=True) if as_ids else token.decode("utf-8", errors="replace")
    return {"token": name, "logprob": _finite(logprob), "bytes": list(token)}


def _finite(logprob: float) -> float:
    return max(logprob, IMPOSSIBLE)


def _empty() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
