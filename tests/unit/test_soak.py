"""What the soak concludes from what it measures, and that its configuration is one."""

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from loadtest.soak.config import write_config
from loadtest.soak.processes import Use


def test_the_slope_is_that_of_the_second_half():
    """The first half fills caches."""
    seconds = [60.0 * minute for minute in range(20)]
    sizes = [100.0 + 50 * minute for minute in range(10)] + [600.0 + minute for minute in range(10)]
    use = Use("EngineReplica", seconds, sizes, [10] * 20)
    assert use.slope_mib_per_hour() == pytest.approx(60.0)
    assert Use("EngineReplica", [1.0], [5.0], [10]).slope_mib_per_hour() == 0.0


def test_its_configuration_is_one_of_ray_serve(tmp_path):
    write_config(tmp_path / "config.yaml", 21_000)
    found = ServeDeploySchema.model_validate(yaml.safe_load((tmp_path / "config.yaml").read_text()))
    assert found.http_options.port == 21_000
    assert [each.num_replicas for each in found.applications[0].deployments] == [2, 2]
