"""Experts in 8 and 4 bits: published formats and rounding on load against transformers, and what stays in memory."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from engine.errors import CheckpointError
from engine.layers.quantized_experts import QuantizedExperts
from tests.quantized_checkpoints import FORMATS, edit_config
from tests.tiny_models import make_tiny_model
from tests.unit.test_quantization import error_of, expected_logprobs, make_llm, prompt_logprobs

SIZES = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "initializer_range": 0.05, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
}  # fmt: skip
BITS = {"int8": 8, "fp8": 8, "int4": 4}


def make_experts(path, name, **overrides):
    """Write a random checkpoint in the format FORMATS[name]; returns transformers' model of the same values."""
    quantization_config, encode = FORMATS[name]
    for folder in ("stored", "wide"):
        make_tiny_model(path / folder, Qwen3MoeConfig, **(SIZES | overrides))
    stored, wide = {}, {}
    for key, tensor in load_file(path / "wide" / "model.safetensors").items():
        if re.search(r"_proj\.weight$", key):
            encoded, wide[key] = encode(tensor)
            stored |= {f"{key.removesuffix('weight')}{leaf}": value.contiguous() for leaf, value in encoded.items()}
        else:
            stored[key] = wide[key] = tensor
    save_file(stored, path / "stored" / "model.safetensors")
    save_file({key: tensor.contiguous() for key, tensor in wide.items()}, path / "wide" / "model.safetensors")
    edit_config(path / "stored", quantization_config=quantization_config)
    return AutoModelForCausalLM.from_pretrained(path / "wide").eval()


@pytest.mark.parametrize("name", ["fp8 blocks", "awq", "gptq", "compressed-tensors int8", "compressed-tensors fp8"])
def test_published_formats(tmp_path, name):
    """FP8 rounds the activations of attention, so that the outputs are not as close."""
    reference = make_experts(tmp_path, name)
    llm = make_llm(tmp_path / "stored")
    expected = expected_logprobs(reference, llm.engine.vocab_size)
    tolerance = 0.3 if "fp8" in name else 5e-3
    torch.testing.assert_close(prompt_logprobs(llm), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("scheme", BITS)
def test_rounded_when_loaded_and_kept_so(tmp_path, scheme):
    reference = make_tiny_model(tmp_path, Qwen3MoeConfig, **SIZES)
    llm = make_llm(tmp_path, quantization=scheme)
    expected = expected_logprobs(reference, llm.engine.vocab_size)
    error = (prompt_logprobs(llm) - expected).abs().mean()
    assert error < {"int8": 0.02, "fp8": 0.1, "int4": 0.4}[scheme]
    experts = [each for each in llm.engine.runner.model.modules() if isinstance(each, QuantizedExperts)]
    assert len(experts) == 4
    weights = 2 * SIZES["num_experts"] * 3 * SIZES["hidden_size"] * SIZES["moe_intermediate_size"]
    padding = 2 if scheme == "int4" else 1  # to whole spans of 256 inputs, which these sizes are half of
    stored = sum(parameter.nbytes for each in experts for parameter in each.parameters())
    assert 1 <= stored / (weights * padding * BITS[scheme] / 8) < 1.08


def test_sizes_that_do_not_fit(tmp_path):
    make_tiny_model(tmp_path, Qwen3MoeConfig, **(SIZES | {"moe_intermediate_size": 96}))
    message = error_of(lambda: make_llm(tmp_path, quantization="int4"))
    assert (
        "mlp.experts_down cannot be quantized" in message and "in_features is 96, expected a multiple of 128" in message
    )


def test_experts_that_are_left_out(tmp_path):
    make_experts(tmp_path, "compressed-tensors int8")
    config = FORMATS["compressed-tensors int8"][0]
    edit_config(tmp_path / "stored", quantization_config=config | {"ignore": ["model.layers.0.mlp.experts.1"]})
    message = error_of(lambda: make_llm(tmp_path / "stored"), CheckpointError)
    assert "leaves some of model.layers.0.mlp.experts.0.gate_proj, " in message and "… unquantized" in message
