"""How long KV blocks keep their content, as the block pool's watcher measures it."""

import pytest

from engine import block_residency
from engine.block_pool import BlockPool
from engine.block_residency import BOUNDS_S, SAMPLE_EVERY, Durations


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(block_residency, "time", made)
    return made


def total(durations: Durations) -> tuple[int, float]:
    return durations.cumulated()[-1], durations.total_s


def test_a_block_is_taken_left_wanted_again_and_given_up(clock: Clock):
    pool = BlockPool(1)
    residency = pool.residency
    [block] = pool.allocate(1)
    pool.register(block, b"key")
    clock.now += 4
    pool.release([block])
    clock.now += 2
    pool.share(pool.find_prefix([b"key"]))
    assert total(residency.reuse_gap) == (1, 2.0)
    pool.share([block])  # a second owner: it was not idle
    pool.release([block])
    pool.release([block])
    assert total(residency.reuse_gap) == (1, 2.0) and total(residency.lifetime) == (0, 0.0)
    clock.now += 1
    pool.allocate(1)
    assert total(residency.idle_before_evict) == (1, 1.0) and total(residency.lifetime) == (1, 7.0)
    clock.now += 3
    pool.release([block])  # without a key: of no use to anybody
    assert total(residency.lifetime) == (2, 10.0) and total(residency.idle_before_evict) == (1, 1.0)


def test_only_a_sample_is_watched():
    pool = BlockPool(4 * SAMPLE_EVERY)
    pool.release(pool.allocate(4 * SAMPLE_EVERY))
    assert pool.residency.lifetime.cumulated()[-1] == 4


def test_buckets_hold_what_is_up_to_their_ends():
    durations = Durations()
    for seconds in (0.0, BOUNDS_S[0], BOUNDS_S[1], BOUNDS_S[-1] + 1):
        durations.add(seconds)
    assert durations.cumulated() == [2, *[3] * (len(BOUNDS_S) - 1), 4]
