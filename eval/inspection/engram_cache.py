"""How often a cache of rows would have what is asked for, from the order in which rows were looked up."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Sequence

import numpy as np


def lru_hits(rows: np.ndarray, capacities: Sequence[int]) -> list[int]:
    """Lookups that find their row among the ``capacity`` rows that were looked up most recently, for each capacity."""
    known = stack_distances(rows)
    known = np.sort(known[known > 0])
    return np.searchsorted(known, np.asarray(capacities), side="right").tolist()


def stack_distances(rows: np.ndarray) -> np.ndarray:
    """Of each lookup, how many distinct rows were looked up since its row was last, that row included; 0: it never was.

    With p the last time before i, these are 1 + the j in (p, i) whose own last time is not after p. All up to p are of that
    kind too, so counting needs no window: 1 + |{j < i: last_j <= p}| - (p + 1).
    """
    last = _last_times(rows)
    return np.where(last >= 0, _earlier_and_not_larger(last) - last, 0)


def _last_times(rows: np.ndarray) -> np.ndarray:
    """The place of the lookup before that of the same row; -1: none."""
    order = np.argsort(rows, kind="stable")
    same = rows[order[1:]] == rows[order[:-1]]
    last = np.full(len(rows), -1, dtype=np.int64)
    last[order[1:][same]] = order[:-1][same]
    return last


def _earlier_and_not_larger(a: np.ndarray) -> np.ndarray:
    """|{j < i: a_j <= a_i}| of whole numbers in [-1, n): blocks are merged in pairs, level by level."""
    n = len(a)
    size = 1 << max(0, n - 1).bit_length()
    padded = np.full(size, n, dtype=np.int64)
    padded[:n] = a
    count = np.zeros(size, dtype=np.int64)
    width = 1
    while width < size:
        pairs = padded.reshape(-1, 2 * width)
        shift = np.arange(len(pairs))[:, None] * (n + 2)  # one search for all pairs: their values do not overlap
        left, right = np.sort(pairs[:, :width], axis=1) + shift, pairs[:, width:] + shift
        place = np.searchsorted(left.ravel(), right.ravel(), side="right").reshape(right.shape)
        count.reshape(-1, 2 * width)[:, width:] += place - np.arange(len(pairs))[:, None] * width
        width *= 2
    return count[:n]


def lfu_hits(rows: Sequence[int], capacity: int) -> int:
    """Lookups that find their row where the one that leaves is the one looked up least often since it came, and of those the
    longest ago."""
    uses: dict[int, int] = {}
    by_uses: defaultdict[int, OrderedDict[int, None]] = defaultdict(OrderedDict)  # the longest ago first
    hits, fewest = 0, 1
    for row in rows:
        n = uses.get(row, 0)
        if n:
            hits += 1
            del by_uses[n][row]
            if n == fewest and not by_uses[n]:
                fewest += 1
        else:
            if len(uses) == capacity:
                del uses[by_uses[fewest].popitem(last=False)[0]]
            fewest = 1
        uses[row] = n + 1
        by_uses[n + 1][row] = None
    return hits


def best_hits(rows: np.ndarray, capacities: Sequence[int]) -> list[int]:
    """Lookups of the rows that are looked up most often of all: what a cache that never changes could have at best."""
    times = np.sort(np.unique(rows, return_counts=True)[1])[::-1].cumsum()
    return [int(times[min(capacity, len(times)) - 1]) for capacity in capacities]
