"""Quantized models against transformers with the same values in float32, what they keep in memory, what is refused."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from engine.config import EngineConfig
from engine.errors import CheckpointError, ConfigError
from engine.layers.quantized_linear import Int4Linear, QuantizedLinear
from engine.llm import LLM
from engine.model_config import ModelConfig
from engine.request import SamplingParams
from engine.weights.quantization import choose_quantization
from kernels.quantize_weights import dequantize_int4_group
from tests.quantized_checkpoints import (
    FORMATS,
    GPTQ,
    SHAPE,
    compressed,
    edit_config,
    edit_tensors,
    encode_channels,
    make_quantized,
    round_to_int4,
)
from tests.tiny_models import make_tiny_qwen3

PROMPT = list(range(20, 60))
CPU = torch.device("cpu")


def make_llm(path, **config) -> LLM:
    values = {"kv_cache_memory": 2**21, "max_num_seqs": 4, "show_progress": False, "device": "cpu", "dtype": "float32"}
    return LLM(str(path), **(values | config))


def prompt_logprobs(llm: LLM, prompt=PROMPT) -> torch.Tensor:
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    return torch.tensor([entry.logprob for entry in llm.generate([prompt], params)[0].prompt_logprobs])


@torch.inference_mode()
def expected_logprobs(reference, vocab_size: int, prompt=PROMPT) -> torch.Tensor:
    logits = reference(torch.tensor([prompt])).logits[0].float()[:, :vocab_size].log_softmax(-1)
    return logits[range(len(prompt) - 1), prompt[1:]]


def round_activations(model, group_size: int | None):
    """Make transformers' linear layers round what they get to FP8, each token with a scale or one each `group_size`."""

    def round_input(_, inputs):
        x = inputs[0].unflatten(-1, (-1, group_size or inputs[0].shape[-1]))
        scale = x.abs().amax(-1, keepdim=True) / 448
        return ((x / scale).to(torch.float8_e4m3fn).float() * scale).flatten(-2)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(round_input)


def error_of(action, kind=CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


# ---- parity ----


@pytest.mark.parametrize("name", FORMATS)
def test_published_formats_compute_what_their_values_say(tmp_path, name):
    reference = make_quantized(tmp_path, name, tie_word_embeddings=name != "awq")
    if "fp8" in name:
        plain = copy.deepcopy(reference)
        round_activations(reference, 128 if "blocks" in name else None)
    llm = make_llm(tmp_path)
    found = prompt_logprobs(llm)
    torch.testing.assert_close(found, expected_logprobs(reference, llm.engine.vocab_size), atol=5e-3, rtol=0)
    if "fp8" in name:  # without the rounding of activations too, though not as closely
        torch.testing.assert_close(found, expected_logprobs(plain, llm.engine.vocab_size), atol=0.3, rtol=0)


def test_attention_bias_and_base_model_names(tmp_path):
    reference = make_quantized(tmp_path, "compressed-tensors int8", attention_bias=True)
    torch.nn.init.normal_(reference.model.layers[0].self_attn.q_proj.bias)
    edit_tensors(tmp_path, self_attn__q_proj__bias=lambda _: reference.model.layers[0].self_attn.q_proj.bias.data)
    llm = make_llm(tmp_path)
    expected = expected_logprobs(reference, llm.engine.vocab_size)
    torch.testing.assert_close(prompt_logprobs(llm), expected, atol=1e-3, rtol=0)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    torch.testing.assert_close(prompt_logprobs(make_llm(tmp_path)), expected, atol=1e-3, rtol=0)


def test_modules_that_are_not_converted_stay_as_they_are(tmp_path):
    names = ["q_proj", "k_proj", "v_proj"]
    ignore = ["lm_head", "model.layers.1.mlp.down_proj", *(f"model.layers.0.self_attn.{name}" for name in names)]
    FORMATS["ignoring"] = compressed("int", ignore=ignore), lambda weight: encode_channels(weight, torch.int8)
    reference = make_quantized(tmp_path, "ignoring")
    del FORMATS["ignoring"]
    llm = make_llm(tmp_path)
    layers = llm.engine.runner.model.model.layers
    assert not isinstance(layers[0].self_attn.qkv_proj, QuantizedLinear)
    assert isinstance(layers[1].self_attn.qkv_proj, QuantizedLinear)
    assert not isinstance(layers[1].mlp.down_proj, QuantizedLinear)
    expected = expected_logprobs(reference, llm.engine.vocab_size)
    torch.testing.assert_close(prompt_logprobs(llm), expected, atol=1e-3, rtol=0)
    patterns = [r"re:.*layers\.0\.self_attn\.[qkv]_proj$", "model.layers.1.mlp.down_proj"]
    edit_config(tmp_path, quantization_config=compressed("int", ignore=patterns))
    torch.testing.assert_close(prompt_logprobs(make_llm(tmp_path)), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8"])
def test_rounding_when_loaded(tmp_path, scheme, tied):
    reference = make_tiny_qwen3(tmp_path, max_shard_size="300KB", tie_word_embeddings=tied, **SHAPE)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    for name, module in reference.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            weight = module.weight.data
            dtype = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}.get(scheme)
            if dtype is None:
                module.weight.data = round_to_int4(weight)[3]
            else:
                scale = weight.abs().amax(1, keepdim=True) / (127 if scheme == "int8" else 448)
                rounded = (weight / scale).round() if scheme == "int8" else weight / scale
                module.weight.data = rounded.to(dtype).float() * scale
    if scheme == "fp8":
        round_activations(reference, None)
    llm = make_llm(tmp_path, quantization=scheme)
    model = llm.engine.runner.model
    assert all(isinstance(layer.mlp.gate_up_proj, QuantizedLinear) for layer in model.model.layers)
    assert model.model.embed_tokens.weight.dtype == model.model.norm.weight.dtype == torch.float32
    assert tied or model.lm_head.weight.dtype == torch.float32
    expected = expected_logprobs(reference, llm.engine.vocab_size)
    torch.testing.assert_close(prompt_logprobs(llm), expected, atol=5e-3, rtol=0)


@pytest.mark.parametrize("name", ["awq", "compressed-tensors int8", "fp8 blocks"])
def test_bfloat16_is_close_to_float32(tmp_path, name):
    make_quantized(tmp_path, name)
    wide, narrow = (prompt_logprobs(make_llm(tmp_path, dtype=dtype)) for dtype in ("float32", "bfloat16"))
    assert (wide - narrow).abs().max() < 0.3 and (wide - narrow).abs().mean() < 0.05


def test_dummy_weights_can_be_quantized(tmp_path):
    make_tiny_qwen3(tmp_path, **SHAPE)
    llm = make_llm(tmp_path, load_format="dummy", quantization="int4")
    assert isinstance(llm.engine.runner.model.model.layers[0].mlp.down_proj, Int4Linear)
    assert len(llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))[0].token_ids) == 3


# ---- memory ----


MEASURE = """
import re, json, psutil, torch
from pathlib import Path
from engine.config import EngineConfig
from engine.model_config import ModelConfig
from engine.models.registry import find_model
from engine.parallel.group import TensorParallel
from engine.weights.loader import load_weights
from engine.weights.quantization import choose_quantization
from engine.weights.quantized_checkpoint import quantize
from engine.weights.safetensors_checkpoint import SafetensorsCheckpoint

def rss():
    return psutil.Process().memory_info().rss

def load(path, scheme):
    config = ModelConfig.from_dir(Path(path))
    with torch.device("meta"):
        model = find_model(config.architectures)(config, None, TensorParallel())
    quantization = choose_quantization(EngineConfig(quantization=scheme), config, cpu, torch.bfloat16)
    checkpoint = quantize(model, SafetensorsCheckpoint(Path(path)), quantization, cpu)
    load_weights(model, checkpoint, cpu, torch.bfloat16, progress=False)
    return model

cpu = torch.device("cpu")
kept = [load({small!r}, scheme) for scheme in ("int8", "int4")]  # libraries set themselves up
for scheme in ("int8", "int4"):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = rss()
    model = load({path!r}, scheme)
    peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    print(json.dumps([sum(p.nbytes for p in model.parameters()), rss() - before, peak - before]))
    del model
"""


def test_resident_memory_is_the_weights(tmp_path):
    """Within 5 % of the arithmetic; loading takes that, a shard and what rounds one piece of a tensor."""
    small, wide = tmp_path / "small", tmp_path / "wide"
    make_tiny_qwen3(small, **SHAPE)
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 4}
    others = {"head_dim": 128, "num_hidden_layers": 4, "tie_word_embeddings": False}
    make_tiny_qwen3(wide, dtype=torch.bfloat16, max_shard_size="13MB", **sizes, **others)
    result = subprocess.run(
        [sys.executable, "-c", MEASURE.format(small=str(small), path=str(wide))],
        capture_output=True, text=True, check=False, timeout=120,
        env=os.environ | {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    linear = 4 * (1024 * (1024 + 512 + 512) + 1024 * 1024 + 3 * 1024 * 2048)
    unquantized = 2 * (2 * 512 * 1024 + 9 * 1024 + 8 * 128)
    for line, (scheme, bits) in zip(
        result.stdout.splitlines(), {"int8": 8 + 32 / 1024, "int4": 4 + 32 / 128}.items(), strict=True
    ):
        parameters, resident, peak = json.loads(line)
        expected = linear * bits / 8 + unquantized
        found = f"{resident / 2**20:.1f} MiB resident, {peak / 2**20:.1f} at the peak"
        print(f"{scheme}: {expected / 2**20:.1f} MiB expected, {found}")
        assert parameters == pytest.approx(expected, rel=0.01)
        assert resident == pytest.approx(expected, rel=0.05)
        assert peak <= expected + 13 * 2**20 + 32 * 2**20


# ---- what is refused ----


@pytest.mark.parametrize(
    ("name", "tensor", "change", "expected"),
    [
        ("fp8 blocks", "q_proj__weight_scale_inv", lambda _: None, ["q_proj.weight_scale_inv' is missing", "[2, 1]"]),
        ("fp8 blocks", "down_proj__weight_scale_inv", lambda t: t[:, :1], ["has shape [1, 1], expected [1, 2]"]),
        ("fp8 blocks", "down_proj__weight", lambda t: t[:64], ["has shape [64, 256], expected [128, 256]"]),
        ("awq", "k_proj__scales", lambda _: None, ["k_proj.scales' is missing, expected shape [1, 128]"]),
        ("awq", "k_proj__qzeros", lambda t: t[:, :3], ["k_proj.qzeros' has shape [1, 3], expected [1, 16]"]),
        ("awq", "k_proj__qweight", lambda t: t.long(), ["has dtype int64, expected int32"]),
        ("awq", "k_proj__scales", lambda t: t * torch.nan, ["k_proj'", "scales holds numbers that are not finite"]),
        ("gptq", "down_proj__g_idx", lambda t: t.flip(0), ["g_idx permutes", "desc_act"]),
        ("gptq", "up_proj__qweight", lambda t: t.t(), ["qweight' has shape [256, 16], expected [16, 256]"]),
        ("compressed-tensors int8", "o_proj__weight_scale", lambda _: None, ["o_proj.weight_scale' is missing"]),
        ("compressed-tensors int8", "o_proj__weight", lambda t: t.float(), ["dtype float32, expected int8"]),
        ("compressed-tensors int8", "o_proj__weight_scale", lambda t: t[1:], ["[127, 1], expected [128, 1]"]),
        ("compressed-tensors fp8", "o_proj__weight", lambda t: t.float(), ["expected float8_e4m3fn"]),
    ],
)
def test_damage_is_named(tmp_path, name, tensor, change, expected):
    make_quantized(tmp_path, name, num_hidden_layers=1)
    edit_tensors(tmp_path, **{tensor: change})
    message = error_of(lambda: make_llm(tmp_path))
    assert all(text in message for text in expected), message


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"quant_method": "bitsandbytes"}, ["'bitsandbytes' is not supported", "fp8, awq, gptq, compressed-tensors"]),
        ({}, ["quant_method", "not supported"]),
        (GPTQ | {"desc_act": True}, ["quantization_config.desc_act is 'true'", "gptq: False"]),
        (GPTQ | {"bits": 8}, ["quantization_config.bits is '8'", "supported with quant_method gptq: 4"]),
        (GPTQ | {"group_size": 32}, ["group_size is '32'"]),
        (FORMATS["awq"][0] | {"version": "gemv"}, ["version is '\"gemv\"'", "'gemm'"]),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, ["weight_block_size is missing"]),
        (FORMATS["fp8 blocks"][0] | {"activation_scheme": "static"}, ["activation_scheme is '\"static\"'"]),
        (FORMATS["fp8 blocks"][0] | {"weight_block_size": [64, 64]}, ["weight_block_size.0 is '64'"]),
        (compressed("float", format="pack-quantized"), ["format is '\"pack-quantized\"'"]),
        (compressed("float", kv_cache_scheme={"num_bits": 8}), ["kv_cache_scheme is"]),
        (compressed("int", "block"), ["expected 128 × 128 of float8"]),
        (compressed("int", config_groups={}), ["config_groups is '{}'"]),
        (compressed("int", ignore=["re:("]), ["'re:('", "regular expression"]),
    ],
)
def test_unsupported_methods_are_named(tmp_path, config, expected):
    make_quantized(tmp_path, "compressed-tensors int8", num_hidden_layers=1)
    edit_config(tmp_path, quantization_config=config)
    message = error_of(lambda: make_llm(tmp_path))
    assert all(text in message for text in expected), message


def test_a_config_that_contradicts_the_tensors(tmp_path):
    make_quantized(tmp_path, "compressed-tensors int8", num_hidden_layers=1)
    edit_config(tmp_path, quantization_config=FORMATS["awq"][0])
    message = error_of(lambda: make_llm(tmp_path))
    assert (
        "q_proj.qweight' is missing" in message and "(quant_method: awq)" in message and "more such errors" in message
    )
    edit_config(tmp_path, quantization_config=None)
    message = error_of(lambda: make_llm(tmp_path))
    assert "has dtype int8" in message and "config.json does not say that it is quantized" in message
    message = error_of(lambda: make_llm(tmp_path, quantization="int8"))
    assert "has dtype int8, expected float32, float16" in message
    ignore = ["model.layers.0.self_attn.q_proj"]
    edit_config(tmp_path, quantization_config=compressed("int", ignore=ignore))
    assert "expected all of them or none" in error_of(lambda: make_llm(tmp_path))


def test_a_checkpoint_is_quantized_once(tmp_path):
    make_quantized(tmp_path, "gptq", num_hidden_layers=1)
    message = error_of(lambda: make_llm(tmp_path, quantization="int8"), ConfigError)
    assert "quantization is 'int8', but the checkpoint is quantized already (quant_method: gptq)" in message


@pytest.mark.parametrize(
    ("scheme", "hidden_size", "expected"),
    [("int4", 48, "in_features is 48, expected a multiple of 128"), ("fp8", 24, "24, expected a multiple of 16")],
)
def test_sizes_that_do_not_fit(tmp_path, scheme, hidden_size, expected):
    make_tiny_qwen3(tmp_path, hidden_size=hidden_size)
    message = error_of(lambda: make_llm(tmp_path, quantization=scheme))
    assert "qkv_proj cannot be quantized" in message and expected in message


def test_parts_that_share_a_block_of_scales(tmp_path):
    make_quantized(tmp_path, "fp8 blocks", head_dim=32)
    assert "parts are [128, 64, 64] wide, expected multiples of 128" in error_of(lambda: make_llm(tmp_path))


def test_weights_that_are_not_numbers(tmp_path):
    make_tiny_qwen3(tmp_path, **SHAPE)
    edit_tensors(tmp_path, up_proj__weight=lambda t: t / 0)
    message = error_of(lambda: make_llm(tmp_path, quantization="int8"))
    assert "model.safetensors: 'model.layers.0.mlp.up_proj'" in message and "expected finite" in message


def test_float32_is_refused_on_a_gpu(tmp_path):
    make_tiny_qwen3(tmp_path)
    model = ModelConfig.from_dir(tmp_path)
    arguments = EngineConfig(quantization="int8"), model, torch.device("cuda")
    assert "dtype is float32" in error_of(lambda: choose_quantization(*arguments, torch.float32), ConfigError)
    assert choose_quantization(*arguments, torch.bfloat16) is not None
    assert choose_quantization(EngineConfig(), model, CPU, torch.float32) is None


def test_quantized_layers_take_any_number_of_rows():
    with torch.device("cpu"):
        layer = Int4Linear(256, (24, 8), bias=True)
    layer.weight.data.random_(-(2**15), 2**15)
    layer.scale_zero.data[:] = (torch.full((32, 2), 0.01).half().view(torch.int16).int() << 16) | 8
    layer.bias.data.normal_()
    layer.after_loading()
    x = torch.randn(70, 256)
    whole = layer(x)
    assert whole.shape == (70, 32)
    for rows in (0, 1, 7, 33):
        torch.testing.assert_close(layer(x[:rows]), whole[:rows], atol=1e-4, rtol=1e-4)
    wide = dequantize_int4_group(layer.weight, layer.scale_zero, 256, torch.float32)
    torch.testing.assert_close(whole, F.linear(x, wide, layer.bias), atol=1e-4, rtol=1e-4)
