"""build_app: the Serve application that cluster/config.yaml names."""

import ray
from ray.serve import Application

from serve_app.config import ServiceConfig
from serve_app.ingress import Ingress
from serve_app.replica import EngineReplica


def build_app(args: ServiceConfig) -> Application:
    """One ingress deployment in front of one engine deployment.

    Engine replicas take a GPU each where the configuration says `device: cuda`, or `auto` and the cluster has any now.
    Shares of CPUs only tell Ray where replicas fit; both deployments fit on one core. `ray_actor_options` in the
    configuration file replace all of these.
    """
    has_gpus = ray.cluster_resources().get("GPU", 0) >= 1
    num_gpus = 1 if args.engine.device == "cuda" or (has_gpus and args.engine.device == "auto") else 0
    engine = EngineReplica.options(  # type: ignore[attr-defined]  # a Deployment since its decorator
        ray_actor_options={"num_cpus": 0.5, "num_gpus": num_gpus},
        request_router_config={"request_router_class": "serve_app.router:KvAwareRouter"},
    ).bind(args.engine, args.model_name)
    return Ingress.options(  # type: ignore[attr-defined]
        ray_actor_options={"num_cpus": 0.25}
    ).bind(args, engine)
