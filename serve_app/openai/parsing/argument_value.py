"""A value that was written without quotes, as the JSON that its schema asks for. Parsed, never evaluated."""

import json
from collections.abc import Mapping
from typing import Any

import msgspec

from serve_app.openai.parsing.call import MAX_HELD_CHARS

_MAX_PARTS = 256
_TYPES: dict[type, frozenset[str]] = {
    bool: frozenset({"boolean"}),
    int: frozenset({"integer", "number"}),
    float: frozenset({"number"}),
    list: frozenset({"array"}),
    dict: frozenset({"object"}),
    type(None): frozenset({"null"}),
}
_SPELLINGS = {"True": "true", "False": "false", "None": "null"}
"""As models that think in Python write them."""


class ArgumentValue:
    """Writes one value. Where its type is text and nothing else, it is said as it comes; others when they are complete.

    Args:
        types: JSON types that the schema allows. A value that is of none of them becomes text.
    """

    def __init__(self, types: frozenset[str]) -> None:
        self._types = types
        self._held: list[str] | None = None if types <= {"string"} else []
        self._num_held = 0
        self._is_begun = False

    def add(self, text: str) -> str:
        """More of the value. Returns the JSON that is certain."""
        if self._held is None:
            return self._quoted(text)
        self._held.append(text)
        self._num_held += len(text)
        if self._num_held <= MAX_HELD_CHARS:
            return ""
        held, self._held = "".join(self._held), None
        return self._quoted(held)

    def end(self) -> str:
        """The rest of the JSON."""
        if self._held is not None:
            raw = "".join(self._held)
            written = _SPELLINGS.get(raw.strip(), raw.strip())
            if not self._types.isdisjoint(_types_of(written)):
                return written
            self._held = None
            return self._quoted(raw) + '"'
        return self._quoted("") + '"'

    def cut_off(self) -> str:
        """What is held back of a value that goes no further."""
        return "".join(self._held or ())

    def _quoted(self, text: str) -> str:
        opening = "" if self._is_begun else '"'
        self._is_begun = True
        return opening + json.dumps(text, ensure_ascii=False)[1:-1]


def allowed_types(schema: Mapping[str, Any], name: str) -> frozenset[str]:
    """JSON types that a function's schema allows for one argument; text if it says nothing."""
    properties = schema.get("properties")
    parts = [properties.get(name)] if isinstance(properties, Mapping) else []
    found: set[str] = set()
    # A schema is a stranger's and can refer to itself: so many of its parts are looked at.
    for _ in range(_MAX_PARTS):
        if not parts:
            break
        part = parts.pop()
        if isinstance(part, Mapping):
            found |= _named_types(part)
            parts += _alternatives(part, schema)[:_MAX_PARTS]
    return frozenset(found or {"string"})


def _named_types(part: Mapping[str, Any]) -> frozenset[str]:
    """The types that a part of a schema names, or those of the values it lists."""
    named = part.get("type")
    if isinstance(named, str):
        return frozenset({named})
    if isinstance(named, list):
        return frozenset(name for name in named if isinstance(name, str))
    values = part.get("enum", [part["const"]] if "const" in part else None)
    if not isinstance(values, list):
        return frozenset()
    return frozenset().union(*(_TYPES.get(type(value), frozenset({"string"})) for value in values))


def _alternatives(part: Mapping[str, Any], schema: Mapping[str, Any]) -> list[Any]:
    """What a part of a schema leaves its types to."""
    branches = [branches for key in ("anyOf", "oneOf", "allOf") if isinstance(branches := part.get(key), list)]
    found = [branch for each in branches for branch in each]
    reference = part.get("$ref")
    return [*found, _target(reference, schema)] if isinstance(reference, str) else found


def _target(reference: str, root: Mapping[str, Any]) -> Any:
    """What a reference inside of the same schema points at."""
    found: Any = root
    for part in reference.removeprefix("#").split("/")[1:]:
        found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
    return found if reference.startswith("#") else None


def _types_of(written: str) -> frozenset[str]:
    """JSON types that a text is of; none if it is no JSON, or is quoted text."""
    try:
        value = msgspec.json.decode(written)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        return frozenset()
    if isinstance(value, float) and value.is_integer():
        return _TYPES[int]
    return _TYPES.get(type(value), frozenset())
