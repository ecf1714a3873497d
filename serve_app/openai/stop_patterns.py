"""Regular expressions that end an output, found in text as it comes, in time linear in it whatever they are.

Stop strings beside them are searched for here, too: what ends an output is what is complete first.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

# The standard library's parser has no public name; its trees are what `re` itself compiles.
from re import _compiler, _constants, _parser  # type: ignore[attr-defined]
from typing import Any

from engine.errors import RequestError

MAX_SIZE = 256
"""Steps of all expressions of a request together: what one character of the output can cost at most."""
MAX_MATCH_CHARS = 1_024
"""A match is no longer, so that no more text is ever held back."""
_NOTHING: frozenset[int] = frozenset()
_UNSUPPORTED = {
    _constants.AT: "an anchor",
    _constants.ASSERT: "looking ahead or behind",
    _constants.ASSERT_NOT: "looking ahead or behind",
    _constants.GROUPREF: "a back-reference",
    _constants.GROUPREF_EXISTS: "a back-reference",
}


class _UnsupportedError(Exception):
    """A part of an expression that no place of a character stands for."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of an expression: the places of the characters that it can begin and end with."""

    first: frozenset[int] = _NOTHING
    last: frozenset[int] = _NOTHING
    is_optional: bool = True
    """Whether it matches the empty text."""


class StopExpressions:
    """The stop strings and expressions of a request, as one automaton (Glushkov's: a place for each character).

    Expressions are those of Python's `re`, without what looks at more than the match: anchors, look-around,
    back-references; and without atomic groups.

    Args:
        stops: texts.
        patterns: regular expressions.

    Raises:
        RequestError: an expression is invalid, matches the empty text, or is too large; `param` is "stop_regex".
    """

    def __init__(self, stops: Sequence[str], patterns: Sequence[str]) -> None:
        self.accepts: list[Callable[[str], object]] = []
        """Whether a character can be at a place."""
        self.following: list[dict[int, None]] = []
        """Places that may come after a place."""
        self.ends: dict[int, str] = {}
        """The stop string or expression that is complete with a place."""
        self._size = 0
        parts = [(stop, self._sequence(map(self._character, stop))) for stop in stops]
        parts += [(pattern, self._expression(pattern)) for pattern in patterns]
        for source, part in parts:
            for place in part.last:
                self.ends.setdefault(place, source)
        self.first: tuple[int, ...] = tuple(place for _, part in parts for place in sorted(part.first))
        """Places that a match can begin with."""

    def _expression(self, pattern: str) -> _Part:
        try:
            tree = _parser.parse(pattern)
            part = self._sequence(self._part(node, tree.state.flags) for node in tree)
        except (re.error, OverflowError) as error:
            raise _wrong(pattern, str(error)[:100]) from None
        except RecursionError:
            raise _wrong(pattern, "it is nested too deeply") from None
        except _UnsupportedError as error:
            raise _wrong(pattern, f"{error} is not supported; leave it out") from None
        if part.is_optional:
            raise _wrong(pattern, "it matches the empty text; expected at least one character")
        return part

    def _part(self, node: tuple[Any, Any], flags: int) -> _Part:
        """The part for a node of the parser's tree."""
        self._grow(1)
        kind, value = node
        if kind is _constants.LITERAL and not flags & re.IGNORECASE:
            return self._character(chr(value))
        if kind in (_constants.LITERAL, _constants.NOT_LITERAL, _constants.ANY, _constants.IN):
            one = _compiler.compile(_parser.SubPattern(_parser.State(), [node]), flags)
            return self._place(one.fullmatch)
        if kind is _constants.BRANCH:
            return _either([self._sequence(self._part(each, flags) for each in branch) for branch in value[1]])
        if kind is _constants.SUBPATTERN:
            _, added, removed, inner = value
            return self._sequence(self._part(each, (flags | added) & ~removed) for each in inner)
        if kind in (_constants.MAX_REPEAT, _constants.MIN_REPEAT):
            return self._repeat(value, flags)
        raise _UnsupportedError(_UNSUPPORTED.get(kind, "an atomic group"))

    def _repeat(self, value: tuple[int, int, Any], flags: int) -> _Part:
        least, most, inner = value

        def once() -> _Part:
            self._grow(1)
            return self._sequence(self._part(each, flags) for each in inner)

        needed = [once() for _ in range(least)]
        if most is _constants.MAXREPEAT:
            again = needed.pop() if needed else once()
            self._join(again.last, again.first)
            return self._sequence([*needed, again if least else _either([again, _Part()])])
        return self._sequence([*needed, *(_either([once(), _Part()]) for _ in range(most - least))])

    def _sequence(self, parts: Iterable[_Part]) -> _Part:
        whole = _Part()
        for part in parts:
            self._join(whole.last, part.first)
            whole = _Part(
                first=whole.first | part.first if whole.is_optional else whole.first,
                last=whole.last | part.last if part.is_optional else part.last,
                is_optional=whole.is_optional and part.is_optional,
            )
        return whole

    def _character(self, character: str) -> _Part:
        return self._place(character.__eq__)

    def _place(self, accepts: Callable[[str], object]) -> _Part:
        self._grow(1)
        self.accepts.append(accepts)
        self.following.append({})
        place = frozenset([len(self.accepts) - 1])
        return _Part(place, place, is_optional=False)

    def _join(self, before: Iterable[int], after: frozenset[int]) -> None:
        for place in before:
            self._grow(len(after))
            self.following[place].update(dict.fromkeys(sorted(after)))

    def _grow(self, size: int) -> None:
        self._size += size
        if self._size > MAX_SIZE:
            raise RequestError(f"stop_regex and stop are more than {MAX_SIZE} steps; expected less", "stop_regex")


class StopPatterns:
    """Finds the first match in one output, which comes in pieces, and holds back what could still become one.

    The match that is complete first ends the text; of several that are complete with the same character, the one that
    began first. So `\\d+` ends it at the first digit, and how the text is split over calls changes nothing.

    Args:
        expressions: what to look for.
        include_in_output: end the output after the match, not before it.
    """

    def __init__(self, expressions: StopExpressions, include_in_output: bool = False) -> None:
        self._expressions = expressions
        self._include_in_output = include_in_output
        self._waiting: dict[int, int] = {}
        """Places that the next character may be at, and where the match began; earliest first."""
        self._held = ""
        self._num_read = 0
        """Characters of all text so far, where places in it are counted from."""
        self._matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that is certain now, and what ended the output if something did; then nothing follows."""
        if self._matched is not None:
            return "", self._matched
        known, offset = self._held + text, self._num_read - len(self._held)
        for character in text:
            start = self._step(character)
            self._num_read += 1
            if start is not None:
                self._held = ""
                return known[: (self._num_read if self._include_in_output else start) - offset], self._matched
        certain = next(iter(self._waiting.values()), self._num_read) - offset
        self._held = known[certain:]
        return known[:certain], None

    def flush(self) -> str:
        """What is held back, when no more text comes. To be called once, after the last `push`."""
        return self._held

    def _step(self, character: str) -> int | None:
        """One more character. Returns where the match began that is complete with it, if one is."""
        expressions, oldest = self._expressions, self._num_read - MAX_MATCH_CHARS
        waiting: dict[int, int] = {}
        begun = self._waiting
        for place in expressions.first:
            begun.setdefault(place, self._num_read)
        for place, start in begun.items():
            if start > oldest and expressions.accepts[place](character):
                if place in expressions.ends:
                    self._matched = expressions.ends[place]
                    return start
                for following in expressions.following[place]:
                    waiting.setdefault(following, start)
        self._waiting = waiting
        return None


def _either(parts: Sequence[_Part]) -> _Part:
    return _Part(
        _NOTHING.union(*(part.first for part in parts)),
        _NOTHING.union(*(part.last for part in parts)),
        any(part.is_optional for part in parts),
    )


def _wrong(pattern: str, why: str) -> RequestError:
    return RequestError(f"stop_regex has {pattern[:64]!r}: {why}", "stop_regex")
