"""Random LoRA adapters in PEFT's format, and models with adapters merged into their weights."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "tiny",
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "modules_to_save": None,
    "use_dora": False,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
}


def make_adapter(
    path: Path,
    model: torch.nn.Module,
    *,
    rank: int = 4,
    seed: int = 0,
    targets: tuple[str, ...] = TARGETS,
    **config: Any,
) -> dict[str, Tensor]:
    """Write an adapter that changes what a model says. Returns what its layers' weights grow by."""
    torch.manual_seed(seed)
    values = CONFIG | {"r": rank, "lora_alpha": 2 * rank, "target_modules": list(targets)} | config
    scale = values["lora_alpha"] / (rank**0.5 if values["use_rslora"] else rank)
    tensors, changes = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in targets:
            out_features, in_features = module.weight.shape
            a, b = torch.randn(rank, in_features) * 0.2, torch.randn(out_features, rank) * 0.2
            tensors[f"base_model.model.{name}.lora_A.weight"] = a
            tensors[f"base_model.model.{name}.lora_B.weight"] = b
            changes[name] = scale * b @ a
    write_adapter(path, values, tensors)
    return changes


def write_adapter(path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """PEFT's two files."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, path / "adapter_model.safetensors")


def merge(model: torch.nn.Module, changes: dict[str, Tensor], sign: float = 1.0) -> None:
    """Add an adapter to a model's own weights, or take it off again."""
    for name, change in changes.items():
        module = model.get_submodule(name)
        module.weight.data += sign * change.to(module.weight.dtype)
