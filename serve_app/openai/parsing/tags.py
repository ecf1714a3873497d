"""Tags in text that comes in pieces."""

from collections.abc import Sequence


def num_partial(text: str, tags: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of one of `tags`, each of which begins with `<`."""
    longest = max(map(len, tags), default=1) - 1
    start = max(len(text) - longest, 0)
    while (start := text.find("<", start)) >= 0:
        if any(tag.startswith(text[start:]) for tag in tags):
            return len(text) - start
        start += 1
    return 0
