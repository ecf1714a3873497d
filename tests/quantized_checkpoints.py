"""Tiny quantized checkpoints in the published formats, and what transformers computes with the same values in float32.

The encoders here are written from the formats' descriptions alone and share nothing with the engine's decoders.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3ForCausalLM

from tests.tiny_models import make_tiny_qwen3

SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "initializer_range": 0.05,
}
Encoded = tuple[dict[str, torch.Tensor], torch.Tensor]
"""Tensors of one weight in the checkpoint, and the [N, K] float32 weight that they stand for."""


def compressed(weight_type: str, strategy: str = "channel", **changes: object) -> dict:
    """A compressed-tensors configuration with 8-bit weights and activations."""
    weights = {"num_bits": 8, "type": weight_type, "symmetric": True, "strategy": strategy, "dynamic": False}
    activations = {"num_bits": 8, "type": weight_type, "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if weight_type == "float" else "int-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    } | changes


def encode_fp8_blocks(weight: torch.Tensor, scale_name: str = "weight_scale_inv") -> Encoded:
    rows, columns = weight.shape
    values, wide = torch.empty(rows, columns), torch.empty(rows, columns)
    scales = torch.empty(-(-rows // 128), -(-columns // 128))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            scales[i, j] = weight[block].abs().max() / 448
            values[block] = (weight[block] / scales[i, j]).to(torch.float8_e4m3fn).float()
            wide[block] = values[block] * scales[i, j]
    return {"weight": values.to(torch.float8_e4m3fn), scale_name: scales}, wide


def encode_channels(weight: torch.Tensor, dtype: torch.dtype, scale_shape: tuple[int, ...] = (-1, 1)) -> Encoded:
    largest = weight.abs().amax(dim=1, keepdim=True) if scale_shape else weight.abs().max().reshape(1, 1)
    scale = (largest / (127 if dtype == torch.int8 else 448)).bfloat16()
    codes = weight / scale.float()
    codes = codes.round().clamp(-127, 127) if dtype == torch.int8 else codes.clamp(-448, 448)
    codes = codes.to(dtype)
    return {"weight": codes, "weight_scale": scale.reshape(scale_shape)}, codes.float() * scale.float()


def round_to_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [N, K], zeros and float16 scales [N, K / 128], and the float32 weight that they stand for."""
    groups = weight.unflatten(1, (-1, 128))
    low, high = groups.amin(2), groups.amax(2)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales.float()).round().clamp(0, 15)
    codes = (groups / scales.float()[..., None] + zeros[..., None]).round().clamp(0, 15)
    wide = (codes - zeros[..., None]) * scales.float()[..., None]
    return codes.flatten(1).long(), zeros.long(), scales, wide.flatten(1)


def pack_words(numbers: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """[rows, 8 · words] numbers of 4 bits → int32 [rows, words]: nibble i of a word is number order[i] of its eight."""
    words = torch.zeros(numbers.shape[0], numbers.shape[1] // 8, dtype=torch.int64)
    for nibble, position in enumerate(order):
        words |= numbers[:, position::8] << (4 * nibble)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def encode_awq(weight: torch.Tensor) -> Encoded:
    codes, zeros, scales, wide = round_to_int4(weight)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {"qweight": pack_words(codes.t(), order), "qzeros": pack_words(zeros.t(), order), "scales": scales.t()}
    return tensors, wide


def encode_gptq(weight: torch.Tensor, zero_offset: int = 1) -> Encoded:
    codes, zeros, scales, wide = round_to_int4(weight)
    tensors = {
        "qweight": pack_words(codes, tuple(range(8))).t(),
        "qzeros": pack_words((zeros.t() - zero_offset) % 16, tuple(range(8))),
        "scales": scales.t(),
        "g_idx": (torch.arange(weight.shape[1]) // 128).int(),
    }
    return tensors, wide


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": False}
FORMATS: dict[str, tuple[dict, Callable[[torch.Tensor], Encoded]]] = {
    "fp8 blocks": (
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        encode_fp8_blocks,
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "modules_to_not_convert": None},
        encode_awq,
    ),
    "gptq": (GPTQ, encode_gptq),
    "gptq_v2": (GPTQ | {"checkpoint_format": "gptq_v2"}, lambda weight: encode_gptq(weight, 0)),
    "compressed-tensors fp8": (compressed("float"), lambda weight: encode_channels(weight, torch.float8_e4m3fn)),
    "compressed-tensors fp8, a scale a tensor": (
        compressed("float", "tensor"),
        lambda weight: encode_channels(weight, torch.float8_e4m3fn, ()),
    ),
    "compressed-tensors int8": (compressed("int"), lambda weight: encode_channels(weight, torch.int8)),
}


def make_quantized(path: Path, name: str, seed: int = 0, **overrides: object) -> Qwen3ForCausalLM:
    """Write a random checkpoint in the format FORMATS[name]; returns the model with the same values in float32."""
    quantization_config, encode = FORMATS[name]
    model = make_tiny_qwen3(path, seed=seed, **(SHAPE | overrides))
    tensors: dict[str, torch.Tensor] = {}
    ignored = quantization_config.get("ignore", [])
    for key, tensor in load_file(path / "model.safetensors").items():
        if re.search(r"_proj\.weight$", key) and key.removesuffix(".weight") not in ignored:
            encoded, wide = encode(tensor)
            model.get_parameter(key).data = wide.contiguous()
            tensors |= {f"{key.removesuffix('weight')}{leaf}": value.contiguous() for leaf, value in encoded.items()}
        else:
            tensors[key] = tensor
    save_file(tensors, path / "model.safetensors")
    edit_config(path, quantization_config=quantization_config)
    return model


def edit_config(path: Path, **changes: object) -> None:
    """Change fields of config.json."""
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(path: Path, **changes: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Replace each tensor whose name ends so by what the function makes of it; None removes it."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    for ending, change in changes.items():
        name = next(name for name in tensors if name.endswith(f".{ending.replace('__', '.')}"))
        changed = change(tensors.pop(name))
        if changed is not None:
            tensors[name] = changed.contiguous()
    save_file(tensors, file)
