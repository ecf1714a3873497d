"""Random numbers that depend on nothing but a seed and a position (counter-based, so there is no state to keep)."""

import numpy as np
import numpy.typing as npt

UInt64s = npt.NDArray[np.uint64]

_LOW_WORD, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)
_FACTORS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
_WEYL = np.arange(10, dtype=np.uint64)[:, None, None] * np.array([[0x9E3779B9], [0xBB67AE85]], np.uint64)


def philox4x32(counter: UInt64s, key: UInt64s) -> UInt64s:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    Args:
        counter: uint64 [2, N], four 32-bit words: `w0 << 32 | w1` and `w2 << 32 | w3`.
        key: uint64 [2, N], two 32-bit words.

    Returns:
        uint64 [2, N]: four random words for each counter and key, paired as in the counter.
    """
    for round_key in (key + _WEYL) << _32:
        counter = ((counter >> _32) * _FACTORS)[::-1] ^ (counter << _32) ^ round_key
    return counter


def uniforms(seeds: UInt64s, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """One number in (0, 1) for each pair of a 64-bit seed and a position: an odd multiple of 2**-53."""
    counter = np.zeros((2, len(seeds)), np.uint64)
    counter[0] = positions
    key = np.empty_like(counter)
    np.bitwise_and(seeds, _LOW_WORD, out=key[0])
    np.right_shift(seeds, _32, out=key[1])
    return ((philox4x32(counter, key)[0] >> np.uint64(12)) + 0.5) * 2.0**-52
