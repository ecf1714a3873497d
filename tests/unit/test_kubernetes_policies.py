"""k8s/: what no schema asks for. Pods have no privileges, limits, probes and time to drain; the network is closed."""

import re
from itertools import pairwise

import pytest
import yaml

from tests.kubernetes import (
    OVERLAYS,
    ROOT,
    Manifest,
    containers,
    of_kind,
    pod_templates,
    ray_service,
    rendered,
    selects,
    worker_groups,
)
from tests.unit.test_auth import plain_app

INTERNAL_PORTS = {6379, 8265, 10001, 52365}
"""Of the control store, the dashboard, Ray's client server and the agents: for the cluster alone."""
RAY_PODS = ("head", "ingress", "engine")

pytestmark = pytest.mark.parametrize("overlay", OVERLAYS)


def quantity(text: str) -> float:
    """A Kubernetes quantity of CPUs, bytes or devices."""
    units = {"m": 1e-3, "Mi": 2**20, "Gi": 2**30}
    return next(
        (float(text.removesuffix(unit)) * size for unit, size in units.items() if text.endswith(unit)), None
    ) or float(text)


def test_pods_run_without_privileges(overlay: str):
    for name, template in pod_templates(overlay).items():
        spec = template["spec"]
        assert not {"hostNetwork", "hostPID", "hostIPC", "hostUsers"} & set(spec), name
        assert not [volume for volume in spec.get("volumes", []) if "hostPath" in volume], name
        security = spec["securityContext"]
        assert security["runAsNonRoot"] and security["runAsUser"] > 0 and security["fsGroup"] > 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        # KubeRay gives the head an account for its autoscaler; nobody else has one.
        assert spec["automountServiceAccountToken"] is (name == "head")
        assert spec["enableServiceLinks"] is False
    autoscaler = ray_service(overlay)["spec"]["rayClusterConfig"]["autoscalerOptions"]
    for name, container in [*containers(overlay), ("autoscaler", autoscaler)]:
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"] is True, name
        assert security["allowPrivilegeEscalation"] is False and "privileged" not in security, name
        assert security["capabilities"] == {"drop": ["ALL"]}, name


def test_kubernetes_itself_refuses_other_pods(overlay: str):
    [namespace] = of_kind(overlay, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for found in rendered(overlay):
        if found["kind"] != "Namespace":
            assert found["metadata"]["namespace"] == namespace["metadata"]["name"], found["metadata"]["name"]


def test_what_ray_writes_to_is_writable(overlay: str):
    for name in RAY_PODS:
        spec = pod_templates(overlay)[name]["spec"]
        empty = {volume["name"] for volume in spec["volumes"] if "emptyDir" in volume}
        for container in spec["containers"]:
            home = next(each["value"] for each in container["env"] if each["name"] == "HOME")
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert {mounts["/tmp"], mounts[home]} <= empty


def test_images_have_versions(overlay: str):
    for name, container in containers(overlay):
        tag = container["image"].rpartition(":")[2]
        assert any(character.isdigit() for character in tag) and "latest" not in tag, name
        assert container["imagePullPolicy"] == "IfNotPresent"


def test_containers_have_requests_and_limits(overlay: str):
    autoscaler = ray_service(overlay)["spec"]["rayClusterConfig"]["autoscalerOptions"]
    for name, container in [*containers(overlay), ("autoscaler", autoscaler)]:
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert {"cpu", "memory"} <= set(requests) == set(limits), name
        assert all(quantity(requests[each]) <= quantity(limits[each]) for each in requests), name
        # Ray takes the limit for what there is; memory that others can take away would get its pods killed.
        assert requests["memory"] == limits["memory"], name


def test_long_running_containers_have_all_three_probes(overlay: str):
    for template in pod_templates(overlay).values():
        for container in template["spec"]["containers"]:
            probes = [container[f"{kind}Probe"] for kind in ("startup", "liveness", "readiness")]
            assert all(("httpGet" in probe) or ("exec" in probe) for probe in probes)
    for name in RAY_PODS:
        [container] = pod_templates(overlay)[name]["spec"]["containers"]
        startup, liveness, readiness = (container[f"{kind}Probe"] for kind in ("startup", "liveness", "readiness"))
        # A pod must not be restarted because the model, which may be elsewhere, is being loaded.
        assert startup["httpGet"] == liveness["httpGet"] == {"path": "/api/healthz", "port": 52365}
        assert startup["periodSeconds"] * startup["failureThreshold"] >= 300
        proxy = {"path": "/-/healthz", "port": "serve"}
        assert readiness["httpGet"] == (liveness["httpGet"] if name == "head" else proxy)


def test_there_is_time_to_drain(overlay: str):
    spec = ray_service(overlay)["spec"]
    deployments = yaml.safe_load(spec["serveConfigV2"])["applications"][0]["deployments"]
    longest = max(deployment["graceful_shutdown_timeout_s"] for deployment in deployments)
    for group in worker_groups(overlay).values():
        pod = group["template"]["spec"]
        command, seconds = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert (ROOT / "k8s" / command).is_file()
        assert longest <= int(seconds) < pod["terminationGracePeriodSeconds"]
    # After an upgrade the old cluster finishes what it has, and so does an HAProxy that a new one has replaced.
    assert spec["rayClusterDeletionDelaySeconds"] > longest
    assert int(ray_variables("Dockerfile")["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) >= longest


def ray_variables(file: str) -> dict[str, str]:
    """Ray's environment variables that a file sets as NAME=VALUE."""
    return dict(re.findall(r"\b(RAY_\w+)=(\S+)", (ROOT / file).read_text()))


def test_the_image_runs_ray_as_make_serve_does(overlay: str):
    of_one_machine = {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S",
        "RAY_SERVE_HAPROXY_BINARY_PATH",
    }
    expected = {name: value for name, value in ray_variables("Makefile").items() if name not in of_one_machine}
    assert expected.items() <= ray_variables("Dockerfile").items()
    environments = [container.get("env", []) for _, container in containers(overlay)]
    assert not [each["name"] for environment in environments for each in environment if each["name"] in expected]


def test_the_head_runs_no_replicas_and_survives(overlay: str):
    spec = ray_service(overlay)["spec"]
    cluster = spec["rayClusterConfig"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0" and spec["excludeHeadPodFromServeSvc"]
    assert cluster["enableInTreeAutoscaling"] and cluster["authOptions"] == {"mode": "token"}
    options = cluster["gcsFaultToleranceOptions"]
    [service] = of_kind(overlay, "Service")
    host, _, port = options["redisAddress"].partition(":")
    assert host == service["metadata"]["name"] and int(port) == service["spec"]["ports"][0]["port"]
    secret = options["redisPassword"]["valueFrom"]["secretKeyRef"]
    [redis] = pod_templates(overlay)["redis"]["spec"]["containers"]
    assert redis["env"] == [{"name": "REDISCLI_AUTH", "valueFrom": {"secretKeyRef": secret}}]


def test_no_secret_is_in_the_repository(overlay: str):
    assert not of_kind(overlay, "Secret")


def test_worker_groups_scale_within_their_bounds(overlay: str):
    for group in worker_groups(overlay).values():
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] < 100


def test_selectors_select_pods_that_there_are(overlay: str):
    pods = {name: template["labels"] for name, template in pod_templates(overlay).items()}

    def selected(selector: Manifest) -> set[str]:
        return {name for name, labels in pods.items() if selects(selector, labels)}

    for budget in of_kind(overlay, "PodDisruptionBudget"):
        assert selected(budget["spec"]["selector"]) == {budget["metadata"]["name"]}
        # Kubernetes cannot count the pods of a RayCluster, so a percentage or maxUnavailable would not work.
        assert isinstance(budget["spec"]["minAvailable"], int)
    for service in of_kind(overlay, "Service"):
        assert selected({"matchLabels": service["spec"]["selector"]}) == {service["metadata"]["name"]}
    for policy in of_kind(overlay, "NetworkPolicy"):
        assert selected(policy["spec"]["podSelector"]), policy["metadata"]["name"]
    for name in ("ingress", "engine"):
        constraints = pod_templates(overlay)[name]["spec"]["topologySpreadConstraints"]
        assert {each["topologyKey"] for each in constraints} >= {
            "kubernetes.io/hostname",
            "topology.kubernetes.io/zone",
        }
        assert all(selected(each["labelSelector"]) == {name} for each in constraints)


def test_monitors_name_ports_that_pods_have(overlay: str):
    monitors = of_kind(overlay, "PodMonitor")
    assert bool(monitors) == (overlay != "cpu-dev")
    for monitor in monitors:
        templates = [
            each for each in pod_templates(overlay).values() if selects(monitor["spec"]["selector"], each["labels"])
        ]
        names = {port["name"] for each in templates for port in each["spec"]["containers"][0]["ports"]}
        assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} <= names


def test_everything_is_denied_first(overlay: str):
    [deny] = [each for each in of_kind(overlay, "NetworkPolicy") if each["metadata"]["name"] == "default-deny"]
    assert deny["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def allowed(overlay: str, pod: str, direction: str) -> list[tuple[list[Manifest], set[int]]]:
    """Rules for a pod: peers (none: anybody) and ports (none: all)."""
    labels = pod_templates(overlay)[pod]["labels"]
    return [
        (rule.get("from", rule.get("to", [])), {port["port"] for port in rule.get("ports", [])})
        for policy in of_kind(overlay, "NetworkPolicy")
        if selects(policy["spec"]["podSelector"], labels)
        for rule in policy["spec"].get(direction, [])
    ]


def test_what_comes_in_is_named(overlay: str):
    """Every rule has peers, and whoever is not a node of Ray gets single ports."""
    for pod in pod_templates(overlay):
        for peers, ports in allowed(overlay, pod, "ingress"):
            assert peers, f"{pod} is open to anybody on {ports}"
            for peer in peers:
                inside = "namespaceSelector" not in peer
                is_node = peer.get("podSelector", {}).get("matchLabels", {}) == {"ray.io/is-ray-node": "yes"}
                assert ports or (inside and is_node), f"{pod} has all ports open to {peer}"
                if not inside and 8265 not in ports:
                    assert not ports & INTERNAL_PORTS
    dashboards = [peers for peers, ports in allowed(overlay, "head", "ingress") if 8265 in ports]
    assert [peer["podSelector"]["matchLabels"] for [peer] in dashboards] == [
        {"app.kubernetes.io/name": "kuberay-operator"}
    ]
    assert {port for _, ports in allowed(overlay, "redis", "ingress") for port in ports} == {6379}


def test_what_goes_out_is_named(overlay: str):
    outward = {
        pod: {
            frozenset(ports) for peers, ports in allowed(overlay, pod, "egress") if not peers or "ipBlock" in peers[0]
        }
        for pod in pod_templates(overlay)
    }
    download = {frozenset({443})} if overlay != "cpu-dev" else set()
    assert outward == {"head": {frozenset({443, 6443})}, "ingress": set(), "engine": download, "redis": set()}
    for policy in of_kind(overlay, "NetworkPolicy"):
        for rule in policy["spec"].get("egress", []):
            for peer in rule.get("to", []):
                if "ipBlock" in peer:
                    assert {"10.0.0.0/8", "169.254.0.0/16"} <= set(peer["ipBlock"]["except"])


def test_only_the_api_is_routed_from_outside(overlay: str):
    for service in of_kind(overlay, "Service"):
        assert service["spec"].get("type", "ClusterIP") == "ClusterIP"
    cluster = ray_service(overlay)["spec"]["rayClusterConfig"]
    assert cluster["headGroupSpec"].get("serviceType", "ClusterIP") == "ClusterIP"
    assert not cluster["headGroupSpec"].get("enableIngress") and not of_kind(overlay, "Ingress")
    routes = of_kind(overlay, "HTTPRoute")
    assert bool(routes) == (overlay != "cpu-dev")
    served = {route.path for route in plain_app(()).routes}
    for route in routes:
        api, page = route["spec"]["rules"]
        assert matched(api) | matched(page) == served - {"/metrics", "/openapi.json"}
        # The page's files and what its fleet view asks; not a route of the API.
        assert {path for path in matched(page) if not path.startswith("/playground/")} == {"/", "/status"}
        # A limit of the gateway would cut streams.
        assert set(api["timeouts"].values()) == {"0s"}
        for rule in (api, page):
            [backend] = rule["backendRefs"]
            name = ray_service(overlay)["metadata"]["name"]
            assert (backend["name"], backend["port"]) == (f"{name}-serve-svc", 8000)


def matched(rule: Manifest) -> set[str]:
    """Routes of the service that a rule of an HTTPRoute lets through. Raises ValueError where a match has none."""
    found: set[str] = set()
    for match in rule["matches"]:
        path, is_exact = match["path"]["value"], match["path"]["type"] == "Exact"
        hits = {each.path for each in plain_app(()).routes if each.path == path}
        if not is_exact:
            hits |= {each.path for each in plain_app(()).routes if each.path.startswith(f"{path}/")}
        if not hits:
            raise ValueError(f"the service has no route for {match}")
        found |= hits
    return found


def test_the_engine_sees_the_models_but_cannot_change_or_download_them(overlay: str):
    spec = pod_templates(overlay)["engine"]["spec"]
    assert bool(spec.get("initContainers")) == (overlay != "cpu-dev")
    if overlay != "cpu-dev":
        [engine], [download] = spec["containers"], spec["initContainers"]
        mounts = [
            next(mount for mount in container["volumeMounts"] if mount["name"] == "model-cache")
            for container in (engine, download)
        ]
        assert [mount.get("readOnly", False) for mount in mounts] == [True, False]
        environment = {each["name"]: each.get("value") for each in engine["env"]}
        assert environment["HF_HUB_OFFLINE"] == "1" and environment["HF_HOME"] == mounts[0]["mountPath"]
        [claim] = of_kind(overlay, "PersistentVolumeClaim")
        names = [
            volume["persistentVolumeClaim"]["claimName"]
            for volume in spec["volumes"]
            if "persistentVolumeClaim" in volume
        ]
        assert names == [claim["metadata"]["name"]] and claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_names_fit(overlay: str):
    """KubeRay adds suffixes; a label's value holds 63 characters."""
    assert len(ray_service(overlay)["metadata"]["name"]) <= 47
    names = [(found["kind"], found["metadata"]["name"]) for found in rendered(overlay)]
    assert all(first != second for first, second in pairwise(sorted(names)))
