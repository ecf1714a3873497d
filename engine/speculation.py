"""Speculative decoding by prompt lookup: what followed the last few tokens earlier is guessed to follow them again.

A step computes the guesses beside the token before them, and samples after each as if there were no guesses. What is
sampled does not depend on a guess, only whether a guess was right does; so tokens are those of steps without guesses,
and a run of right ones saves as many steps (arXiv:2302.01318 for models as guessers; here no second model is needed).
"""

from array import array
from collections.abc import Sequence

LONGEST_MATCH = 4
SHORTEST_MATCH = 2
"""Tokens that must repeat: single ones repeat by chance."""
LOOK_BACK = 8192
"""How many tokens are searched."""
_ITEM_BYTES = array("i").itemsize


def look_up(token_ids: Sequence[int], num_guesses: int) -> list[int]:
    """Up to `num_guesses` tokens that followed the last ones when these came before; the longest, latest match wins."""
    recent = array("i", token_ids[-LOOK_BACK:])
    text = recent.tobytes()
    for length in range(min(LONGEST_MATCH, len(recent) - 1), SHORTEST_MATCH - 1, -1):
        place = _last_occurrence(text, text[-length * _ITEM_BYTES :])
        if place is not None:
            return recent[place + length : place + length + num_guesses].tolist()
    return []


def _last_occurrence(text: bytes, pattern: bytes) -> int | None:
    """Index of the token where the pattern last begins before the end of the text."""
    end = len(text) - 1  # not where it stands itself
    while (found := text.rfind(pattern, 0, end)) >= 0:
        if found % _ITEM_BYTES == 0:
            return found // _ITEM_BYTES
        end = found + len(pattern) - 1
    return None
