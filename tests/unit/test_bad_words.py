"""Words that must not come out, and tokens that alone may, through the whole engine."""

import pytest

from engine.bad_words import bad_word_ids
from engine.errors import RequestError
from engine.llm import LLM
from engine.request import MAX_BAD_WORD_TOKENS, EngineRequest, SamplingParams
from engine.tokenizer import Tokenizer
from engine.weights.hub import resolve_model

TOKENIZER = Tokenizer.from_dir(resolve_model("demo"))
PROMPT = "<|im_start|>user\nHello, who are you?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module", params=[False, True], ids=["in turn", "overlapped"])
def llm(request: pytest.FixtureRequest) -> LLM:
    return LLM(
        "demo",
        kv_cache_memory=16 * 2**20,
        max_num_seqs=4,
        num_threads=1,
        overlap_steps=request.param,
        show_progress=False,
    )


def complete(llm: LLM, **params) -> list[int]:
    values = {"temperature": 0, "max_tokens": 24, "ignore_eos": True} | params
    return llm.generate(PROMPT, SamplingParams(**values))[0].token_ids


def find(token_ids: list[int], word: tuple[int, ...]) -> list[int]:
    """Where a word begins."""
    return [index for index in range(len(token_ids)) if tuple(token_ids[index : index + len(word)]) == word]


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_bad_word_does_not_come_out(llm: LLM, length: int):
    plain = complete(llm)
    word = tuple(plain[6 : 6 + length])
    found = complete(llm, bad_word_ids=(word,))
    before_last = find(plain, word)[0] + length - 1
    assert find(found, word) == []
    assert found[:before_last] == plain[:before_last]


def test_no_other_tokens_than_the_allowed_come_out(llm: LLM):
    allowed = tuple(TOKENIZER.encode("0123456789"))
    assert set(complete(llm, allowed_token_ids=allowed)) <= set(allowed)
    assert len(set(complete(llm, allowed_token_ids=allowed, temperature=2.0, seed=1))) > 3


def test_words_are_tokenized_alone_and_after_a_space():
    found = bad_word_ids(TOKENIZER, ["Hello", "\n"])
    for text in ("Hello", " Hello", "\n"):
        assert tuple(TOKENIZER.encode(text)) in found
    with pytest.raises(RequestError) as caught:
        bad_word_ids(TOKENIZER, ["\ud800"])
    assert caught.value.param == "bad_words"


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"allowed_token_ids": ()}, "allowed_token_ids"),
        ({"bad_word_ids": ((1,), ())}, "bad_words"),
        ({"bad_word_ids": ((1,) * MAX_BAD_WORD_TOKENS, (1,))}, "bad_words"),
    ],
    ids=str,
)
def test_parameters_that_mean_nothing(params, param):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**params)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"allowed_token_ids": (1, 10**6)}, "allowed_token_ids"),
        ({"bad_word_ids": ((1, 10**6, 1),)}, "bad_words"),
        ({"allowed_token_ids": (TOKENIZER.token_to_id("<|im_end|>"), 7), "stop_token_ids": (7,), "min_tokens": 1},
         "allowed_token_ids"),
    ],
    ids=str,
)  # fmt: skip
def test_parameters_that_this_model_cannot_follow(llm: LLM, params, param):
    with pytest.raises(RequestError) as caught:
        llm.engine.validate(EngineRequest(request_id="r", prompt_token_ids=[1], params=SamplingParams(**params)))
    assert caught.value.param == param
