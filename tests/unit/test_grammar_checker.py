"""Grammars are tried out where they hurt nobody: time, memory, crashes, what is remembered, what is refused."""

import asyncio
import json
import os
import signal
import time
from types import SimpleNamespace

import pytest

from engine.grammar import GrammarCompiler, choice_grammar, json_schema_grammar, lark_grammar, regex_grammar
from engine.tokenizer import Tokenizer, read_eos_token_ids
from engine.weights.hub import resolve_model
from serve_app import grammar_checker
from serve_app.config import Limits
from serve_app.grammar_checker import GrammarChecker
from serve_app.grammar_worker import try_grammar
from serve_app.openai.endpoint import Constraint
from serve_app.openai.errors import ApiError

DEMO = resolve_model("demo", None)
TOKENIZER = Tokenizer.from_dir(DEMO)
EOS_TOKEN_IDS = read_eos_token_ids(DEMO, TOKENIZER)
MODEL = SimpleNamespace(
    tokenizer=TOKENIZER,
    info=SimpleNamespace(vocab_size=TOKENIZER.vocab_size, eos_token_ids=EOS_TOKEN_IDS),
)
GOOD = Constraint(json_schema_grammar({"type": "object"}), "response_format")
ENDLESS = json_schema_grammar(
    {"allOf": [{"type": "string", "pattern": f".*(a|b){'.' * length}.*"} for length in range(1, 60)]}
)


@pytest.fixture(scope="module")
def compiler():
    return GrammarCompiler(TOKENIZER.to_json(), TOKENIZER.vocab_size, EOS_TOKEN_IDS)


@pytest.fixture
async def checker():
    made = GrammarChecker(Limits(grammar_compile_s=0.3))
    yield made
    if made._process is not None:
        made._process.kill()
        await made._process.wait()


def nested(depth: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "grammar",
    [
        ENDLESS,
        json_schema_grammar({"allOf": [{"type": "integer"}, *({"multipleOf": n} for n in (97, 89, 83, 101))]}),
        json_schema_grammar({"enum": [f"{i * 2654435761 % 2**32:x}" for i in range(40_000)]}),
        json_schema_grammar({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1500)}}),
        json_schema_grammar({"const": "x" * 100_000}),
        json_schema_grammar(nested(120)),
        json_schema_grammar({"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}}),
        regex_grammar("((a{1000}){1000}){1000}"),
        regex_grammar("(" * 2000 + "a" + ")" * 2000),
        lark_grammar("start: " + "(" * 3000 + '"a"' + ")" * 3000),
        lark_grammar("start: s\ns: s s"),
    ],
    ids=lambda grammar: grammar[15:60],
)
def test_hostile_grammars_end_soon(compiler, grammar):
    """Most are refused; what matters is that there is an answer, in bounded time."""
    start = time.process_time() + os.times().children_user
    found = try_grammar(compiler, grammar, 0.3)
    assert time.process_time() + os.times().children_user - start < 1
    assert "\n" not in found


def test_what_takes_too_long_is_told(compiler):
    assert "takes more than 0.1 s to compile" in try_grammar(compiler, ENDLESS, 0.1)


def test_what_takes_too_much_memory_is_told(compiler, monkeypatch):
    monkeypatch.setattr("serve_app.grammar_worker.MEMORY_BYTES", 2**20)
    assert "too much memory" in try_grammar(compiler, ENDLESS, 20)


async def test_good_ones_pass_and_bad_ones_name_the_field(checker, monkeypatch):
    unique = Constraint(json_schema_grammar({"type": "array", "uniqueItems": True}), "guided_json")
    await checker.check(GOOD, MODEL, "alice")
    with pytest.raises(ApiError, match="uniqueItems") as caught:
        await checker.check(unique, MODEL, "alice")
    assert (caught.value.status, caught.value.param) == (400, "guided_json")
    monkeypatch.setattr(checker, "_ask", None)  # both answers are remembered
    await checker.check(GOOD, MODEL, "alice")
    with pytest.raises(ApiError, match="uniqueItems"):
        await checker.check(unique, MODEL, "alice")


async def test_a_lost_process_is_replaced(checker):
    choice = Constraint(choice_grammar(["a"]), "guided_choice")
    await checker.check(GOOD, MODEL, "alice")
    os.kill(checker._process.pid, signal.SIGKILL)
    with pytest.raises(ApiError) as caught:
        await checker.check(choice, MODEL, "alice")
    assert caught.value.status == 503
    task = asyncio.create_task(checker.check(Constraint(ENDLESS, "guided_json"), MODEL, "alice"))
    await asyncio.sleep(0.05)
    task.cancel()  # its answer must not be taken for that of the next
    await asyncio.gather(task, return_exceptions=True)
    await checker.check(choice, MODEL, "alice")


async def test_the_queue_is_bounded(checker, monkeypatch):
    monkeypatch.setattr(grammar_checker, "MAX_WAITING", 2)
    await checker.check(GOOD, MODEL, "alice")
    tasks = [
        asyncio.create_task(
            checker.check(Constraint(json.dumps({"n": index}) + ENDLESS, "guided_json"), MODEL, "alice")
        )
        for index in range(3)
    ]
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert sorted(error.status for error in found) == [400, 400, 429]


async def test_one_key_cannot_take_all_turns(checker, monkeypatch):
    monkeypatch.setattr(grammar_checker, "MAX_WAITING_OF_KEY", 1)
    await checker.check(GOOD, MODEL, "alice")
    tasks = [
        asyncio.create_task(checker.check(Constraint(json.dumps({"n": index}) + ENDLESS, "guided_json"), MODEL, name))
        for index, name in enumerate(("alice", "alice", "bob", "", ""))
    ]
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [error.status for error in found] == [400, 429, 400, 400, 400]
    assert not checker._waiting
