"""qwen3-serve's engine: paged KV cache, continuous batching, prefix caching; a library without any server."""

from typing import TYPE_CHECKING

from engine.config import EngineConfig, set_cpu_defaults

set_cpu_defaults()

from engine.errors import CheckpointError, ConfigError, EngineDeadError, EngineError, RequestError  # noqa: E402
from engine.request import EngineRequest, FinishReason, RequestOutput, SamplingParams  # noqa: E402

if TYPE_CHECKING:
    from engine.async_engine import AsyncEngine
    from engine.llm import LLM


def __getattr__(name: str) -> object:
    """LLM and AsyncEngine bring torch with them, so they are imported when first asked for."""
    if name == "LLM":
        from engine.llm import LLM

        return LLM
    if name == "AsyncEngine":
        from engine.async_engine import AsyncEngine

        return AsyncEngine
    raise AttributeError(f"module 'engine' has no attribute {name!r}")


__all__ = [
    "LLM",
    "AsyncEngine",
    "CheckpointError",
    "ConfigError",
    "EngineConfig",
    "EngineDeadError",
    "EngineError",
    "EngineRequest",
    "FinishReason",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
]
