"""Attention over the paged KV cache, behind one interface."""

from typing import Literal

import torch

from engine.attention.backend import AttentionBackend, AttentionBatch
from engine.attention.cpu_backend import CpuAttention
from engine.attention.flash_backend import load_flash_attention
from engine.attention.torch_backend import TorchAttention
from engine.attention.triton_backend import BLOCK_SIZES, HEAD_DIMS, TritonAttention
from engine.errors import ConfigError
from engine.model_config import ModelConfig
from engine.staging import Staging

__all__ = ["AttentionBackend", "AttentionBatch", "create_backend"]


def create_backend(
    model: ModelConfig,
    block_size: int,
    staging: Staging,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    choice: Literal["auto", "torch", "triton", "flash"],
) -> AttentionBackend:
    """The backend for a model on a device: the one place that chooses.

    Args:
        dtype: of activations.
        cache_dtype: of the KV cache, the same or float8_e4m3fn.
        choice: the operator's; auto takes the fastest that serves the model.

    Raises:
        ConfigError: the backend chosen cannot serve the model, or not on this device.
    """
    if choice == "flash":
        return load_flash_attention(model, block_size, staging, dtype, cache_dtype)
    on_triton = staging.device.type == "cuda" and TritonAttention.supports(model, block_size)
    if choice == "triton" and not on_triton:
        raise ConfigError(
            f"attention_backend 'triton' does not take head_dim {model.head_dim} with block_size {block_size} on "
            f"{staging.device.type}; expected {HEAD_DIMS} with {BLOCK_SIZES} on cuda, or attention_backend: auto"
        )
    windows = set(model.layer_windows)
    if choice == "torch":
        return TorchAttention(block_size, staging, windows)
    if on_triton:
        return TritonAttention(model, staging)
    if staging.device.type == "cpu" and cache_dtype == dtype and CpuAttention.supports(model, dtype):
        return CpuAttention(block_size, staging, windows)
    return TorchAttention(block_size, staging, windows)
