"""Rotary tables against those of transformers, and long contexts."""

import pytest
import torch
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from engine.errors import CheckpointError
from engine.layers.rotary import build_cos_sin
from engine.model_config import ModelConfig

TYPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic, within what was trained": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn, all options": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 100,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "attention_factor": 1.25,
    },
    "yarn, other scales": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 96,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
        "truncate": False,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def both(rope: dict, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    values = {"rope_theta": 10_000.0} | rope
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    theirs = Qwen3RotaryEmbedding(Qwen3Config(max_position_embeddings=256, rope_parameters=values, **sizes))
    cos, sin = theirs(torch.zeros(1), torch.arange(num_positions)[None])
    expected = torch.cat((cos[0, :, :16], sin[0, :, :16]), dim=1)
    config = ModelConfig(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        max_position_embeddings=256,
        rope_parameters=values,
        **sizes,
    )
    return build_cos_sin(config.rope, 32, num_positions, 256, torch.device("cpu")), expected


@pytest.mark.parametrize("name", TYPES)
def test_tables_equal_those_of_transformers(name):
    ours, expected = both(TYPES[name], 256)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_dynamic_uses_the_longest_context():
    """transformers takes the length of the sequence at hand, which a server cannot: keys of all lengths are cached."""
    ours, expected = both(TYPES["dynamic, within what was trained"], 512)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def config(**rope: object) -> ModelConfig:
    return ModelConfig(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=40960,
        rope_scaling=rope,
    )


def test_stretched_contexts():
    assert config(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768).context_length == 131_072
    assert config(type="linear", factor=2.0).context_length == 81_920
    assert config(rope_type="default").context_length == 40_960


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "yarn"}, "has no factor"),
        ({"rope_type": "yarn", "factor": 0.5}, "greater than or equal to 1"),
        ({"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0}, "high_freq_factor is 4.0"),
    ],
)
def test_what_makes_no_sense_is_refused(rope, message):
    with pytest.raises(ValueError, match=message):
        config(**rope)


def test_an_unknown_type_is_named():
    with pytest.raises(CheckpointError, match="rope_type is 'spiral', expected one of 'default'"):
        build_cos_sin(config(rope_type="spiral").rope, 8, 4, 4, torch.device("cpu"))
