"""Ingress: the HTTP side of the service. It owns text; the engine replicas see token ids only."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from importlib.metadata import version
from typing import Any, TypeVar

import msgspec
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel
from ray import serve
from ray.serve.handle import DeploymentHandle

from engine.request import EngineRequest
from serve_app.admission import Admission, entry_of
from serve_app.auth import ApiKeys, Caller
from serve_app.config import LiveConfig, ServiceConfig
from serve_app.gate import caller_of
from serve_app.http import EventStream, parse_body, read_body, server_timing, unless_disconnected
from serve_app.metrics.exposition import CONTENT_TYPE, FleetMetrics
from serve_app.metrics.requests import meter_in, meter_of
from serve_app.metrics.service import KeyCollector
from serve_app.model import Model
from serve_app.openai.endpoint import Endpoint, ServedModel, model_not_found
from serve_app.openai.errors import ApiError, internal_error
from serve_app.openai.generation import Delta, Generation
from serve_app.routes import GENERATING, Conversion, EndpointClass, build_http_app

T = TypeVar("T")

logger = logging.getLogger("ray.serve")

LONG_BODY_BYTES = 2 * 1024
"""Longer bodies are read on a thread, so that they delay no other request: prompts, grammars and biases take time."""
MANY_LOGPROBS = 256
"""Tokens with log-probabilities; answers with more are written on a thread."""


@serve.deployment
@serve.ingress()
class Ingress:
    """Parses, renders, tokenizes, and turns outputs into responses. Needs no GPU, and no files of the models.

    Args:
        config: the service's configuration.
        engines: handles of the engines' deployments, in the order of `config.engines`.
    """

    async def __init__(self, config: ServiceConfig, *engines: DeploymentHandle) -> None:  # type: ignore[misc]  # awaited
        self._given = self.config = config
        self.keys = ApiKeys(config.api_keys)
        context = serve.get_replica_context()
        self._id = context.replica_id.unique_id
        configs = config.engines.values()
        models = [Model(each, engine, self._id) for each, engine in zip(configs, engines, strict=True)]
        self._models = {model.name: model for model in models}
        self._first = models[0]
        self.measured = self._first.measured
        self.measured.registry.register(KeyCollector(self.keys))
        for model in models:
            model.measured.expect(GENERATING, self.keys)
        ingresses = serve.get_deployment_handle(context.deployment, context.app_name)
        self._fleet_metrics = FleetMetrics([ingresses, *engines])
        self._encoder = msgspec.json.Encoder()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """For Ray, which serves it."""
        return build_http_app(self)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """For Ray: take over a LiveConfig. What runs goes on."""
        self.config = self._given.changed(LiveConfig.model_validate(user_config))
        self.keys.replace(self.config.api_keys)
        for model, config in zip(self._models.values(), self.config.engines.values(), strict=True):
            await model.configure(config)
            model.measured.expect(GENERATING, self.keys)

    async def health(self) -> Response:
        """200 when all models can be used."""
        for model in self._models.values():
            await model.check_ready()
        return self._json({"status": "ok"})

    async def version(self) -> Response:
        return self._json({"version": version("qwen3-serve")})

    async def all_metrics(self) -> Response:
        """The metrics of every process, in Prometheus' text format."""
        return Response(await self._fleet_metrics.text(), media_type=CONTENT_TYPE)

    async def metrics(self) -> bytes:
        """Those of this one: a list of Snapshots (msgpack), for the ingress that answers /metrics."""
        return msgspec.msgpack.encode([model.snapshot() for model in self._models.values()])

    async def status(self) -> Response:
        """The fleet as this process sees it."""
        models = [await model.state() for model in self._models.values()]
        return self._json({"version": version("qwen3-serve"), "ingress": self._id, "models": models})

    async def models(self) -> Response:
        cards = [card for model in self._models.values() for card in await model.cards()]
        return self._json({"object": "list", "data": cards})

    async def model(self, name: str) -> Response:
        return self._json(await self._find(name).card(name))

    async def convert(self, request: Request, body: type[BaseModel], conversion: Conversion) -> Response:
        """Answer a request that the engine is not needed for."""

        def answer(values: Any, model: ServedModel) -> Response:
            return self._json(conversion(values, model))

        return (await self._read(request, body, answer))[1]

    async def generate(self, request: Request, body: type[BaseModel], endpoint_class: EndpointClass) -> Response:
        """Answer a request that runs the model."""
        model, endpoint = await self._read(request, body, endpoint_class)
        meter, caller = meter_of(request), caller_of(request)
        caller.check_priority(endpoint.requests[0].priority)
        if endpoint.constraint is not None:
            await model.grammars.check(endpoint.constraint, model.served, caller.name)
        requests = [
            msgspec.structs.replace(each, cache_salt=caller.cache_salt(each.cache_salt)) for each in endpoint.requests
        ]
        generation = Generation(
            model.client, model.served.tokenizer, requests, endpoint.text_options, endpoint.prompt_tokens
        )
        started_s = time.monotonic()
        admitted = _admitted(model.admission, caller, requests, generation)
        deltas = meter.watch(admitted, requests, generation.usage)
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
        """For Ray. Raises what kept a model from being read: this replica then never works."""
        for model in self._models.values():
            model.check()

    async def _read(
        self, request: Request, body_class: type[BaseModel], make: Callable[[Any, ServedModel], T]
    ) -> tuple[Model, T]:
        """The model that a request's body names, and what `make` makes of the body."""
        named: list[Model] = []

        def read() -> T:
            body: Any = parse_body(raw, body_class)
            named.append(self._find(body.model) if body.model is not None else self._first)
            return make(body, named[0].served)

        raw = await read_body(request, self.config.limits.body_bytes)
        try:
            made = await asyncio.to_thread(read) if len(raw) > LONG_BODY_BYTES else read()
        finally:
            # Also where its model is not loaded yet: that is no fault of another model.
            if named and (meter := meter_in(request.scope)) is not None:
                meter.belongs_to(named[0].measured)
        return named[0], made

    def _find(self, name: str) -> Model:
        """The model of a name, which may name one of its adapters, too. Raises ApiError 404."""
        found = self._models.get(name)
        if found is None:
            bases = [known for known in self._models if name.startswith(f"{known}:")]
            found = self._models[max(bases, key=len)] if bases else None  # names may have colons, too
        if found is None:
            raise model_not_found(name, self._models)
        return found

    async def _whole(self, endpoint: Endpoint, generation: Generation, deltas: AsyncGenerator[Delta, None]) -> Response:
        async with aclosing(deltas):
            found = [delta async for delta in deltas]

        def answer() -> Response:
            return self._json(endpoint.whole(found, generation.usage))

        num_logprobs = sum(len(delta.logprobs) + len(delta.prompt_logprobs or ()) for delta in found)
        return await asyncio.to_thread(answer) if num_logprobs > MANY_LOGPROBS else answer()

    async def _events(
        self, endpoint: Endpoint, generation: Generation, first: Delta, deltas: AsyncGenerator[Delta, None]
    ) -> AsyncGenerator[bytes, None]:
        """The stream's events. A fault on the way is an event too, and then the stream has no proper end."""
        try:
            async with aclosing(deltas):
                if found := await _events_of(endpoint, first):
                    yield found
                async for delta in deltas:
                    if found := await _events_of(endpoint, delta):
                        yield found
            yield endpoint.last_events(generation.usage)
        except ApiError as error:
            yield endpoint.error_event(error)
        except Exception:
            logger.exception("a stream ends on a fault")
            yield endpoint.error_event(internal_error())

    def _json(self, body: object) -> Response:
        return Response(self._encoder.encode(body), media_type="application/json")


async def _events_of(endpoint: Endpoint, delta: Delta) -> bytes:
    """The stream's events for a delta; those that echo a long prompt with log-probabilities are made on a thread."""
    if delta.prompt_logprobs is not None and len(delta.prompt_logprobs) > MANY_LOGPROBS:
        return await asyncio.to_thread(endpoint.events, delta)
    return endpoint.events(delta)


async def _admitted(
    admission: Admission, caller: Caller, requests: list[EngineRequest], generation: Generation
) -> AsyncGenerator[Delta, None]:
    """The deltas of a request, once its turn has come. Raises ApiError 429 if it does not come soon enough."""
    prompt_tokens = generation.usage.prompt_tokens
    caller.check_tokens(prompt_tokens)
    entry = entry_of(caller.name, requests, prompt_tokens)
    async with admission.admitted(entry), aclosing(generation.deltas()) as deltas:
        caller.take_tokens(prompt_tokens)
        async for delta in deltas:
            admission.received(entry, len(delta.token_ids))
            caller.take_tokens(len(delta.token_ids))
            yield delta
