"""How a product is cut into programs."""

from hypothesis import given
from hypothesis import strategies as st

from kernels.split_k import HALF_SHARED_MEMORY, MAX_SPLIT_TILES, MAX_SPLITS, pipeline_stages, plan_splits


@given(st.integers(1, 10_000), st.integers(1, 500), st.integers(1, 400))
def test_splits_cover_all_steps(num_tiles, num_steps, programs):
    steps, splits = plan_splits(num_tiles, num_steps, programs)
    assert steps * (splits - 1) < num_steps <= steps * splits, "every program has steps, and none is left over"
    assert 1 <= splits <= MAX_SPLITS
    assert splits == 1 or (steps >= 2 and num_tiles <= MAX_SPLIT_TILES and num_tiles * (splits - 1) < programs)


def test_splits_of_real_layers():
    assert plan_splits(64, 32, 264) == (7, 5)  # 4096 × 4096 in tiles of 64 channels
    assert plan_splits(384, 32, 264) == (32, 1)  # 24576 × 4096


@given(st.integers(1 << 10, 72 << 10), st.sampled_from([99 << 10, 163 << 10, 227 << 10]))
def test_stages_fit(stage_bytes, shared_memory):
    stages = pipeline_stages(stage_bytes, shared_memory)
    assert 2 <= stages <= 5
    assert stages == 2 or stages * stage_bytes <= max(HALF_SHARED_MEMORY, shared_memory)
