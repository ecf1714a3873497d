"""EngineConfig: all an operator can choose about the engine. Environment variables are read here and nowhere else."""

import os
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|KiB|MiB|GiB|TiB)?")
_UNITS = {None: 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def parse_bytes(value: Any) -> Any:
    """`"4GiB"`, `"512 MiB"` or a plain number of bytes, as an int."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise ValueError(f'{value!r} is no size; expected bytes, or a number with KiB, MiB or GiB, such as "4GiB"')
    return int(float(match[1]) * _UNITS[match[2]])


Bytes = Annotated[int, BeforeValidator(parse_bytes)]


class EngineConfig(BaseModel):
    """Frozen; unknown fields are an error. `None` means: chosen from the model and the device."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(
        "demo", description="`demo`, a folder with a checkpoint, a .gguf file, or a hub id such as Qwen/Qwen3-0.6B"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    load_format: Literal["auto", "dummy"] = Field(
        "auto", description="auto: what the checkpoint is; dummy: random weights of its shape, for benchmarks"
    )
    device: Literal["auto", "cuda", "cpu"] = Field("auto", description="auto: CUDA where there is a device, else CPU")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="of weights and activations; auto: the checkpoint's, or float32 on a CPU without bfloat16"
    )
    quantization: Literal["none", "fp8", "int8", "int4"] = Field(
        "none",
        description="round an unquantized checkpoint's linear layers as it is loaded; none: as the checkpoint says",
    )
    max_model_len: int | None = Field(None, ge=1, description="most tokens of prompt and output; None: the model's own")
    max_num_seqs: int = Field(256, ge=1, le=4096, description="most requests running at once")
    max_num_batched_tokens: int | None = Field(
        None, ge=1, description="most tokens in one step; None: 8192 on CUDA, 256 on CPU"
    )
    max_num_waiting: int = Field(4096, ge=1, description="most requests waiting; more are refused")
    block_size: int = Field(16, ge=1, le=256, description="tokens in a KV-cache block")
    kv_cache_memory: Bytes | None = Field(
        None,
        ge=1,
        description="bytes for KV blocks; None: what gpu_memory_utilization leaves, or a quarter of free host memory",
    )
    kv_cache_dtype: Literal["auto", "fp8"] = Field(
        "auto",
        description="auto: that of activations; fp8: E4M3, half the memory of bfloat16 for some accuracy; "
        "on CUDA from compute capability 8.9",
    )
    attention_backend: Literal["auto", "torch", "triton", "flash"] = Field(
        "auto",
        description="auto: Triton on CUDA; torch: any heads, without CUDA graphs; flash: the flash-attn library on "
        "CUDA, needs block_size: 256",
    )
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="share of the GPU's memory the engine may use")
    enable_prefix_caching: bool = Field(True, description="share KV blocks between requests with an equal beginning")
    enforce_eager: bool = Field(False, description="no CUDA graphs")
    overlap_steps: bool | None = Field(
        None, description="launch a step before the outcome of the one before is read; None: on CUDA"
    )
    num_speculative_tokens: int = Field(
        0,
        ge=0,
        le=32,
        description="tokens guessed from what came before and verified in one step; 0: none. Steps do not overlap then",
    )
    tensor_parallel_size: int = Field(
        1,
        ge=1,
        le=64,
        description="GPUs of this machine that hold the model together, or processes on a CPU: docs/tensor-parallel.md",
    )
    max_loras: int = Field(
        0, ge=0, le=64, description="most LoRA adapters in one step; so much device memory is set apart; 0: no adapters"
    )
    max_lora_rank: int = Field(16, ge=1, le=512, description="most ranks of an adapter")
    adapters: dict[str, str] = Field({}, description="adapters to load at the start: name and PEFT folder of each")
    lora_folder: str | None = Field(
        None, description="where `NAME/adapter_config.json` is looked up when a request first asks for adapter NAME"
    )
    step_timeout_s: float | None = Field(
        None,
        gt=0,
        description="seconds after which a step that does not return makes the engine unhealthy; "
        "None: 60 on CUDA, 600 on CPU",
    )
    num_threads: int | None = Field(
        None, ge=1, description="CPU threads for tensor operations; None: all cores, or an equal part for each rank"
    )
    show_progress: bool = Field(True, description="progress bars for what takes over two seconds")

    @model_validator(mode="after")
    def _adapters_have_room(self) -> "EngineConfig":
        if not self.max_loras and (self.adapters or self.lora_folder is not None):
            raise ValueError("max_loras is 0 though there are adapters or a lora_folder, expected at least 1")
        return self


def set_cpu_defaults() -> None:
    """Let OpenMP's threads spin for a short time between operations; to be called before torch is imported.

    A decode step of a small model is hundreds of operations of a few microseconds; threads that sleep between them make
    it two times slower. Unlimited spinning collapses when another process wants the core, so it is bounded.
    A value set by the operator stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
