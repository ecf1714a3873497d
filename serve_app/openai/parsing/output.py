"""A model's whole output: reasoning, content and tool calls, one after the other or within one another."""

import re
from enum import StrEnum

from serve_app.openai.parsing.call import MAX_NAME_CHARS, WHITESPACE, CallParser, Schemas
from serve_app.openai.parsing.events import ContentText, ParserEvent, ReasoningText, ToolCallEnd, ToolCallStart
from serve_app.openai.parsing.formats import ToolFormat
from serve_app.openai.parsing.tags import num_partial

THINK = "<think>"
END_OF_THINK = "</think>"
_MAX_SPACES = MAX_NAME_CHARS
"""More white space than this before a tag is text."""
_PIECE_CHARS = 4_096
"""Text is read in pieces of this size, so that time is linear in it however it comes."""


class Channel(StrEnum):
    """Where the text of an output goes."""

    UNDECIDED = "undecided"
    """At the beginning of an output that may begin with `<think>`."""
    REASONING = "reasoning"
    CONTENT = "content"


class OutputParser:
    """Reads one output. What it finds does not depend on how the text is cut.

    The line breaks that the model's format puts around its tags are part of neither reasoning nor content. All else
    that is not a well-formed block or call is text, down to the last character. Memory is bounded, time linear.

    Args:
        start: the channel that the rendered prompt leaves open.
        tool_format: how calls are written; None where there are no tools.
        schemas: the functions that may be called.
    """

    def __init__(self, start: Channel, tool_format: ToolFormat | None = None, schemas: Schemas | None = None) -> None:
        self.channel = start
        self.num_calls = 0
        """Calls that are complete."""
        self._format = tool_format
        self._schemas = schemas or {}
        self._call: CallParser | None = None
        self._num_started = 0
        self._held = ""
        """What may be the beginning of a tag."""
        self._spaces = ""
        """White space that is text only if more text follows."""
        self._skips_breaks = start is Channel.REASONING
        """Whether line breaks are not text here, right after a tag."""
        self._follows_call = False
        self._events: list[ParserEvent] = []
        openings = () if tool_format is None else tool_format.openings
        self._tags = {
            Channel.UNDECIDED: (THINK, *openings),
            Channel.REASONING: (END_OF_THINK, *openings),
            Channel.CONTENT: openings,
        }
        self._patterns = {channel: re.compile("|".join(tags) or "(?!)") for channel, tags in self._tags.items()}

    @property
    def is_reasoning(self) -> bool:
        """Whether what comes next is reasoning, as far as known."""
        return self.channel is Channel.REASONING and self._call is None

    def push(self, text: str) -> list[ParserEvent]:
        """What is certain now."""
        if "<" not in text and not self._held and self._call is None:  # no tag near, as nearly always
            self._say(text)
            return self._fetch()
        for start in range(0, len(text), _PIECE_CHARS):
            self._read(self._held + text[start : start + _PIECE_CHARS])
        return self._fetch()

    def flush(self) -> list[ParserEvent]:
        """What was held back, when no more text comes."""
        call, self._call = self._call, None
        if call is not None:
            call.flush()
            self._take_over(call)
            self._say(call.literal)
        self._say(self._held)
        if not self._follows_call:
            self._emit(self._spaces)
        self._held = self._spaces = ""
        return self._fetch()

    def _fetch(self) -> list[ParserEvent]:
        events, self._events = self._events, []
        return events

    def _read(self, text: str) -> None:
        position, self._held = 0, ""
        while position < len(text):
            if self._call is not None:
                position = self._call.push(text, position)
                self._take_over(self._call)
                if self._call.is_ended:
                    call, self._call = self._call, None
                    self._say(call.literal)
                    text, position = call.rest + text[position:], 0
                continue
            tag = self._patterns[self.channel].search(text, position)
            if tag is None:
                end = len(text) - num_partial(text[position:], self._tags[self.channel])
                self._say(text[position:end])
                self._held = text[end:]
                return
            self._say(text[position : tag.start()])
            position = tag.end()
            self._meet(tag[0])

    def _meet(self, tag: str) -> None:
        if tag == THINK and self.channel is not Channel.UNDECIDED:
            self._say(tag)  # text came before it
        elif tag in (THINK, END_OF_THINK):
            self.channel = Channel.REASONING if tag == THINK else Channel.CONTENT
            self._spaces, self._skips_breaks = "", True
        elif self._format is not None:
            self._call = self._format.parser(self._num_started, tag, self._schemas)

    def _take_over(self, call: CallParser) -> None:
        """What a call has found."""
        for event in call.events:
            if isinstance(event, ToolCallStart):
                self._leave_undecided()
                self._num_started += 1
                self._spaces, self._skips_breaks = "", False
            elif isinstance(event, ToolCallEnd):
                self.num_calls += 1
                self._follows_call = True
        self._events += call.events
        call.events = []

    def _say(self, text: str) -> None:
        """More text. White space at its end waits for what follows, where that may be a tag."""
        if self._skips_breaks:
            text = text.lstrip("\n")
        if not text:
            return
        self._skips_breaks = False
        waits = self.channel is not Channel.CONTENT or self._format is not None
        visible = text.rstrip(WHITESPACE) if waits else text
        if visible:
            self._emit(self._spaces + visible)
            self._spaces = ""
        self._spaces += text[len(visible) :]
        if len(self._spaces) > _MAX_SPACES:
            self._emit(self._spaces[:-_MAX_SPACES])
            self._spaces = self._spaces[-_MAX_SPACES:]

    def _emit(self, text: str) -> None:
        if text:
            self._leave_undecided()
            self._follows_call = False
            self._events.append(ReasoningText(text) if self.channel is Channel.REASONING else ContentText(text))

    def _leave_undecided(self) -> None:
        if self.channel is Channel.UNDECIDED:
            self.channel = Channel.CONTENT
