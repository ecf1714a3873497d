"""The whole engine through the interpreter: every kernel that a decode or prefill step launches, in its place."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import engine.runner
import kernels.backend
from engine.attention.triton_backend import TritonAttention
from engine.llm import LLM
from engine.request import SamplingParams
from tests.tiny_models import make_tiny_qwen3, reference_greedy

PROMPTS = [[5, 6, 7], list(range(20, 53)), [9]]
GREEDY = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.9, top_k=50, top_p=0.9, seed=3, max_tokens=3, ignore_eos=True)
PENALIZED = SamplingParams(
    repetition_penalty=1.4, presence_penalty=0.5, seed=4, logprobs=2, max_tokens=3, ignore_eos=True
)

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero"}
"""Operations that, on a GPU, wait for the device to know a value or a shape."""


class NoWait(TorchDispatchMode):
    """Refuses operations for which the host would have to wait."""

    num_operations = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.num_operations += 1
        name = operation.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in WAITING or masks:
            raise RuntimeError(f"{operation} would wait for the device")
        return operation(*args, **(kwargs or {}))


FIELDS = {
    "dtype": "float32", "device": "cpu", "max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 24,
    "kv_cache_memory": "8MiB", "show_progress": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("interpreted")
    shape = {"head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    return path, make_tiny_qwen3(path, vocab_size=256, hidden_size=64, **shape)


@pytest.fixture
def make_llm(checkpoint, monkeypatch):
    def make(**config) -> LLM:
        monkeypatch.setattr(
            engine.runner, "create_backend", lambda model, _, staging, *rest: TritonAttention(model, staging)
        )
        return LLM(str(checkpoint[0]), **FIELDS, **config)

    return make


def test_tokens_equal_those_of_transformers_and_of_the_sampler(checkpoint, make_llm, monkeypatch):
    """Overlapped steps with sampling inside, bucketed as CUDA graphs are, against eager ones that torch samples for."""
    llm = make_llm(overlap_steps=True)
    llm.engine.runner.use_decode_graphs(llm.engine.config, capture=False)
    params = [GREEDY, PENALIZED, SAMPLED]
    launch, no_wait = llm.engine.runner.launch, NoWait()

    def launch_without_wait(*arguments):
        with no_wait:
            return launch(*arguments)

    monkeypatch.setattr(llm.engine.runner, "launch", launch_without_wait)
    outputs = [completion.token_ids for completion in llm.generate(PROMPTS, params)]
    assert no_wait.num_operations > 100
    assert outputs[0] == reference_greedy(checkpoint[1], PROMPTS[0], 3)

    monkeypatch.undo()
    monkeypatch.setattr(kernels.backend, "_INTERPRETED", False)
    by_torch = LLM(str(checkpoint[0]), **FIELDS).generate(PROMPTS, params)
    assert outputs == [completion.token_ids for completion in by_torch]
