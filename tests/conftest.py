"""Settings for all tests."""

import os

from hypothesis import HealthCheck, settings

import engine  # noqa: F401  (sets OpenMP's waiting before torch is loaded)

import torch  # isort: skip

# Tiny models are faster on one thread, the more so where several test runs share the cores.
torch.set_num_threads(1)

# A loaded machine is no failure, and CI tries the same examples every time.
settings.register_profile(
    "project", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
settings.load_profile("project")
