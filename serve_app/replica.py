"""EngineReplica: one engine as a Ray Serve deployment. It sees token ids, not text, and no HTTP."""

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from importlib.metadata import version
from pathlib import Path

import msgspec
from ray import serve

import serve_app.ray_private  # noqa: F401  # for longer messages, see there
from engine.async_engine import AsyncEngine, EngineStatus, StepReport
from engine.config import EngineConfig
from engine.errors import EngineDeadError, QueueFullError, RequestError
from engine.request import EngineRequest, RequestOutput
from engine.weights.hub import resolve_model
from serve_app.load_report import LoadReport
from serve_app.metrics.engine import replica_registry
from serve_app.metrics.process import Snapshot, process_id, samples_of
from serve_app.metrics.ray_export import RayExport
from serve_app.ranks import start_actor
from serve_app.step_sender import StepSenders
from serve_app.terminal import say
from serve_app.wire import EngineResult, ModelInfo, Refusal, RefusalKind

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
            self._engine = await asyncio.to_thread(AsyncEngine, config, self._step_done, start_actor)
        except Exception as error:
            say(f"the engine cannot start: {error}")
            raise
        self._folder = resolve_model(config.model, config.revision)
        self._senders = StepSenders(self._engine.stats())
        self._decoder = msgspec.msgpack.Decoder(EngineRequest)
        self._encoder = msgspec.msgpack.Encoder()
        self._load = LoadReport(config.max_num_seqs)
        self._registry = replica_registry(config, self._engine.stats, self._engine.block_residency)
        self._model_name = model_name
        labels = {"model_name": model_name, "replica": process_id()}
        self._exporting = asyncio.create_task(RayExport(self._registry, labels).run())
        logger.info("%s is loaded: context of %d tokens", config.model, self._engine.max_model_len)

    async def generate(self, request_id: str, ingress_id: str, encoded: bytes) -> AsyncGenerator[bytes, None]:
        """Run a request to its end; cancelling the call aborts it. What it produces goes to the ingress's step stream.

        A stream of one item, as Ray tells the caller at once that a replica has taken a streaming call. A plain one it
        would send again to another replica, if this one died meanwhile.

        Args:
            request_id: that of the request; routers see it here.
            ingress_id: see `steps`.
            encoded: the EngineRequest (msgpack).

        Yields:
            The EngineResult (msgpack).
        """
        try:
            result = EngineResult(await self._run(ingress_id, self._decoder.decode(encoded)))
        except RequestError as error:
            result = _refusal(RefusalKind.BAD_REQUEST, str(error), error.param)
        except QueueFullError as error:
            result = _refusal(RefusalKind.OVERLOADED, str(error))
        except EngineDeadError as error:
            result = _refusal(RefusalKind.UNAVAILABLE, str(error))
        except _EngineEndedError as error:
            result = _refusal(RefusalKind.ENGINE_ENDED, str(error))
        yield self._encoder.encode(result)

    async def steps(self, ingress_id: str) -> AsyncGenerator[bytes, None]:
        """StepUpdates (msgpack) for an ingress: at most one for each step, at least one for each HEARTBEAT_S.

        Args:
            ingress_id: any name, the same as in its calls of `generate`. A stream ends when another one is opened for
                the same ingress, and where the engine has ended.
        """
        async with aclosing(self._senders.updates(ingress_id)) as updates:
            async for update in updates:
                if self._engine.status is not EngineStatus.RUNNING:
                    return
                yield self._encoder.encode(update)

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
        """This replica's metrics: a list of one Snapshot (msgpack)."""
        snapshot = Snapshot("replica", process_id(), self._model_name, samples_of(self._registry))
        return msgspec.msgpack.encode([snapshot])

    def record_autoscaling_stats(self) -> dict[str, int | float]:
        """For Ray, which hands it to the autoscaling policy: see LoadReport."""
        return self._load.measure(self._engine.stats(), time.monotonic())

    async def check_health(self) -> None:
        """Raise if the engine has died: Ray then replaces this replica."""
        self._engine.check_health()

    async def __del__(self) -> None:
        if hasattr(self, "_exporting"):
            self._exporting.cancel()
        if hasattr(self, "_engine"):
            await self._engine.stop()

    async def _run(self, ingress_id: str, request: EngineRequest) -> RequestOutput:
        """All that a request produced."""
        request_id = request.request_id
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def take(output: RequestOutput) -> None:
            is_last = output.finish_reason is not None
            # Where the engine has ended, the request did not end by itself and can go on elsewhere.
            if not is_last or self._engine.status is EngineStatus.RUNNING:
                self._senders.put(ingress_id, output)
            if is_last and not ended.done():
                ended.set_result(None)

        buffer = self._senders.begin(ingress_id, request_id)
        try:
            await self._engine.submit(request, take)
            try:
                await ended
            finally:
                self._engine.drop(request_id)
        finally:
            self._senders.end(ingress_id, request_id)
        if not buffer.is_finished:
            raise _EngineEndedError(self._engine.fatal_error or "the replica has been stopped")
        return buffer.whole()

    def _step_done(self, report: StepReport) -> None:
        self._senders.step_done(report)


class _EngineEndedError(Exception):
    """The engine ended while it had a request."""


def _refusal(kind: RefusalKind, message: str, param: str | None = None) -> EngineResult:
    return EngineResult(refusal=Refusal(kind, message, param))


def _fingerprint(folder: Path) -> str:
    """Of code version, model configuration, and the sizes of the weight files, which are too long to read again."""
    digest = hashlib.sha256(version("qwen3-serve").encode())
    digest.update((folder / "config.json").read_bytes())
    for path in sorted(path for pattern in ("*.safetensors", "*.gguf", "*.bin") for path in folder.glob(pattern)):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
    return f"fp_{digest.hexdigest()[:12]}"
