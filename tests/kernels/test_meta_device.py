"""The engine's path on a GPU, on torch's device without data: no tensor of it is on the host, and nothing reads one.

Operations refuse to mix the two devices, and values cannot be read. Kernels are launched into the void; what they
compute is shown in tests/kernels.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.interpreter import InterpretedFunction

import engine.outcome
import engine.runner
import engine.weights.dummy_checkpoint
from engine import EngineRequest, SamplingParams
from engine.attention.triton_backend import TritonAttention
from engine.config import EngineConfig
from engine.llm_engine import LLMEngine
from engine.request import MAX_LOGPROBS
from engine.sampling import table, word_table
from engine.staging import Staging
from engine.weights.dummy_checkpoint import DummyCheckpoint
from loadtest.gpu.models import Shape, write_folder

META = torch.device("meta")
SHAPE = Shape("tiny", 256, 512, 2, 4, 2, tied=True, head_dim=64, vocab=1200)
PARAMS = [
    SamplingParams(temperature=0, max_tokens=4, ignore_eos=True),
    SamplingParams(temperature=0.8, top_p=0.9, seed=1, max_tokens=5, ignore_eos=True),
    SamplingParams(presence_penalty=0.5, logprobs=MAX_LOGPROBS, logit_bias={3: 1.0}, seed=3, max_tokens=4),
    SamplingParams(bad_word_ids=((1, 2, 3), (4,)), allowed_token_ids=tuple(range(50)), seed=2, min_tokens=3),
    SamplingParams(prompt_logprobs=2, logprobs=1, logprob_token_ids=(1, 2), seed=2, max_tokens=3),
]
PLAIN = {"_qk_norm_rope_store_kernel", "_rms_norm_kernel", "_silu_and_mul_kernel", "_paged_decode_kernel"}
PLAIN |= {"_paged_attention_kernel", "maxima_kernel", "select_kernel", "count_kernel", "parts_kernel"}


class Readback:
    """Zeros in the place of results that do not exist."""

    def __init__(self, tensors):
        assert all(tensor.is_meta for tensor in tensors)
        self._tensors = tensors

    def wait(self):
        return [torch.zeros(tensor.shape, dtype=tensor.dtype) + 1 for tensor in self._tensors]


def on_meta(array, _device=None):
    if isinstance(array, torch.Tensor) and array.is_meta:
        return array
    return torch.as_tensor(np.ascontiguousarray(array)).to(META)


@pytest.fixture
def launched(monkeypatch):
    """The device, in the place of a GPU. Gives the names of the kernels launched."""
    names = set()

    def launch(kernel, *arguments, grid, warmup, **options):
        assert all(argument.is_meta for argument in arguments if isinstance(argument, torch.Tensor))
        names.add(kernel.fn.__name__)

    monkeypatch.setattr(InterpretedFunction, "run", launch)
    monkeypatch.setattr(engine.runner, "choose_device", lambda config: META)
    monkeypatch.setitem(engine.runner.STEP_TOKENS, "meta", 128)
    monkeypatch.setattr(
        engine.runner, "create_backend", lambda model, _, staging, *rest: TritonAttention(model, staging)
    )
    monkeypatch.setattr(engine.outcome, "Readback", Readback)
    monkeypatch.setattr(Staging, "send", lambda self, *arrays, into=None: [on_meta(array) for array in arrays])
    monkeypatch.setattr(DummyCheckpoint, "read", lambda self, name: torch.empty(self.tensors[name].shape, device=META))
    for module in (table, word_table):
        monkeypatch.setattr(module, "send", on_meta)
    return names


@pytest.mark.parametrize(
    ("config", "kernels"),
    [
        ({"overlap_steps": True, "kv_cache_dtype": "fp8"}, PLAIN),
        ({"quantization": "fp8"}, PLAIN | {"_quantize_fp8_kernel", "_scaled_mm_fp8_kernel"}),
        (
            {"quantization": "int4", "max_loras": 2},
            PLAIN | {"_weight_only_int4_kernel", "_widen_int4_kernel", "_shrink_kernel", "_expand_kernel"},
        ),
        ({"num_speculative_tokens": 3}, PLAIN),
    ],
    ids=["overlapped, fp8 cache", "fp8 weights", "int4 weights, adapters", "guesses"],
)
def test_nothing_is_on_the_host(tmp_path, monkeypatch, launched, config, kernels):
    path = write_folder(SHAPE, tmp_path)
    fields = {"load_format": "dummy", "kv_cache_memory": 64 << 20, "max_model_len": 512, "max_num_seqs": 8}
    with monkeypatch.context() as loading:
        # Loading may wait: quantizers ask whether weights are finite, and random ones have a generator.
        loading.setattr(torch.Tensor, "__bool__", lambda self: True)
        generators = SimpleNamespace(Generator=lambda _device: torch.Generator())
        loading.setattr(engine.weights.dummy_checkpoint, "torch", generators)
        llm = LLMEngine(EngineConfig(model=str(path), show_progress=False, **fields, **config))
    llm.runner.use_decode_graphs(llm.config, capture=False)
    for params in (PARAMS[:2], PARAMS):
        for index, own in enumerate(params):
            prompt = [(7 * token + index) % 1200 for token in range(1 + 20 * index)]
            llm.add_request(EngineRequest(request_id=str(index), prompt_token_ids=prompt, params=own))
        while llm.has_work:
            assert all(output.error is None for output in llm.step())
    assert kernels <= launched
