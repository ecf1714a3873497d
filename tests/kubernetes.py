"""The manifests of k8s/ as `kubectl kustomize` renders them, and the pods in them."""

import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
OVERLAYS = ("cpu-dev", "gpu-8b", "gpu-32b")
Manifest = dict[str, Any]


@cache
def rendered(overlay: str) -> tuple[Manifest, ...]:
    """Every object of an overlay; skips the test where there is nothing to render with."""
    folder = str(ROOT / "k8s" / "overlays" / overlay)
    if shutil.which("kubectl"):
        command = ["kubectl", "kustomize", folder]
    elif shutil.which("kustomize"):
        command = ["kustomize", "build", folder]
    else:
        pytest.skip("neither kubectl nor kustomize is on PATH to render k8s/ with")
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
    return tuple(found for found in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if found)


def of_kind(overlay: str, *kinds: str) -> list[Manifest]:
    """The objects of some kinds."""
    return [found for found in rendered(overlay) if found["kind"] in kinds]


def ray_service(overlay: str) -> Manifest:
    """Its RayService; there is one."""
    [found] = of_kind(overlay, "RayService")
    return found


def worker_groups(overlay: str) -> dict[str, Manifest]:
    """Worker groups of the RayService by name."""
    return {group["groupName"]: group for group in ray_service(overlay)["spec"]["rayClusterConfig"]["workerGroupSpecs"]}


def pod_templates(overlay: str) -> dict[str, Manifest]:
    """Pod templates by name: the head, the worker groups, Redis. Labels include those that KubeRay adds."""
    cluster = ray_service(overlay)["spec"]["rayClusterConfig"]
    templates = {
        "head": (cluster["headGroupSpec"]["template"], {"ray.io/node-type": "head", "ray.io/group": "headgroup"})
    }
    for name, group in worker_groups(overlay).items():
        templates[name] = (group["template"], {"ray.io/node-type": "worker", "ray.io/group": name})
    found = {
        name: template | {"labels": labels | {"ray.io/is-ray-node": "yes"}}
        for name, (template, labels) in templates.items()
    }
    for workload in of_kind(overlay, "StatefulSet"):
        template = workload["spec"]["template"]
        found[workload["metadata"]["name"]] = template | {"labels": template["metadata"]["labels"]}
    return found


def containers(overlay: str) -> Iterator[tuple[str, Manifest]]:
    """Every container and init container, with a name to show."""
    for pod, template in pod_templates(overlay).items():
        for container in template["spec"].get("initContainers", []) + template["spec"]["containers"]:
            yield f"{pod}/{container['name']}", container


def selects(selector: Manifest, labels: dict[str, str]) -> bool:
    """Whether a Kubernetes label selector, with matchLabels and `In` expressions, takes an object with these labels."""
    expressions = selector.get("matchExpressions", [])
    if any(expression["operator"] != "In" for expression in expressions):
        raise ValueError(f"the selector {selector} has an operator other than In")
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()) and all(
        labels.get(expression["key"]) in expression["values"] for expression in expressions
    )
