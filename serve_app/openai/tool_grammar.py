"""Grammars that hold a model to well-formed tool calls, in llguidance's dialect of Lark.

A schema goes into them as it is, so what llguidance does not support is an error there. Only the text arguments of
Qwen3-Coder, which are written without quotes, are dealt with here.
"""

import json
from collections.abc import Mapping
from typing import Any

from serve_app.openai.errors import bad_request
from serve_app.openai.parsing.argument_value import allowed_types
from serve_app.openai.parsing.formats import QWEN_CODER
from serve_app.openai.parsing.output import Channel
from serve_app.openai.tools import ToolUse

_AS_TRAINED = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}
"""How chat templates write JSON, and so how the model does."""
_THINKING = {
    Channel.UNDECIDED: "(<think> TEXT? </think>)? ",
    Channel.REASONING: "TEXT? </think> ",
    Channel.CONTENT: "",
}
"""What an output begins with."""
_TEXT = "TEXT: /(?s:.+)/ & ~/(?s:.*(<think>|<\\/think>|<tool_call>|<function=).*)/"
"""Tags that are spelled out in tokens of other text would be tags, too."""
_VALUE = '[suffix="\\n</parameter>\\n"]: /(?s:.*)/'
_TEXT_KEYWORDS = {"pattern", "format", "minLength", "maxLength"}


def tool_grammar(tools: ToolUse, start: Channel) -> str:
    """The grammar of an output for a request's tools.

    After any reasoning, which is free but makes no calls, the output is one call or more where one must be made. Else
    it is text and calls as the model likes, but of functions that are offered, and with arguments that are what
    `parameters` describes if the function is `strict`.

    Args:
        tools: the request's.
        start: what the prompt leaves open.

    Raises:
        ApiError: 400, a schema asks for what cannot be enforced in the model's format.
    """
    schemas = tools.schemas or {}
    more = "" if tools.most_calls == 1 else ' ("\\n" call)*'
    answer = f"/\\n{{0,2}}/ call{more}" if tools.must_call else f"TEXT? (call{more} TEXT?)?"
    rules = [f"start: {_THINKING[start]}{answer}", _TEXT]
    rules.append("call: " + " | ".join(f"call_{index}" for index in range(len(schemas))))
    for index, (name, schema) in enumerate(schemas.items()):
        is_enforced = tools.must_call or name in tools.strict
        if tools.format is QWEN_CODER:
            rules += _coder_call(f"call_{index}", name, schema if is_enforced else None)
        else:
            rules.append(_hermes_call(f"call_{index}", name, schema if is_enforced else {}))
    return "\n".join(rules) + "\n"


def _hermes_call(rule: str, name: str, schema: Mapping[str, Any]) -> str:
    opening = _quoted(f'\n{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": ')
    return f'{rule}: <tool_call> {opening} {_json({"type": "object", **schema})} "}}\\n" </tool_call>'


def _coder_call(rule: str, name: str, schema: Mapping[str, Any] | None) -> list[str]:
    """A rule for the call, and rules for each of its arguments, which come in the order of the schema."""
    opening = _quoted(f"\n<function={name}>\n")
    if schema is None:
        parts, rules = (
            f"{rule}_any*",
            [f'{rule}_any: "<parameter=" /[^<>\\n]+/ ">\\n" {rule}_text', f"{rule}_text{_VALUE}"],
        )
    else:
        required = schema.get("required")
        optional = schema.get("properties", {}).keys() - set(required if isinstance(required, list) else ())
        names = {argument: f"{rule}_{number}" for number, argument in enumerate(schema.get("properties", {}))}
        parts = " ".join(own + "?" * (argument in optional) for argument, own in names.items())
        rules = [each for argument, own in names.items() for each in _coder_argument(own, argument, schema)]
    return [f'{rule}: <tool_call> {opening} {parts} "</function>\\n" </tool_call>', *rules]


def _coder_argument(rule: str, name: str, schema: Mapping[str, Any]) -> list[str]:
    if not name or set("<>\n") & set(name):
        raise _unsupported(f"the name of the argument {name[:64]!r}")
    part = schema["properties"][name]
    described = part if isinstance(part, Mapping) else {}
    opening = _quoted(f"<parameter={name}>\n")
    if "string" not in allowed_types(schema, name):
        shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        return [f'{rule}: {opening} {_json(shared | dict(described))} "\\n</parameter>\\n"']
    if unsupported := _TEXT_KEYWORDS & described.keys():
        raise _unsupported(f"{min(unsupported)!r} of the argument {name[:64]!r}")
    choices = described.get("enum", [described["const"]] if "const" in described else None)
    if isinstance(choices, list) and choices:
        texts = (choice if isinstance(choice, str) else json.dumps(choice) for choice in choices)
        return [f'{rule}: {opening} ({" | ".join(map(_quoted, texts))}) "\\n</parameter>\\n"']
    return [f"{rule}: {opening} {rule}_text", f"{rule}_text{_VALUE}"]


def _unsupported(what: str) -> Exception:
    return bad_request(f"{what} cannot be enforced in this model's tool calls; leave it out", "tools", "invalid_schema")


def _json(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': _AS_TRAINED}, ensure_ascii=False)}"


def _quoted(text: str) -> str:
    """A literal of Lark."""
    return json.dumps(text, ensure_ascii=False)
