"""Expressions that end an output: what `re` finds, however the text is cut, in bounded time and memory."""

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import RequestError
from serve_app.openai.stop_patterns import MAX_MATCH_CHARS, MAX_SIZE, StopExpressions, StopPatterns

ATOMS = st.sampled_from(
    ["a", "b", "A", "\\n", ".", "[ab]", "[^a]", "\\w", "(?i:a)", "(?i:[a-b](?-i:[a])(?-i:b))", "(?s:.)", "\\s", "ab"]
)
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.builds("{}{}".format, inner, inner),
        st.builds("(?:{}|{})".format, inner, inner),
        st.builds("({}){}".format, inner, st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "*?", "{2,}"])),
    ),
    max_leaves=5,
)


def read(expressions: StopExpressions, pieces: list[str], include: bool = False) -> tuple[str, str | None]:
    """The text that comes out, and what ended it."""
    search, out = StopPatterns(expressions, include), ""
    for piece in pieces:
        text, matched = search.push(piece)
        out += text
        if matched is not None:
            assert search.push("more") == ("", matched) and search.flush() == ""
            return out, matched
    return out + search.flush(), None


def expected(sources: list[str], text: str, include: bool) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        for start in range(end):
            for source in sources:
                if re.fullmatch(source, text[start:end]):
                    return text[: end if include else start], source
    return text, None


@given(
    st.lists(EXPRESSIONS, min_size=1, max_size=2, unique=True),
    st.text("abAB \n", max_size=12),
    st.lists(st.integers(0, 12), max_size=4),
    st.booleans(),
)
def test_what_re_finds_first_ends_the_text_however_it_is_cut(
    sources: list[str], text: str, cuts: list[int], include: bool
):
    try:
        expressions = StopExpressions([], sources)
    except RequestError as error:
        assert any(re.fullmatch(source, "") for source in sources) or "steps" in str(error)
        return
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in pairwise(bounds)]
    found, matched = read(expressions, pieces, include)
    wanted, source = expected(sources, text, include)
    assert found == wanted and (matched is None) == (source is None)


def test_held_back_is_only_what_can_still_match():
    search = StopPatterns(StopExpressions([], ["\\n(Human|User):"]))
    shown = [search.push(piece)[0] for piece in ("Hi\n", "Hum", "or", "\nUs", "es")]
    assert shown == ["Hi", "", "\nHumor", "", "\nUses"]
    assert search.push("\nUser: x") == ("", "\\n(Human|User):")


def test_stop_strings_count_beside_expressions():
    expressions = StopExpressions(["STOP", "a.c"], ["\\d+", "ST\\w"])
    assert read(expressions, ["go STOP"]) == ("go ", "ST\\w")
    assert read(expressions, ["abc a", ".c 7"]) == ("abc ", "a.c")
    assert read(expressions, ["now 12"], include=True) == ("now 1", "\\d+")


def test_a_match_that_never_ends_is_let_go():
    search = StopPatterns(StopExpressions([], ["<.*>"]))
    out = "".join(search.push("<" + "x" * 99)[0] for _ in range(100))
    assert len(out) >= 100 * 100 - MAX_MATCH_CHARS and search.push(">")[1] is not None


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("(", "unterminated"),
        ("a*", "empty text"),
        ("x|", "empty text"),
        ("^a", "anchor"),
        ("a$", "anchor"),
        ("\\ba", "anchor"),
        ("a(?=b)", "looking"),
        ("(?<!a)b", "looking"),
        ("(a)\\1", "back-reference"),
        ("(a)?(?(1)b|c)", "back-reference"),
        ("(?>a)b", "atomic"),
        ("a*+b", "atomic"),
        ("a{1000}", "steps"),
        ("((((a?){9}){9}){9}){9}b", "steps"),
        ("(?:(?:){4294967294})x", "steps"),
        ("((){500}){500}x", "steps"),
        ("a{99999999999}", "large"),
        ("(?L)a", "flag"),
        ("(?au)a", "flags"),
    ],
    ids=str,
)
def test_what_cannot_be_searched_for_is_refused(source: str, why: str):
    with pytest.raises(RequestError, match=why) as caught:
        StopExpressions([], [source])
    assert caught.value.param == "stop_regex"


def test_no_character_costs_more_than_the_steps():
    """Of an expression that takes exponential time where it is tried out."""
    expressions = StopExpressions([], ["(a|a)*b", "(.?){9}x"])
    search = StopPatterns(expressions)
    for _ in range(50):
        search.push("a" * 10)
        assert len(search._waiting) <= MAX_SIZE
