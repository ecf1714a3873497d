"""From a checkpoint folder to a model that can run."""

from pathlib import Path

import torch

from engine.attention import AttentionBackend
from engine.config import EngineConfig
from engine.model_config import ModelConfig
from engine.models.decoder import CausalLM
from engine.models.registry import find_model
from engine.parallel.group import TensorParallel
from engine.weights.checkpoint import Checkpoint
from engine.weights.dummy_checkpoint import DummyCheckpoint
from engine.weights.gguf_checkpoint import GgufCheckpoint
from engine.weights.gguf_quantized import keep_quantized
from engine.weights.loader import load_weights
from engine.weights.open_checkpoint import open_checkpoint
from engine.weights.quantization import choose_quantization
from engine.weights.quantized_checkpoint import quantize


def load_model(
    config: EngineConfig,
    model_config: ModelConfig,
    path: Path,
    device: torch.device,
    dtype: torch.dtype,
    backend: AttentionBackend,
    group: TensorParallel,
) -> CausalLM:
    """The model of a folder, or this rank's share of it, with its weights on the device.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        ConfigError: there is too little memory, or the quantization cannot run here.
    """
    with torch.device("meta"):
        model = find_model(model_config.architectures)(model_config, backend, group)
    checkpoint: Checkpoint = (
        DummyCheckpoint(model, device, dtype) if config.load_format == "dummy" else open_checkpoint(path, dtype)
    )
    quantization = choose_quantization(config, model_config, device, dtype)
    if quantization is not None:
        checkpoint = quantize(model, checkpoint, quantization, device)
    elif isinstance(checkpoint, GgufCheckpoint):
        checkpoint = keep_quantized(model, checkpoint, device, dtype)
    load_weights(model, checkpoint, device, dtype, config.show_progress)
    return model
