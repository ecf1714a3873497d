"""What a parser finds → the items of a response, and the events that tell of them as they grow."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

from serve_app.openai.endpoint import new_id
from serve_app.openai.parsing.events import (
    ContentText,
    ParserEvent,
    ReasoningText,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)

Event = tuple[str, dict[str, Any]]
"""An event's name, and its fields."""


class ResponseOutput:
    """The output items, which are the same however the output came."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        """Complete items."""
        self._open: _Item | None = None

    def add(self, events: Iterable[ParserEvent]) -> Iterator[Event]:
        """More of the output."""
        for event in events:
            match event:
                case ReasoningText(text):
                    yield from self._say(_ReasoningItem, text)
                case ContentText(text):
                    yield from self._say(_MessageItem, text)
                case ToolCallStart(_, name):
                    yield from self._begin(_CallItem(len(self.items) + (self._open is not None), name))
                case ToolCallArguments(_, text):
                    if self._open is not None:
                        yield self._open.say(text)
                case ToolCallEnd():
                    yield from self._close("completed")

    def end(self, is_cut_off: bool) -> Iterator[Event]:
        """The end of the output."""
        is_open_call = isinstance(self._open, _CallItem)
        yield from self._close("incomplete" if is_cut_off or is_open_call else "completed")

    def _say(self, kind: "type[_ReasoningItem | _MessageItem]", text: str) -> Iterator[Event]:
        if not isinstance(self._open, kind):
            yield from self._begin(kind(len(self.items) + (self._open is not None)))
        if self._open is not None:
            yield self._open.say(text)

    def _begin(self, item: "_Item") -> Iterator[Event]:
        yield from self._close("completed")
        self._open = item
        yield from item.begin()

    def _close(self, status: str) -> Iterator[Event]:
        item, self._open = self._open, None
        if item is not None:
            self.items.append(item.body(status))
            yield from item.end(status)


class _Item(ABC):
    """One item as it grows.

    Args:
        index: its place in the output.
    """

    prefix: str
    text_name: str
    """What its text is called in the names of events."""

    def __init__(self, index: int) -> None:
        self.id = new_id(self.prefix)
        self._index = index
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        """All of it so far."""
        return "".join(self._texts)

    @abstractmethod
    def body(self, status: str) -> dict[str, Any]:
        """The item as it is now."""

    def begin(self) -> Iterator[Event]:
        """The events that it begins with, before it has any text."""
        yield "response.output_item.added", {"output_index": self._index, "item": self.body("in_progress")}

    def say(self, text: str) -> Event:
        """More text."""
        self._texts.append(text)
        return f"response.{self.text_name}.delta", self.place | {"delta": text}

    def end(self, status: str) -> Iterator[Event]:
        """The events that it ends with."""
        yield "response.output_item.done", {"output_index": self._index, "item": self.body(status)}

    @property
    def place(self) -> dict[str, Any]:
        """Where its text is."""
        return {"item_id": self.id, "output_index": self._index}


class _PartItem(_Item, ABC):
    """An item whose text is in a content part."""

    @abstractmethod
    def part(self) -> dict[str, Any]:
        """The content part as it is now."""

    @property
    def place(self) -> dict[str, Any]:
        return super().place | {"content_index": 0}

    def begin(self) -> Iterator[Event]:
        added, item = next(super().begin())
        yield added, item | {"item": item["item"] | {"content": []}}
        yield "response.content_part.added", self.place | {"part": self.part()}

    def end(self, status: str) -> Iterator[Event]:
        yield f"response.{self.text_name}.done", self.place | {"text": self.text}
        yield "response.content_part.done", self.place | {"part": self.part()}
        yield from super().end(status)


class _ReasoningItem(_PartItem):
    prefix = "rs"
    text_name = "reasoning_text"

    def part(self) -> dict[str, Any]:
        return {"type": "reasoning_text", "text": self.text}

    def body(self, status: str) -> dict[str, Any]:
        return {"type": "reasoning", "id": self.id, "summary": [], "content": [self.part()], "status": status}


class _MessageItem(_PartItem):
    prefix = "msg"
    text_name = "output_text"

    def part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}

    def body(self, status: str) -> dict[str, Any]:
        return {"type": "message", "id": self.id, "role": "assistant", "content": [self.part()], "status": status}

    def say(self, text: str) -> Event:
        name, fields = super().say(text)
        return name, fields | {"logprobs": []}

    def end(self, status: str) -> Iterator[Event]:
        done, *others = super().end(status)
        yield done[0], done[1] | {"logprobs": []}
        yield from others


class _CallItem(_Item):
    prefix = "fc"
    text_name = "function_call_arguments"

    def __init__(self, index: int, name: str) -> None:
        super().__init__(index)
        self._name = name
        self._call_id = new_id("call")

    def body(self, status: str) -> dict[str, Any]:
        call = {"id": self.id, "call_id": self._call_id, "name": self._name, "arguments": self.text}
        return {"type": "function_call", **call, "status": status}

    def end(self, status: str) -> Iterator[Event]:
        yield "response.function_call_arguments.done", self.place | {"name": self._name, "arguments": self.text}
        yield from super().end(status)
