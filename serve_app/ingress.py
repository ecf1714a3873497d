"""Ingress: the HTTP side of the service. It owns text; the engine replicas see token ids only."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from importlib.metadata import version
from typing import Any, TypeVar

import msgspec
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel
from ray import serve
from ray.serve.handle import DeploymentHandle

from engine.request import EngineRequest
from serve_app.admission import Admission, entry_of
from serve_app.auth import Caller
from serve_app.config import ServiceConfig
from serve_app.engine_client import EngineClient
from serve_app.fleet import fleet_of
from serve_app.gate import caller_of
from serve_app.grammar_checker import GrammarChecker
from serve_app.http import EventStream, parse_body, read_body, server_timing, unless_disconnected
from serve_app.metrics.exposition import CONTENT_TYPE, FleetMetrics
from serve_app.metrics.ingress import IngressMetrics
from serve_app.metrics.process import Snapshot, samples_of
from serve_app.metrics.ray_export import RayExport
from serve_app.metrics.requests import meter_of
from serve_app.metrics.service import AdmissionCollector, RoutingCollector
from serve_app.openai.endpoint import Endpoint, ServedModel, adapter_of, model_not_found
from serve_app.openai.errors import ApiError, internal_error, unavailable
from serve_app.openai.generation import Delta, Generation
from serve_app.placer import placer_of
from serve_app.ray_private import deployment_details
from serve_app.routes import Conversion, EndpointClass, build_http_app
from serve_app.status import Status
from serve_app.terminal import announce

T = TypeVar("T")

logger = logging.getLogger("ray.serve")

LONG_BODY_BYTES = 16 * 1024
"""Longer bodies are tokenized on a thread, so that they delay no other request."""
LOADING_RETRY_S = 1.0


@serve.deployment
@serve.ingress()
class Ingress:
    """Parses, renders, tokenizes, and turns outputs into responses. Needs no GPU, and no files of the model.

    Until a replica of the engine is ready, and has told about the model, every answer is a 503.

    Args:
        config: the service's configuration.
        engine: handle of the EngineReplica deployment.
    """

    async def __init__(self, config: ServiceConfig, engine: DeploymentHandle) -> None:  # type: ignore[misc]  # awaited
        self._config = config
        context = serve.get_replica_context()
        self._id = context.replica_id.unique_id
        self._client = EngineClient(engine, self._id, config.engine.block_size)
        names = engine.app_name, engine.deployment_name
        self._fleet = fleet_of(*names)
        self._status = Status(partial(deployment_details, *names))
        self.admission = Admission(config.admission, config.slo.ttft_s, self._fleet)
        self._grammars = GrammarChecker(config.limits)
        self._encoder = msgspec.json.Encoder()
        self._served: ServedModel | None = None
        self.measured = IngressMetrics(config)
        self.measured.registry.register(AdmissionCollector(self.admission.queue))
        self.measured.registry.register(RoutingCollector(placer_of(*names).counters, self._client.num_migrations))
        ingresses = serve.get_deployment_handle(context.deployment, context.app_name)
        self._fleet_metrics = FleetMetrics([ingresses, engine], config.model_name)
        labels = {"model_name": config.model_name, "ingress": self._id}
        self._exporting = asyncio.create_task(RayExport(self.measured.registry, labels).run())
        self._loading = asyncio.create_task(self._load())

    def __serve_build_asgi_app__(self) -> FastAPI:
        """For Ray, which serves it."""
        return build_http_app(self, self._config)

    async def health(self) -> Response:
        """200 when the model can be used."""
        self._model()
        await self._client.check_health()
        return self._json({"status": "ok"})

    async def version(self) -> Response:
        return self._json({"version": version("qwen3-serve")})

    async def all_metrics(self) -> Response:
        """The metrics of every process, in Prometheus' text format."""
        return Response(await self._fleet_metrics.text(), media_type=CONTENT_TYPE)

    async def metrics(self) -> bytes:
        """Those of this one: a Snapshot (msgpack), for the ingress that answers /metrics."""
        return msgspec.msgpack.encode(Snapshot("ingress", self._id, samples_of(self.measured.registry)))

    async def status(self) -> Response:
        """The fleet as this process sees it."""
        found = await self._status.of(self._fleet.replicas.values())
        model = {"name": self._config.model_name, "num_queued": self.admission.queue.num_queued} | found
        return self._json({"version": version("qwen3-serve"), "ingress": self._id, "models": [model]})

    async def models(self) -> Response:
        served = self._model()
        names = await self._client.adapters() if served.has_adapters else []
        return self._json({"object": "list", "data": [self._model_card(served, name) for name in ("", *names)]})

    async def model(self, name: str) -> Response:
        served = self._model()
        adapter = adapter_of(name, served)
        if adapter and adapter not in await self._client.adapters():
            raise model_not_found(name, served)
        return self._json(self._model_card(served, adapter))

    async def convert(self, request: Request, body: type[BaseModel], conversion: Conversion) -> Response:
        """Answer a request that the engine is not needed for."""
        return self._json(await self._read(request, body, conversion))

    async def generate(self, request: Request, body: type[BaseModel], endpoint_class: EndpointClass) -> Response:
        """Answer a request that runs the model."""
        served = self._model()
        endpoint = await self._read(request, body, endpoint_class)
        if endpoint.constraint is not None:
            await self._grammars.check(endpoint.constraint, served)
        caller = caller_of(request)
        requests = [
            msgspec.structs.replace(each, cache_salt=caller.cache_salt(each.cache_salt)) for each in endpoint.requests
        ]
        generation = Generation(self._client, served.tokenizer, requests, endpoint.text_options, endpoint.prompt_tokens)
        started_s = time.monotonic()
        admitted = self._admitted(caller, requests, generation)
        deltas = meter_of(request).watch(admitted, requests, generation.usage)
        if not endpoint.stream:
            return await unless_disconnected(request, self._whole(endpoint, generation, deltas))
        try:
            # Errors up to the first output still have a status of their own.
            first = await unless_disconnected(request, anext(deltas))
        except BaseException:
            await deltas.aclose()
            raise
        stream = EventStream(self._events(endpoint, generation, first, deltas))
        if first.timings is not None:
            stream.headers["Server-Timing"] = server_timing(first.timings, time.monotonic() - started_s)
        return stream

    async def check_health(self) -> None:
        """For Ray. Raises what kept the model from being read: this replica then never works."""
        if self._loading.done():
            self._loading.result()

    async def _read(self, request: Request, body: type[BaseModel], make: Callable[[Any, ServedModel], T]) -> T:
        """What `make` makes of the request's body."""
        served = self._model()
        raw = await read_body(request, self._config.limits.body_bytes)
        if len(raw) > LONG_BODY_BYTES:
            return await asyncio.to_thread(lambda: make(parse_body(raw, body), served))
        return make(parse_body(raw, body), served)

    async def _admitted(
        self, caller: Caller, requests: list[EngineRequest], generation: Generation
    ) -> AsyncGenerator[Delta, None]:
        """The deltas of a request, once its turn has come. Raises ApiError 429 if it does not come soon enough."""
        prompt_tokens = generation.usage.prompt_tokens
        caller.check_tokens(prompt_tokens)
        entry = entry_of(caller.name, requests, prompt_tokens)
        async with self.admission.admitted(entry), aclosing(generation.deltas()) as deltas:
            caller.take_tokens(prompt_tokens)
            async for delta in deltas:
                self.admission.received(entry, len(delta.token_ids))
                caller.take_tokens(len(delta.token_ids))
                yield delta

    async def _whole(self, endpoint: Endpoint, generation: Generation, deltas: AsyncGenerator[Delta, None]) -> Response:
        async with aclosing(deltas):
            found = [delta async for delta in deltas]
        return self._json(endpoint.whole(found, generation.usage))

    async def _events(
        self, endpoint: Endpoint, generation: Generation, first: Delta, deltas: AsyncGenerator[Delta, None]
    ) -> AsyncGenerator[bytes, None]:
        """The stream's events. A fault on the way is an event too, and then the stream has no proper end."""
        try:
            async with aclosing(deltas):
                if found := endpoint.events(first):
                    yield found
                async for delta in deltas:
                    if found := endpoint.events(delta):
                        yield found
            yield endpoint.last_events(generation.usage)
        except ApiError as error:
            yield endpoint.error_event(error)
        except Exception:
            logger.exception("a stream ends on a fault")
            yield endpoint.error_event(internal_error())

    async def _load(self) -> None:
        """Wait for a replica and take over what it tells about the model."""
        while self._served is None:
            try:
                info = await self._client.info()
            except ApiError:
                await asyncio.sleep(LOADING_RETRY_S)
                continue
            self._served = await asyncio.to_thread(ServedModel.from_info, self._config, info)
            self.measured.describe(info)
        await announce(self._config.model_name)

    def _model(self) -> ServedModel:
        """The model. Raises ApiError 503 until a replica has told about it."""
        if self._served is None:
            raise unavailable("the model is being loaded; try again later")
        return self._served

    def _model_card(self, served: ServedModel, adapter: str) -> dict[str, object]:
        return {
            "id": f"{served.name}:{adapter}" if adapter else served.name,
            "parent": served.name if adapter else None,
            "object": "model",
            "created": served.created,
            "owned_by": "qwen3-serve",
            "max_model_len": served.info.max_model_len,
            "default_sampling_params": served.defaults.model_dump(),
        }

    def _json(self, body: object) -> Response:
        return Response(self._encoder.encode(body), media_type="application/json")
