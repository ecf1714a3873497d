"""Which quantization a model runs with: what config.json says about the checkpoint, or what the operator asked for."""

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engine.config import EngineConfig
from engine.errors import CheckpointError, ConfigError
from engine.model_config import ModelConfig
from engine.weights.messages import shown
from engine.weights.quantized_formats import Awq, Format, Gptq, RoundWhenLoaded, ScaledBlocks, ScaledChannels
from kernels.quantize_fp8 import require_fp8


@dataclass(frozen=True, slots=True)
class Quantization:
    """How linear layers are quantized.

    `unquantized` names those that are not: a module's name, its beginning or its end up to a dot, or `re:` and a
    regular expression.
    """

    label: str
    """For messages: where this comes from."""
    format: Format
    unquantized: tuple[str, ...] = ()

    def covers(self, module: str) -> bool:
        """Whether the linear layer of this name in the checkpoint is quantized."""
        return not any(_names(pattern, module) for pattern in self.unquantized)


def choose_quantization(
    config: EngineConfig, model: ModelConfig, device: torch.device, dtype: torch.dtype
) -> Quantization | None:
    """The quantization of a model on a device, or None.

    Raises:
        CheckpointError: config.json names a method or a variant of it that is not supported.
        ConfigError: the checkpoint is quantized already, or the device or dtype cannot run it.
    """
    found = None if model.quantization_config is None else _read(model.quantization_config)
    if config.quantization != "none":
        if found is not None:
            raise ConfigError(
                f"quantization is {config.quantization!r}, but the checkpoint is quantized already ({found.label}); "
                "expected quantization: none, or an unquantized checkpoint"
            )
        found = Quantization(f"quantization: {config.quantization}", RoundWhenLoaded(config.quantization))
    if found is not None and device.type == "cuda":
        _check_device(found, device, dtype)
    return found


def _check_device(quantization: Quantization, device: torch.device, dtype: torch.dtype) -> None:
    if dtype == torch.float32:
        raise ConfigError(
            f"dtype is float32, but {quantization.label} needs bfloat16 or float16 on a GPU: set dtype: bfloat16"
        )
    stored = quantization.format.layer.stored(1, 1)
    if stored["weight"].dtype == torch.float8_e4m3fn:
        try:
            require_fp8(device)
        except ValueError as error:
            raise ConfigError(f"{quantization.label}: {error}") from None


class _Method(BaseModel):
    """The fields that decide how weights are stored. What describes how they were made is ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class _Fp8(_Method):
    weight_block_size: tuple[Literal[128], Literal[128]]
    activation_scheme: Literal["dynamic"]
    fmt: Literal["e4m3"] = "e4m3"
    modules_to_not_convert: tuple[str, ...] | None = None

    def quantization(self, label: str) -> Quantization:
        return Quantization(label, ScaledBlocks("weight_scale_inv"), self.modules_to_not_convert or ())


class _Awq(_Method):
    bits: Literal[4]
    group_size: Literal[128]
    version: Literal["gemm", "GEMM"] = "gemm"
    modules_to_not_convert: tuple[str, ...] | None = None

    def quantization(self, label: str) -> Quantization:
        return Quantization(label, Awq(), self.modules_to_not_convert or ())


class _Gptq(_Method):
    bits: Literal[4]
    group_size: Literal[128]
    desc_act: Literal[False] = False
    lm_head: Literal[False] = False
    checkpoint_format: Literal["gptq", "gptq_v2"] = "gptq"
    modules_to_not_convert: tuple[str, ...] | None = None

    def quantization(self, label: str) -> Quantization:
        offset = 1 if self.checkpoint_format == "gptq" else 0
        return Quantization(label, Gptq(offset), self.modules_to_not_convert or ())


class _Weights(_Method):
    num_bits: Literal[8]
    type: Literal["int", "float"]
    symmetric: Literal[True]
    strategy: Literal["channel", "tensor", "block"]
    block_structure: tuple[Literal[128], Literal[128]] | None = None


class _Activations(_Method):
    num_bits: Literal[8]
    dynamic: Literal[True]


class _Group(_Method):
    targets: tuple[Literal["Linear"]]
    weights: _Weights
    input_activations: _Activations
    output_activations: None = None


class _CompressedTensors(_Method):
    config_groups: dict[str, _Group] = Field(min_length=1, max_length=1)
    format: Literal["float-quantized", "int-quantized", "naive-quantized"]
    ignore: tuple[str, ...] = ()
    kv_cache_scheme: None = None

    def quantization(self, label: str) -> Quantization:
        (group,) = self.config_groups.values()
        scaled: Format
        if group.weights.strategy == "block":
            if group.weights.type != "float" or group.weights.block_structure is None:
                raise CheckpointError("config.json: quantization_config scales blocks, expected 128 × 128 of float8")
            scaled = ScaledBlocks("weight_scale")
        else:
            scaled = ScaledChannels(torch.int8 if group.weights.type == "int" else torch.float8_e4m3fn)
        return Quantization(label, scaled, self.ignore)


_METHODS: dict[str, type[_Fp8 | _Awq | _Gptq | _CompressedTensors]] = {
    "fp8": _Fp8,
    "awq": _Awq,
    "gptq": _Gptq,
    "compressed-tensors": _CompressedTensors,
}


def _read(values: dict[str, Any]) -> Quantization:
    """What a checkpoint's `quantization_config` says."""
    name = values.get("quant_method")
    if not isinstance(name, str) or name not in _METHODS:
        raise CheckpointError(
            f"config.json: quantization_config.quant_method {shown(str(name))} is not supported; expected one of "
            f"{', '.join(_METHODS)}, or an unquantized checkpoint"
        )
    try:
        return _METHODS[name].model_validate(values).quantization(f"quant_method: {name}")
    except ValidationError as error:
        raise CheckpointError(_explain(error, name)) from None


def _explain(error: ValidationError, method: str) -> str:
    """The first thing wrong with a `quantization_config`, on one line."""
    first = error.errors()[0]
    field = ".".join(map(str, ("config.json: quantization_config", *first["loc"])))
    if first["type"] == "missing":
        return f"{field} is missing, expected with quant_method {method}"
    expected = first.get("ctx", {}).get("expected") or first["msg"]
    return (
        f"{field} is {shown(json.dumps(first['input'], default=str))}, supported with quant_method {method}: {expected}"
    )


def _names(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], module) is not None
        except re.error as error:
            raise CheckpointError(
                f"config.json: quantization_config.ignore has {shown(pattern)}, expected a regular expression: {error}"
            ) from None
    return pattern == module or module.startswith(f"{pattern}.") or module.endswith(f".{pattern}")
