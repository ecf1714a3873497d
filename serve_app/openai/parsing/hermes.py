"""The tool calls of Qwen3 and many others: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, named Hermes."""

import json
import re
from collections.abc import Generator

from serve_app.openai.parsing.call import CLOSING, MAX_NAME_CHARS, CallParser, NoCallError, Steps

_MARKS = re.compile(r'["{}\[\]]')
_MARKS_IN_STRING = re.compile(r'["\\]')


class HermesCall(CallParser):
    """The arguments come out as the model wrote them, up to the bracket that closes them.

    That they are JSON is not checked: a client that gets broken arguments can tell the model so.
    """

    def _parse(self) -> Steps:
        yield from self._expect("{")
        key = yield from self._key()
        if key == "name":
            yield from self._after_name(self._check_name((yield from self._string())))
        elif key == "arguments":
            yield from self._arguments_first()
        else:
            raise NoCallError

    def _after_name(self, name: str) -> Steps:
        following = yield from self._visible()
        if following == "}":
            self._start(name)
            self._say("{}")
            self._is_complete = True
            yield from self._one_of(CLOSING)
            return
        if following != ",":
            self._refuse(following)
        if (yield from self._key()) != "arguments":
            raise NoCallError
        yield from self._expect("{")
        self._start(name)
        self._say("{")
        yield from self._object()
        self._is_complete = True
        # Models forget the last bracket at times.
        if (yield from self._one_of("}", CLOSING)) == "}":
            yield from self._one_of(CLOSING)

    def _arguments_first(self) -> Steps:
        yield from self._expect("{")
        first = len(self._raw)
        yield from self._object()
        arguments = "{" + "".join(self._raw[first:])
        yield from self._expect(",")
        if (yield from self._key()) != "name":
            raise NoCallError
        name = self._check_name((yield from self._string()))
        yield from self._expect("}")
        self._start(name)
        self._say(arguments)
        self._is_complete = True
        yield from self._one_of(CLOSING)

    def _key(self) -> Generator[None, None, str]:
        """A key and its colon."""
        key = yield from self._string()
        yield from self._expect(":")
        return key

    def _string(self) -> Generator[None, None, str]:
        """A short JSON string, in one line and without tags: one that never ends must not hide what follows it."""
        yield from self._expect('"')
        raw = '"'
        while len(raw) < MAX_NAME_CHARS:
            character = yield from self._character()
            if character in "<\n":
                self._refuse(character)
            raw += character
            if character == "\\":
                raw += yield from self._character()
            elif character == '"':
                break
        try:
            return str(json.loads(raw))
        except ValueError:
            raise NoCallError from None

    def _object(self) -> Steps:
        """An object, from after its bracket: said as it comes, or held while its function is not known."""
        depth, in_string, is_escaped = 1, False, False
        while depth:
            while self._position >= len(self._text):
                yield
            start = end = self._position
            while depth and end < len(self._text):
                if is_escaped:
                    end, is_escaped = end + 1, False
                    continue
                mark = (_MARKS_IN_STRING if in_string else _MARKS).search(self._text, end)
                if mark is None:
                    end = len(self._text)
                    break
                end = mark.end()
                if mark[0] == '"':
                    in_string = not in_string
                elif mark[0] == "\\":
                    is_escaped = True
                else:
                    depth += 1 if mark[0] in "{[" else -1
            self._position = end
            if self.is_started:
                self._say(self._text[start:end])
            else:
                self._hold(self._text[start:end])
