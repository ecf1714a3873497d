"""Settings for tests of kernels under Triton's interpreter, which runs them on CPU tensors.

The interpreter is chosen for a process, before Triton is imported, so these tests run apart: `pytest tests/kernels`.
Without Triton they are skipped.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

RUN_APART = "tests/kernels must run apart from other tests, for it has Triton interpret: pytest tests/kernels"
HAS_TRITON = importlib.util.find_spec("triton") is not None

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError(RUN_APART)
os.environ["TRITON_INTERPRET"] = "1"
if HAS_TRITON:
    from tests.kernels import interpreter

    interpreter.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse company; skip all where there is no Triton."""
    here = Path(__file__).parent
    if not all(item.path.is_relative_to(here) for item in items):
        raise pytest.UsageError(RUN_APART)
    if not HAS_TRITON:
        for item in items:
            item.add_marker(pytest.mark.skip(reason="Triton is not installed"))
