"""Which bytes each token of a vocabulary stands for."""

import json
import re
from typing import Any

import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes(dict[int, bytes]):
    """Token id to the bytes of that token, part of a character at times; b"" for ids that the tokenizer does not know.

    Filled as ids are asked for, from the vocabulary and by the steps of the tokenizer's decoder. Byte-level
    vocabularies write each byte as one printable character, others write a space as `▁` and bytes that have no token as
    `<0x0A>`.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        super().__init__({id_: token.content.encode() for id_, token in backend.get_added_tokens_decoder().items()})
        self._backend = backend
        steps = _decoder_steps(backend)
        kinds = {step["type"] for step in steps}
        self.is_byte_level = "ByteLevel" in kinds and kinds <= {"ByteLevel", "Fuse"}
        """Whether the bytes of a sequence of tokens are those of its tokens, one after the other."""
        self._alphabet = _byte_alphabet() if "ByteLevel" in kinds else None
        self._has_byte_tokens = "ByteFallback" in kinds
        self._replacements = [pair for step in steps if (pair := _replacement(step)) is not None]

    def __missing__(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        if token is None:
            return b""
        # Two threads may both come here; they store the same.
        self[token_id] = found = self._decode(token)
        return found

    def _decode(self, token: str) -> bytes:
        if self._alphabet is not None and all(character in self._alphabet for character in token):
            return bytes(self._alphabet[character] for character in token)
        if self._has_byte_tokens and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(match[1])
        for old, new in self._replacements:
            token = token.replace(old, new)
        return token.encode()


def _decoder_steps(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    """The decoder as in tokenizer.json, nested sequences laid out flat."""
    if backend.decoder is None:
        return []
    pending, steps = [json.loads(backend.decoder.__getstate__())], []
    while pending:
        step = pending.pop()
        if step["type"] == "Sequence":
            pending.extend(reversed(step["decoders"]))
        else:
            steps.append(step)
    return steps


def _replacement(step: dict[str, Any]) -> tuple[str, str] | None:
    """What a decoder step replaces inside tokens, and by what."""
    if step["type"] == "Metaspace":
        return step["replacement"], " "
    if step["type"] == "Replace" and "String" in step["pattern"]:
        return step["pattern"]["String"], step["content"]
    return None


def _byte_alphabet() -> dict[str, int]:
    """Character to byte, as GPT-2 defined it: printable Latin-1 stands for itself, the other bytes follow from U+0100.

    https://github.com/openai/gpt-2/blob/master/src/encoder.py, `bytes_to_unicode`
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
