"""Outputs of a form that the request asks for, over HTTP, from the demo model. It knows nothing of these forms."""

import json
import re
import threading
import time
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import jsonschema
import pytest
from openai import BadRequestError, OpenAI
from pydantic import BaseModel, Field

from tests.integration.conftest import Engine

HOT: dict[str, Any] = {"model": "demo", "temperature": 1.0, "max_tokens": 400}
NO_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
TOOL = {"type": "function", "function": {"name": "see_person", "description": "See.", "parameters": SCHEMA}}
ENDLESS = {"allOf": [{"type": "string", "pattern": f".*(a|b){'.' * length}.*"} for length in range(1, 60)]}


class Person(BaseModel):
    name: str = Field(max_length=6)
    mood: Literal["good", "bad"]
    friends: list[Literal["Ann", "Bob"]] = Field(max_length=2)


def messages(text: str = "Write JSON for Ann, age 31, from Peru.") -> list[Any]:
    return [{"role": "user", "content": text}]


def ask(client: OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(**(HOT | {"messages": messages()} | fields))


@pytest.mark.parametrize("seed", range(3))
def test_parse_gives_objects_of_a_class(client: OpenAI, seed: int):
    answer = client.chat.completions.parse(
        messages=messages(), response_format=Person, seed=seed, extra_body=NO_THINKING, **HOT
    )
    assert isinstance(answer.choices[0].message.parsed, Person)
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("extra", [{}, NO_THINKING], ids=["thinking", "not thinking"])
def test_a_schema_holds_after_the_reasoning(client: OpenAI, extra: dict[str, Any]):
    answer = ask(client, response_format=FORMAT, n=4, seed=1, extra_body=extra, temperature=0.7)
    for choice in answer.choices:
        if choice.finish_reason == "length":  # it may think forever
            assert extra == {}
            continue
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)
        assert "<think>" not in choice.message.content
    if not extra:
        assert any(choice.message.reasoning for choice in answer.choices)


def test_a_stream_says_the_same(client: OpenAI):
    fields: dict[str, Any] = {"response_format": FORMAT, "seed": 4, "logprobs": True, "extra_body": NO_THINKING}
    whole = ask(client, **fields).choices[0]
    chunks: Iterator[Any] = ask(client, **fields, stream=True)
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == whole.message.content
    assert choices[-1].finish_reason == whole.finish_reason == "stop"
    jsonschema.validate(json.loads(whole.message.content), SCHEMA)


@pytest.mark.parametrize(
    ("extra", "pattern"),
    [
        ({"structured_outputs": {"regex": "[0-9]{3}-[a-c]/x"}}, r"[0-9]{3}-[a-c]/x"),
        ({"guided_regex": "[0-9]{3}-[a-c]/x"}, r"[0-9]{3}-[a-c]/x"),
        ({"structured_outputs": {"choice": ["red", "green"]}}, "red|green"),
        ({"guided_choice": ["red", "green"]}, "red|green"),
        ({"structured_outputs": {"grammar": 'start: "a" B\nB: /[xy]{2}/'}}, "a[xy]{2}"),
        ({"guided_grammar": 'root ::= "a" [xy]'}, "a[xy]"),
        ({"structured_outputs": {"json": {"enum": [7, 8]}}}, "[78]"),
        ({"guided_json": {"enum": [7, 8]}}, "[78]"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"const": 5}}}}, "5"),
    ],
)
def test_every_way_to_ask_works_for_chats_and_completions(client: OpenAI, extra: dict[str, Any], pattern: str):
    chat = ask(client, extra_body=extra | NO_THINKING, n=2)
    completion = client.completions.create(prompt="x", n=2, extra_body=extra, **HOT)
    for text in [choice.message.content for choice in chat.choices] + [each.text for each in completion.choices]:
        assert re.fullmatch(pattern, text)
    assert {choice.finish_reason for choice in chat.choices} == {"stop"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "see_person"}}], ids=["required", "named"]
)
def test_a_call_that_must_be_made_is_made(client: OpenAI, choice: Any, stream: bool):
    fields: dict[str, Any] = {
        "messages": messages("Hello"), "tools": [TOOL], "tool_choice": choice, "seed": 2, "extra_body": NO_THINKING,
        "parallel_tool_calls": False,
    }  # fmt: skip
    if stream:
        with client.chat.completions.stream(**(HOT | fields)) as events:
            answer = events.get_final_completion()
    else:
        answer = ask(client, **fields)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "see_person"
    jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
    assert answer.choices[0].finish_reason == ("tool_calls" if choice == "required" else "stop")


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"guided_json": {"type": "array", "uniqueItems": True}}, "guided_json", "uniqueItems"),
        ({"guided_json": {"type": "string", "minLenght": 2}}, "guided_json", "minLenght"),
        ({"guided_json": {"type": "string", "format": "colour"}}, "guided_json", "colour"),
        ({"guided_regex": "(?<=a)b"}, "guided_regex", "look"),
        ({"guided_regex": "("}, "guided_regex", "unclosed"),
        ({"guided_grammar": "start: missing"}, "guided_grammar", "missing"),
        ({"structured_outputs": {"json": ENDLESS}}, "structured_outputs.json", "to compile"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}],
                "tool_choice": "required",
            },
            "tools.0.function.parameters",
            "'not'",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_enforced_is_refused(
    client: OpenAI, stream: bool, fields: dict[str, Any], param: str, message: str
):
    with pytest.raises(BadRequestError, match=message) as caught:
        ask(client, extra_body=fields, stream=stream)
    assert caught.value.param == param


def test_a_grammar_with_nothing_left_to_choose_is_the_clients_error(client: OpenAI, free_engine: Engine):
    with pytest.raises(BadRequestError, match="grammar"):
        client.completions.create(prompt="x", extra_body={"guided_regex": "[0-9]+", "allowed_token_ids": [70]}, **HOT)


def test_hostile_grammars_delay_nobody(client: OpenAI, http: httpx.Client, free_engine: Engine):
    """While grammars that never compile are tried, other streams go on."""
    refused: list[int] = []

    def attack(number: int) -> None:
        body = {"model": "demo", "prompt": "x", "guided_json": ENDLESS | {"title": f"{time.time()} {number}"}}
        refused.append(http.post("/v1/completions", json=body).status_code)

    attackers = [threading.Thread(target=attack, args=(number,)) for number in range(3)]
    for attacker in attackers:
        attacker.start()
    start = time.monotonic()
    stream = client.completions.create(
        model="demo", prompt="x", max_tokens=100, stream=True, extra_body={"ignore_eos": True}
    )
    arrivals = [time.monotonic() for _ in stream]
    gaps = [after - before for before, after in zip([start, *arrivals], arrivals, strict=False)]
    assert max(gaps) < 1.5
    for attacker in attackers:
        attacker.join()
    assert refused == [400] * 3
