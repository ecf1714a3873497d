"""LLMEngine and LLM: what they refuse, how they isolate, what they report."""

import json
import logging
import re

import pytest
import torch

from engine import EngineConfig, device
from engine.config import parse_bytes
from engine.errors import CheckpointError, ConfigError, QueueFullError, RequestError
from engine.llm import LLM
from engine.request import EngineRequest, FinishReason, RequestStatus, SamplingParams
from tests.tiny_models import make_tiny_qwen3

FIELDS = {"kv_cache_memory": "4MiB", "block_size": 4, "max_num_seqs": 4, "show_progress": False, "device": "cpu"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("engine")
    make_tiny_qwen3(path)
    return path


@pytest.fixture
def llm(checkpoint):
    return LLM(str(checkpoint), **FIELDS)


def request(name="r", prompt=(1, 2, 3), priority=0, **params) -> EngineRequest:
    return EngineRequest(
        request_id=name, prompt_token_ids=list(prompt), params=SamplingParams(**params), priority=priority
    )


@pytest.mark.parametrize(
    ("source", "param", "message"),
    [
        (request(prompt=()), "prompt", "no tokens"),
        (request(prompt=(1, 400)), "prompt", "token id 400, expected 0 to 399"),
        (request(prompt=(-1,)), "prompt", "token id -1"),
        (request(prompt=[1] * 512), "prompt", "512 tokens, expected fewer than the context of 512"),
        (request(prompt=[1] * 500, max_tokens=13), "max_tokens", "513, expected at most the context of 512"),
        (request(stop_token_ids=(1, 9999)), "stop_token_ids", "token id 9999"),
        (request(logit_bias={511: 1.0}), "logit_bias", "token id 511"),
    ],
)
def test_requests_that_can_never_run_are_refused(llm, source, param, message):
    with pytest.raises(RequestError, match=message) as caught:
        llm.engine.add_request(source)
    assert caught.value.param == param
    assert not llm.engine.has_work


@pytest.mark.parametrize(
    "field",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -2},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"presence_penalty": 2.5},
        {"frequency_penalty": float("inf")},
        {"max_tokens": 0},
        {"min_tokens": -1},
        {"min_tokens": 5, "max_tokens": 4},
        {"logprobs": 21},
        {"prompt_logprobs": -1},
        {"stop": ("",)},
        {"logit_bias": {3: 101.0}},
        {"seed": 2**64},
    ],
    ids=str,
)
def test_parameters_out_of_range_are_named(field):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**field)
    assert caught.value.param in field


def test_unknown_fields_are_errors():
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)
    with pytest.raises(ValueError, match="max_sequences"):
        EngineConfig(max_sequences=3)


def test_sizes_are_read():
    assert [parse_bytes(text) for text in ("4GiB", "1.5 MiB", "12", "7B")] == [2**32, 3 * 2**19, 12, 7]
    with pytest.raises(ValueError, match="'4 gigs' is no size"):
        EngineConfig(kv_cache_memory="4 gigs")


def test_queue_is_bounded(checkpoint):
    engine = LLM(str(checkpoint), max_num_waiting=2, **FIELDS).engine
    engine.add_request(request("a"))
    engine.add_request(request("b"))
    with pytest.raises(QueueFullError):
        engine.add_request(request("c"))
    with pytest.raises(RequestError, match="'a' is in use"):
        engine.add_request(request("a"))


def test_more_prompts_than_may_wait(checkpoint):
    llm = LLM(str(checkpoint), max_num_waiting=2, **FIELDS)
    completions = llm.generate([[index] for index in range(20)], SamplingParams(max_tokens=2, ignore_eos=True))
    assert [completion.prompt_token_ids for completion in completions] == [[index] for index in range(20)]
    assert all(len(completion.token_ids) == 2 for completion in completions)


def test_nan_logits_end_one_request_alone(tmp_path):
    """A token whose embedding is no number poisons its request, and no other: not beside it, not after it."""
    make_tiny_qwen3(tmp_path, tie_word_embeddings=False)
    llm = LLM(str(tmp_path), **FIELDS)
    engine, greedy = llm.engine, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    healthy = [[5, 6, 7, 8, 9, 10], [8, 9]]
    expected = [completion.token_ids for completion in llm.generate(healthy, greedy)]
    row = engine.runner.model.model.embed_tokens.weight
    before = row[3].clone()
    row[3] = float("nan")
    bad, *good = llm.generate([[5, 6, 7, 8, 3, 10, 11], *healthy], greedy)
    assert bad.finish_reason is FinishReason.ERROR and "not finite" in bad.error and bad.token_ids == []
    assert [completion.token_ids for completion in good] == expected
    row[3] = before
    # Blocks that held the poison are in use again here, and its prefix is not found.
    again = llm.generate([[5, 6, 7, 8, 3, 10, 11], *healthy, *([index] for index in range(40))], greedy)
    assert [completion.token_ids for completion in again[1:3]] == expected
    assert all(completion.finish_reason is FinishReason.LENGTH for completion in again)
    assert engine.stats().num_owned_blocks == 0
    for k_cache, v_cache in engine.runner._kv_caches:
        assert torch.isfinite(k_cache).all() and torch.isfinite(v_cache).all()


def test_states_of_a_request(llm):
    engine = llm.engine
    assert engine.request_state("r") is None
    engine.add_request(request(prompt=range(1, 10), max_tokens=2, ignore_eos=True))
    waiting = engine.request_state("r")
    assert waiting.status is RequestStatus.WAITING and waiting.num_blocks == 0
    engine.step()
    running = engine.request_state("r")
    assert running.status is RequestStatus.DECODE
    assert (running.num_computed_tokens, running.num_output_tokens, running.num_blocks) == (9, 1, 3)
    assert waiting.arrival_time <= running.first_scheduled_time <= running.first_token_time
    engine.step()
    ended = engine.request_state("r")
    assert (ended.status, ended.finish_reason, ended.num_output_tokens) == (RequestStatus.FINISHED, "length", 2)
    assert ended.finish_time >= running.first_token_time


def test_prefill_state_is_seen_in_chunks(checkpoint):
    engine = LLM(str(checkpoint), max_num_batched_tokens=4, **FIELDS).engine
    engine.add_request(request(prompt=range(1, 10)))
    engine.step()
    assert engine.request_state("r").status is RequestStatus.PREFILL
    assert engine.stats().num_prefill_tokens == 4  # 4 of 9 are done, and the last one is no wait


def test_no_text_stops_an_output_before_its_least_tokens(llm):
    def text(**params: object) -> str:
        params = {"temperature": 0, "max_tokens": 8, "ignore_eos": True} | params
        return llm.generate([[1, 2, 3]], SamplingParams(**params))[0].text

    whole = text()
    assert text(stop=(whole[0],)) == "" and text(stop=(whole[0],), min_tokens=8) == whole


def test_stop_token_and_length(llm):
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    whole = llm.generate([[1, 2, 3]], params)[0]
    assert whole.finish_reason is FinishReason.LENGTH and whole.stop_reason is None
    stop = whole.token_ids[4]
    first = whole.token_ids.index(stop)
    stopped = llm.generate(
        [[1, 2, 3]], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, stop_token_ids=(stop,))
    )[0]
    assert stopped.token_ids == whole.token_ids[: first + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == (FinishReason.STOP, stop)
    least = llm.generate(
        [[1, 2, 3]],
        SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, stop_token_ids=(stop,), min_tokens=first + 2),
    )[0]
    assert stop not in least.token_ids[: first + 2]


def test_stop_string_ends_the_output_and_frees_its_blocks(llm):
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    whole = llm.generate(["Hello"], params)[0]
    stop = whole.text[len(whole.text) // 2 :][:3]
    stopped = llm.generate(["Hello"], SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, stop=(stop,)))[0]
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert (stopped.finish_reason, stopped.stop_reason) == (FinishReason.STOP, stop)
    assert llm.engine.stats().num_owned_blocks == 0


def test_stream_equals_generate(llm):
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    assert "".join(llm.stream("Hello", params)) == llm.generate("Hello", params)[0].text


def test_leaving_a_stream_frees_its_blocks(llm):
    stream = llm.stream("Hello", SamplingParams(max_tokens=32, ignore_eos=True))
    next(stream)
    stream.close()
    assert not llm.engine.has_work and llm.engine.stats().num_owned_blocks == 0


def test_too_little_memory_is_an_error_when_a_length_was_asked_for(checkpoint, caplog):
    small = FIELDS | {"kv_cache_memory": 100 * 1152}
    with pytest.raises(ConfigError, match=r"expected at least max_model_len \(300"):
        LLM(str(checkpoint), max_model_len=300, **small)
    with caplog.at_level(logging.WARNING):
        engine = LLM(str(checkpoint), **small).engine
    assert engine.max_model_len < 512 and "max_model_len is" in caplog.text
    with pytest.raises(ConfigError, match="KV cache of 0 tokens"):
        LLM(str(checkpoint), **(FIELDS | {"kv_cache_memory": 5}))


def test_bad_checkpoints_stop_the_start_in_one_line(tmp_path, checkpoint):
    for name, text, message in (
        ("config.json", "{", "not a JSON object"),
        ("config.json", "[]", "not a JSON object"),
        ("config.json", '{"architectures": ["GPT2LMHeadModel"]}', "vocab_size"),
    ):
        for file in checkpoint.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / name).write_text(text)
        with pytest.raises(CheckpointError, match=message) as caught:
            LLM(str(tmp_path), **FIELDS)
        assert "\n" not in str(caught.value)
    config = (checkpoint / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace("Qwen3ForCausalLM", "MambaForCausalLM"))
    with pytest.raises(CheckpointError, match=r"MambaForCausalLM is not supported; expected .*Qwen3ForCausalLM"):
        LLM(str(tmp_path), **FIELDS)
    (tmp_path / "config.json").write_text(json.dumps(json.loads(config) | {"num_hidden_layers": 10**9}))
    with pytest.raises(CheckpointError, match="num_hidden_layers: Input should be less than or equal to 10000"):
        LLM(str(tmp_path), **FIELDS)


def test_dummy_weights_need_no_checkpoint(tmp_path, checkpoint):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    first, second = (
        LLM(str(tmp_path), load_format="dummy", **FIELDS).generate([[1, 2, 3]], params)[0] for _ in range(2)
    )
    assert first.token_ids == second.token_ids and len(first.token_ids) == 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_asked_for_and_missing(checkpoint):
    with pytest.raises(ConfigError, match="finds no CUDA device"):
        LLM(str(checkpoint), **(FIELDS | {"device": "cuda"}))


def test_cuda_needs_triton(monkeypatch):
    """Without it, operations would take paths for CPUs."""
    monkeypatch.setattr(device.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device, "HAS_TRITON", False)
    assert device.choose_device(EngineConfig(device="cpu")).type == "cpu"
    for choice in ("auto", "cuda"):
        with pytest.raises(ConfigError, match="CUDA needs Triton, which is not installed"):
            device.choose_device(EngineConfig(device=choice))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tensor_parallel": 2}, "the engine has no option 'tensor_parallel'; did you mean tensor_parallel_size?"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0: Input should be greater than or equal to 1"),
    ],
)
def test_a_wrong_option_is_named_on_one_line(fields: dict[str, int], message: str):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        LLM("demo", **fields)
