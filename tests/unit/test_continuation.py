"""A request that another engine began goes on as if this one had: the same tokens, the same end, nothing twice."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.errors import RequestError
from engine.grammar import regex_grammar
from engine.llm_engine import LLMEngine
from engine.request import EngineRequest, FinishReason, SamplingParams, ThinkingBudget
from tests.tiny_models import make_tiny_qwen3

FIELDS = {"kv_cache_memory": "2MiB", "block_size": 4, "max_num_seqs": 8, "show_progress": False, "device": "cpu"}
EOS_TOKEN_ID = 376
THINKING = ThinkingBudget(num_tokens=6, closing_ids=(22, 21), opening_id=20, closing_id=21, is_open=True)
REPEATING = [5, 6, 7, 8, 9, 10, 11, 12] * 3
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.9, "top_p": 0.95},
    "top_k": {"top_k": 20, "min_p": 0.01},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.6, "frequency_penalty": 0.4, "top_k": 40},
    "greedy penalties": {"temperature": 0, "frequency_penalty": 1.0, "logit_bias": {7: 3.0}},
    "bad words": {"temperature": 0, "bad_word_ids": ((8, 9), (12,), (7, 7)), "logit_bias": {7: 3.0, 8: 3.0}},
    "stop tokens": {"stop_token_ids": tuple(range(40, 60)), "min_tokens": 5},
    "thinking budget": {"thinking": THINKING, "temperature": 0.8},
    "grammar": {"grammar": regex_grammar("[a-f]{3,9}x?[0-9]{2,12}"), "temperature": 1.5},
    "grammar with penalties": {"grammar": regex_grammar("(ab?c|de){4,}"), "frequency_penalty": 0.5},
    "logprobs": {"logprobs": 2, "top_k": 8},
    "guessable": {"temperature": 0.5, "logit_bias": {7: 6.0, 8: 6.0}},
}


@dataclass
class Outcome:
    """All that a request's outputs said."""

    token_ids: list[int] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    end: tuple[Any, ...] = ()

    def rest(self, num_tokens: int) -> "Outcome":
        """What is left to say after so many tokens."""
        return Outcome(self.token_ids[num_tokens:], self.ranks[num_tokens:], self.end)


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """One engine on which requests begin, and those on which they go on."""
    path = tmp_path_factory.mktemp("continued")
    # Large weights: tokens whose logits differ in the last bit alone are rare, and chunks of a prompt change that bit.
    make_tiny_qwen3(path, eos_token_id=EOS_TOKEN_ID, initializer_range=0.3)
    fields = FIELDS | {"model": str(path), "dtype": "float32"}
    return LLMEngine(EngineConfig(**fields)), [
        LLMEngine(EngineConfig(**fields)),
        LLMEngine(EngineConfig(**fields, overlap_steps=True, max_num_batched_tokens=16)),
        LLMEngine(EngineConfig(**fields, num_speculative_tokens=4, enable_prefix_caching=False)),
    ]


def run(engine: LLMEngine, sources: list[EngineRequest]) -> dict[str, Outcome]:
    """What comes out of requests that run together."""
    for source in sources:
        engine.add_request(source)
    outcomes = {source.request_id: Outcome() for source in sources}
    while engine.has_work:
        for output in engine.step():
            outcome = outcomes[output.request_id]
            assert not outcome.end and output.prompt_logprobs is None
            outcome.token_ids += output.token_ids
            outcome.ranks += [entry.rank for entry in output.logprobs or ()]
            if output.finish_reason is not None:
                outcome.end = (output.finish_reason, output.stop_token_id, output.error)
    return outcomes


def continued(source: EngineRequest, outcome: Outcome, num_tokens: int) -> EngineRequest:
    return EngineRequest(
        request_id=str(num_tokens),
        prompt_token_ids=source.prompt_token_ids,
        params=source.params,
        output_token_ids=outcome.token_ids[:num_tokens],
    )


@settings(max_examples=3, deadline=None, derandomize=True)
@given(
    prompt=st.one_of(st.just(REPEATING), st.lists(st.integers(0, 255), min_size=1, max_size=30)),
    seed=st.integers(0, 2**64 - 1),
    max_tokens=st.integers(2, 24),
    ignore_eos=st.booleans(),
)
@pytest.mark.parametrize("case", CASES)
def test_the_rest_is_the_same_from_every_token_on(engines, case, prompt, seed, max_tokens, ignore_eos):
    first, others = engines
    values = {"seed": seed, "max_tokens": max_tokens, "ignore_eos": ignore_eos} | CASES[case]
    values["min_tokens"] = min(values.get("min_tokens", 0), max_tokens)
    source = EngineRequest(request_id="whole", prompt_token_ids=prompt, params=SamplingParams(**values))
    whole = run(first, [source])["whole"]
    splits = range(1, len(whole.token_ids))
    for engine in others:
        before = engine.stats()
        found = run(engine, [continued(source, whole, split) for split in splits])
        assert found == {str(split): whole.rest(split) for split in splits}
        after = engine.stats()
        made = sum(len(whole.token_ids) - split for split in splits)
        assert after.num_generated_tokens - before.num_generated_tokens == made
        assert (after.num_running, after.num_owned_blocks) == (0, 0)


def test_the_beginning_is_found_in_the_cache_and_reported_as_prompt(engines):
    engine = engines[0]
    params = SamplingParams(max_tokens=20, ignore_eos=True, temperature=0)
    source = EngineRequest(request_id="a", prompt_token_ids=list(range(300, 306)), params=params)
    whole = run(engine, [source])["a"]
    before = engine.stats()
    engine.add_request(continued(source, whole, 15))
    [output] = engine.step()
    after = engine.stats()
    assert after.num_cached_prompt_tokens - before.num_cached_prompt_tokens == 20  # of the 21 it came with
    assert output.num_cached_tokens == 6  # no more than the prompt has
    assert output.token_ids == whole.token_ids[15:16]
    assert engine.abort("15")


@pytest.mark.parametrize(
    ("output", "params", "param", "message"),
    [
        ([400], {}, "output_token_ids", "token id 400, expected 0 to 399"),
        ([-1], {}, "output_token_ids", "token id -1"),
        ([5] * 4, {"max_tokens": 4}, "output_token_ids", "has 4 tokens, expected fewer than the 4 that may come"),
        ([5] * 509, {"max_tokens": None}, "output_token_ids", "has 509 tokens, expected fewer than the 509"),
        ([5, 6], {"stop_token_ids": (6,)}, "output_token_ids", "token id 6, which ends the output"),
        ([5, EOS_TOKEN_ID], {}, "output_token_ids", f"token id {EOS_TOKEN_ID}, which ends"),
        ([5], {"prompt_logprobs": 1}, "prompt_logprobs", "came with its first token"),
        ([5, 6], {"grammar": regex_grammar("[0-9]{4}")}, "output_token_ids", r"\[0\] does not fit the grammar"),
        ([16, 16], {"grammar": regex_grammar("11")}, "output_token_ids", "fulfils the grammar"),
    ],
)
def test_outputs_that_cannot_go_on_are_refused(engines, output, params, param, message):
    engine = engines[0]
    assert engine.tokenizer.encode("1") == [16]
    source = EngineRequest(
        request_id="r", prompt_token_ids=[1, 2, 3], params=SamplingParams(**params), output_token_ids=output
    )
    with pytest.raises(RequestError, match=message) as caught:
        engine.add_request(source)
    assert caught.value.param == param and not engine.has_work


def test_asyncio_callers_may_continue_too(engines):
    grammar = SamplingParams(grammar=CASES["grammar"]["grammar"], seed=3, max_tokens=12)
    source = EngineRequest(request_id="whole", prompt_token_ids=[1, 2], params=grammar)
    whole = run(engines[0], [source])["whole"]

    async def go_on() -> tuple[list[int], FinishReason | None]:
        engine = AsyncEngine(engines[0].config)
        outputs = [output async for output in engine.generate(continued(source, whole, 3))]
        with pytest.raises(RequestError, match="output_token_ids"):
            await anext(engine.generate(continued(source, Outcome([400]), 1)))
        await engine.stop()
        return [token_id for output in outputs for token_id in output.token_ids], outputs[-1].finish_reason

    assert asyncio.run(go_on()) == (whole.token_ids[3:], whole.end[0])
