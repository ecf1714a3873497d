"""cluster/*.yaml and the arguments in it: every key means something, and a wrong one is named."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from engine.errors import ConfigError
from serve_app.config import ENGINE_DEPLOYMENT, LiveConfig, ServiceConfig
from serve_app.config_file import INGRESS, check_config_file, unknown_keys

CLUSTER = Path(__file__).parents[2] / "cluster"
CONFIG = CLUSTER / "config.yaml"


@pytest.mark.parametrize("path", sorted(CLUSTER.glob("*.yaml")), ids=lambda path: path.name)
def test_every_configuration_file_is_valid(path: Path):
    check_config_file(path)


def test_the_model_is_one_line_that_make_serve_can_replace():
    lines = [line.strip() for line in CONFIG.read_text().splitlines() if "model: demo" in line]
    assert lines == ["model: demo"]


def test_it_listens_on_loopback_only_and_logs_no_requests():
    values = yaml.safe_load(CONFIG.read_text())
    assert values["http_options"]["host"] == "127.0.0.1"
    assert values["logging_config"] == {"log_level": "WARNING", "enable_access_log": False}


def test_named_deployments_are_those_of_the_application():
    from serve_app.ingress import Ingress
    from serve_app.replica import EngineReplica

    assert Ingress.name == INGRESS and EngineReplica.name == ENGINE_DEPLOYMENT  # type: ignore[attr-defined]


def changed(tmp_path: Path, *path: Any, key: str, value: Any) -> Path:
    """The configuration file with one more key at a path."""
    values = yaml.safe_load(CONFIG.read_text())
    place = values
    for part in path:
        place = place[part]
    place[key] = value
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.mark.parametrize(
    ("path", "key", "value", "message"),
    [
        ((), "htp_options", {}, "unknown key htp_options"),
        (("http_options",), "prot", 1, "unknown key http_options.prot"),
        (("http_options",), "port", "x", "http_options.port"),
        (("logging_config",), "log_levl", "INFO", "unknown key logging_config.log_levl"),
        (("applications", 0), "arg", {}, r"unknown key applications\[0\].arg"),
        (("applications", 0, "args"), "modle", "demo", r"applications\[0\].args.modle: Extra inputs"),
        (("applications", 0, "args", "engine"), "dtyp", "x", r"applications\[0\].args.engine.dtyp: Extra inputs"),
        (("applications", 0, "args", "engine"), "max_num_seqs", 0, "args.engine.max_num_seqs"),
        (("applications", 0, "args", "engine"), "kv_cache_memory", "lots", "'lots' is no size"),
        (("applications", 0, "deployments", 0), "max_ongoing", 1, r"deployments\[0\].max_ongoing"),
        (("applications", 0, "deployments", 0), "name", "Ingres", "is 'Ingres', expected one of Ingress"),
        (("applications", 0, "deployments", 0), "autoscaling_config", {"min_replica": 1}, "autoscaling_config.min_r"),
        (("applications", 0, "deployments", 0), "ray_actor_options", {"gpus": 1}, "ray_actor_options.gpus"),
        (("applications", 0), "autoscaling_policy", {"policy": "x"}, "autoscaling_policy.policy"),
        (("applications", 0, "args"), "other_models", [{"engine": {"modle": "x"}}], "other_models.0.engine.modle"),
        (("applications", 0, "args"), "other_models", [{"api_keys": []}], "other_models.0.api_keys: Extra inputs"),
        (("applications", 0, "args"), "other_models", [{"limits": {"body_bytes": 9999}}], "0.limits.body_bytes: Extra"),
        (("applications", 0, "args"), "other_models", [{}], "two models have the model name 'demo'"),
        (("applications", 0, "deployments", 1), "name", "EngineReplica-x", "expected one of Ingress, EngineReplica$"),
        (("applications", 0, "deployments", 0), "user_config", {"engine": {}}, r"\[0\].user_config.engine: Extra"),
        (("applications", 0, "deployments", 0), "user_config", {"slo": {"ttft_s": 0}}, "user_config.slo.ttft_s"),
    ],
)
def test_a_wrong_key_or_value_is_named(tmp_path: Path, path: tuple, key: str, value: object, message: str):
    with pytest.raises(ConfigError, match=message):
        check_config_file(changed(tmp_path, *path, key=key, value=value))


@pytest.mark.parametrize("text", ["", "- 1", "a: [", "\0", "applications: 3"])
def test_what_is_no_configuration_is_refused(tmp_path: Path, text: str):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        check_config_file(file)


def test_unknown_keys_looks_into_lists_and_optional_models():
    values = {"applications": [{"name": "a", "deployments": [{"name": "b", "x": 1}, {"y": 2}]}], "z": 0}
    expected = ["applications[0].deployments[0].x", "applications[0].deployments[1].y", "z"]
    assert list(unknown_keys(values, ServeDeploySchema)) == expected


def test_arguments_are_strict_and_frozen():
    config = ServiceConfig.model_validate({"engine": {"model": "demo"}})
    with pytest.raises(ValidationError, match="frozen"):
        config.served_model_name = "other"  # type: ignore[misc]
    with pytest.raises(ValidationError, match="max_bodies"):
        ServiceConfig.model_validate({"limits": {"max_bodies": 1}})


def test_the_model_is_called_what_its_user_calls_it(tmp_path: Path):
    folder = tmp_path / "My-Model"
    folder.mkdir()

    def name(model: str, **others: str) -> str:
        return ServiceConfig.model_validate({"engine": {"model": model}, **others}).model_name

    assert name("demo") == "demo"
    assert name("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert name(str(folder)) == name(f"{folder}/") == "My-Model"
    assert name("demo", served_model_name="assistant") == "assistant"


def test_each_model_has_a_deployment_of_its_own():
    others = [{"served_model_name": "Qwen/Qwen3-8B"}, {"engine": {"model": "a b"}}]
    config = ServiceConfig.model_validate({"other_models": others})
    assert {name: model.model_name for name, model in config.engines.items()} == {
        "EngineReplica": "demo",
        "EngineReplica-Qwen-Qwen3-8B": "Qwen/Qwen3-8B",
        "EngineReplica-a-b": "a b",
    }
    with pytest.raises(ValidationError, match="two models have the deployment name 'EngineReplica-a-b'"):
        ServiceConfig.model_validate({"other_models": [{"served_model_name": name} for name in ("a b", "a/b")]})


def test_what_changes_without_a_restart_takes_the_place_of_the_same_in_the_arguments():
    config = ServiceConfig.model_validate({"limits": {"messages": 5, "choices": 3}, "slo": {"ttft_s": 7}})
    changed = config.changed(LiveConfig.model_validate({"limits": {"messages": 6}}))
    assert (changed.limits.messages, changed.limits.choices, changed.slo.ttft_s) == (6, 16, 7)
    assert config.changed(LiveConfig()) == config
    for name, field in LiveConfig.model_fields.items():
        assert field.annotation == ServiceConfig.model_fields[name].annotation
    with pytest.raises(ValidationError, match="there twice"):
        LiveConfig.model_validate({"api_keys": [{"name": "a", "sha256": "0" * 64}] * 2})
