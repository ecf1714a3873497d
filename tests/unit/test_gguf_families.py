"""GGUF files of the other architectures, written as the usual converters write them, against transformers."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, Qwen2Config, Qwen3MoeConfig

from engine import LLM, CheckpointError
from engine.layers.quantized_experts import QuantizedExperts
from engine.layers.quantized_linear import BlockLinear, Q4Linear, Q8Linear
from engine.weights import gguf_quantized
from engine.weights.gguf_checkpoint import GgufCheckpoint
from engine.weights.gguf_folder import gguf_folder
from kernels.cpu_build import load_library
from loadtest.demo_gguf import DEMO, tokens_and_kinds
from tests.tiny_models import make_tiny_model

F32, Q8_0 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 32, "norm_topk_prob": True
}  # fmt: skip
FAMILIES = {
    "qwen2": (gguf.MODEL_ARCH.QWEN2, Qwen2Config, {"tie_word_embeddings": False}),
    "llama": (gguf.MODEL_ARCH.LLAMA, LlamaConfig, {}),
    "llama, stretched": (gguf.MODEL_ARCH.LLAMA, LlamaConfig, {"rope_parameters": LLAMA3_ROPE}),
    "qwen3moe": (gguf.MODEL_ARCH.QWEN3MOE, Qwen3MoeConfig, EXPERTS),
}
PROMPT = list(range(20, 60))


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    load_library()
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setattr(Path, "home", lambda: home)


def interleave(values, num_heads):
    """As the converter reorders rows of q and k of Llama."""
    return values.reshape(num_heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def rope_divisors(rope, head_dim):
    """As the converter works them out: by wavelengths."""
    divisors = []
    for index in range(head_dim // 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (2 * index / head_dim)
        original, low, high = (
            rope["original_max_position_embeddings"],
            rope["low_freq_factor"],
            rope["high_freq_factor"],
        )
        if wavelength < original / high:
            divisors.append(1.0)
        elif wavelength > original / low:
            divisors.append(rope["factor"])
        else:
            smooth = (original / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(divisors, dtype=np.float32)


def write(folder, family, kind=F32, **changes):
    """A tiny random model as a GGUF file. Returns its path and transformers' model."""
    architecture, config_class, overrides = FAMILIES[family]
    tokens, kinds = tokens_and_kinds()
    reference = make_tiny_model(
        folder / "made", config_class, vocab_size=len(tokens), **(SIZES | overrides | changes.get("sizes", {}))
    )
    config = json.loads((folder / "made" / "config.json").read_text()) | overrides | changes.get("sizes", {})
    writer = gguf.GGUFWriter(folder / "model.gguf", gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_context_length(512)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope["rope_theta"])
    if "num_experts" in overrides:
        writer.add_key_length(config["head_dim"])
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe" if architecture == gguf.MODEL_ARCH.LLAMA else "qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_bos_token_id(tokens.index("<|im_start|>"))
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    stacked: dict[str, list[np.ndarray]] = {}
    for name, tensor in sorted(load_file(folder / "made" / "model.safetensors").items()):
        values = tensor.float().numpy()
        if ".experts." in name:
            layer, _, rest = name.partition(".experts.")
            stacked.setdefault(f"{layer}.experts.{rest.split('.', 1)[1]}", []).append(values)
            continue
        if architecture == gguf.MODEL_ARCH.LLAMA and ("q_proj" in name or "k_proj" in name):
            heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            values = interleave(values, heads)
        add(writer, names, name, values, changes.get("kinds", {}).get(name.split(".")[-2], kind))
    for name, matrices in stacked.items():
        add(writer, names, name, np.stack(matrices), changes.get("kinds", {}).get(name.split(".")[-2], kind))
    if rope["rope_type"] == "llama3":
        head_dim = config["hidden_size"] // config["num_attention_heads"]
        divisors = rope_divisors(rope, head_dim) * changes.get("divisors", 1.0)
        writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "model.gguf", reference


def add(writer, names, name, values, kind):
    used = F32 if values.ndim == 1 or "mlp.gate." in name else kind
    gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
    writer.add_tensor(gguf_name, gguf.quants.quantize(values, used), raw_dtype=used)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(tmp_path, family):
    path, reference = write(tmp_path, family)
    llm = LLM(str(path), dtype="float32", kv_cache_memory=2**22, show_progress=False, device="cpu")
    with torch.inference_mode():
        expected = reference(torch.tensor([PROMPT])).logits[0]
    torch.testing.assert_close(llm.logits(PROMPT), expected, atol=1e-4, rtol=1e-3)
    encoded = llm.tokenizer.encode("a 12345 b", add_special_tokens=True)
    assert (encoded[0] == llm.tokenizer.token_to_id("<|im_start|>")) == family.startswith("llama")


KINDS = {name: gguf.GGMLQuantizationType[name] for name in ("Q8_0", "Q4_0", "F16")}
BLOCK_LAYERS = {"Q8_0": Q8Linear, "Q4_0": Q4Linear}


def gguf_logits(path, dtype="float32"):
    llm = LLM(str(path), dtype=dtype, kv_cache_memory=2**22, show_progress=False, device="cpu")
    return llm.logits(PROMPT), llm.engine.runner.model


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3moe"])
def test_logits_of_kept_blocks_are_those_of_dequantized_ones(tmp_path, monkeypatch, family, kind):
    """Biases of Qwen2, reordered rows of Llama, experts, once in two types: layers compute with the file's codes."""
    kinds = {"down_proj": KINDS["Q8_0"]} if family == "qwen3moe" else {}
    path, _ = write(tmp_path, family, KINDS[kind], kinds=kinds)
    kept, model = gguf_logits(path)
    narrow, _ = gguf_logits(path, "bfloat16")
    layers = [name for name, module in model.named_modules() if type(module) is BLOCK_LAYERS[kind]]
    expected = ["qkv_proj", "o_proj"] + (["gate_up_proj", "down_proj"] if family != "qwen3moe" else [])
    assert {name.rpartition(".")[2] for name in layers} == set(expected)
    assert len(layers) == len(expected) * len(model.model.layers)
    experts = [module.weight.dtype for module in model.modules() if isinstance(module, QuantizedExperts)]
    dtypes = [BLOCK_LAYERS[kind].codes_dtype, torch.int8] if family == "qwen3moe" else []
    assert experts == dtypes * len(model.model.layers)
    monkeypatch.setattr(gguf_quantized, "GGUF_BLOCKS", {})
    wide, model = gguf_logits(path)
    assert not any(isinstance(module, BlockLinear | QuantizedExperts) for module in model.modules())
    torch.testing.assert_close(kept, wide, atol=1e-4, rtol=1e-4)
    assert (narrow.float() - wide).abs().mean() < 0.05 * wide.abs().mean()


def test_quantized_experts_are_read_one_by_one(tmp_path):
    """The inner width is 32, a block of Q8_0."""
    path, _ = write(tmp_path, "qwen3moe", Q8_0)
    checkpoint = GgufCheckpoint(path, torch.float32)
    original = load_file(tmp_path / "made" / "model.safetensors")
    assert set(checkpoint.tensors) == set(original)
    for name, tensor in original.items():
        error = (checkpoint.read(name) - tensor).abs().max()
        assert error <= tensor.abs().max() / 127, name


def test_frequencies_that_are_not_llama_3s_are_refused(tmp_path):
    path, _ = write(tmp_path, "llama, stretched", divisors=np.linspace(1, 2, 8))
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight is not as in Llama 3"):
        gguf_folder(path)
