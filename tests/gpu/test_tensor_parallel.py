"""Two GPUs against one: the same tokens, with graphs or without, with adapters, and the end when a rank dies."""

import os
import signal

import pytest
import torch

from engine.errors import EngineDeadError
from engine.llm import LLM
from engine.request import SamplingParams
from tests.adapters import make_adapter
from tests.tiny_models import make_tiny_qwen3

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
PROMPTS = [[5, 6, 7], list(range(20, 90)), [3]]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=24, ignore_eos=True),
    SamplingParams(temperature=0.8, top_k=40, top_p=0.9, seed=1, max_tokens=24, ignore_eos=True),
    SamplingParams(presence_penalty=0.5, logprobs=2, seed=4, max_tokens=9, ignore_eos=True),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpu")
    model = make_tiny_qwen3(path, vocab_size=256, hidden_size=256, head_dim=64, num_attention_heads=4)
    for seed in (1, 2):
        make_adapter(path / "adapters" / f"a{seed}", model, seed=seed)
    return path


def make_llm(path, **config) -> LLM:
    values = {"dtype": "float32", "device": "cuda", "max_model_len": 512, "kv_cache_memory": "64MiB", "max_num_seqs": 7}
    return LLM(str(path), show_progress=False, **(values | config))


def tokens(llm: LLM) -> list[list[int]]:
    return [completion.token_ids for completion in llm.generate(PROMPTS, PARAMS)]


@pytest.mark.parametrize("config", [{}, {"enforce_eager": True}, {"overlap_steps": False}], ids=str)
def test_two_ranks_draw_what_one_does(checkpoint, config):
    one, two = make_llm(checkpoint, **config), make_llm(checkpoint, tensor_parallel_size=2, **config)
    torch.testing.assert_close(two.logits(PROMPTS[1]), one.logits(PROMPTS[1]), atol=1e-3, rtol=1e-3)
    assert tokens(two) == tokens(one)
    two.engine.close()


@pytest.mark.parametrize("config", [{}, {"enforce_eager": True}], ids=str)
def test_adapters_are_divided_too(checkpoint, config):
    """One place for two of them: the one in use makes way between steps."""
    config |= {"max_loras": 1, "lora_folder": str(checkpoint / "adapters")}
    one, two = make_llm(checkpoint, **config), make_llm(checkpoint, tensor_parallel_size=2, **config)
    expected, found = (llm.generate(PROMPTS, PARAMS, adapter=["a1", "", "a2"]) for llm in (one, two))
    assert [each.token_ids for each in found] == [each.token_ids for each in expected]
    two.engine.close()


def test_a_rank_that_is_killed_ends_the_engine(checkpoint):
    llm = make_llm(checkpoint, tensor_parallel_size=2)
    [process] = llm.engine.runner._workers._state.ranks.values()
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(EngineDeadError, match="rank 1 of 2 failed: its process was killed by signal 9"):
        tokens(llm)
