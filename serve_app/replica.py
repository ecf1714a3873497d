"""EngineReplica: one engine as a Ray Serve deployment. It sees token ids, not text, and no HTTP."""

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from importlib.metadata import version
from pathlib import Path
from typing import cast

import msgspec
from ray import serve

from engine.async_engine import AsyncEngine, EngineStatus
from engine.config import EngineConfig
from engine.errors import EngineDeadError, QueueFullError, RequestError
from engine.request import EngineRequest, FinishReason, RequestOutput
from engine.weights.hub import resolve_model
from serve_app.load_report import LoadReport
from serve_app.metrics.engine import replica_registry
from serve_app.metrics.process import Snapshot, process_id, samples_of
from serve_app.metrics.ray_export import RayExport
from serve_app.terminal import say
from serve_app.wire import ModelInfo, Refusal, RefusalKind, ReplicaMessage

logger = logging.getLogger("ray.serve")

TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
"""What an ingress reads of a checkpoint folder."""


@serve.deployment
class EngineReplica:
    """Runs requests on an engine that has a thread of its own, so this event loop only moves outputs.

    Args:
        config: the engine's configuration. The model is loaded before the replica counts as started; where it cannot
            be, the terminal says why.
        model_name: what clients call the model; a label of the metrics.
    """

    async def __init__(self, config: EngineConfig, model_name: str) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        try:
            # On a thread, as it takes minutes for a large model and Ray talks to this loop meanwhile.
            self._engine = await asyncio.to_thread(AsyncEngine, config)
        except Exception as error:
            say(f"the engine cannot start: {error}")
            raise
        self._folder = resolve_model(config.model, config.revision)
        self._decoder = msgspec.msgpack.Decoder(EngineRequest)
        self._encoder = msgspec.msgpack.Encoder()
        self._load = LoadReport(config.max_num_seqs)
        self._registry = replica_registry(config, self._engine.stats)
        labels = {"model_name": model_name, "replica": process_id()}
        self._exporting = asyncio.create_task(RayExport(self._registry, labels).run())
        logger.info("%s is loaded: context of %d tokens", config.model, self._engine.max_model_len)

    async def generate(self, encoded: bytes) -> AsyncGenerator[bytes, None]:
        """Run one EngineRequest (msgpack); yields ReplicaMessages (msgpack). Cancelling the call aborts the request."""
        yield self._encoder.encode(ReplicaMessage())
        try:
            made = cast(AsyncGenerator[RequestOutput, None], self._engine.generate(self._decoder.decode(encoded)))
            async with aclosing(made) as outputs:
                async for output in outputs:
                    self._raise_if_dead(output)
                    yield self._encoder.encode(ReplicaMessage(output))
        except RequestError as error:
            yield self._refuse(RefusalKind.BAD_REQUEST, str(error), error.param)
        except QueueFullError as error:
            yield self._refuse(RefusalKind.OVERLOADED, str(error))
        except EngineDeadError as error:
            yield self._refuse(RefusalKind.UNAVAILABLE, str(error))

    async def info(self) -> bytes:
        """ModelInfo (msgpack)."""
        engine, folder = self._engine, self._folder
        files = {name: (folder / name).read_bytes() for name in TEXT_FILES if (folder / name).is_file()}
        info = ModelInfo(
            engine.max_model_len, engine.vocab_size, tuple(engine.eos_token_ids), _fingerprint(folder), files
        )
        return self._encoder.encode(info)

    async def adapters(self) -> list[str]:
        """Names of the adapters that requests can ask for."""
        return await asyncio.to_thread(self._engine.adapter_names)

    async def stats(self) -> dict[str, int | float]:
        """EngineStats as a dict."""
        return msgspec.to_builtins(self._engine.stats())

    async def metrics(self) -> bytes:
        """This replica's metrics: a Snapshot (msgpack)."""
        return msgspec.msgpack.encode(Snapshot("replica", process_id(), samples_of(self._registry)))

    def record_autoscaling_stats(self) -> dict[str, int | float]:
        """For Ray, which hands it to the autoscaling policy: see LoadReport."""
        return self._load.measure(self._engine.stats(), time.monotonic())

    async def request_state(self, request_id: str) -> dict[str, object] | None:
        """RequestState of a live or recently ended request as a dict."""
        return msgspec.to_builtins(self._engine.request_state(request_id))

    async def check_health(self) -> None:
        """Raise if the engine has died: Ray then replaces this replica."""
        self._engine.check_health()

    async def __del__(self) -> None:
        if hasattr(self, "_exporting"):
            self._exporting.cancel()
        if hasattr(self, "_engine"):
            await self._engine.stop()

    def _raise_if_dead(self, output: RequestOutput) -> None:
        """A request that ended on the engine's fault can be sent again; one that ended on its own cannot."""
        if output.finish_reason is FinishReason.ERROR and self._engine.status is EngineStatus.DEAD:
            raise EngineDeadError(output.error)

    def _refuse(self, kind: RefusalKind, message: str, param: str | None = None) -> bytes:
        return self._encoder.encode(ReplicaMessage(refusal=Refusal(kind, message, param)))


def _fingerprint(folder: Path) -> str:
    """Of code version, model configuration, and the sizes of the weight files, which are too long to read again."""
    digest = hashlib.sha256(version("qwen3-serve").encode())
    digest.update((folder / "config.json").read_bytes())
    for path in sorted(path for pattern in ("*.safetensors", "*.gguf", "*.bin") for path in folder.glob(pattern)):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
    return f"fp_{digest.hexdigest()[:12]}"
