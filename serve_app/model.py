"""Model: one of the models behind an ingress."""

import asyncio
import gc
from functools import partial
from typing import Any

from ray.serve.handle import DeploymentHandle

from serve_app.admission import Admission
from serve_app.config import ModelConfig
from serve_app.engine_client import EngineClient
from serve_app.grammar_checker import GrammarChecker
from serve_app.metrics.ingress import IngressMetrics
from serve_app.metrics.process import Snapshot, samples_of
from serve_app.metrics.ray_export import RayExport
from serve_app.metrics.service import AdmissionCollector, RoutingCollector
from serve_app.openai.endpoint import ServedModel, adapter_of, model_not_found
from serve_app.openai.errors import ApiError, unavailable
from serve_app.placer import placer_of
from serve_app.ray_private import deployment_details
from serve_app.status import Status
from serve_app.terminal import announce

LOADING_RETRY_S = 1.0


class Model:
    """What an ingress process has of one model: the way to its replicas, and all that turns text into tokens and back.

    Until a replica is ready, and has told about the model, all that needs it is a 503.

    Args:
        config: the model's.
        engine: handle of its engine's deployment.
        ingress_id: of this process.

    Attributes:
        name: in the API.
        client: the way to the replicas.
        admission: which requests may go there.
        grammars: checks grammars.
        measured: the metrics of its requests.
    """

    def __init__(self, config: ModelConfig, engine: DeploymentHandle, ingress_id: str) -> None:
        self.name = config.model_name
        block_size = config.engine.block_size if config.engine.enable_prefix_caching else None
        self.client = EngineClient(engine, ingress_id, block_size)
        self.admission = Admission(config.admission, config.slo.ttft_s, self.client.fleet)
        self.grammars = GrammarChecker(config.limits)
        self.measured = IngressMetrics(config)
        self._config = config
        self._ingress_id = ingress_id
        self._status = Status(partial(deployment_details, engine.app_name, engine.deployment_name))
        self._served: ServedModel | None = None
        self._loading = asyncio.create_task(self._load())
        self.measured.registry.register(AdmissionCollector(self.admission.queue))
        counters = placer_of(engine.app_name, engine.deployment_name).counters
        self.measured.registry.register(RoutingCollector(counters, self.client.num_migrations))
        labels = {"model_name": self.name, "ingress": ingress_id}
        self._exporting = asyncio.create_task(RayExport(self.measured.registry, labels).run())

    @property
    def served(self) -> ServedModel:
        """What text takes. Raises ApiError 503 until a replica has told about it."""
        if self._served is None:
            raise unavailable("the model is being loaded; try again later")
        return self._served

    def check(self) -> None:
        """Raise what kept the model from being read: this process then never can."""
        if self._loading.done():
            self._loading.result()

    async def check_ready(self) -> None:
        """Raise ApiError 503 unless the model can be used: a replica answers, or none is wanted before a request."""
        _ = self.served
        views = self.client.fleet.replicas.values()
        if any(view.load is not None and not view.is_silent for view in views):
            return
        if (await self.state())["target_num_replicas"] != 0:
            raise unavailable()

    async def configure(self, config: ModelConfig) -> None:
        """Take over what can be changed while the model is served."""
        self._config = config
        self.admission.queue.configure(config.admission, config.slo.ttft_s)
        self.grammars.configure(config.limits)
        self.measured.hold_against(config.slo)
        if self._served is not None:
            self._served = await asyncio.to_thread(ServedModel.from_info, config, self._served.info)

    async def cards(self) -> list[dict[str, object]]:
        """What /v1/models says of it and its adapters."""
        served = self.served
        names = await self.client.adapters() if served.has_adapters else []
        return [_card(served, name) for name in ("", *names)]

    async def card(self, name: str) -> dict[str, object]:
        """What /v1/models/{name} says. Raises ApiError 404 if there is no such adapter."""
        served = self.served
        adapter = adapter_of(name, served)
        if adapter and adapter not in await self.client.adapters():
            raise model_not_found(name, served.names)
        return _card(served, adapter)

    async def state(self) -> dict[str, Any]:
        """What /status says of it; see Status."""
        found = await self._status.of(self.client.fleet.replicas.values())
        return {"name": self.name, "num_queued": self.admission.queue.num_queued} | found

    def snapshot(self) -> Snapshot:
        """Its metrics of this process."""
        return Snapshot("ingress", self._ingress_id, self.name, samples_of(self.measured.registry))

    async def _load(self) -> None:
        """Wait for a replica and take over what it tells about the model."""
        while self._served is None:
            try:
                info = await self.client.info()
            except ApiError:
                await asyncio.sleep(LOADING_RETRY_S)
                continue
            config = self._config
            served = await asyncio.to_thread(ServedModel.from_info, config, info)
            if config is self._config:  # not if that was changed meanwhile
                self._served = served
                self.measured.describe(info)
        # All that is there now stays: to look through it for garbage again would hold up every stream for 0.2 s.
        gc.collect()
        gc.freeze()
        await announce(self.name)


def _card(served: ServedModel, adapter: str) -> dict[str, object]:
    return {
        "id": f"{served.name}:{adapter}" if adapter else served.name,
        "parent": served.name if adapter else None,
        "object": "model",
        "created": served.created,
        "owned_by": "qwen3-serve",
        "max_model_len": served.info.max_model_len,
        "default_sampling_params": served.defaults.model_dump(),
    }
