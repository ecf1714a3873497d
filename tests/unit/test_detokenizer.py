"""Incremental detokenization and stop strings: what comes out does not depend on how it came in."""

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

from engine.detokenizer import Detokenizer, StopStrings
from engine.errors import RequestError
from engine.tokenizer import Tokenizer
from tests.tiny_tokenizer import NUM_TOKENS, make_tiny_tokenizer

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "qwen3-tokenizer"
TEXTS = [
    "plain ascii, and a line\nbreak",
    "👩‍👩‍👧‍👦 and 🇫🇷 flags 👍🏽",
    "世界 こんにちは 한국어",
    "q\u0323\u0307 — Ω ﬁ \u200d \ufeff",
    "a literal \ufffd stays",
    "<think>\nwhy?\n</think>\n\nso <tool_call> it is",
    "",
]


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    make_tiny_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tiny(tiny_path):
    return Tokenizer.from_dir(tiny_path)


@pytest.fixture(scope="module")
def sentencepiece():
    """Built as Llama 2's: `▁` for spaces, `<0x0A>` for bytes, and a decoder that drops the first space."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyz,.\ufffd",
    ]
    pairs = [("▁", "a"), ("t", "h"), ("th", "e"), ("▁", "the"), ("a", "n"), ("an", "d")]
    vocabulary = {word: index for index, word in enumerate([*words, *(left + right for left, right in pairs)])}
    backend = Backend(models.BPE(vocabulary, pairs, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<s>", "</s>")])
    return Tokenizer(backend, None)


def byte_ids(tokenizer, data):
    """The tokens of single bytes."""
    found = {tokenizer.token_bytes(token_id): token_id for token_id in range(tokenizer.vocab_size)}
    return [found[bytes([byte])] for byte in data]


def chunked(items, cuts):
    edges = [0, *sorted(cuts), len(items)]
    return [items[left:right] for left, right in itertools.pairwise(edges)]


def pieces(tokenizer, chunks, **options):
    detokenizer = Detokenizer(tokenizer, **options)
    return [*(detokenizer.push(chunk) for chunk in chunks), detokenizer.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_every_split_into_two(tiny, text):
    ids = tiny.encode(text)
    assert tiny.decode(ids) == text
    for cut in range(len(ids) + 1):
        assert "".join(pieces(tiny, [ids[:cut], ids[cut:]])) == text


@pytest.mark.parametrize("text", TEXTS)
def test_never_half_a_character(tiny, text):
    """One byte at a time: after each push all whole characters are out, and nothing else."""
    ids = byte_ids(tiny, text.encode())
    detokenizer, shown = Detokenizer(tiny), ""
    for count, token_id in enumerate(ids, start=1):
        shown += detokenizer.push([token_id])
        assert shown == text.encode()[:count].decode("utf-8", "ignore")
    assert shown == text and detokenizer.flush() == ""


@pytest.mark.parametrize(
    "data",
    [
        b"\xff",
        b"\xc3",
        b"\xe4\xb8",
        b"\xf0\x9f\x98",
        b"\x80\x80",
        b"\xc0\xaf",
        b"\xed\xa0\x80",
        b"\xf4\x90\x80\x80",
        b"a\xe4\xb8b",
        b"\xf0\x9f\xe4\xb8\xad",
        b"\xe4\xb8\xad\xff\xe4\xb8\xad",
        b"\xf5\x80\x80\xc3\xa9",
        b"\xe0\x80\xaf",
    ],
)
def test_invalid_bytes(tiny, tiny_path, data):
    """The U+FFFD are those that the tokenizers library writes, for every split."""
    ids = byte_ids(tiny, data)
    expected = Backend.from_file(str(tiny_path / "tokenizer.json")).decode(ids)
    assert tiny.decode(ids) == data.decode("utf-8", "replace") == expected
    for size in range(len(ids)):
        for cuts in itertools.combinations(range(len(ids) + 1), size):
            assert "".join(pieces(tiny, chunked(ids, cuts))) == expected


@settings(deadline=None)
@given(st.lists(st.integers(-1, NUM_TOKENS + 5), max_size=40), st.data(), st.booleans())
def test_any_ids_in_any_chunks(tiny, ids, data, skip):
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=8))
    whole = tiny.decode(ids, skip_special_tokens=skip)
    assert "".join(pieces(tiny, chunked(ids, cuts), skip_special_tokens=skip)) == whole


def test_special_tokens(tiny):
    ids = tiny.encode("<|im_start|>a<|im_end|><think>b")
    assert "".join(pieces(tiny, [ids])) == "a<think>b"
    assert "".join(pieces(tiny, [ids], skip_special_tokens=False)) == "<|im_start|>a<|im_end|><think>b"


def test_special_token_inside_a_character(tiny):
    """A skipped token does not cut the bytes around it apart, as for `decode`."""
    end, (first, second) = tiny.token_to_id("<|im_end|>"), tiny.encode("Ж")
    assert "".join(pieces(tiny, [[first], [end], [second]])) == tiny.decode([first, end, second]) == "Ж"
    assert tiny.decode([first, end, second], skip_special_tokens=False) == "\ufffd<|im_end|>\ufffd"


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no Qwen3 tokenizer at {REAL}")
def test_real_vocabulary():
    tokenizer = Tokenizer.from_dir(REAL)
    for text in TEXTS:
        assert "".join(pieces(tokenizer, [[token_id] for token_id in tokenizer.encode(text)])) == text


@pytest.mark.parametrize(
    "text", ["the band", "and, the world", " two  spaces ", "the 世界 and é", "a\nb \ufffd c", "é", ""]
)
def test_sentencepiece(sentencepiece, text):
    assert not sentencepiece.is_byte_level
    ids = sentencepiece.encode(text)
    assert sentencepiece.decode(ids) == text
    for cut in range(len(ids) + 1):
        assert "".join(pieces(sentencepiece, [ids[:cut], ids[cut:]])) == text
    assert b"".join(map(sentencepiece.token_bytes, ids)) == (b" " + text.encode() if text else b"")


@settings(deadline=None)
@given(st.text(alphabet="abcthe ,.é世👍\n", max_size=30), st.data())
def test_sentencepiece_in_any_chunks(sentencepiece, text, data):
    ids = [1, *sentencepiece.encode(text), 2]
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=5))
    assert "".join(pieces(sentencepiece, chunked(ids, cuts))) == sentencepiece.decode(ids)


@settings(deadline=None)
@given(st.lists(st.integers(-1, 320), max_size=40), st.data())
def test_sentencepiece_any_ids(sentencepiece, ids, data):
    """Independent of the chunks even for bytes that are no text; without such bytes equal to the whole."""
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=5))
    whole = "".join(pieces(sentencepiece, [ids]))
    assert "".join(pieces(sentencepiece, chunked(ids, cuts))) == whole
    expected = sentencepiece.decode(ids)
    assert whole == expected or "\ufffd" in expected


def test_sentencepiece_holds_at_most_one_character(sentencepiece):
    """Bytes that never become a character come out as U+FFFD after four tokens, not at the end of a long output."""
    bad = sentencepiece.token_to_id("<0xFF>")
    detokenizer = Detokenizer(sentencepiece)
    assert [detokenizer.push([bad]) for _ in range(8)] == ["", "", "", "\ufffd" * 4] * 2


def test_sentencepiece_shows_a_character_once(sentencepiece):
    """A bad byte after a good character makes `decode` replace both; what is out stays, and only the rest follows."""
    ids = [sentencepiece.token_to_id(token) for token in ("<0xE4>", "<0xB8>", "<0xAD>", "<0xFF>", "▁the")]
    assert pieces(sentencepiece, [[token_id] for token_id in ids]) == ["", "", "中", "", "\ufffd the", ""]


# Stop strings


def reference(text, stops, include):
    """The first stop string that is complete; at the same end the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def certain(text, stops):
    """`text` without its longest end that begins a stop string."""
    lengths = range(min(len(text), max(map(len, stops), default=0)), 0, -1)
    held = next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in stops)), 0)
    return text[: len(text) - held]


letters = st.text(alphabet="ab", max_size=12)


@settings(max_examples=300, deadline=None)
@given(letters, st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=4), st.booleans(), st.data())
def test_stop_strings_in_any_chunks(text, stops, include, data):
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=6))
    expected_text, expected_stop = reference(text, stops, include)
    stop_strings, shown, so_far = StopStrings(stops, include), "", ""
    for chunk in chunked(text, cuts):
        piece, matched = stop_strings.push(chunk)
        shown, so_far = shown + piece, so_far + chunk
        if matched is None:
            assert shown == certain(so_far, stops)
        else:
            assert (shown, matched) == (expected_text, expected_stop)
    if expected_stop is None:
        shown += stop_strings.flush()
    assert shown == expected_text
    assert stop_strings.push("")[1] == expected_stop


@pytest.mark.parametrize(
    ("stops", "text", "shown", "stop"),
    [
        (["</s>"], "done</s>more", "done", "</s>"),
        (["\n\n", "\n"], "a\n\nb", "a", "\n"),
        (["bcd", "bc"], "abcd", "a", "bc"),
        (["c", "abc"], "xabc", "x", "abc"),
        (["abcd", "bc"], "abcd", "a", "bc"),
        (["aab"], "aaab", "a", "aab"),
        (["同じ"], "これは同じです", "これは", "同じ"),
    ],
)
def test_which_stop_wins(stops, text, shown, stop):
    for chunks in ([text], list(text)):
        stop_strings = StopStrings(stops)
        results = [stop_strings.push(chunk) for chunk in chunks]
        assert "".join(piece for piece, _ in results) == shown
        assert results[-1][1] == stop
        assert stop_strings.push("more") == ("", stop)
        assert stop_strings.flush() == ""


def test_holds_back_only_what_could_become_a_stop():
    stop_strings = StopStrings(["User:", "<end>"])
    assert stop_strings.push("Hello Us") == ("Hello ", None)
    assert stop_strings.push("e") == ("", None)
    assert stop_strings.push("d <e") == ("Used ", None)
    assert stop_strings.flush() == "<e"


def test_include_in_output():
    stop_strings = StopStrings(["<end>"], include_in_output=True)
    assert stop_strings.push("a<e") == ("a", None)
    assert stop_strings.push("nd>b") == ("<end>", "<end>")


def test_hostile_stop_strings():
    """Long, self-similar stop strings and a text that nearly matches all the time: linear, so done in a moment."""
    stops = ["a" * 5000 + "b", "ab" * 2500 + "c", "a" * 4999 + "c", "ba" * 2500 + "d"]
    stop_strings = StopStrings(stops)
    text = "a" * 20_000 + "ab" * 10_000
    shown = "".join(stop_strings.push(text[i : i + 3])[0] for i in range(0, len(text), 3))
    assert shown + stop_strings.flush() == text[: text.index(stops[0])]


def test_empty_stop_string():
    with pytest.raises(RequestError, match="empty string") as raised:
        StopStrings(["a", ""])
    assert raised.value.param == "stop"
