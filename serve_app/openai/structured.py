"""What a request says about the form of its output → a grammar for the engine."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from engine.grammar import choice_grammar, json_schema_grammar, lark_grammar, regex_grammar
from serve_app.config import Limits
from serve_app.openai.endpoint import Constraint
from serve_app.openai.errors import bad_request
from serve_app.openai.json_schema import check_schema
from serve_app.openai.parsing.output import Channel
from serve_app.openai.protocol import GenerationBody, StructuredOutputs
from serve_app.openai.tool_grammar import tool_grammar
from serve_app.openai.tools import ToolUse

_REASONING = {
    Channel.UNDECIDED: "(<think> TEXT? </think> BREAKS)?",
    Channel.REASONING: "TEXT? </think> BREAKS",
    Channel.CONTENT: "",
}
"""What comes before the answer, by what the prompt leaves open. It is free, and the output cannot end in it."""
_KINDS = {"json": "schema", "json_schema": "schema", "ebnf": "grammar"}
"""Kinds of forms that are not called so."""
_RULES = "TEXT: /(?s:.+)/\nBREAKS: /\\n{0,2}/"


def constraint(body: GenerationBody, start: Channel, limits: Limits, tools: ToolUse | None = None) -> Constraint | None:
    """The form that a request asks for; None if it asks for none.

    Args:
        body: the request.
        start: what its prompt leaves open: a form is that of the answer, not of the reasoning before it.
        limits: on schemas and grammars.
        tools: what a chat may call. A call that must be made is the whole answer; one that may be made can take the
            place of an answer of the form asked for.

    Raises:
        ApiError: 400, the form cannot be enforced.
    """
    tools = tools or ToolUse()
    form = _form(body, limits)
    if tools.must_call or (form is None and tools.strict):
        _check_tools(tools, limits)
        return Constraint(lark_grammar(tool_grammar(tools, start)), "tools")
    if form is None:
        return None
    grammar, param = form
    names, parts = ["@answer"], [{"name": "answer", **_only_part(grammar)}]
    if tools.schemas:
        _check_tools(tools, limits)
        names.append("@calls")
        calls = tool_grammar(replace(tools, must_call=True), Channel.CONTENT)
        parts.append({"name": "calls", "lark_grammar": calls})
    elif start is Channel.CONTENT:
        return Constraint(grammar, param)
    whole = f"start: {_REASONING[start]} ({' | '.join(names)})\n{_RULES}"
    return Constraint(json.dumps({"grammars": [{"lark_grammar": whole}, *parts]}), param)


def _form(body: GenerationBody, limits: Limits) -> tuple[str, str] | None:
    """The grammar that a request asks for, and the field that says so."""
    found = list(_asked_for(body))
    if not found:
        return None
    if len(found) > 1:
        raise bad_request(f"{found[1][0]} is given beside {found[0][0]}, expected one of them", found[1][0])
    param, kind, value = found[0]
    _check_size(value, param, limits)
    if kind == "schema":
        return json_schema_grammar(_schema(value, param, limits), _whitespace(body.structured_outputs)), param
    if kind == "regex":
        return regex_grammar(value), param
    if kind == "choice":
        return choice_grammar(value), param
    return lark_grammar(_as_lark(value, param)), param


def _asked_for(body: GenerationBody) -> Iterator[tuple[str, str, Any]]:
    """(field, kind, value) of every form that a request asks for."""
    response_format = body.response_format
    if response_format is not None and response_format.type == "json_object":
        yield "response_format", "schema", {"type": "object"}
    if response_format is not None and response_format.json_schema is not None:
        yield "response_format.json_schema.schema", "schema", response_format.json_schema.schema_
    outputs = body.structured_outputs
    if outputs is not None:
        if outputs.json_object:
            yield "structured_outputs.json_object", "schema", {"type": "object"}
        yield from _given(
            "structured_outputs.", json=outputs.json_, regex=outputs.regex, choice=outputs.choice,
            grammar=outputs.grammar,
        )  # fmt: skip
    yield from _given(
        "guided_", json=body.guided_json, regex=body.guided_regex, choice=body.guided_choice,
        grammar=body.guided_grammar,
    )  # fmt: skip
    yield from _given("", json_schema=body.json_schema, regex=body.regex, ebnf=body.ebnf, grammar=body.grammar)


def _given(prefix: str, **values: Any) -> Iterator[tuple[str, str, Any]]:
    for name, value in values.items():
        if value is not None:
            yield f"{prefix}{name}", _KINDS.get(name, name), value


def _whitespace(outputs: StructuredOutputs | None) -> str | None:
    """What a request wants between the tokens of JSON; None: it does not say."""
    if outputs is None:
        return None
    return "" if outputs.disable_any_whitespace else outputs.whitespace_pattern


def _schema(value: Any, param: str, limits: Limits) -> Any:
    """A schema that can be enforced, also where it comes as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise bad_request(f"{param} is text, but not JSON: {str(error)[:200]}", param, "invalid_schema") from None
    check_schema(value, param, limits.schema_depth)
    return value


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _as_lark(grammar: str, param: str) -> str:
    """A grammar in llguidance's dialect of Lark, also where it comes as llama.cpp's GBNF."""
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return any_to_lark(grammar)
    except (Exception, RecursionError) as error:  # what a parser of any text may raise
        found = " ".join(str(error).split())[:200]
        raise bad_request(f"{param} is neither Lark nor GBNF: {found}", param, "invalid_grammar") from None


def _check_size(value: Any, param: str, limits: Limits) -> None:
    try:
        size = len(value if isinstance(value, str) else json.dumps(value))
    except RecursionError:
        raise bad_request(f"{param} is nested too deeply", param, "invalid_schema") from None
    if size > limits.grammar_chars:
        message = f"{param} has {size} characters, expected at most {limits.grammar_chars}"
        raise bad_request(message, param, "grammar_too_large")


def _check_tools(tools: ToolUse, limits: Limits) -> None:
    for index, tool in enumerate(tools.offered):
        name = tool.function.name
        is_enforced = tools.must_call or name in tools.strict
        if tool.function.parameters is not None and is_enforced and name in (tools.schemas or {}):
            param = f"tools.{index}.function.parameters"
            _check_size(tool.function.parameters, param, limits)
            check_schema(tool.function.parameters, param, limits.schema_depth)


def _only_part(grammar: str) -> dict[str, Any]:
    return json.loads(grammar)["grammars"][0]
