"""A shuffle of any number of things that needs no memory: a keyed permutation of 0..n-1, computed number by number.

Owns the permutation; knows nothing of cells or files. Letters: m numbers asked for.
"""

import numpy as np

_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def mixed(numbers_m: np.ndarray, key: int) -> np.ndarray:
    """Hash numbers under a key with the finaliser of SplitMix64 (Steele et al. 2014, OOPSLA), uint64 of shape (m,)."""
    z = (numbers_m.astype(np.uint64) ^ np.uint64(key & 0xFFFFFFFFFFFFFFFF)) + _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return np.asarray(z ^ (z >> np.uint64(31)))


def _feistel(numbers_m: np.ndarray, *, half_bits: int, key: int) -> np.ndarray:
    """Permute numbers of 2 * half_bits bits: a Feistel network is a permutation whatever its round function."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = numbers_m >> shift, numbers_m & mask
    for number in range(_ROUNDS):
        left, right = right, left ^ (mixed(right, key * _ROUNDS + number) & mask)
    return np.asarray((left << shift) | right)


def shuffled_positions(numbers_m: np.ndarray, *, size: int, key: int) -> np.ndarray:
    """Return where a keyed shuffle of 0..size-1 puts each number, int64 of shape (m,).

    Numbers that leave the range are permuted again until they are back in it ("cycle walking", Black and Rogaway 2002),
    which keeps it a permutation; the network spans at most four times the range, so few rounds are needed.

    Example:
        >>> sorted(shuffled_positions(np.arange(5), size=5, key=1).tolist())
        [0, 1, 2, 3, 4]
    """
    half_bits = max(1, ((max(size, 2) - 1).bit_length() + 1) // 2)
    positions = _feistel(numbers_m.astype(np.uint64), half_bits=half_bits, key=key)
    while (is_outside := positions >= np.uint64(max(size, 1))).any():
        positions[is_outside] = _feistel(positions[is_outside], half_bits=half_bits, key=key)
    return positions.astype(np.int64)
