import numpy as np
import pytest
from scipy import stats

from engine.sampling.philox import philox4x32, uniforms

# From Random123's kat_vectors: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def pairs(words: str) -> np.ndarray:
    return np.array([[int(pair, 16)] for pair in (words.replace(" ", "")[:16], words.replace(" ", "")[16:])], np.uint64)


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_vectors(counter, key, result):
    key_words = np.array([[int(word, 16)] for word in key.split()], np.uint64)
    assert (philox4x32(pairs(counter), key_words) == pairs(result)).all()


def test_columns_are_independent_of_each_other():
    random = np.random.default_rng(0)
    seeds = random.integers(0, 2**64, 50, dtype=np.uint64)
    positions = random.integers(0, 2**40, 50)
    together = uniforms(seeds, positions)
    alone = [uniforms(seeds[i : i + 1], positions[i : i + 1])[0] for i in range(50)]
    assert together.tolist() == alone
    assert len(set(alone)) == 50


@pytest.mark.parametrize("what", ["positions", "seeds"])
def test_uniformity(what):
    count = 100_000
    running, fixed = np.arange(count), np.full(count, 7)
    seeds, positions = (fixed, running) if what == "positions" else (running, fixed)
    drawn = uniforms(seeds.astype(np.uint64), positions)
    assert 0 < drawn.min() < drawn.max() < 1
    assert stats.kstest(drawn, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 4 / np.sqrt(count)


def test_every_bit_of_seed_and_position_counts():
    seeds = np.array([0] + [2**bit for bit in range(64)], np.uint64)
    assert len(set(uniforms(seeds, np.zeros(65, np.int64)))) == 65
    positions = np.array([0] + [2**bit for bit in range(63)])
    assert len(set(uniforms(np.zeros(64, np.uint64), positions))) == 64
