"""Settings for all tests."""

import pytest
from hypothesis import HealthCheck, settings

import engine  # noqa: F401  (sets OpenMP's waiting before torch is loaded)

import torch  # isort: skip

# Tiny models are faster on one thread, the more so where several test runs share the cores.
torch.set_num_threads(1)

# A loaded machine is no failure, and every run tries the same examples. `--hypothesis-profile=explore` tries new ones.
settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("project", settings.get_profile("explore"), derandomize=True)
settings.load_profile("project")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Tensors that a test or its fixtures draw are the same in every run, alone or among others."""
    torch.manual_seed(0)
