"""The tool calls of Qwen3-Coder: `<tool_call><function=…><parameter=…>…</parameter></function></tool_call>`.

Values are written without quotes, so what an argument is depends on its schema.
"""

import json
from collections.abc import Generator

from serve_app.openai.parsing.argument_value import ArgumentValue, allowed_types
from serve_app.openai.parsing.call import CLOSING, MAX_NAME_CHARS, CallParser, Steps
from serve_app.openai.parsing.tags import num_partial

FUNCTION = "<function="
_PARAMETER = "<parameter="
_END_OF_FUNCTION = "</function>"
_END_OF_VALUE = "</parameter>"


class QwenCoderCall(CallParser):
    """The arguments come out as JSON. A call may lack its outer tags, as models forget them at times."""

    _value: ArgumentValue | None = None
    """The value that is being read."""
    _held = ""
    """The end of its text, which may not be part of it."""

    def _parse(self) -> Steps:
        if self._opening != FUNCTION and (yield from self._one_of(FUNCTION)) is None:
            self._refuse(self.rest)
        name = yield from self._name()
        if name is None:
            self._refuse(self.rest)
        self._start(self._check_name(name))
        schema, separator = self._schemas[name], "{"
        while (tag := (yield from self._one_of(_PARAMETER, _END_OF_FUNCTION, CLOSING))) == _PARAMETER:
            argument = yield from self._name()
            if argument is None:
                self.rest = _PARAMETER + self.rest
                break
            self._say(f"{separator}{json.dumps(argument, ensure_ascii=False)}: ")
            separator = ", "
            yield from self._read_value(ArgumentValue(allowed_types(schema, argument)))
        self._say("{}" if separator == "{" else "}")
        self._is_complete = True
        if tag == _END_OF_FUNCTION:
            yield from self._one_of(CLOSING)

    def flush(self) -> None:
        if self._value is not None:
            self._say(self._value.add(self._held) + self._value.cut_off())
        super().flush()

    def _name(self) -> Generator[None, None, str | None]:
        """A name, from after the equals sign to the bracket; None if it is none, and then `rest` is what there is."""
        name = ""
        while len(name) < MAX_NAME_CHARS:
            character = yield from self._character()
            if character == ">":
                return name.strip()
            name += character
            if character in "<\n":
                break
        self.rest = name
        return None

    def _read_value(self, value: ArgumentValue) -> Steps:
        """A value without the line breaks around it, said as far as it is certain."""
        self._value, self._held, is_first, end = value, "", True, -1
        while end < 0:
            while self._position >= len(self._text):
                yield
            text = self._held + self._text[self._position :]
            end = text.find(_END_OF_VALUE)
            if end >= 0:
                self._position += end + len(_END_OF_VALUE) - len(self._held)
                piece, self._held = text[:end].removesuffix("\n"), ""
            else:
                self._position = len(self._text)
                size = len(text) - num_partial(text, (_END_OF_VALUE,))
                size -= text[:size].endswith("\n")
                piece, self._held = text[:size], text[size:]
            if piece:
                self._say(value.add(piece.removeprefix("\n") if is_first else piece))
                is_first = False
        self._say(value.end())
        self._value = None
