"""What a parser finds in a model's output, in order. An endpoint writes each in the shapes of its own API.

The texts of one channel, put together, do not depend on how the output was cut into pieces.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReasoningText:
    """More of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class ContentText:
    """More of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A call begins. Calls come one after the other, never interleaved."""

    index: int
    """0 for an output's first call."""
    name: str
    """One of the functions that were offered."""


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """More of the arguments: JSON text. Together they are an object, unless the model wrote no JSON or was cut off."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallEnd:
    """The call is complete. A call that was cut off has no end."""

    index: int


ParserEvent = ReasoningText | ContentText | ToolCallStart | ToolCallArguments | ToolCallEnd
