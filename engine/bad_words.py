"""Words that must not be in an output, as sequences of token ids."""

from collections.abc import Iterable

from engine.errors import RequestError
from engine.tokenizer import Tokenizer


def bad_word_ids(tokenizer: Tokenizer, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
    """For `SamplingParams.bad_word_ids`: each word as it is tokenized alone, at a text's beginning and after a space.

    A word that is part of a longer one, or comes out in other tokens than these, is not recognized.

    Raises:
        RequestError: a word has no tokens or cannot be encoded; `param` is "bad_words".
    """
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = word.lstrip()
        for text in (word, bare, f" {bare}") if bare else (word,):
            try:
                token_ids = tuple(tokenizer.encode(text))
            except RequestError as error:
                raise RequestError(str(error), "bad_words") from None
            if not token_ids:
                raise RequestError(f"bad_words has {word[:40]!r}, which has no tokens", "bad_words")
            found[token_ids] = None
    return tuple(found)
