"""What a parser finds → the content blocks of a message, and the events that tell of them as they grow."""

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from serve_app.openai.endpoint import new_id
from serve_app.openai.parsing.events import (
    ContentText,
    ParserEvent,
    ReasoningText,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)

_DELTAS = {
    "text": ("text_delta", "text"),
    "thinking": ("thinking_delta", "thinking"),
    "tool_use": ("input_json_delta", "partial_json"),
}
"""Of a block's type: what its deltas are called, and where their text is."""


class Content:
    """The blocks, which are the same however the output came."""

    def __init__(self) -> None:
        self.blocks: list[dict[str, Any]] = []
        """Complete blocks."""
        self._open: dict[str, Any] | None = None
        self._texts: list[str] = []
        """Of the open block."""

    def add(self, events: Iterable[ParserEvent]) -> Iterator[dict[str, Any]]:
        """More of the output; yields the events of a stream."""
        for event in events:
            match event:
                case ReasoningText(text):
                    yield from self._say({"type": "thinking", "thinking": "", "signature": ""}, text)
                case ContentText(text):
                    yield from self._say({"type": "text", "text": ""}, text)
                case ToolCallStart(_, name):
                    yield from self._begin({"type": "tool_use", "id": new_id("toolu"), "name": name, "input": {}})
                case ToolCallArguments(_, text):
                    yield from self._more(text)
                case ToolCallEnd():
                    yield from self.end()

    def end(self) -> Iterator[dict[str, Any]]:
        """The end of the open block, if there is one."""
        block, self._open = self._open, None
        if block is None:
            return
        text = "".join(self._texts)
        if block["type"] == "tool_use":
            block["input"] = _input(text)
        else:
            block[block["type"]] = text
        yield {"type": "content_block_stop", "index": len(self.blocks)}
        self.blocks.append(block)

    def _say(self, block: dict[str, Any], text: str) -> Iterator[dict[str, Any]]:
        if self._open is None or self._open["type"] != block["type"]:
            yield from self._begin(block)
        yield from self._more(text)

    def _begin(self, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self.end()
        self._open, self._texts = block, []
        yield {"type": "content_block_start", "index": len(self.blocks), "content_block": dict(block)}

    def _more(self, text: str) -> Iterator[dict[str, Any]]:
        if self._open is not None:
            self._texts.append(text)
            kind, name = _DELTAS[self._open["type"]]
            yield {"type": "content_block_delta", "index": len(self.blocks), "delta": {"type": kind, name: text}}


def _input(arguments: str) -> dict[str, Any]:
    """The arguments of a call. Those that are no JSON object, as models write at times, are still told."""
    try:
        return msgspec.json.decode(arguments or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        return {"INVALID_JSON": arguments}
