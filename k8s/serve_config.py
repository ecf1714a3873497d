"""serveConfigV2 of the overlays, made from the project's own configuration files.

python -m k8s.serve_config     # writes k8s/overlays/*/serve-config.yaml again; a test compares
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
SOURCES = {"cpu-dev": "cluster/config.yaml", "gpu-8b": "cluster/gpu.yaml", "gpu-32b": "cluster/tp.yaml"}
"""The configuration file of each overlay."""
INGRESS_REPLICAS = {"cpu-dev": 1, "gpu-8b": 2, "gpu-32b": 2}
"""One for each ingress pod that is always there, on pods of their own."""
WORKER_GROUPS = {"Ingress": "ingress", "EngineReplica": "engine"}
"""Where each deployment's replicas go: the label `role` of worker groups in k8s/base/rayservice.yaml."""
ACTOR_OPTIONS = {"Ingress": {"num_cpus": 0.25}, "EngineReplica": {"num_cpus": 0.5}}
"""As serve_app/app.py has them, which options in a configuration replace as a whole."""
HEADER = """\
# Made by `python -m k8s.serve_config` from {source}. What differs is what pods need: all interfaces instead of
# loopback, HAProxy on every node with replicas, which workers the replicas go to, one Ingress replica an ingress pod.
"""


def for_pods(configuration: dict[str, Any], ingress_replicas: int) -> dict[str, Any]:
    """A Serve configuration for one machine, as pods need it.

    Raises:
        ValueError: an application names no deployment, or one that has no worker group.
    """
    values = deepcopy(configuration)
    values["proxy_location"] = "EveryNode"
    values["http_options"]["host"] = "0.0.0.0"
    for application in values["applications"]:
        names = [deployment["name"] for deployment in application.get("deployments", ())]
        if sorted(names) != sorted(WORKER_GROUPS):
            raise ValueError(f"deployments are {names}, expected {list(WORKER_GROUPS)}: each needs a worker group")
        for deployment in application["deployments"]:
            options = deployment.setdefault("ray_actor_options", dict(ACTOR_OPTIONS[deployment["name"]]))
            role = {"role": WORKER_GROUPS[deployment["name"]]}
            if "placement_group_bundles" in deployment:
                deployment["placement_group_bundle_label_selector"] = [role]  # one stands for all bundles
            else:
                options["label_selector"] = role
            if deployment["name"] == "Ingress":
                deployment |= {"num_replicas": ingress_replicas, "max_replicas_per_node": 1}
    return values


def manifest(overlay: str) -> str:
    """The text of an overlay's serve-config.yaml."""
    source = SOURCES[overlay]
    values = for_pods(yaml.safe_load((ROOT / source).read_text(encoding="utf-8")), INGRESS_REPLICAS[overlay])
    text = yaml.safe_dump(values, sort_keys=False)
    indented = "".join(f"    {line}\n" for line in text.splitlines())
    head = "apiVersion: ray.io/v1\nkind: RayService\nmetadata:\n  name: qwen3-serve\nspec:\n  serveConfigV2: |\n"
    return HEADER.format(source=source) + head + indented


def main() -> None:
    """Write every overlay's file."""
    for overlay in SOURCES:
        (ROOT / "k8s" / "overlays" / overlay / "serve-config.yaml").write_text(manifest(overlay), encoding="utf-8")


if __name__ == "__main__":
    main()
