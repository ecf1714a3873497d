"""Grammars in the engine: what may come next, compiling and its limits, and outputs that always fit."""

import json
import random
import re
import sys

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import RequestError
from engine.grammar import (
    GrammarCompiler,
    choice_grammar,
    fill_masks,
    json_schema_grammar,
    lark_grammar,
    regex_grammar,
)
from engine.llm import LLM
from engine.request import EngineRequest, FinishReason, SamplingParams
from engine.tokenizer import Tokenizer
from tests.tiny_models import make_tiny_qwen3

FIELDS = {"kv_cache_memory": "4MiB", "block_size": 4, "max_num_seqs": 8, "show_progress": False, "device": "cpu"}
EOS_TOKEN_ID = 376  # <|im_end|>; the tiny models' usual one is a quote, which JSON cannot do without
DIGITS = regex_grammar("[0-9]{4}")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("grammar")
    make_tiny_qwen3(path, eos_token_id=EOS_TOKEN_ID, initializer_range=0.02)  # it proposes anything
    return path


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return Tokenizer.from_dir(checkpoint)


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return GrammarCompiler(tokenizer.to_json(), tokenizer.vocab_size, (EOS_TOKEN_ID,))


@pytest.fixture(scope="module", params=[False, True], ids=["sequential", "overlapped"])
def llm(checkpoint, request):
    return LLM(str(checkpoint), overlap_steps=request.param, **FIELDS)


def allowed_ids(state, vocab_size) -> set[int]:
    masks = np.zeros((1, -(-vocab_size // 32)), np.int32)
    fill_masks([state], masks)
    bits = np.unpackbits(masks.view(np.uint8), bitorder="little")
    assert not bits[vocab_size:].any()
    return set(np.flatnonzero(bits).tolist())


@given(st.data())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_masks_are_those_found_by_trying_every_token(compiler, tokenizer, data):
    choices = data.draw(st.lists(st.text(alphabet='ab"\n é世t', max_size=6), min_size=1, max_size=4, unique=True))
    texts = {choice.encode() for choice in choices}
    state, written = compiler.start(choice_grammar(choices)), b""
    plain = [t for t in range(tokenizer.vocab_size) if t not in tokenizer.special_token_ids and t < 374]
    while True:
        expected = {
            t
            for t in plain
            if (piece := tokenizer.token_bytes(t)) and any(text.startswith(written + piece) for text in texts)
        } | ({EOS_TOKEN_ID} if written in texts else set())
        found = allowed_ids(state, tokenizer.vocab_size)
        # Where the next bytes are certain, their usual token stands for all ways to write them.
        is_certain = min(texts)[: len(written) + 1] == max(texts)[: len(written) + 1] != written
        assert found == expected or (is_certain and len(found) == 1 and found < expected)
        token_id = data.draw(st.sampled_from(sorted(found)))
        assert state.advance(token_id) is None
        if token_id == EOS_TOKEN_ID:
            return
        written += tokenizer.token_bytes(token_id)
        texts = {text for text in texts if text.startswith(written)}
        assert state.is_complete == (texts == {written})
        if state.is_complete:
            return


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (json_schema_grammar({"not": {}}), "not"),
        (json_schema_grammar({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (json_schema_grammar({"not": {}, "x-guidance": {"lenient": True}}), "not"),
        (json_schema_grammar({"properties": {"a": {"not": {}, "x-guidance": {"lenient": True}}}}), "not"),
        (json_schema_grammar({"$ref": "http://127.0.0.1:9/schema"}), "does not fetch"),
        (json_schema_grammar({"$ref": "file:///etc/passwd"}), "does not fetch"),
        (json_schema_grammar(False), "false"),
        (json_schema_grammar({"type": "object", "properties": {f"p{i}": {} for i in range(1000)}}), "items"),
        (regex_grammar("(?=a)b"), "look-around"),
        (regex_grammar("((a{1000}){1000}){1000}"), "too many"),
        (regex_grammar("("), "unclosed group"),
        (lark_grammar("start: s s\ns: s"), "nothing fulfils"),
        (lark_grammar("start: <no_such_token>"), "unknown special token"),
        ("neither { JSON nor Lark", "Expected"),
    ],
)
def test_grammars_that_cannot_be_used_are_refused(compiler, grammar, message):
    with pytest.raises(RequestError, match=message) as caught:
        compiler.start(grammar)
    assert caught.value.param == "grammar"
    assert "\n" not in str(caught.value)


def test_a_state_does_not_change_the_compiled_grammar(compiler, tokenizer):
    first, second = compiler.start(DIGITS), compiler.start(DIGITS)
    (three,) = tokenizer.encode("3")
    for _ in range(4):
        assert first.advance(three) is None
    assert first.is_complete
    assert not second.is_complete
    assert second.advance(EOS_TOKEN_ID) is not None


def test_compiled_grammars_are_remembered_up_to_a_limit(compiler, monkeypatch):
    monkeypatch.setattr("engine.grammar.MAX_COMPILED", 2)
    for text in ("a", "b", "a", "c"):
        compiler.start(choice_grammar([text]))
    assert list(compiler._compiled)[-2:] == [choice_grammar(["a"]), choice_grammar(["c"])]


def test_a_missing_package_is_told_when_a_grammar_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.setattr("engine.grammar.find_spec", lambda name: None)
    with pytest.raises(RequestError, match="llguidance is not installed"):
        GrammarCompiler("{}", 400, (1,)).start("start: /a/")


def json_schemas() -> st.SearchStrategy:
    """Schemas whose instances are all short."""
    small = st.integers(-50, 50)
    bounds = st.tuples(small, small).map(sorted)
    lengths = st.tuples(st.integers(0, 4), st.integers(0, 4)).map(sorted)
    constant = st.one_of(st.none(), st.booleans(), small, st.text(max_size=4))
    leaves = st.one_of(
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
        bounds.map(lambda b: {"type": "integer", "minimum": b[0], "maximum": b[1]}),
        bounds.map(lambda b: {"type": "integer", "exclusiveMinimum": b[0], "maximum": b[1] + 1}),
        lengths.map(lambda b: {"type": "string", "minLength": b[0], "maxLength": b[1]}),
        st.sampled_from(["^[a-c]{2}$", "^x?y{1,3}$", "^(ab|cd)$"]).map(lambda p: {"type": "string", "pattern": p}),
        st.sampled_from(["date", "uuid", "ipv4"]).map(lambda f: {"type": "string", "format": f}),
        st.lists(constant, min_size=1, max_size=3).map(lambda values: {"enum": values}),
        constant.map(lambda value: {"const": value}),
        st.just({"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 100}),
        st.just({"type": ["integer", "null"], "minimum": 1, "maximum": 3}),
    )

    def array(items):
        return st.builds(
            lambda item, b: {"type": "array", "items": item, "minItems": b[0], "maxItems": b[1]}, items, lengths
        )

    def tuples(items):
        return st.lists(items, min_size=1, max_size=3).map(
            lambda parts: {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}
        )

    def closed_object(items):
        properties = st.dictionaries(st.text(min_size=1, max_size=4), items, max_size=3)
        return properties.flatmap(
            lambda p: st.builds(
                lambda required: {
                    "type": "object",
                    "properties": p,
                    "required": required,
                    "additionalProperties": False,
                },
                st.lists(st.sampled_from(sorted(p)), unique=True) if p else st.just([]),
            )
        )

    def any_of(items):
        return st.lists(items, min_size=1, max_size=3).map(lambda parts: {"anyOf": parts})

    def referred(items):
        return items.map(
            lambda item: {
                "type": "array",
                "items": {"$ref": "#/$defs/item"},
                "maxItems": 2,
                "$defs": {"item": {k: v for k, v in item.items() if k != "$defs"}},
            }
        )

    nested = st.recursive(leaves, lambda s: st.one_of(array(s), tuples(s), closed_object(s), any_of(s)), max_leaves=6)
    return st.one_of(nested, referred(nested))


def assert_described(text: str, schema: dict) -> None:
    checker = jsonschema.FormatChecker()
    jsonschema.validate(json.loads(text), schema, cls=jsonschema.Draft202012Validator, format_checker=checker)


@given(schema=json_schemas(), seed=st.integers(0, 2**32))
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_tokens_drawn_from_the_masks_are_what_the_schema_describes(compiler, tokenizer, schema, seed):
    state, output, draw = compiler.start(json_schema_grammar(schema)), [], random.Random(seed)
    while not (state.is_complete or EOS_TOKEN_ID in output):
        output.append(draw.choice(sorted(allowed_ids(state, tokenizer.vocab_size))))
        assert state.advance(output[-1]) is None
    assert_described(tokenizer.decode(output), schema)


@given(schema=json_schemas(), seed=st.integers(0, 2**32), top_k=st.sampled_from([0, 5]))
@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_random_model_always_writes_what_the_schema_describes(llm, schema, seed, top_k):
    grammar = json_schema_grammar(schema)
    params = [SamplingParams(grammar=grammar, seed=seed + i, top_k=top_k, max_tokens=480) for i in range(4)]
    for completion in llm.generate([[2, 3]] * 4, params):
        if completion.finish_reason is FinishReason.LENGTH:  # objects with long names in nested arrays
            assert len(completion.token_ids) == 480
            continue
        assert completion.finish_reason is FinishReason.STOP, completion.error
        assert_described(completion.text, schema)


def test_it_works_together_with_everything_else(llm):
    """Penalties, bias, logprobs, min_tokens, bad words and neighbours without a grammar."""
    four = llm.tokenizer.encode("4")[0]
    common = {"grammar": DIGITS, "max_tokens": 20}
    params = [
        SamplingParams(**common, temperature=0),
        SamplingParams(**common, frequency_penalty=2.0, presence_penalty=2.0, repetition_penalty=1.5, temperature=0),
        SamplingParams(**common, logit_bias={four: 100.0}, logprobs=2),
        SamplingParams(**common, min_tokens=10, ignore_eos=True, top_p=0.5),
        SamplingParams(**common, bad_word_ids=((four,),), min_p=0.5),
        SamplingParams(max_tokens=20, ignore_eos=True, seed=3),
        SamplingParams(**common, allowed_token_ids=(four, EOS_TOKEN_ID)),
    ]
    alone = [llm.generate([[5, 6]], own)[0].token_ids for own in params[:2]]
    found = llm.generate([[5, 6]] * len(params), params)
    assert all(re.fullmatch("[0-9]{4}", each.text) for index, each in enumerate(found) if index != 5)
    assert [each.token_ids for each in found[:2]] == alone
    assert len(set(found[1].text)) == 4
    assert found[2].text == "4444" == found[6].text
    assert len(found[2].logprobs) == 4
    assert "4" not in found[4].text
    assert len(found[5].token_ids) == 20
    assert all(each.finish_reason is FinishReason.STOP for index, each in enumerate(found) if index != 5)


def test_a_token_limit_cuts_the_output_short(llm):
    (found,) = llm.generate([[5]], SamplingParams(grammar=DIGITS, max_tokens=3))
    assert (found.finish_reason, len(found.text)) == (FinishReason.LENGTH, 3)
    (found,) = llm.generate([[5]], SamplingParams(grammar=DIGITS, max_tokens=4))
    assert (found.finish_reason, len(found.text)) == (FinishReason.STOP, 4)


def test_a_request_that_nothing_is_left_for_ends_alone(llm):
    """The other limits leave no token that the grammar allows: never a wrong output, and not even an empty one."""
    letter = llm.tokenizer.encode("x")[0]
    requests = {
        "none": SamplingParams(grammar=DIGITS, allowed_token_ids=(letter,)),
        "eos": SamplingParams(grammar=DIGITS, allowed_token_ids=(EOS_TOKEN_ID,), temperature=0),
        "good": SamplingParams(grammar=DIGITS),
    }
    for name, params in requests.items():
        llm.engine.add_request(EngineRequest(request_id=name, prompt_token_ids=[4], params=params))
    outputs = []
    while llm.engine.has_work:
        outputs += llm.engine.step()
    last = {output.request_id: output for output in outputs if output.finish_reason is not None}
    for name in ("none", "eos"):
        assert last[name].finish_reason is FinishReason.ERROR
        assert "grammar" in last[name].error
        assert last[name].error_param == "grammar"
        assert not [output for output in outputs if output.request_id == name and output.token_ids]
    assert last["good"].finish_reason is FinishReason.STOP
    assert llm.engine.stats().num_owned_blocks == 0


def test_a_preempted_request_goes_on_where_it_was(checkpoint):
    grammar = regex_grammar("([0-9]{3}-){6}")
    params = [SamplingParams(grammar=grammar, max_tokens=40, seed=i) for i in range(6)]
    prompts = [[i + 2] * 8 for i in range(6)]
    for overlap in (False, True):
        fields = FIELDS | {"overlap_steps": overlap, "max_model_len": 48}
        roomy = LLM(str(checkpoint), **fields)
        block_bytes = 2 * 3 * 4 * 2 * 16 * 4  # keys and values, layers, tokens, heads, head size, bytes
        tight = LLM(str(checkpoint), **(fields | {"kv_cache_memory": 24 * block_bytes}))
        tight.engine._scheduler._expected_output = -1000  # admit too many
        expected = [each.text for each in roomy.generate(prompts, params)]
        assert [each.text for each in tight.generate(prompts, params)] == expected
        assert all(re.fullmatch("([0-9]{3}-){6}", text) for text in expected)
        assert tight.engine.stats().num_preemptions > 0
