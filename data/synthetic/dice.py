"""Draws for many rows at once, each row's a pure function of a key and its own number.

SplitMix64 (Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195) as a counter-based generator: integer arithmetic alone,
so any set of rows can be drawn in any order, without a loop over rows. R rows.
"""

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Dice:
    """The draws of `rows` [R] under `key`; every call goes on where the one before stopped, for all rows alike."""

    def __init__(self, rows: np.ndarray, *key: int):
        start = np.random.SeedSequence(key).generate_state(1, np.uint64)
        self._rows = _mix(start + rows.astype(np.uint64) * _GOLDEN)
        self._drawn = 0

    def words(self, n: int) -> np.ndarray:
        """uint64 [R, n]."""
        columns = np.arange(self._drawn + 1, self._drawn + n + 1, dtype=np.uint64) * _GOLDEN
        self._drawn += n
        return _mix(self._rows[:, None] + columns)

    def uniform(self, n: int) -> np.ndarray:
        """float64 [R, n] in [0, 1)."""
        return (self.words(n) >> np.uint64(11)) * 2.0**-53

    def below(self, high: int | np.ndarray, n: int) -> np.ndarray:
        """int64 [R, n]: integers in [0, high); `high` broadcasts."""
        return (self.uniform(n) * high).astype(np.int64)

    def choice(self, options: tuple[int, ...]) -> np.ndarray:
        """int64 [R]: one of the options for each row."""
        return np.array(options, dtype=np.int64)[self.below(len(options), 1)[:, 0]]

    def shuffled(self, n: int, first: int) -> np.ndarray:
        """int32 [R, n]: range(n) in an order whose first `first` places are a uniform draw without replacement."""
        order = np.tile(np.arange(n, dtype=np.int32), (len(self._rows), 1))
        every = np.arange(len(order))
        leap = self.uniform(first)
        for i in range(first):
            other = i + (leap[:, i] * (n - i)).astype(np.int64)
            order[every, i], order[every, other] = order[every, other], order[every, i]
        return order

    def weighted(self, weights: np.ndarray, n: int) -> np.ndarray:
        """int64 [R, n]: places of `weights` [R or 1, N], drawn one after the other without replacement, each time with
        chances as the weights of those left; places of weight zero come last. By exponential races: E / w, smallest first."""
        with np.errstate(divide="ignore"):
            times = -np.log1p(-self.uniform(weights.shape[1])) / weights
        return np.argsort(times, axis=1)[:, :n]


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 in which every bit of `x` moves about half of the bits of the result."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hashed(values: np.ndarray) -> np.ndarray:
    """int [R, N] -> uint64 [R]: equal rows give equal words."""
    code = np.zeros(len(values), dtype=np.uint64)
    for column in values.astype(np.uint64).T:
        code = _mix(code + column + _GOLDEN)
    return code
