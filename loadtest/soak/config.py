"""The service under test: cluster/config.yaml with several replicas of each kind on this machine."""

from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
ENGINE = {"dtype": "float32", "kv_cache_memory": "64MiB", "max_num_seqs": 16, "num_threads": 1}
"""In float32 greedy text does not depend on who shares a batch."""
NUM_REPLICAS = 2


def write_config(path: Path, port: int) -> None:
    """Write the configuration file."""
    values = yaml.safe_load((ROOT / "cluster" / "config.yaml").read_text())
    values["http_options"]["port"] = port
    [application] = values["applications"]
    application["args"]["engine"] |= ENGINE
    deployments = {each["name"]: each for each in application["deployments"]}
    deployments["Ingress"]["num_replicas"] = NUM_REPLICAS
    engine = deployments["EngineReplica"]
    engine.pop("autoscaling_config")
    engine["num_replicas"] = NUM_REPLICAS
    engine["ray_actor_options"] = {"num_cpus": 0.25}
    path.write_text(yaml.safe_dump(values))
