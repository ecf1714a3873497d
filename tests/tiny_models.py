"""Tiny random checkpoints, made by transformers, so that it can be the judge of what our engine computes."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from tests.tiny_tokenizer import make_tiny_tokenizer

transformers.logging.set_verbosity_error()

EOS_TOKEN_ID = 1


def make_tiny_qwen3(path: Path, **options: Any) -> Qwen3ForCausalLM:
    """`make_tiny_model` for Qwen3."""
    model = make_tiny_model(path, Qwen3Config, head_dim=options.pop("head_dim", 16), **options)
    assert isinstance(model, Qwen3ForCausalLM)
    return model


def make_tiny_model(
    path: Path,
    config_class: type[PreTrainedConfig],
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_size: str = "1GB",
    **overrides: object,
) -> PreTrainedModel:
    """Write a random checkpoint of an architecture with a tiny tokenizer to `path`; returns the model in `dtype`.

    The default shape is odd on purpose: num_attention_heads · head_dim is not hidden_size.
    """
    values: dict[str, object] = {
        "vocab_size": 512,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": EOS_TOKEN_ID,
        "initializer_range": 0.2,  # wide, so that greedy choices are no near-ties
    }
    config = config_class(**(values | overrides))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    model = model.to(dtype).eval()
    model.save_pretrained(path, max_shard_size=max_shard_size)
    make_tiny_tokenizer(path)
    return model


@torch.inference_mode()
def reference_greedy(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy continuation by transformers, end of sequence ignored."""
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


@torch.inference_mode()
def reference_logprobs(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """[len(token_ids), vocab_size] float32 log-probabilities of what follows each position."""
    return model(torch.tensor([token_ids])).logits[0].float().log_softmax(-1)
