"""The KV cache in FP8: how much fits, how close its numbers are, and what refuses it."""

import pytest
import torch

import engine.runner
from engine.attention.triton_backend import TritonAttention
from engine.config import EngineConfig
from engine.device import choose_kv_cache_dtype
from engine.errors import ConfigError
from engine.kv_cache import KvCacheSpec, clear_blocks
from engine.llm import LLM
from engine.request import SamplingParams
from tests.tiny_models import make_tiny_qwen3

CPU, FLOAT8 = torch.device("cpu"), torch.float8_e4m3fn
FIELDS = {"device": "cpu", "max_model_len": 512, "max_num_seqs": 8, "show_progress": False}
QUESTIONS = ["What is 17 + 25?", "What is 58 - 31?", "Hello", "Repeat after me: blue cat 42 zorp"]
LOGPROB_TOLERANCE = 0.2
"""Stored numbers are off by up to 1/16 each. None of a random model's log-probabilities (-4 to -8) may be off by more
than this, and their mean not by more than a quarter of it."""


@pytest.fixture(scope="module")
def answers():
    """How many blocks there are and what the demo model answers, by the cache's dtype."""
    found = {}
    for dtype in ("auto", "fp8"):
        llm = LLM("demo", dtype="float32", kv_cache_memory="4MiB", kv_cache_dtype=dtype, **FIELDS)
        params = SamplingParams(temperature=0, max_tokens=100)
        prompts = [llm.tokenizer.encode_chat([{"role": "user", "content": text}]) for text in QUESTIONS]
        found[dtype] = llm.engine.runner.num_blocks, [answer.text for answer in llm.generate(prompts, params)]
    return found


def test_a_quarter_of_the_bytes_of_float32_hold_four_times_the_blocks(answers):
    assert answers["fp8"][0] == 4 * answers["auto"][0]


def test_half_the_bytes_of_bfloat16():
    sizes = [KvCacheSpec(28, 16, 8, 128, dtype).bytes_per_token for dtype in (torch.bfloat16, FLOAT8)]
    assert sizes == [114_688, 57_344]


def test_greedy_answers_of_the_demo_model_stay_the_same(answers):
    assert "42" in answers["fp8"][1][0] and "27" in answers["fp8"][1][1]
    assert answers["fp8"][1] == answers["auto"][1]


def test_log_probabilities_stay_within_the_tolerance(tmp_path):
    make_tiny_qwen3(tmp_path, vocab_size=256, head_dim=64, initializer_range=0.1)
    prompt = [(37 * index + 11) % 256 for index in range(200)]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    found = []
    for dtype in ("auto", "fp8"):
        llm = LLM(str(tmp_path), dtype="float32", kv_cache_memory="4MiB", kv_cache_dtype=dtype, **FIELDS)
        found.append(torch.tensor([entry.logprob for entry in llm.generate([prompt], params)[0].prompt_logprobs]))
    off = (found[0] - found[1]).abs()
    assert 0 < off.max() < LOGPROB_TOLERANCE
    assert off.mean() < LOGPROB_TOLERANCE / 4


@pytest.mark.parametrize("buckets", [False, True], ids=["by lengths", "bucketed decode"])
def test_the_triton_backend_computes_the_same(tmp_path, monkeypatch, buckets):
    """Its plans, with its kernels' references in their place on a CPU."""
    make_tiny_qwen3(tmp_path, vocab_size=256, head_dim=64, num_attention_heads=4)
    config = {"dtype": "float32", "kv_cache_dtype": "fp8", "kv_cache_memory": "4MiB", "max_num_batched_tokens": 16}
    prompts = [[5, 6, 7], list(range(20, 53)), [9]]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    expected = [completion.token_ids for completion in LLM(str(tmp_path), **FIELDS, **config).generate(prompts, params)]
    monkeypatch.setattr(
        engine.runner, "create_backend", lambda model, _, staging, *rest: TritonAttention(model, staging)
    )
    llm = LLM(str(tmp_path), **FIELDS, **config)
    if buckets:
        llm.engine.runner.use_decode_graphs(llm.engine.config, capture=False)
    assert [completion.token_ids for completion in llm.generate(prompts, params)] == expected


def test_blocks_are_cleared():
    caches = KvCacheSpec(2, 4, 1, 8, FLOAT8).allocate(3, CPU)
    for cache in (cache for layer in caches for cache in layer):
        cache.view(torch.uint8).fill_(0x7F)  # NaN
    clear_blocks(caches, [0, 2])
    is_nan = [cache.float().isnan().flatten(1).any(1).tolist() for layer in caches for cache in layer]
    assert is_nan == [[False, True, False, True]] * 4


def test_gpus_without_float8_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    config = EngineConfig(kv_cache_dtype="fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match=r"NVIDIA A100 has compute capability 8.0; expected 8.9 or later"):
        choose_kv_cache_dtype(config, torch.bfloat16, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert choose_kv_cache_dtype(config, torch.bfloat16, torch.device("cuda")) == FLOAT8
