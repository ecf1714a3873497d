"""The C++ operations for CPUs (kernels/cpu_src), compiled for this machine when first needed, without torch's headers.

    python -m kernels.cpu_build

Without a compiler every operation takes its torch path, which computes the same and is slower for few rows.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch  # noqa: F401  # brings the OpenMP runtime, whose threads the operations share

from kernels.cache_folder import cache_folder

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "cpu_src"
COMPILERS = ("c++", "g++", "clang++")
# No option that lets the compiler reorder sums: `exponential` rounds by adding and subtracting.
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"),
    *("-fopenmp", "-shared", "-fPIC"),
)
TIMEOUT_S = 300


@cache
def load_library() -> ctypes.CDLL | None:
    """The compiled operations, or None where they cannot be had; the log then says why."""
    try:
        path = _compiled()
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("CPU operations take torch's slower path: %s", str(error).strip())
        return None


def _compiled() -> Path:
    """The library's file, compiled if this version of it is not there yet."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise OSError(f"found no C++ compiler, expected one of {', '.join(COMPILERS)}; install g++")
    folder = cache_folder()
    path = folder / f"cpu_ops-{_version(compiler)}.so"
    if path.exists():
        return path
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        output = Path(scratch) / path.name
        sources = sorted(map(str, SOURCES.glob("*.cpp")))
        command = [compiler, *FLAGS, *sources, "-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        if done.returncode:
            raise OSError(f"{compiler} ended with status {done.returncode}: {done.stderr[-2000:]}")
        # Several processes may compile at once; each puts a whole file in place.
        os.replace(output, path)
    return path


def _version(compiler: str) -> str:
    """Changes with the sources, the flags, the compiler and the machine's instruction set."""
    digest = hashlib.sha256(repr((FLAGS, compiler, platform.machine(), _instruction_set())).encode())
    digest.update(subprocess.run([compiler, "--version"], capture_output=True, timeout=TIMEOUT_S, check=True).stdout)
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _instruction_set() -> str:
    """What Linux says about the first core."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    load_library()
