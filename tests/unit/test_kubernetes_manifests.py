"""k8s/: it renders, every object is valid with no unknown field, and it runs what the project's own files say."""

import copy
import json
import re
import shutil
import subprocess
import tomllib
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ray.serve.schema import ServeDeploySchema

from k8s.serve_config import SOURCES, for_pods, manifest
from serve_app.config_file import check_config_file
from tests.kubernetes import OVERLAYS, ROOT, Manifest, of_kind, pod_templates, ray_service, rendered, worker_groups

CRDS = ROOT.parent / "shared" / "data" / "crds"
KUBERNETES_VERSION = "1.32"
CUSTOM_GROUPS = ("ray.io/", "monitoring.coreos.com/", "gateway.networking.k8s.io/")


def strict(schema: Any) -> Any:
    """A Kubernetes structural schema as a JSON schema that refuses unknown fields."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made = {key: strict(value) for key, value in schema.items() if key not in ("properties", "required")}
    if "pattern" in schema:
        made["pattern"] = schema["pattern"].replace("^(?i)", "(?i)^")  # from Go's regular expressions to Python's
    properties = schema.get("properties", {})
    if properties:
        made["properties"] = {name: strict(each) for name, each in properties.items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made.setdefault("additionalProperties", False)
    # The API server fills in defaults before it validates.
    made["required"] = [name for name in schema.get("required", []) if "default" not in properties.get(name, {})]
    return made


@cache
def custom_schemas() -> dict[tuple[str, str], Any]:
    """Strict schemas by API version and kind, of the kinds that are not Kubernetes' own."""
    if not CRDS.is_dir():
        pytest.skip(f"{CRDS} is not here: custom resources are not validated")
    found = {}
    for name in ("ray.io_rayservices", "monitoring.coreos.com_podmonitors", "monitoring.coreos.com_prometheusrules"):
        definition = yaml.load((CRDS / f"{name}.yaml").read_text(), Loader=yaml.CSafeLoader)["spec"]
        for version in definition["versions"]:
            key = (f"{definition['group']}/{version['name']}", definition["names"]["kind"])
            found[key] = version["schema"]["openAPIV3Schema"]
    found["gateway.networking.k8s.io/v1", "HTTPRoute"] = json.loads((CRDS / "json" / "httproute_v1.json").read_text())
    for schema in found.values():
        schema["properties"]["metadata"] = {"type": "object"}
    return {key: strict(schema) for key, schema in found.items()}


def check(found: Manifest) -> None:
    """Raise unless an object is valid."""
    if not found["apiVersion"].startswith(CUSTOM_GROUPS):
        kubernetes_validate.validate(found, KUBERNETES_VERSION, strict=True)
    else:
        jsonschema.validate(found, custom_schemas()[found["apiVersion"], found["kind"]], jsonschema.Draft7Validator)


def distinct(is_custom: bool) -> list[Manifest]:
    """Objects of all overlays, each once: most are the same in several."""
    found = {json.dumps(each, sort_keys=True): each for overlay in OVERLAYS for each in rendered(overlay)}
    return [each for each in found.values() if each["apiVersion"].startswith(CUSTOM_GROUPS) == is_custom]


def test_every_built_in_object_is_valid():
    found = distinct(is_custom=False)
    assert len(found) >= 15
    for each in found:
        check(each)


def test_every_custom_resource_is_valid():
    found = distinct(is_custom=True)
    assert {each["kind"] for each in found} == {"RayService", "HTTPRoute", "PodMonitor", "PrometheusRule"}
    for each in found:
        check(each)


def test_a_typing_error_is_found_in_both():
    service = copy.deepcopy(ray_service("cpu-dev"))
    container = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    container["readynessProbe"] = container.pop("readinessProbe")
    with pytest.raises(jsonschema.ValidationError, match="readynessProbe"):
        check(service)
    [redis] = copy.deepcopy(of_kind("cpu-dev", "StatefulSet"))
    redis["spec"]["template"]["spec"]["hostnetwork"] = True
    with pytest.raises(kubernetes_validate.ValidationError, match="hostnetwork"):
        check(redis)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_serve_config_is_the_projects_own(overlay: str):
    assert (ROOT / "k8s" / "overlays" / overlay / "serve-config.yaml").read_text() == manifest(overlay), (
        f"{SOURCES[overlay]} has changed: run `python -m k8s.serve_config`"
    )


def test_pods_differ_from_one_machine_in_what_they_need_only():
    configuration = yaml.safe_load((ROOT / "cluster" / "config.yaml").read_text())
    before = copy.deepcopy(configuration)
    values = for_pods(configuration, ingress_replicas=2)
    assert configuration == before
    assert values.pop("proxy_location") == "EveryNode" and values["http_options"].pop("host") == "0.0.0.0"
    for deployment in values["applications"][0]["deployments"]:
        assert deployment.pop("ray_actor_options")["label_selector"]["role"] in ("ingress", "engine")
    ingress = values["applications"][0]["deployments"][0]
    assert (ingress.pop("num_replicas"), ingress.pop("max_replicas_per_node")) == (2, 1)
    del before["proxy_location"], before["http_options"]["host"]
    for deployment in before["applications"][0]["deployments"]:
        deployment.pop("ray_actor_options", None)
    assert values == before
    configuration["applications"][0]["deployments"].pop()
    with pytest.raises(ValueError, match="each needs a worker group"):
        for_pods(configuration, ingress_replicas=2)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_serve_config_is_valid_imports_and_finds_its_workers(overlay: str, tmp_path: Path):
    text = ray_service(overlay)["spec"]["serveConfigV2"]
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    check_config_file(file)
    [application] = ServeDeploySchema.model_validate(yaml.safe_load(text)).applications
    module, _, builder = application.import_path.partition(":")
    assert callable(getattr(import_module(module), builder))
    groups = worker_groups(overlay)
    for deployment in yaml.safe_load(text)["applications"][0]["deployments"]:
        options = deployment["ray_actor_options"]
        alone = {"CPU": options["num_cpus"], "GPU": options.get("num_gpus", 0)}
        bundles = deployment.get("placement_group_bundles", [alone])
        [role] = deployment.get("placement_group_bundle_label_selector") or [options["label_selector"]]
        [group] = [each for each in groups.values() if each["labels"] == role]
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        # All ranks of a replica are in one pod, and leave none of its GPUs idle.
        assert sum(bundle["CPU"] for bundle in bundles) <= int(limits["cpu"])
        assert sum(bundle["GPU"] for bundle in bundles) == int(limits.get("nvidia.com/gpu", 0))
        if group["groupName"] == "engine":
            assert deployment["autoscaling_config"]["max_replicas"] <= group["maxReplicas"]
        else:
            # As many as there are pods, one on each: a pod without one would never be ready.
            assert deployment["num_replicas"] == group["minReplicas"] and deployment["max_replicas_per_node"] == 1


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_versions_agree(overlay: str):
    constraints = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cluster = ray_service(overlay)["spec"]["rayClusterConfig"]
    assert cluster["rayVersion"] == constraints["ray"]
    dockerfile = (ROOT / "Dockerfile").read_text()
    for template in [pod_templates(overlay)[name] for name in ("head", "ingress", "engine")]:
        for container in template["spec"]["containers"] + template["spec"].get("initContainers", []):
            name, _, tag = container["image"].partition(":")
            assert name == "qwen3-serve" and tag.startswith(f"{project['version']}-")
            assert f"--target {tag.rpartition('-')[2]} " in dockerfile and f"--tag {container['image']} " in dockerfile


@pytest.mark.parametrize("overlay", ["gpu-8b", "gpu-32b"])
def test_the_model_that_is_downloaded_is_the_one_that_is_served(overlay: str):
    [settings] = [each["data"] for each in of_kind(overlay, "ConfigMap") if each["metadata"]["name"] == "model"]
    serve = yaml.safe_load(ray_service(overlay)["spec"]["serveConfigV2"])
    engine = serve["applications"][0]["args"]["engine"]
    assert (settings["MODEL"], settings.get("REVISION")) == (engine["model"], engine.get("revision"))


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not on PATH")
def test_prometheus_takes_the_rules(tmp_path: Path):
    for rule in of_kind("gpu-8b", "PrometheusRule"):
        file = tmp_path / "rules.yaml"
        file.write_text(yaml.safe_dump(rule["spec"]))
        command = ["promtool", "check", "rules", file]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr


def test_the_rules_of_the_service_are_the_ones_beside_the_dashboards():
    rules = yaml.safe_load((ROOT / "cluster/prometheus/rules.yaml").read_text())
    specs = [each["spec"] for each in of_kind("gpu-8b", "PrometheusRule")]
    assert rules in specs, "run `python -m k8s.rules`"


def needed(requirements: list[str]) -> set[str]:
    """Names of the packages that these need, theirs included. What is not installed here needs nothing."""
    found, left = set(), [Requirement(each) for each in requirements]
    while left:
        one = left.pop()
        name = canonicalize_name(one.name)
        if (name, *one.extras) in found:
            continue
        found.add((name, *one.extras))
        try:
            more = [Requirement(each) for each in requires(name) or ()]
        except PackageNotFoundError:
            continue
        chosen = one.extras | {""}
        left += [each for each in more if not each.marker or any(each.marker.evaluate({"extra": x}) for x in chosen)]
    return {name for name, *_ in found}


def test_every_package_in_the_image_has_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(line.partition("==")[0]) for line in lines if "==" in line}
    assert needed(project["dependencies"] + project["optional-dependencies"]["serve"]) - pinned == set()


def test_the_image_is_made_of_pinned_versions_and_has_no_root():
    dockerfile = (ROOT / "Dockerfile").read_text()
    for image in re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE):
        assert image in ("cpu", "build") or re.fullmatch(r"[a-z/]+:\d+\.\d+\.\d+-[a-z-]+", image), image
    for install in re.findall(r"pip install (.*)", dockerfile):
        assert "--constraint constraints.txt" in install
    assert re.findall(r"^USER (\S+)", dockerfile, re.MULTILINE) == ["1000:1000"]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for source in re.findall(r"^COPY (?!--from)(?:--\S+ )?(.+) \S+$", dockerfile, re.MULTILINE):
        for path in source.split():
            assert (ROOT / path).exists()
            assert any(line in (f"!{path}", f"!{path.split('/')[0]}") for line in ignored), path
