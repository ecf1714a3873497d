"""Text → a tokenizer's encoding of it; of text that is far too long, no more than shows that it is."""

import tokenizers

from engine.errors import RequestError, TooManyTokensError
from engine.tokenizer_files import is_library_failure, one_line

_LONG_TOKEN_CHARS = 8
"""Few texts have more characters for each token: only longer ones are looked at in part first."""
_CUT_TOKENS = 64
"""More than a word or an added token becomes that is cut in two."""


def encode_text(
    backend: tokenizers.Tokenizer, text: str, param: str, *, add_special_tokens: bool = False, most_tokens: int | None
) -> tokenizers.Encoding:
    """The encoding of a text.

    Args:
        backend: the tokenizer.
        text: what to encode.
        param: who is to blame in errors.
        add_special_tokens: put around it what the tokenizer wants there, such as a BOS token.
        most_tokens: refuse text that has clearly more; it then takes a few times as long as text of so many tokens,
            however long the text is. None: any number.

    Raises:
        RequestError: the text cannot be encoded.
        TooManyTokensError: it has more tokens than that.
    """
    try:
        text.encode()
        if most_tokens is not None:
            _check_length(backend, text, param, most_tokens)
        return backend.encode(text, add_special_tokens=add_special_tokens)
    except UnicodeEncodeError as error:
        found = f"character {error.start} is U+{ord(text[error.start]):04X}, half of a surrogate pair"
        raise RequestError(f"{found}; expected text that UTF-8 can write", param) from None
    except RequestError:
        raise
    except BaseException as error:
        if not is_library_failure(error):
            raise
        raise RequestError(f"text of {len(text):,} characters cannot be tokenized: {one_line(error)}", param) from None


def _check_length(backend: tokenizers.Tokenizer, text: str, param: str, most_tokens: int) -> None:
    """Raise TooManyTokensError if a beginning of the text shows that all of it has more than `most_tokens`.

    Cutting a text changes the tokens of the word at the cut, or, where there are no words, those of a few characters.
    What a beginning must have beyond `most_tokens` is far more. Each beginning is twice as long as the one before.
    """
    num_chars = _LONG_TOKEN_CHARS * most_tokens
    while num_chars < len(text):
        num_tokens = len(backend.encode(text[:num_chars], add_special_tokens=False))
        if num_tokens > most_tokens + most_tokens // 4 + _CUT_TOKENS:
            raise TooManyTokensError(
                f"text of {len(text):,} characters has {num_tokens:,} tokens in the first {num_chars:,}, "
                f"expected at most {most_tokens:,}",
                param,
            )
        num_chars *= 2
