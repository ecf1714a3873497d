"""What the card can do at most, measured in the same run as everything else."""

import subprocess
import time
from pathlib import Path
from typing import Any

import torch
import triton

CACHE_BYTES = 2**30
"""More than any GPU's cache has, and so many that Python has launched all of a case by the time they are written."""


def median_s(run: Any, repeats: int = 20, warm_up: int = 3) -> float:
    """Median seconds of `run()` on the current CUDA device, by events, with nothing in its caches before."""
    other = torch.empty(CACHE_BYTES, dtype=torch.uint8, device="cuda")
    for _ in range(warm_up):
        run()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        other.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy of 2 GiB."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / median_s(lambda: target.copy_(source))


def matmul_rate() -> float:
    """Floating-point operations a second of a bfloat16 product of 8192 × 8192 matrices."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    out = torch.empty_like(a)
    return 2 * 8192**3 / median_s(lambda: torch.mm(a, b, out=out))


def output_of(*command: str) -> str:
    """What a command prints, or "unknown" where it is not installed or fails: a copy of the tree may have no git."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def describe() -> dict[str, Any]:
    """The run's surroundings and ceilings."""
    return {
        "commit": output_of("git", "rev-parse", "--short", "HEAD"),
        "gpu": torch.cuda.get_device_name(),
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "time": time.strftime("%Y-%m-%d %H:%M"),
        "copy_bytes_per_s": copy_bandwidth(),
        "matmul_flop_per_s": matmul_rate(),
    }
