"""Contexts of a hundred thousand tokens: in bounded memory on a CPU, and YaRN's stretch to 131,072."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import Qwen3Config

from engine.model_config import ModelConfig
from tests.tiny_models import make_tiny_model

ROOT = Path(__file__).parents[2]
NUM_TOKENS = 100_000
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32_768}
SIZES = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 32_768, "rope_parameters": YARN,
}  # fmt: skip

RUN = """
import resource, sys
from engine import LLM, SamplingParams

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

llm = LLM(sys.argv[1], device="cpu", dtype="float32", kv_cache_memory="64MiB", max_num_seqs=1, num_threads=1,
          max_num_batched_tokens=2048, show_progress=False)
params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
llm.generate([[5 + i % 300 for i in range(4096)]], params)
before = peak()
completion = llm.generate([[7 + i % 300 for i in range(int(sys.argv[2]))]], params)[0]
print(llm.engine.max_model_len, len(completion.token_ids), peak() - before)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("long")
    make_tiny_model(path, Qwen3Config, **SIZES)
    return path


def test_a_prompt_of_100k_tokens_runs_in_bounded_memory(checkpoint):
    """In a process of its own, whose peak is its own. The KV cache of the prompt is 13 MB; a mask of all its pairs
    would be 10 GB, and of one chunk's 200 MB."""
    command = [sys.executable, "-c", RUN, str(checkpoint), str(NUM_TOKENS)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    context, num_tokens, growth = map(int, result.stdout.split())
    assert context == 131_072 and num_tokens == 4
    assert growth < 150 * 2**20, f"memory grew by {growth / 2**20:.0f} MiB"


def test_yarn_stretches_to_131072(checkpoint):
    config = ModelConfig.from_dir(checkpoint)
    assert config.rope.rope_type == "yarn" and config.context_length == 131_072
