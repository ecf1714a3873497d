"""Which format a model's tool calls have: its chat template, which shows the model how to write them, says so."""

from dataclasses import dataclass

from serve_app.openai.parsing.call import OPENING, CallParser
from serve_app.openai.parsing.hermes import HermesCall
from serve_app.openai.parsing.qwen_coder import FUNCTION, QwenCoderCall


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """A way to write tool calls."""

    name: str
    openings: tuple[str, ...]
    """Tags, any of which opens a call."""
    parser: type[CallParser]
    takes_objects: bool
    """Whether its chat templates want the arguments of earlier calls as objects, not as JSON text."""


HERMES = ToolFormat("hermes", (OPENING,), HermesCall, takes_objects=False)
QWEN_CODER = ToolFormat("qwen_coder", (OPENING, FUNCTION), QwenCoderCall, takes_objects=True)


def tool_format(chat_template: str | None) -> ToolFormat | None:
    """The format that a chat template (its Jinja text) teaches; None if that is none of those known here."""
    if chat_template is None:
        return None
    if FUNCTION in chat_template:
        return QWEN_CODER
    return HERMES if OPENING in chat_template else None
