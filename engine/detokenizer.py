"""From token ids to text as they come: whole characters only, and nothing of a stop string."""

import codecs
from array import array
from collections.abc import Sequence

from engine.errors import RequestError
from engine.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_MAX_CHARACTER_TOKENS = 4
"""A character of UTF-8 has at most four bytes, and so comes from at most four tokens."""


class Detokenizer:
    """Text of one output, incrementally: ids in, text out, never half a character.

    The pieces do not depend on how the ids are split over calls of `push`, and their concatenation is
    `tokenizer.decode` of all ids. One exception, for tokenizers that are not byte-level: around bytes that are not
    UTF-8 the number of U+FFFD can differ, as such decoders replace characters that were already shown.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._decoder = _ByteDecoder(tokenizer) if tokenizer.is_byte_level else _WindowDecoder(tokenizer)

    def push(self, token_ids: Sequence[int]) -> str:
        """The new text that is certain. Ids the tokenizer does not know have none."""
        return self._decoder.push([token_id for token_id in token_ids if token_id not in self._skipped])

    def flush(self) -> str:
        """What `push` held back; bytes of an incomplete character as U+FFFD. To be called once, after the last id."""
        return self._decoder.flush()


class _ByteDecoder:
    """For byte-level tokenizers: the text of ids is the text of their bytes. Linear in the number of bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Sequence[int]) -> str:
        return self._utf8.decode(b"".join(map(self._tokenizer.token_bytes, token_ids)))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowDecoder:
    """For any other tokenizer: decodes a short window of ids without and with the newest, and takes the difference.

    The window begins with ids whose text is out already, because a token's text can depend on the one before it:
    SentencePiece drops the space of a text's first word.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._num_shown = 0
        """Ids at the window's beginning whose text is out."""

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join(map(self._push_one, token_ids))

    def flush(self) -> str:
        return self._take(self._decode(self._window))

    def _push_one(self, token_id: int) -> str:
        if not self._tokenizer.token_bytes(token_id):
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(_REPLACEMENT) and len(self._window) - self._num_shown < _MAX_CHARACTER_TOKENS:
            return ""
        return self._take(text)

    def _take(self, text: str) -> str:
        """Of the window's text the part of the pending ids, which become the new beginning of the window."""
        before, pending = self._decode(self._window[: self._num_shown]), self._window[self._num_shown :]
        self._window, self._num_shown = pending, len(pending)
        # A run of bytes that turns out to be no UTF-8 changes the text of its beginning, which is out already.
        return text[len(before) :] if text.startswith(before) else self._decode(pending)

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)


class StopStrings:
    """Finds the first stop string in text that comes in pieces, and holds back what could still become one.

    The stop string that is complete first ends the text; of several that are complete with the same character, the
    longest. So a stop is known as soon as its last character is, and does not depend on how the text is split over
    calls. Held back is exactly the longest end of the text that begins a stop string. Time is linear in the text for
    each stop string, and memory in the stop strings (Knuth, Morris and Pratt, doi:10.1137/0206024).

    Args:
        stops: texts that end the output.
        include_in_output: end the output after the stop string, not before it.

    Raises:
        RequestError: a stop string is empty; `param` is "stop".
    """

    def __init__(self, stops: Sequence[str], include_in_output: bool = False) -> None:
        if "" in stops:
            raise RequestError("stop has an empty string, expected non-empty ones", "stop")
        self._searches = [_Search(stop) for stop in stops]
        self._first_characters = frozenset(stop[0] for stop in stops)
        self._include_in_output = include_in_output
        self._held: tuple[str, int] = ("", 0)
        """A stop string, and how many characters of its beginning are held back."""
        self._matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that is certain now, and the stop string that ended the output if one did; then nothing follows."""
        if self._matched is not None:
            return "", self._matched
        if self._held[1] == 0 and self._first_characters.isdisjoint(text):
            return text, None
        found = [(end, -len(search.stop), search.stop) for search in self._searches if (end := search.push(text))]
        if found:
            end, _, self._matched = min(found)
            if not self._include_in_output:
                end -= len(self._matched)
            return self._cut(text, end), self._matched
        stop, num_held = max(((search.stop, search.num_matched) for search in self._searches), key=lambda item: item[1])
        certain = self._cut(text, len(text) - num_held)
        self._held = (stop, num_held)
        return certain, None

    def flush(self) -> str:
        """What is held back, when no more text comes. To be called once, after the last `push`."""
        stop, num_held = self._held
        return "" if self._matched is not None else stop[:num_held]

    def _cut(self, text: str, end: int) -> str:
        """Held text and `text` up to index `end` of `text`; negative indices are in the held text.

        The held text is never put together with the new one: many small pieces after a long one would copy it often.
        """
        stop, num_held = self._held
        return stop[:num_held] + text[:end] if end > 0 else stop[: num_held + end]


class _Search:
    """Looks for one string in text that comes in pieces."""

    __slots__ = ("stop", "num_matched", "_borders")

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.num_matched = 0
        """Length of the longest end of the text so far that begins `stop`."""
        self._borders = array("i", [0])
        """At i the length of the longest proper end of `stop[:i + 1]` that begins `stop`."""
        length = 0
        for character in stop[1:]:
            length = self._extend(length, character)
            self._borders.append(length)

    def push(self, text: str) -> int | None:
        """How many characters of `text` it takes to complete the string, or None if they all do not."""
        length = self.num_matched
        for position, character in enumerate(text):
            length = self._extend(length, character)
            if length == len(self.stop):
                return position + 1
        self.num_matched = length
        return None

    def _extend(self, length: int, character: str) -> int:
        """Length of the longest end of `stop[:length] + character` that begins `stop`."""
        stop, borders = self.stop, self._borders
        while length and stop[length] != character:
            length = borders[length - 1]
        return length + 1 if stop[length] == character else length
