"""Model output → events: the same however it is cut, nothing of it lost, and broken output is text."""

import json
import time
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.openai.parsing.argument_value import allowed_types
from serve_app.openai.parsing.events import ContentText, ReasoningText, ToolCallArguments, ToolCallEnd, ToolCallStart
from serve_app.openai.parsing.formats import HERMES, QWEN_CODER, ToolFormat, tool_format
from serve_app.openai.parsing.output import Channel, OutputParser

SCHEMAS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "exact": {"type": ["boolean", "null"]},
            "where": {"anyOf": [{"$ref": "#/$defs/place"}, {"type": "null"}]},
            "names": {"type": "array"},
        },
        "$defs": {"place": {"type": "object"}},
    },
    "now": {},
}
WEATHER = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
CODER = "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>"
FORMATS = {"hermes": HERMES, "qwen_coder": QWEN_CODER, "no tools": None}


def parse(text: str, cuts: list[int], start: Channel, form: ToolFormat | None) -> dict[str, Any]:
    """What an output holds; its pieces are put together as a client would."""
    parser = OutputParser(start, form, SCHEMAS)
    bounds = [0, *sorted({cut % (len(text) + 1) for cut in cuts}), len(text)]
    events = [event for first, last in pairwise(bounds) for event in parser.push(text[first:last])] + parser.flush()
    found: dict[str, Any] = {"reasoning": "", "content": "", "calls": [], "ended": []}
    for event in events:
        match event:
            case ReasoningText(more):
                found["reasoning"] += more
            case ContentText(more):
                found["content"] += more
            case ToolCallStart(index, name):
                assert index == len(found["calls"])
                found["calls"].append([name, ""])
            case ToolCallArguments(index, more):
                assert index == len(found["calls"]) - 1 and index not in found["ended"]
                found["calls"][-1][1] += more
            case ToolCallEnd(index):
                assert index == len(found["calls"]) - 1
                found["ended"].append(index)
        assert not isinstance(event, ReasoningText | ContentText | ToolCallArguments) or event.text
    assert parser.num_calls == len(found["ended"])
    return found


def read(text: str, start: Channel = Channel.UNDECIDED, form: ToolFormat | None = HERMES) -> tuple[str, str, list[Any]]:
    found = parse(text, [], start, form)
    assert parse(text, list(range(len(text))), start, form) == found
    return found["reasoning"], found["content"], found["calls"]


FRAGMENTS = st.sampled_from(
    [
        *("<think>", "</think>", "<tool_call>", "</tool_call>", "<function=get_weather>", "</function>", "\n", "\n\n"),
        *("<parameter=city>", "<parameter=days>", "<parameter=exact>", "</parameter>", "3", "true", " ", "<", "}", "{"),
        *('{"name": "get_weather", "arguments": {', '"city": "Pa\\"ris}"', "}}", '{"name": "now"}', '{"arguments": {}'),
        *(
            ', "name": "now"}',
            '"',
            "\\",
            "Paris",
            "kůň 🐎",
            "text <b> more",
            WEATHER,
            NOW,
            CODER,
            "<tool",
            "</thi",
            "]",
        ),
    ]
)
OUTPUTS = st.lists(FRAGMENTS | st.text(max_size=4), max_size=16).map("".join)
CUTS = st.lists(st.integers(0, 1_000), max_size=24)


@given(OUTPUTS, CUTS, st.sampled_from(Channel), st.sampled_from([*FORMATS.values()]))
def test_how_an_output_is_cut_changes_nothing(text: str, cuts: list[int], start: Channel, form: ToolFormat | None):
    assert parse(text, cuts, start, form) == parse(text, [], start, form)


def without_marks(text: str) -> str:
    """A text less the tags, and less the white space that may be around them."""
    for tag in ("<think>", "</think>", "<tool_call>", "</tool_call>"):
        text = text.replace(tag, "")
    return "".join(text.split())


@given(OUTPUTS, st.sampled_from(Channel))
def test_what_is_no_call_loses_nothing(text: str, start: Channel):
    """Without functions to call all is text, in its order, but for the tags around reasoning."""
    parser = OutputParser(start, HERMES, {})
    said = "".join(event.text for event in parser.push(text) + parser.flush())  # type: ignore[union-attr]
    assert without_marks(said) == without_marks(text)


@given(OUTPUTS)
def test_without_tags_to_look_for_the_text_is_the_text(text: str):
    found = parse(text, [], Channel.CONTENT, None)
    assert found == {"reasoning": "", "content": text, "calls": [], "ended": []}


STRINGS = st.text(max_size=8) | st.sampled_from(["</tool_call>", '<tool_call>"', "\\", "}}", "{", "</think>"])
VALUES = st.recursive(
    STRINGS | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(STRINGS, inner, max_size=3),
    max_leaves=6,
)


@given(st.lists(st.dictionaries(STRINGS, VALUES, max_size=3), min_size=1, max_size=3), CUTS, st.booleans(), st.data())
def test_hermes_calls_with_any_arguments_come_back(
    calls: list[dict[str, Any]], cuts: list[int], ascii_only: bool, data: st.DataObject
):
    texts = [json.dumps(call, ensure_ascii=ascii_only, indent=data.draw(st.sampled_from([None, 2]))) for call in calls]
    text = "\n".join(f'<tool_call>\n{{"name": "now", "arguments": {each}}}\n</tool_call>' for each in texts)
    found = parse(f"Well.\n{text}\n", cuts, Channel.CONTENT, HERMES)
    assert found["content"] == "Well." and found["calls"] == [["now", each] for each in texts]
    assert found["ended"] == list(range(len(calls)))


@given(
    st.text(st.characters(exclude_characters="<", exclude_categories=["Cs"]), max_size=12),
    st.integers(),
    st.none() | st.booleans(),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    CUTS,
)
def test_qwen_coder_calls_with_any_arguments_come_back(
    city: str, days: int, exact: bool | None, where: dict[str, int], cuts: list[int]
):
    arguments = {"city": city, "days": days, "exact": exact, "where": where, "other": "x"}
    written = "".join(
        f"<parameter={name}>\n{value if isinstance(value, str) else json.dumps(value)}\n</parameter>\n"
        for name, value in arguments.items()
    )
    text = f"<tool_call>\n<function=get_weather>\n{written}</function>\n</tool_call>"
    found = parse(text, cuts, Channel.CONTENT, QWEN_CODER)
    [[name, said]] = found["calls"]
    assert name == "get_weather" and json.loads(said) == arguments and found["content"] == "" and found["ended"] == [0]


@pytest.mark.parametrize(
    ("text", "start", "expected"),
    [
        ("<think>\nHm.\n</think>\n\nHi", Channel.UNDECIDED, ("Hm.", "Hi")),
        ("\n<think>Hm.</think>Hi", Channel.UNDECIDED, ("Hm.", "Hi")),
        ("<think>\n\n</think>\n\n    code", Channel.UNDECIDED, ("", "    code")),
        ("Hm.\n</think>\n\nHi\n", Channel.REASONING, ("Hm.", "Hi\n")),
        ("Hm, cut off\n", Channel.REASONING, ("Hm, cut off\n", "")),
        ("<think>\nHm", Channel.UNDECIDED, ("Hm", "")),
        ("Hi <think>no</think>", Channel.UNDECIDED, ("", "Hi <think>no</think>")),
        ("<think>no</think>", Channel.CONTENT, ("", "<think>no</think>")),
        (" \n", Channel.UNDECIDED, ("", " \n")),
        ("<thi", Channel.UNDECIDED, ("", "<thi")),
        ("a</think>b</think>c", Channel.REASONING, ("a", "b</think>c")),
        ("", Channel.UNDECIDED, ("", "")),
    ],
)
def test_reasoning(text: str, start: Channel, expected: tuple[str, str]):
    assert read(text, start, None) == (*expected, [])
    assert read(text, start, HERMES) == (*expected, [])


PARIS = ["get_weather", '{"city": "Paris"}']


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (WEATHER, ("", "", [PARIS])),
        (f"{WEATHER}\n{NOW}", ("", "", [PARIS, ["now", "{}"]])),
        (f"{WEATHER}{NOW}\n", ("", "", [PARIS, ["now", "{}"]])),
        (f"<think>\nHm.\n</think>\n\nLet me see.\n{WEATHER}", ("Hm.", "Let me see.", [PARIS])),
        (f"<think>\nHm.\n{WEATHER}\n</think>\n\nDone.", ("Hm.", "Done.", [PARIS])),
        (f"<think>\nHm.\n{WEATHER}", ("Hm.", "", [PARIS])),
        (f"One\n{WEATHER}\n\nTwo", ("", "One\n\nTwo", [PARIS])),
        (WEATHER.removesuffix("\n</tool_call>"), ("", "", [PARIS])),
        (WEATHER.replace("}}", "}"), ("", "", [PARIS])),
        (WEATHER.replace("}}", "}}}"), ("", "}\n</tool_call>", [PARIS])),
        (WEATHER[:-len('ris"}}\n</tool_call>')], ("", "", [["get_weather", '{"city": "Pa']])),
        ('<tool_call>{"name":"now"}</tool_call>', ("", "", [["now", "{}"]])),
        ('<tool_call>{"arguments": {"a": ["]"]}, "name": "now"}</tool_call>', ("", "", [["now", '{"a": ["]"]}']])),
        ('<tool_call>{"name": "n\\u006fw"}</tool_call>', ("", "", [["now", "{}"]])),
    ],
)  # fmt: skip
def test_hermes_calls(text: str, expected: tuple[str, str, list[Any]]):
    assert read(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        "<tool_call>\n{",
        '<tool_call>\n{"name": "get_we',
        "<tool_call>\nnot json\n</tool_call>",
        '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "now", "arguments": [1]}\n</tool_call>',
        '<tool_call>\n{"name": "now", "arguments": "{}"}\n</tool_call>',
        '<tool_call>\n{"name": 7, "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "now", "other": 1}\n</tool_call>',
        '<tool_call>\n{"arguments": {}, "name": "unknown"}\n</tool_call>',
        '<tool_call>\n{"name": "\\ud800"}\n</tool_call>',
        '<tool_call>\n{"name": "\\q"}\n</tool_call>',
        "<tool_call></tool_call>",
        "a <tool_call> b </tool_call> c",
        "__import__('os').system('true')",
    ],
)
def test_what_is_no_hermes_call_is_text(text: str):
    assert read(text) == ("", text, [])
    inside = read(f"<think>{text}.</think>")
    assert inside == (f"{text}.", "", [])
    assert read(f"{text}.\n{WEATHER}") == ("", f"{text}.", [PARIS])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CODER, ("", "", [PARIS])),
        (CODER.removeprefix("<tool_call>\n"), ("", "", [PARIS])),
        (CODER.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>"), ("", "", [PARIS])),
        (CODER.replace("</function>\n", ""), ("", "", [PARIS])),
        (f"{CODER}\n{CODER}", ("", "", [PARIS, PARIS])),
        (CODER.replace("\n</tool_call>", "\n<function=now>\n</function>\n</tool_call>"),
         ("", "", [PARIS, ["now", "{}"]])),
        (CODER.replace("\nParis\n", "Paris"), ("", "", [PARIS])),
        (CODER.replace("</parameter>\n", "</parameter>\nand so on\n"),
         ("", "\nand so on\n</function>\n</tool_call>", [PARIS])),
        (CODER[: CODER.index("ris")], ("", "", [["get_weather", '{"city": "Pa']])),
        (CODER[: CODER.index("ameter>\n</f")], ("", "", [["get_weather", '{"city": "Paris\\n</par']])),
        ("<function=now></function>", ("", "", [["now", "{}"]])),
        ("<function=unknown>\n</function>", ("", "<function=unknown>\n</function>", [])),
        ("<tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>", ("", "<tool_call>", [["now", "{}"]])),
    ],
)  # fmt: skip
def test_qwen_coder_calls(text: str, expected: tuple[str, str, list[Any]]):
    assert read(text, form=QWEN_CODER) == expected


@pytest.mark.parametrize(
    ("name", "written", "value"),
    [
        ("city", "3", "3"),
        ("city", ' "Pa\\ris"\t\n\n', ' "Pa\\ris"\t\n\n'),
        ("city", "", ""),
        ("days", "3", 3),
        ("days", " -12 ", -12),
        ("days", "3.0", 3.0),
        ("days", "3.5", "3.5"),
        ("days", "three", "three"),
        ("days", "1" * 30, int("1" * 30)),
        ("days", "NaN", "NaN"),
        ("days", "__import__('os')", "__import__('os')"),
        ("exact", "True", True),
        ("exact", "false", False),
        ("exact", "null", None),
        ("exact", "1", "1"),
        ("where", '{"a": {"b": [1, 2]}}', {"a": {"b": [1, 2]}}),
        ("where", "None", None),
        ("where", "{'a': 1}", "{'a': 1}"),
        ("where", "[" * 100_000, "[" * 100_000),
        ("names", '["a", 1]', ["a", 1]),
        ("names", "[" * 5_000, "[" * 5_000),
        ("unknown", "7", "7"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_types_of_qwen_coder_arguments(name: str, written: str, value: Any):
    text = f"<function=get_weather>\n<parameter={name}>\n{written}\n</parameter>\n</function>"
    [[_, said]] = parse(text, [], Channel.CONTENT, QWEN_CODER)["calls"]
    assert json.loads(said) == {name: value}
    assert parse(text, list(range(0, len(text), 7)), Channel.CONTENT, QWEN_CODER)["calls"] == [["get_weather", said]]


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "string"}, {"string"}),
        ({"enum": [1, 2]}, {"integer", "number"}),
        ({"const": "x"}, {"string"}),
        ({"anyOf": [{"type": "array"}, {"oneOf": [{"type": "null"}]}]}, {"array", "null"}),
        ({"$ref": "#/properties/a"}, {"string"}),
        ({"$ref": "https://example.org/schema"}, {"string"}),
        ({"type": 7}, {"string"}),
        ({"anyOf": [{"$ref": "#/properties/a"}] * 1000}, {"string"}),
        (True, {"string"}),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_types_that_a_schema_allows(schema: Any, expected: set[str]):
    assert allowed_types({"properties": {"a": schema}}, "a") == expected


def test_arguments_are_streamed():
    parser = OutputParser(Channel.CONTENT, HERMES, SCHEMAS)
    assert parser.push('<tool_call>\n{"name": "now", "arguments": {"a": "some') == [
        ToolCallStart(0, "now"), ToolCallArguments(0, "{"), ToolCallArguments(0, '"a": "some')
    ]  # fmt: skip
    assert parser.push(" text") == [ToolCallArguments(0, " text")]
    parser = OutputParser(Channel.CONTENT, QWEN_CODER, SCHEMAS)
    parser.push("<tool_call>\n<function=get_weather>\n<parameter=city>\nPa")
    assert parser.push("ris") == [ToolCallArguments(0, "ris")]


def test_text_is_held_back_only_where_it_may_be_a_tag():
    parser = OutputParser(Channel.UNDECIDED, HERMES, SCHEMAS)
    assert parser.push("a <t") == [ContentText("a")]
    assert parser.push("able> b") == [ContentText(" <table> b")]
    assert parser.push("\n") == [] and parser.push("c") == [ContentText("\nc")]


def test_the_format_comes_from_the_chat_template():
    assert tool_format('{{- \'<tool_call>\\n{"name": "\' }}') is HERMES
    assert tool_format("{{- '<tool_call>\\n<function=' + tool_call.name }}") is QWEN_CODER
    assert tool_format("{{ messages }}") is None and tool_format(None) is None


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>" * 4_000,
        '<tool_call>{"arguments": {"a": "' * 1_500,
        '<tool_call>{"name": "' * 2_000,
        "\n" * 40_000,
        "<" * 40_000,
        WEATHER * 500,
        CODER * 500,
        '<tool_call>{"name": "now", "arguments": {' + '{"' * 20_000,
        "<function=get_weather><parameter=days>" + "</para" * 6_000,
        "<function=get_weather>" + "<parameter=days>1</parameter>" * 1_500,
        '<tool_call>{"name": "now"}' + " " * 40_000,
    ],
    ids=lambda text: text[:32],
)
@pytest.mark.parametrize("form", [HERMES, QWEN_CODER], ids=["hermes", "qwen_coder"])
def test_time_is_linear_and_memory_bounded(text: str, form: ToolFormat):
    for size in (len(text), 5):
        parser = OutputParser(Channel.UNDECIDED, form, SCHEMAS)
        start = time.process_time()
        for position in range(0, len(text), size):
            parser.push(text[position : position + size])
        parser.flush()
        assert time.process_time() - start < 1
