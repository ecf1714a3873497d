"""The service with a model that has a fault: a certain prompt ends the engine. And replicas can be kept from starting.

A Serve configuration names `tests.integration.faults:build_app` in place of the service's own.
"""

import os
from pathlib import Path
from typing import Any

from ray.serve import Application

from engine import async_engine
from engine.config import EngineConfig
from engine.llm_engine import LLMEngine
from engine.request import EngineRequest, RequestOutput
from serve_app import app
from serve_app.config import ServiceConfig
from serve_app.replica import EngineReplica

DEADLY_PROMPT = "\x07\x07\x07"


def no_start_file() -> Path:
    """While it is there, no replica starts. In the folder that the service has to itself."""
    return Path(os.environ["RAY_TMPDIR"]) / "no-start"


class FaultyEngine(LLMEngine):
    """Fails in the step after a deadly prompt has come, and where it must not start."""

    def __init__(self, *args: Any) -> None:
        if no_start_file().exists():
            raise RuntimeError("no device is free")
        super().__init__(*args)
        self._deadly = self.tokenizer.encode(DEADLY_PROMPT)
        self._is_doomed = False

    def enqueue(self, source: EngineRequest, *args: Any) -> None:
        self._is_doomed = self._is_doomed or source.prompt_token_ids[: len(self._deadly)] == self._deadly
        super().enqueue(source, *args)

    def step(self) -> list[RequestOutput]:
        if self._is_doomed:
            raise RuntimeError("an illegal memory access was encountered")
        return super().step()


class FaultyReplica(EngineReplica.func_or_class):  # type: ignore[name-defined,misc]
    """A replica with a FaultyEngine."""

    async def __init__(self, config: EngineConfig, model_name: str) -> None:
        async_engine.LLMEngine = FaultyEngine  # type: ignore[misc]
        await super().__init__(config, model_name)


def build_app(args: ServiceConfig) -> Application:
    """The service with FaultyReplicas."""
    app.EngineReplica = EngineReplica.options(func_or_class=FaultyReplica)  # type: ignore[misc,attr-defined]
    return app.build_app(args)
