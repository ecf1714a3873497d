"""The engine on a GPU: with graphs or without, in turn or overlapped, the same tokens, and those of transformers."""

import gc
import random

import pytest
import torch

from engine.llm import LLM
from engine.request import SamplingParams
from tests.gpu import needs_cuda
from tests.tiny_models import make_tiny_qwen3, reference_greedy

pytestmark = needs_cuda
NUM_TOKENS = 24
PROMPTS = [[random.Random(index).randrange(256) for _ in range(3 + 29 * index)] for index in range(9)]
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
VARIED = [
    SamplingParams(temperature=0.8, top_k=40, top_p=0.9, seed=1, max_tokens=NUM_TOKENS, ignore_eos=True),
    SamplingParams(temperature=1.1, min_p=0.05, seed=2, max_tokens=NUM_TOKENS - 4, ignore_eos=True),
    GREEDY,
] * 3
ONE_EDITED = [*VARIED[:8], SamplingParams(presence_penalty=0.5, logprobs=2, seed=4, max_tokens=9, ignore_eos=True)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpu")
    return path, make_tiny_qwen3(path, vocab_size=256, hidden_size=256, head_dim=64, num_attention_heads=4)


def generate(checkpoint, params, **config) -> list[list[int]]:
    llm = LLM(
        str(checkpoint[0]), dtype="float32", device="cuda", max_model_len=512,
        kv_cache_memory="64MiB", show_progress=False, **{"max_num_seqs": 7} | config,
    )  # fmt: skip
    completions = llm.generate(PROMPTS, params)
    del llm
    gc.collect()
    torch.cuda.empty_cache()
    return [completion.token_ids for completion in completions]


WAYS = {
    "eager": {"enforce_eager": True, "overlap_steps": False},
    "eager, overlapped": {"enforce_eager": True},
    "graphs": {"overlap_steps": False},
    "graphs, overlapped": {},
    "graphs, chunks of 16": {"max_num_batched_tokens": 16},
    "graphs, one at a time": {"max_num_seqs": 1},
}


@pytest.mark.parametrize("params", [VARIED, ONE_EDITED], ids=["plain", "one edited"])
def test_the_same_tokens_come_out_in_any_way(checkpoint, params):
    outputs = {name: generate(checkpoint, params, **config) for name, config in WAYS.items()}
    assert all(tokens == outputs["eager"] for tokens in outputs.values()), outputs


@pytest.mark.parametrize("config", [{}, {"enforce_eager": True}], ids=["graphs", "eager"])
def test_no_launch_waits_for_the_device(checkpoint, config):
    """Torch raises where it would; that a step's outcome is waited for, by an event, it does not count."""
    llm = LLM(
        str(checkpoint[0]), device="cuda", max_model_len=512, kv_cache_memory="64MiB", show_progress=False, **config
    )
    launch = llm.engine.runner.launch

    def strict_launch(*arguments):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    llm.engine.runner.launch = strict_launch
    completions = llm.generate(PROMPTS, ONE_EDITED)
    assert all(completion.error is None for completion in completions)


def test_greedy_tokens_equal_those_of_transformers(checkpoint):
    expected = [reference_greedy(checkpoint[1], prompt, NUM_TOKENS) for prompt in PROMPTS]
    assert generate(checkpoint, GREEDY) == expected
