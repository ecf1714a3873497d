"""A request's fields go before the model's defaults, and these before OpenAI's."""

import json
from pathlib import Path
from typing import Any

import pytest

from engine.errors import CheckpointError
from engine.request import SamplingParams
from engine.tokenizer import Tokenizer
from engine.weights.hub import resolve_model
from serve_app.openai.chat_protocol import ChatBody
from serve_app.openai.errors import ApiError
from serve_app.openai.sampling import GenerationDefaults, choice_params, choice_seed, sampling_params

TOKENIZER = Tokenizer.from_dir(resolve_model("demo"))


def defaults(folder: Path, **values: Any) -> GenerationDefaults:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return GenerationDefaults.from_dir(folder)


def params(model: GenerationDefaults, **fields: Any) -> SamplingParams:
    body = ChatBody(model="demo", messages=[{"role": "user", "content": "x"}], **fields)
    return sampling_params(body, model, TOKENIZER, max_tokens=body.max_tokens, logprobs=None)


def test_the_request_goes_before_the_model_and_the_model_before_openai(tmp_path: Path):
    plain, model = GenerationDefaults.from_dir(tmp_path), defaults(tmp_path, temperature=0.6, top_k=20, top_p=None)
    assert (params(plain).temperature, params(plain).top_k, params(plain).top_p) == (1.0, 0, 1.0)
    assert (params(model).temperature, params(model).top_k, params(model).top_p) == (0.6, 20, 1.0)
    own = params(model, temperature=0, top_k=-1, top_p=0.5)
    assert (own.temperature, own.top_k, own.top_p) == (0, -1, 0.5)


def test_a_model_says_how_much_to_make_at_most(tmp_path: Path):
    assert GenerationDefaults().max_tokens_within(50) is None
    assert GenerationDefaults().max_tokens_within(50, 16) == 16
    assert GenerationDefaults().max_tokens_within(5, 16) == 5
    model = defaults(tmp_path, max_new_tokens=30)
    assert (model.max_tokens_within(50, 16), model.max_tokens_within(20)) == (30, 20)


def test_penalties_have_defaults_too():
    server = GenerationDefaults(presence_penalty=1.5, frequency_penalty=-0.5)
    assert (params(server).presence_penalty, params(server).frequency_penalty) == (1.5, -0.5)
    assert params(server, presence_penalty=0).presence_penalty == 0


def test_a_model_that_does_not_sample_is_greedy(tmp_path: Path):
    assert params(defaults(tmp_path, do_sample=False, temperature=0.6)).temperature == 0


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"temperature": "hot"}', '{"top_k": 1.5}', '{"top_p": -1}', '{"max_new_tokens": 0}']
)
def test_a_broken_file_is_named(tmp_path: Path, text: str):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        GenerationDefaults.from_dir(tmp_path)


def test_stop_and_bias_take_their_forms(tmp_path: Path):
    found = params(GenerationDefaults(), stop="a", logit_bias={"5": -100, "6": 1.5}, stop_token_ids=[3])
    assert found.stop == ("a",) and found.logit_bias == {5: -100.0, 6: 1.5} and found.stop_token_ids == (3,)


def test_restrictions_take_their_forms():
    found = params(GenerationDefaults(), allowed_token_ids=[7, 5], bad_words=["cat", "dog"])
    assert found.allowed_token_ids == (7, 5)
    for word in ("cat", " cat", "dog", " dog"):
        assert tuple(TOKENIZER.encode(word)) in found.bad_word_ids
    assert params(GenerationDefaults()).allowed_token_ids is None


def test_what_only_the_engine_knows_to_be_wrong_is_the_clients_error(tmp_path: Path):
    with pytest.raises(ApiError) as caught:
        params(GenerationDefaults(), min_tokens=5, max_tokens=4)
    assert (caught.value.status, caught.value.param) == (400, "min_tokens")
    with pytest.raises(ApiError) as caught:
        choice_params(params(GenerationDefaults(), min_tokens=5), 1, max_tokens=4)
    assert (caught.value.status, caught.value.param) == (400, "min_tokens")


def test_seeds_of_choices_differ_and_the_first_is_the_requests():
    assert choice_seed(None, 3) is None
    assert choice_seed(7, 0) == 7
    assert len({choice_seed(seed, index) for seed in range(-50, 50) for index in range(50)}) == 5000
    assert all(0 <= (choice_seed(-5, index) or 0) < 2**64 for index in range(5))
