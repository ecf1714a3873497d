"""Split-K: where a product has too few output tiles for all multiprocessors, several programs share the inner dimension
of a tile, and the last one to finish adds their parts up, always in the same order: sums do not depend on timing.
"""

from functools import cache

import torch
from torch import Tensor

from kernels.backend import tl, triton

MAX_SPLITS = 16
"""The last program of a tile reads this many parts, one after another."""
MAX_SPLIT_TILES = 4096
"""Products with more tiles fill any GPU without a split."""
HALF_SHARED_MEMORY = 96 << 10
"""Bytes of shared memory with which two programs fit a multiprocessor of an H100 or H200; one fits any since sm_86."""
PLANNED_SHARED_MEMORY = 163 << 10
"""Launches that no device serves (see PLANNED_MULTIPROCESSORS) are planned for the least of A100, H100 and B200."""


@cache
def shared_memory_limit(device: torch.device) -> int:
    """Bytes of shared memory that a block of a CUDA device may have; PLANNED_SHARED_MEMORY for any other device."""
    if device.type != "cuda":
        return PLANNED_SHARED_MEMORY
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]


def pipeline_stages(stage_bytes: int, shared_memory: int) -> int:
    """Depth of a software pipeline that holds `stage_bytes` a stage: five if two programs still fit, else three."""
    return max(2, min(5, HALF_SHARED_MEMORY // stage_bytes), min(3, (shared_memory - 4096) // stage_bytes))


def plan_splits(num_tiles: int, num_steps: int, programs: int) -> tuple[int, int]:
    """(steps of the inner loop per program, programs per tile) that start about `programs` programs.

    Args:
        num_tiles: output tiles.
        num_steps: steps of the inner loop of a tile.
    """
    splits = min(-(-programs // num_tiles), MAX_SPLITS, max(1, num_steps // 2))
    if num_tiles > MAX_SPLIT_TILES:
        splits = 1
    steps = -(-num_steps // splits)
    return steps, -(-num_steps // steps)


@cache
def tile_counters(device: torch.device) -> Tensor:
    """int32 [MAX_SPLIT_TILES], how many programs of each tile have finished: zeros, to which every launch returns them.

    One per device, so launches that split must follow one another: they go to one stream, or streams that wait.

    Raises:
        RuntimeError: the first use is inside a CUDA graph's capture, where the zeros would be written at each replay.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "split-K counters do not exist yet and cannot be made while a CUDA graph is captured; run once"
        )
    return torch.zeros(MAX_SPLIT_TILES, dtype=torch.int32, device=device)


def split_buffers(
    num_tiles: int, splits: int, tile_size: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """(float32 room for the parts of each tile, counters), or nothing where no tile is split."""
    if splits == 1:
        return None, None
    return torch.empty(num_tiles * splits * tile_size, dtype=torch.float32, device=device), tile_counters(device)


@triton.jit
def combine_splits(
    part: tl.tensor,  # [ROWS, COLUMNS] float32: this program's share of the tile
    parts_ptr: tl.tensor,  # [num_tiles, SPLITS, ROWS, COLUMNS] float32; None where SPLITS is 1
    counters_ptr: tl.tensor,  # [MAX_SPLIT_TILES] int32; None where SPLITS is 1
    tile: tl.tensor,
    split: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
) -> tl.tensor:
    """(the tile's sum, whether this program has it); what others get is to be dropped."""
    is_last = tl.full([], 1, tl.int1)
    if SPLITS > 1:
        offsets = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        tile_ptr = parts_ptr + tile.to(tl.int64) * (SPLITS * ROWS * COLUMNS) + offsets
        tl.store(tile_ptr + split * (ROWS * COLUMNS), part)
        # All threads' stores come before the count (barrier, then release); all parts before the sum (acquire).
        tl.debug_barrier()
        is_last = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel") == SPLITS - 1
        if is_last:
            tl.store(counters_ptr + tile, 0)
            part = tl.zeros([ROWS, COLUMNS], tl.float32)
            for index in tl.static_range(SPLITS):
                part += tl.load(tile_ptr + index * (ROWS * COLUMNS), cache_modifier=".cg")
    return part, is_last
