"""build_app: the Serve application that cluster/config.yaml names."""

from typing import Any

import ray
from ray.serve import Application

from serve_app.config import ModelConfig, ServiceConfig
from serve_app.ingress import Ingress
from serve_app.replica import EngineReplica


def build_app(args: ServiceConfig) -> Application:
    """One ingress deployment in front of an engine deployment for each model.

    Engine replicas take a GPU each where the configuration says `device: cuda`, or `auto` and the cluster has any now,
    or `tensor_parallel_size` of them on one node. Shares of CPUs only tell Ray where replicas fit; one of each
    deployment fits on one core. `ray_actor_options` and `placement_group_bundles` in the configuration file replace
    all of these.
    """
    has_gpus = ray.cluster_resources().get("GPU", 0) >= 1
    engines = [_engine(name, model, has_gpus) for name, model in args.engines.items()]
    return Ingress.options(  # type: ignore[attr-defined]
        ray_actor_options={"num_cpus": 0.25}
    ).bind(args, *engines)


def _engine(name: str, model: ModelConfig, has_gpus: bool) -> Application:
    num_gpus = 1 if model.engine.device == "cuda" or (has_gpus and model.engine.device == "auto") else 0
    placement: dict[str, Any] = {}
    if model.engine.tensor_parallel_size > 1:
        bundle = {"CPU": 0.5, "GPU": num_gpus} if num_gpus else {"CPU": 0.5}
        bundles = [dict(bundle) for _ in range(model.engine.tensor_parallel_size)]
        placement = {"placement_group_bundles": bundles, "placement_group_strategy": "STRICT_PACK"}
    return EngineReplica.options(  # type: ignore[attr-defined]  # a Deployment since its decorator
        name=name,
        ray_actor_options={"num_cpus": 0.5, "num_gpus": num_gpus},
        **placement,
        request_router_config={"request_router_class": "serve_app.router:KvAwareRouter"},
    ).bind(model.engine, model.model_name)
