"""One tool call, as text that comes in pieces: what the parsers of all formats share."""

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from typing import Any, NoReturn

from serve_app.openai.parsing.events import ParserEvent, ToolCallArguments, ToolCallEnd, ToolCallStart

Steps = Generator[None, None, None]
"""A parser as a program that stops, at a `yield`, when it needs more text."""
Schemas = Mapping[str, Mapping[str, Any]]
"""The functions that may be called, by name, and the JSON schemas of their arguments."""

OPENING = "<tool_call>"
CLOSING = "</tool_call>"
WHITESPACE = " \t\r\n"
MAX_HELD_CHARS = 65_536
"""Text that is held back until its meaning is clear; where that takes more, it is no call."""
MAX_NAME_CHARS = 1_024


class NoCallError(Exception):
    """The text is no call."""


class CallParser(ABC):
    """Reads one call, from after the tag that opened it.

    Text is a call from the moment that its function is clear and its arguments begin; until then it is held back, and
    if it turns out to be no call it is handed back, every character of it. A call that has started stays one: of what
    follows it takes what belongs to it, and hands back the rest.

    Args:
        index: the call's place among those of the output.
        opening: the tag that opened it.
        schemas: the functions that may be called; a call of any other is none.
    """

    def __init__(self, index: int, opening: str, schemas: Schemas) -> None:
        self.events: list[ParserEvent] = []
        """What was found and not yet fetched."""
        self.is_started = False
        self.is_ended = False
        """Whether nothing of the text that follows belongs to the call."""
        self.literal = ""
        """Once ended: the text that turned out to be no call."""
        self.rest = ""
        """Once ended: text that comes after that or after the call, to be read again as it may open something else."""
        self._index = index
        self._opening = opening
        self._schemas = schemas
        self._raw = [opening]
        self._num_raw = len(opening)
        self._is_complete = False
        self._text = ""
        self._position = 0
        self._steps = self._parse()

    def push(self, text: str, position: int) -> int:
        """Read on at a position of `text`. Returns where it stopped: the text's end, or where the call's is."""
        self._text, self._position = text, position
        try:
            next(self._steps)
        except (StopIteration, NoCallError):
            self._end()
        return self._position

    def flush(self) -> None:
        """No more text comes: a call that is not complete was cut off."""
        self._steps.close()
        self._end()

    @abstractmethod
    def _parse(self) -> Steps:
        """Read the call; ends where that does. Raises NoCallError before it has started, never afterwards."""

    def _end(self) -> None:
        self.is_ended = True
        if not self.is_started:
            self.literal = "".join(self._raw).removesuffix(self.rest)
        elif self._is_complete:
            self.events.append(ToolCallEnd(self._index))

    def _start(self, name: str) -> None:
        self.is_started = True
        self._raw.clear()
        self.events.append(ToolCallStart(self._index, name))

    def _say(self, text: str) -> None:
        """More of the arguments."""
        if text:
            self.events.append(ToolCallArguments(self._index, text))

    def _refuse(self, rest: str) -> NoReturn:
        """This is no call, as `rest` shows, the end of what was read."""
        self.rest = rest
        raise NoCallError

    def _check_name(self, name: str) -> str:
        if name not in self._schemas:
            raise NoCallError
        return name

    def _character(self) -> Generator[None, None, str]:
        """The next character."""
        while self._position >= len(self._text):
            yield
        found = self._text[self._position]
        self._position += 1
        if not self.is_started:
            self._hold(found)
        return found

    def _hold(self, text: str) -> None:
        """Keep text of what may still be no call."""
        room = MAX_HELD_CHARS - self._num_raw
        self._raw.append(text[:room])
        self._num_raw += len(text)
        if len(text) > room:
            self._position -= len(text) - room
            raise NoCallError

    def _visible(self) -> Generator[None, None, str]:
        """The next character that is no white space."""
        while (character := (yield from self._character())) in WHITESPACE:
            pass
        return character

    def _expect(self, expected: str) -> Steps:
        """One character, after any white space."""
        if (found := (yield from self._visible())) != expected:
            self._refuse(found)

    def _one_of(self, *tags: str) -> Generator[None, None, str | None]:
        """One of these tags, after any white space. None if there is none: then `rest` is what there is."""
        spaces, found = "", ""
        while found not in tags:
            found += yield from self._character()
            if found in WHITESPACE and len(spaces) < MAX_NAME_CHARS:
                spaces, found = spaces + found, ""
            elif not any(tag.startswith(found) for tag in tags):
                self.rest = spaces + found
                return None
        return found
