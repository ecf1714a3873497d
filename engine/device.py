"""The one place that chooses device and dtype, and knows how much memory there is."""

import psutil
import torch

from engine.config import EngineConfig
from engine.errors import ConfigError, EngineError
from engine.model_config import ModelConfig
from kernels.backend import HAS_TRITON

HOST_KV_SHARE = 0.25
"""Part of the free host memory that KV blocks take on a CPU unless told otherwise."""


def choose_device(config: EngineConfig) -> torch.device:
    """Raises ConfigError if CUDA is asked for and there is none, or there is and Triton is not."""
    has_cuda = torch.cuda.is_available()
    if config.device == "cuda" and not has_cuda:
        raise ConfigError("device is 'cuda', but torch finds no CUDA device; expected one, or device: cpu")
    if has_cuda and config.device != "cpu" and not HAS_TRITON:
        raise ConfigError("CUDA needs Triton, which is not installed; expected `pip install triton`, or device: cpu")
    return torch.device("cuda" if has_cuda and config.device != "cpu" else "cpu")


def set_num_threads(config: EngineConfig) -> None:
    """Use as many threads as the configuration says; where ranks share the cores, an equal part."""
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    elif config.tensor_parallel_size > 1:
        cores = psutil.cpu_count(logical=False) or 1
        torch.set_num_threads(max(1, cores // config.tensor_parallel_size))


def choose_dtype(config: EngineConfig, model: ModelConfig, device: torch.device) -> torch.dtype:
    """The dtype of weights and activations."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    if device.type == "cpu" and not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return torch.float32
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}.get(
        model.dtype or "bfloat16", torch.bfloat16
    )


def choose_kv_cache_dtype(config: EngineConfig, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the KV cache where activations have `dtype`. Raises ConfigError if the GPU cannot convert it."""
    if config.kv_cache_dtype == "auto":
        return dtype
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < (8, 9):
        raise ConfigError(
            f"kv_cache_dtype is 'fp8', but {torch.cuda.get_device_name(device)} has compute capability "
            f"{capability[0]}.{capability[1]}; expected 8.9 or later, or kv_cache_dtype: auto"
        )
    return torch.float8_e4m3fn


def kv_cache_bytes(config: EngineConfig, device: torch.device) -> int:
    """Bytes to spend on KV blocks, to be called when all else that takes memory has been at its peak."""
    if config.kv_cache_memory is not None:
        return config.kv_cache_memory
    if device.type == "cpu":
        return int(HOST_KV_SHARE * psutil.virtual_memory().available) // config.tensor_parallel_size
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    in_use_at_peak = total - free + torch.cuda.max_memory_reserved(device) - torch.cuda.memory_reserved(device)
    return int(config.gpu_memory_utilization * total) - in_use_at_peak


def is_out_of_memory(error: Exception) -> bool:
    """Whether an operation failed for want of memory alone: what was computed before it is as good as ever."""
    if isinstance(error, EngineError):  # of several ranks, none goes on when one has failed, whatever the reason
        return False
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: " in str(error)
