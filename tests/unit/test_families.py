"""The other architectures against transformers: greedy tokens and log-probabilities on random weights."""

import json

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from engine import LLM, CheckpointError, SamplingParams
from tests.tiny_models import make_tiny_model, reference_greedy, reference_logprobs

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
FAMILIES = {
    "Qwen3, sizes that the CPU's own operations serve": (
        Qwen3Config,
        {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_attention_heads": 4},
    ),
    "Qwen3, stretched by YaRN": (Qwen3Config, {"head_dim": 16, "rope_parameters": YARN_ROPE}),
    "Qwen3 MoE": (Qwen3MoeConfig, EXPERTS | {"norm_topk_prob": True}),
    "Qwen3 MoE, weights not normalised": (Qwen3MoeConfig, EXPERTS | {"norm_topk_prob": False}),
    "Qwen3 MoE, some layers dense": (Qwen3MoeConfig, EXPERTS | {"decoder_sparse_step": 2, "mlp_only_layers": [1]}),
    "Qwen2": (Qwen2Config, {"hidden_size": 96, "tie_word_embeddings": False}),
    "Llama 2": (LlamaConfig, {"hidden_size": 96, "num_key_value_heads": 6, "tie_word_embeddings": False}),
    "Llama 3": (LlamaConfig, {"hidden_size": 96, "rope_parameters": LLAMA3_ROPE}),
    "Llama, all biases": (LlamaConfig, {"hidden_size": 96, "attention_bias": True, "mlp_bias": True}),
    "Mistral": (MistralConfig, {"hidden_size": 96, "head_dim": 16, "sliding_window": None}),
    "Mistral, within its window": (MistralConfig, {"hidden_size": 96, "head_dim": 16, "sliding_window": 128}),
    "Mistral, beyond its window": (MistralConfig, {"hidden_size": 96, "head_dim": 16, "sliding_window": 9}),
    "Mistral, on the CPU's own operations": (
        MistralConfig,
        {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_attention_heads": 4, "sliding_window": 9},
    ),
    "Qwen2, a window in its last layers": (
        Qwen2Config,
        {"hidden_size": 96, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "Qwen3, a window in some layers": (
        Qwen3Config,
        {
            "head_dim": 32,
            "use_sliding_window": True,
            "sliding_window": 5,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "Qwen3 MoE, a window": (
        Qwen3MoeConfig,
        EXPERTS | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
}
PROMPTS = [[5, 6, 7], list(range(20, 90)), [3]]
FIELDS = {"kv_cache_memory": 2**22, "block_size": 4, "max_num_seqs": 8, "show_progress": False, "device": "cpu"}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_tokens_and_logprobs_equal_those_of_transformers(tmp_path, family):
    config_class, overrides = family
    reference = make_tiny_model(tmp_path, config_class, **overrides)
    llm = LLM(str(tmp_path), dtype="float32", **FIELDS)
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, prompt_logprobs=0)
    limit = llm.engine.vocab_size
    for prompt, completion in zip(PROMPTS, llm.generate(PROMPTS, params), strict=True):
        expected = reference_greedy(reference, prompt, 16)
        cut = next((index for index, token_id in enumerate(expected) if token_id >= limit), len(expected))
        assert completion.token_ids[:cut] == expected[:cut]
        if len(prompt) > 1:
            found = torch.tensor([entry.logprob for entry in completion.prompt_logprobs])
            logprobs = reference_logprobs(reference, prompt)[:, :limit].log_softmax(-1)
            torch.testing.assert_close(found, logprobs[range(len(prompt) - 1), prompt[1:]], atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    "config",
    [{}, {"max_num_batched_tokens": 16}, {"attention_backend": "torch"}, {"num_speculative_tokens": 2}],
    ids=str,
)
def test_windows_in_chunks_and_on_every_path(tmp_path, config):
    """A window of 20 over blocks of 4 and 7: prompts longer and shorter than it, decoded together."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_attention_heads": 4}
    reference = make_tiny_model(tmp_path, MistralConfig, **sizes, sliding_window=20)
    for block_size in (4, 7):
        llm = LLM(str(tmp_path), dtype="float32", **(FIELDS | config | {"block_size": block_size}))
        assert llm.engine.max_model_len > 20
        if config == {"max_num_batched_tokens": 16}:
            llm.engine.runner.use_decode_graphs(llm.engine.config, capture=False)
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        for prompt, completion in zip(PROMPTS, llm.generate(PROMPTS, params), strict=True):
            expected = reference_greedy(reference, prompt, 40)
            cut = next((index for index, token in enumerate(expected) if token >= llm.engine.vocab_size), 40)
            assert completion.token_ids[:cut] == expected[:cut]


def test_windows_that_contradict_themselves_are_clear_errors(tmp_path):
    make_tiny_model(tmp_path, Qwen3Config, head_dim=16)
    values = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries, expected 3"),
        ({"layer_types": ["sliding_attention"] * 3}, "has sliding_attention, but there is no sliding_window"),
        ({"layer_types": ["linear_attention"] * 3}, "layer_types.0"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(values | change))
        with pytest.raises(CheckpointError, match=message):
            LLM(str(tmp_path), **FIELDS)


def test_experts_without_their_sizes_are_a_clear_error(tmp_path):
    make_tiny_model(tmp_path, Qwen3MoeConfig, **EXPERTS)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"moe_intermediate_size"', '"other"'))
    with pytest.raises(CheckpointError, match="moe_intermediate_size is missing"):
        LLM(str(tmp_path), **FIELDS)
    (tmp_path / "config.json").write_text(config.replace('"num_experts_per_tok": 2', '"num_experts_per_tok": 7'))
    with pytest.raises(CheckpointError, match="num_experts_per_tok is 7, expected at most num_experts"):
        LLM(str(tmp_path), **FIELDS)
