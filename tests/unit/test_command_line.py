"""`python -m engine`, on the demo model."""

import io
import re

import pytest

from engine.__main__ import main

QUESTION = "<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def test_generate_streams_a_continuation(capsys):
    assert main(["generate", "demo", QUESTION, "--max-tokens", "30"]) == 0
    assert "17 + 25 = 42." in capsys.readouterr().out


def test_chat_answers_line_by_line_and_remembers(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 17 + 25?\nWhat is 12 + 30?\n"))
    assert main(["chat", "demo", "--no-thinking"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert "17 + 25 = 42." in first and "12 + 30 = 42." in second


def test_perplexity_of_a_file(capsys, tmp_path):
    expected, unexpected = tmp_path / "expected", tmp_path / "unexpected"
    expected.write_text(QUESTION + "7 + 5 = 12, so 17 + 25 = 42.<|im_end|>")
    unexpected.write_text(QUESTION + "table 99 zebra } so { 17 = = 25.<|im_end|>")
    found = []
    for file in (expected, unexpected):
        assert main(["perplexity", "demo", str(file)]) == 0
        found.append(float(re.fullmatch(r"perplexity (\S+)\n", capsys.readouterr().out)[1]))
    assert found[0] < found[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "/nowhere", "x"], "error: model '/nowhere' is not an existing directory"),
        (["generate", "demo", "x", "--temperature", "-1"], "error: "),
        (["perplexity", "demo", "/nowhere"], "error: /nowhere: cannot be read as text"),
    ],
)
def test_an_error_is_one_line_and_a_status(capsys, arguments, message):
    assert main(arguments) == 1
    output = capsys.readouterr()
    assert output.err.startswith(message) and output.err.count("\n") == 1 and not output.out
