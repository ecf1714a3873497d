"""PEFT's adapter folders: `adapter_config.json` and `adapter_model.safetensors`, checked against the model.

A tensor `base_model.model.<layer>.lora_A.weight` is [rank, in_features], `lora_B` is [out_features, rank], and the
layer's output changes by scale · B · A · x, where scale is lora_alpha / rank, or lora_alpha / √rank if use_rslora.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from engine.errors import CheckpointError
from engine.lora.handle import AdapterHandle
from engine.weights.messages import shape_text, shown
from engine.weights.safetensors_checkpoint import SafetensorsCheckpoint

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG_BYTES = 2**20
PREFIX = "base_model.model."
HARMLESS_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights after which the base model's weights are still its own."""
PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (None, False),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "modules_to_save": (None, []),
    "fan_in_fan_out": (None, False),
    "alpha_pattern": (None, {}),
    "rank_pattern": (None, {}),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "use_qalora": (None, False),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "megatron_config": (None,),
    "init_lora_weights": HARMLESS_INITS,
}
"""Fields of adapter_config.json and the values that are supported: others change what an adapter computes."""


class PartShape(NamedTuple):
    """Where one of a model's layers is, and how large all of it, whatever a rank of the model has."""

    path: str
    """Of the module that computes it, maybe with others."""
    part: int
    """Its number among them."""
    in_features: int
    out_features: int


Outline = dict[str, dict[int, int]]
"""What an adapter changes: by path of the layer and part of its output, the rank."""


class Adapter(AdapterHandle):
    """An adapter's matrices in host memory: by path of the layer and part of its output, A and B · scale."""

    def __init__(self, name: str, version: int, layers: dict[str, dict[int, tuple[Tensor, Tensor]]]) -> None:
        super().__init__(name, version)
        self.layers = layers

    @property
    def outline(self) -> Outline:
        return {path: {part: len(a) for part, (a, _) in parts.items()} for path, parts in self.layers.items()}


class _PeftConfig(BaseModel):
    """The fields of adapter_config.json that a sum of low-rank products needs; see PLAIN for the rest."""

    model_config = ConfigDict(frozen=True, extra="allow")

    peft_type: str
    r: int = Field(ge=1)
    lora_alpha: float = Field(gt=0, allow_inf_nan=False)
    use_rslora: bool = False

    @property
    def scale(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


def read_adapter(
    folder: Path, name: str, version: int, parts: Mapping[str, PartShape], max_rank: int, dtype: torch.dtype
) -> Adapter:
    """Read and check a whole adapter.

    Args:
        parts: the model's layers that adapters may change, by their names in checkpoints.
        max_rank: most ranks that there is room for.
        dtype: of the model's activations.

    Raises:
        CheckpointError: a file is missing or damaged, the adapter does not fit the model, has values that are no
            numbers, or needs what is not supported; the message names it.
    """
    config = _read_config(folder / CONFIG)
    if config.r > max_rank:
        raise CheckpointError(f"{folder / CONFIG}: r is {config.r}, expected at most max_lora_rank ({max_rank})")
    checkpoint = SafetensorsCheckpoint(folder, WEIGHTS)
    file = folder / WEIGHTS
    found = _tensor_names(file, checkpoint, parts)
    for part_name, (a_name, b_name) in found.items():
        shape = parts[part_name]
        for tensor_name, wanted in ((a_name, (config.r, shape.in_features)), (b_name, (shape.out_features, config.r))):
            info = checkpoint.tensors[tensor_name]
            if info.shape != wanted or not info.dtype.is_floating_point or info.dtype.itemsize < 2:
                raise CheckpointError(
                    f"{file}: tensor {shown(tensor_name)} is {info.dtype} {shape_text(info.shape)}, expected floats of "
                    f"16 bits or more, {shape_text(wanted)}: is the adapter of this base model?"
                )
    tensors = _read_tensors(file, checkpoint, dtype)
    layers: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
    for part_name, (a_name, b_name) in found.items():
        scaled = (tensors[b_name].float() * config.scale).to(dtype)
        layers.setdefault(parts[part_name].path, {})[parts[part_name].part] = (
            tensors[a_name].to(dtype, copy=True),
            scaled,
        )
    return Adapter(name, version, layers)


def _read_config(file: Path) -> _PeftConfig:
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}; expected PEFT's adapter folder") from None
    if len(data) > MAX_CONFIG_BYTES:
        raise CheckpointError(f"{file}: expected at most {MAX_CONFIG_BYTES:,} bytes")
    try:
        config = _PeftConfig.model_validate(json.loads(data.decode("utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"{file}: {'.'.join(map(str, first['loc'])) or 'content'}: {first['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not a JSON object ({error})") from None
    if config.peft_type != "LORA":
        raise CheckpointError(f"{file}: peft_type is {shown(config.peft_type)}, expected 'LORA'")
    for field, plain in PLAIN.items():
        value = (config.model_extra or {}).get(field)
        if not any(value is each or (value == each and type(value) is type(each)) for each in plain):
            raise CheckpointError(f"{file}: {field} is {shown(str(value))}, which is not supported")
    return config


def _tensor_names(
    file: Path, checkpoint: SafetensorsCheckpoint, parts: Mapping[str, PartShape]
) -> dict[str, tuple[str, str]]:
    """By layer, the names of A and B."""
    found: dict[str, dict[str, str]] = {}
    for name in checkpoint.tensors:
        path, _, kind = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if not name.startswith(PREFIX) or not name.endswith(".weight") or kind not in ("lora_A", "lora_B"):
            raise CheckpointError(
                f"{file}: tensor {shown(name)} is not supported, expected {PREFIX}LAYER.lora_A.weight or lora_B.weight"
            )
        if path not in parts:
            raise CheckpointError(
                f"{file}: tensor {shown(name)} changes {shown(path)}, expected a linear layer of attention or of a "
                "dense MLP of this model: is the adapter of this base model?"
            )
        found.setdefault(path, {})[kind] = name
    if not found:
        raise CheckpointError(f"{file}: has no tensors, expected an adapter's")
    for path, kinds in found.items():
        if len(kinds) != 2:
            raise CheckpointError(f"{file}: {shown(path)} has only {', '.join(kinds)}, expected lora_A and lora_B")
    return {path: (kinds["lora_A"], kinds["lora_B"]) for path, kinds in found.items()}


def _read_tensors(file: Path, checkpoint: SafetensorsCheckpoint, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors, which are known to fit the model.

    Read and not mapped: adapters are replaced while they are served, and a mapped file that somebody shortens ends the
    process that looks into it.
    """
    try:
        tensors = safetensors.torch.load(file.read_bytes())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read: {' '.join(str(error).split())}") from None
    for name, info in checkpoint.tensors.items():
        if name not in tensors or (tuple(tensors[name].shape), tensors[name].dtype) != (info.shape, info.dtype):
            raise CheckpointError(f"{file}: changed while it was read; ask for the adapter again when it is written")
        if not torch.isfinite(tensors[name].to(dtype)).all():
            raise CheckpointError(f"{file}: tensor {shown(name)} has values that are no finite numbers as {dtype}")
    return tensors
