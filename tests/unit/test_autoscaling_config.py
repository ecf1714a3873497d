"""The autoscaling part of cluster/*.yaml: an unknown argument of the policy, or a wrong value, is named."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.errors import ConfigError
from serve_app.config_file import check_config_file

CLUSTER = Path(__file__).parents[2] / "cluster"
FILES = sorted(CLUSTER.glob("*.yaml"))


def engine_deployment(values: dict[str, Any]) -> dict[str, Any]:
    return next(each for each in values["applications"][0]["deployments"] if each["name"] == "EngineReplica")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_engines_scale_by_this_policy_alone(path: Path):
    """Delays of Ray Serve's own would add to the policy's; its reports come each second."""
    scaling = engine_deployment(yaml.safe_load(path.read_text()))["autoscaling_config"]
    assert scaling["policy"]["policy_function"] == "cluster.autoscaling:QueueAndKvPolicy"
    assert scaling["upscale_delay_s"] == scaling["downscale_delay_s"] == 0
    assert scaling["metrics_interval_s"] == 1 and scaling["look_back_period_s"] == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy_kwargs": {"hold": 5}}, r"policy_kwargs: .*unexpected keyword argument 'hold'"),
        ({"policy_kwargs": {"hold_s": -1}}, r"policy_kwargs: hold_s is -1, expected a number at least 0"),
        ({"policy_kwargs": {"hold_s": "long"}}, r"policy_kwargs: hold_s is 'long', expected a number"),
        (
            {"policy_function": "cluster.autoscaling:Policy"},
            r"cannot be imported: module 'cluster.autoscaling' has no attribute 'Policy'",
        ),
        ({"policy_arguments": {}}, r"unknown key .*autoscaling_config\.policy\.policy_arguments"),
    ],
)
def test_what_is_wrong_with_a_policy_is_named(tmp_path: Path, changes: dict[str, Any], message: str):
    values = yaml.safe_load((CLUSTER / "config.yaml").read_text())
    engine_deployment(values)["autoscaling_config"]["policy"] |= changes
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=message):
        check_config_file(file)
