"""Which JSON Schemas can be enforced. All others are refused: output that nearly fits is worse than none.

What is not listed here is refused, unless it is a mere remark. A misspelt `minLenght` is an error that names it, not a
limit that is not there. llguidance refuses the rest: formats, patterns and combinations that it cannot enforce.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from serve_app.openai.errors import ApiError, bad_request

_SCHEMA = frozenset({"items", "additionalProperties"})
_SCHEMAS = frozenset({"prefixItems", "allOf", "anyOf", "oneOf"})
_NAMED_SCHEMAS = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_VALUES = frozenset(
    "$ref type enum const required pattern format multipleOf minimum maximum exclusiveMinimum exclusiveMaximum "
    "minLength maxLength minItems maxItems minProperties maxProperties".split()
)
_REMARKS = frozenset(
    "$schema $id $comment title description default examples example deprecated readOnly writeOnly discriminator "
    "contentEncoding contentMediaType".split()
)
_SUPPORTED = _SCHEMA | _SCHEMAS | _NAMED_SCHEMAS | _VALUES | _REMARKS


def check_schema(schema: object, param: str, most_depth: int) -> None:
    """Raise ApiError 400, naming the keyword and where it is, unless every keyword of a schema can be enforced.

    Args:
        schema: as it came in.
        param: the field that it came in.
        most_depth: how deep schemas may be in one another.
    """
    level = [(schema, "")]
    for _ in range(most_depth):
        level = [inner for found, path in level for inner in _check_keywords(found, path, param)]
        if not level:
            return
    raise bad_request(f"{param} is nested deeper than {most_depth} schemas", param, "invalid_schema")


def _check_keywords(schema: object, path: str, param: str) -> Iterator[tuple[object, str]]:
    """The schemas in a schema, and where they are."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise _wrong(path, param, f"is {_kind(schema)}, expected a schema: an object or a boolean")
    for keyword, value in schema.items():
        where = f"{path}/{keyword}"
        if keyword not in _SUPPORTED and (keyword == "x-guidance" or not keyword.startswith("x-")):
            raise _wrong(path, param, f"has the keyword {keyword[:64]!r}, which is not supported; leave it out")
        if keyword in _SCHEMA:
            yield value, where
        elif keyword in _SCHEMAS:
            yield from ((inner, f"{where}/{index}") for index, inner in enumerate(_all(value, list, where, param)))
        elif keyword in _NAMED_SCHEMAS:
            yield from ((inner, f"{where}/{name}") for name, inner in _all(value, dict, where, param).items())


def _all(value: Any, kind: type, where: str, param: str) -> Any:
    if not isinstance(value, kind):
        raise _wrong(where, param, f"is {_kind(value)}, expected {'a list' if kind is list else 'an object'}")
    return value


def _wrong(path: str, param: str, found: str) -> ApiError:
    return bad_request(f"{param} at {path[:256] or '/'} {found}", param, "invalid_schema")


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
