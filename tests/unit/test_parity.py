"""Our model against transformers on the same random weights: logits, log-probabilities and greedy tokens."""

import math

import pytest
import torch

from engine.errors import RequestError
from engine.llm import LLM
from engine.request import SamplingParams
from tests.tiny_models import make_tiny_qwen3, reference_greedy, reference_logprobs

SHAPES = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "multi-query": {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 24},
    "no grouping": {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "hidden_size": 64},
    "wide heads": {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 128, "hidden_size": 32},
    "one layer, high theta": {"num_hidden_layers": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 5e6}},
    "attention bias": {"attention_bias": True},
    "odd sizes": {"hidden_size": 52, "intermediate_size": 70, "vocab_size": 517, "head_dim": 10},
}
PROMPTS = [[5, 6, 7], [11] * 17, list(range(20, 90)), [3], list(range(100, 133))]


def make_llm(path, **config) -> LLM:
    values = {"kv_cache_memory": 2**22, "block_size": 4, "max_num_seqs": 8, "show_progress": False, "device": "cpu"}
    return LLM(str(path), **(values | config))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_greedy_tokens_equal_in_float32(tmp_path, shape):
    reference = make_tiny_qwen3(tmp_path, **shape)
    llm = make_llm(tmp_path, dtype="float32")
    completions = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))
    limit = llm.engine.vocab_size
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        expected = reference_greedy(reference, prompt, 24)
        # Past the tokenizer's vocabulary, ours has no choice that transformers has.
        cut = next((index for index, token_id in enumerate(expected) if token_id >= limit), len(expected))
        assert completion.token_ids[:cut] == expected[:cut]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.15), ("float16", 0.05)], ids=str)
def test_prompt_logprobs_equal(tmp_path, dtype, tolerance):
    reference = make_tiny_qwen3(tmp_path, dtype=getattr(torch, dtype), initializer_range=0.05)
    llm = make_llm(tmp_path, dtype=dtype)
    prompt = list(range(20, 90))
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=3, logprobs=3)
    completion = llm.generate([prompt], params)[0]
    logits = reference(torch.tensor([prompt])).logits[0].float()
    expected = logits[:, : llm.engine.vocab_size].log_softmax(-1)
    found = [entry.logprob for entry in completion.prompt_logprobs]
    wanted = [expected[position, prompt[position + 1]].item() for position in range(len(prompt) - 1)]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), atol=tolerance, rtol=0)
    last = completion.logprobs[0]
    torch.testing.assert_close(torch.tensor(last.top_logprobs), expected[-1].topk(3).values, atol=tolerance, rtol=0)


def test_prompt_logprobs_survive_chunks_and_preemption(tmp_path):
    reference = make_tiny_qwen3(tmp_path)
    llm = make_llm(
        tmp_path, dtype="float32", max_num_batched_tokens=16, max_model_len=64, kv_cache_memory=64 * 1152 * 2
    )
    prompts = [[index, *range(30, 60)] for index in range(6)]
    params = SamplingParams(temperature=0, max_tokens=30, prompt_logprobs=0, ignore_eos=True)
    llm.engine._scheduler._expected_output = 0  # admit too many, so that some are preempted
    completions = llm.generate(prompts, params)
    assert llm.engine.stats().num_preemptions > 0
    for prompt, completion in zip(prompts, completions, strict=True):
        limit = llm.engine.vocab_size
        logits = reference(torch.tensor([prompt])).logits[0].float()[:, :limit].log_softmax(-1)
        wanted = logits[range(len(prompt) - 1), prompt[1:]]
        found = torch.tensor([entry.logprob for entry in completion.prompt_logprobs])
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def test_output_logprobs_equal(tmp_path):
    reference = make_tiny_qwen3(tmp_path)
    llm = make_llm(tmp_path, dtype="float32")
    prompt = [7, 8, 9]
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=20, logprobs=2, ignore_eos=True)
    completion = llm.generate([prompt], params)[0]
    logits = reference(torch.tensor([prompt + completion.token_ids])).logits[0].float()
    expected = logits[:, : llm.engine.vocab_size].log_softmax(-1)
    for offset, entry in enumerate(completion.logprobs):
        assert entry.token_id == completion.token_ids[offset]
        row = expected[len(prompt) - 1 + offset]
        assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-4)
        assert entry.rank == 1 + int((row > row[entry.token_id]).sum())


def test_sharded_checkpoint_equals_single_file(tmp_path):
    make_tiny_qwen3(tmp_path / "one")
    make_tiny_qwen3(tmp_path / "many", max_shard_size="40KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    one, many = (make_llm(tmp_path / name).generate(PROMPTS, params) for name in ("one", "many"))
    assert [completion.token_ids for completion in one] == [completion.token_ids for completion in many]


def test_reference_logprobs_helper_matches_generate(tmp_path):
    reference = make_tiny_qwen3(tmp_path)
    tokens = reference_greedy(reference, [5, 6, 7], 8)
    logprobs = reference_logprobs(reference, [5, 6, 7, *tokens])
    assert logprobs[2:-1].argmax(-1).tolist() == tokens


@pytest.mark.parametrize("chunk", [8, 1024])
def test_logits_of_all_positions_equal(tmp_path, chunk):
    reference = make_tiny_qwen3(tmp_path)
    llm = make_llm(tmp_path, dtype="float32", max_num_batched_tokens=chunk)
    prompt = list(range(20, 90))
    found = llm.logits(prompt)
    expected = reference(torch.tensor([prompt])).logits[0, :, : llm.engine.vocab_size]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_perplexity_is_that_of_the_reference(tmp_path):
    """Over a text of several windows."""
    reference = make_tiny_qwen3(tmp_path)
    llm = make_llm(tmp_path, dtype="float32", max_model_len=33)
    text = [5 + index % 90 for index in range(101)]
    surprise, count = 0.0, 0
    for start in range(0, 101, 32):
        window = text[start : start + 32]
        logprobs = reference_logprobs(reference, window)[:, : llm.engine.vocab_size].log_softmax(-1)
        surprise -= logprobs[range(len(window) - 1), window[1:]].sum().item()
        count += len(window) - 1
    assert llm.perplexity(text) == pytest.approx(math.exp(surprise / count), rel=1e-4)
    with pytest.raises(RequestError, match="has 1 tokens, expected at least 2"):
        llm.perplexity([5])
