"""Counter-based randomness: every draw is a pure function of a seed and a few integers.

Only the raw Philox stream is used, whose bits numpy guarantees across versions (its Generator methods may change).
"""

import numpy as np


def _raw(n: int, key: tuple[int, ...]) -> np.ndarray:
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(n)


def permutation(n: int, *key: int) -> np.ndarray:
    """int64 [n]: a permutation of range(n)."""
    return np.argsort(_raw(n, key), kind="stable")


def uniform(n: int, *key: int) -> np.ndarray:
    """float64 [n] in [0, 1)."""
    return (_raw(n, key) >> np.uint64(11)) * 2.0**-53


def draw(*key: int) -> float:
    """One number in [0, 1)."""
    return float(uniform(1, *key)[0])
