"""Which pieces of which documents stand in which row: a pure function of (document lengths, seed, epoch, window).

A document of n tokens is n+1 transitions: inputs BOS, t1..tn; targets t1..tn, EOS. A piece is a run of consecutive
transitions of one document; a plan lists the pieces of the rows of one window. Every transition of the corpus stands in
exactly one scored place of an epoch.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

from data.randomness import permutation

WINDOW_DOCUMENTS = 4096
WINDOW_ROWS = 4096
_DOCUMENT_ORDER, _ROW_ORDER = 1, 2


@dataclass(frozen=True)
class Plan:
    """Rows of one window. Piece p is transitions [start, start+length) of document doc; row r holds pieces
    row_ptr[r]:row_ptr[r+1], and its first scored[r] places count in the loss."""

    doc: np.ndarray  # int64 [P]
    start: np.ndarray  # int64 [P]
    length: np.ndarray  # int64 [P]
    row_ptr: np.ndarray  # int64 [R+1]
    scored: np.ndarray  # int64 [R]

    @property
    def rows(self) -> int:
        """R."""
        return len(self.scored)

    def reorder(self, order: np.ndarray) -> "Plan":
        """The same rows, row r taken from order[r]."""
        sizes = np.diff(self.row_ptr)[order]
        ptr = np.concatenate([[0], np.cumsum(sizes)])
        index = np.repeat(self.row_ptr[order] - ptr[:-1], sizes) + np.arange(ptr[-1])
        return Plan(self.doc[index], self.start[index], self.length[index], ptr, self.scored[order])


def cut(docs: np.ndarray, transitions: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut documents into consecutive pieces of at most seq_len transitions: (doc, start, length), in order."""
    count = -(-transitions // seq_len)
    first = np.cumsum(count) - count
    start = (np.arange(count.sum()) - np.repeat(first, count)) * seq_len
    length = np.minimum(np.repeat(transitions, count) - start, seq_len)
    return np.repeat(docs, count), start, length


def pack(docs: np.ndarray, transitions: np.ndarray, seq_len: int, max_segments: int) -> Plan:
    """Cut these documents and pack the pieces best-fit, longest first, into rows of at most max_segments segments.

    The unused tail of a row counts as one segment. Full pieces come first in document order, packed rows after them.
    """
    doc, start, length = cut(docs, transitions, seq_len)
    full = np.flatnonzero(length == seq_len)
    short = np.flatnonzero(length < seq_len)
    short = short[np.argsort(-length[short], kind="stable")]
    bins = _best_fit(length[short].tolist(), seq_len, max_segments)
    packed = [short[i] for members in bins for i in members]
    index = np.concatenate([full, np.array(packed, dtype=np.int64)])
    sizes = np.concatenate([np.ones(len(full), np.int64), np.array([len(m) for m in bins], dtype=np.int64)])
    ptr = np.concatenate([[0], np.cumsum(sizes)])
    length = length[index]
    return Plan(doc[index], start[index], length, ptr, np.add.reduceat(length, ptr[:-1]))


def _best_fit(lengths: list[int], size: int, max_segments: int) -> list[list[int]]:
    """Members of each bin for falling lengths < size. A bin is closed when only its tail segment is left to it."""
    bins: list[list[int]] = []
    open_by_space: dict[int, list[int]] = {}
    spaces: list[int] = []  # the keys of open_by_space, sorted
    for item, length in enumerate(lengths):
        at = bisect_left(spaces, length)
        if at == len(spaces):
            bins.append([item])
            chosen, space = len(bins) - 1, size - length
        else:
            space = spaces[at]
            stack = open_by_space[space]
            chosen = stack.pop()
            if not stack:
                del open_by_space[space]
                del spaces[at]
            bins[chosen].append(item)
            space -= length
        if space and len(bins[chosen]) + 1 < max_segments:
            if space not in open_by_space:
                open_by_space[space] = []
                insort(spaces, space)
            open_by_space[space].append(chosen)
    return bins


class DocumentRows:
    """Training rows that keep documents apart: windows of shuffled documents, rows shuffled within a window."""

    def __init__(self, tokens_per_doc: np.ndarray, seq_len: int, seed: int, source: int, max_segments: int):
        self.transitions = tokens_per_doc + 1
        self.seq_len, self.key, self.max_segments = seq_len, (seed, source), max_segments
        self.windows = -(-len(tokens_per_doc) // WINDOW_DOCUMENTS)
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def plan(self, epoch: int, window: int) -> Plan:
        """The rows of one window."""
        if epoch != self._epoch:
            self._order = permutation(len(self.transitions), *self.key, _DOCUMENT_ORDER, epoch)
            self._epoch = epoch
        docs = self._order[window * WINDOW_DOCUMENTS : (window + 1) * WINDOW_DOCUMENTS]
        rows = pack(docs, self.transitions[docs], self.seq_len, self.max_segments)
        return rows.reorder(permutation(rows.rows, *self.key, _ROW_ORDER, epoch, window))


def stream(docs: np.ndarray, transitions: np.ndarray, ends: np.ndarray, seq_len: int, first: int, last: int) -> Plan:
    """Rows [first, last) of the concatenation of these documents, cut every seq_len transitions.

    `ends` is the cumulative sum of `transitions`. A last row that the text does not fill is filled up from the
    beginning; the filling is not scored.
    """
    total, begin, end = int(ends[-1]), first * seq_len, last * seq_len
    edges = [np.arange(begin, end, seq_len)]
    for offset in range(begin // total * total, end, total):  # laps over the text; more than one only in the last row
        inside = slice(*np.searchsorted(ends, (begin - offset, end - offset)))
        edges.append(ends[inside] + offset)
    starts = np.unique(np.concatenate(edges))
    length = np.diff(np.append(starts, end))
    place = starts % total
    slot = np.searchsorted(ends, place, side="right")
    ptr = np.searchsorted(starts, np.arange(begin, end + 1, seq_len))
    scored = np.clip(total - np.arange(begin, end, seq_len), 0, seq_len)
    return Plan(docs[slot], place - (ends - transitions)[slot], length, ptr, scored)


class StreamRows:
    """Training rows cut from the concatenation of an epoch's shuffled documents, shuffled within windows of rows."""

    def __init__(self, tokens_per_doc: np.ndarray, seq_len: int, seed: int, source: int):
        self.transitions = tokens_per_doc + 1
        self.seq_len, self.key = seq_len, (seed, source)
        self.rows = -(-int(self.transitions.sum()) // seq_len)
        self.windows = -(-self.rows // WINDOW_ROWS)
        self._epoch = -1
        self._order = self._lengths = self._ends = np.empty(0, np.int64)

    def plan(self, epoch: int, window: int) -> Plan:
        """The rows of one window."""
        if epoch != self._epoch:
            self._order = permutation(len(self.transitions), *self.key, _DOCUMENT_ORDER, epoch)
            self._lengths = self.transitions[self._order]
            self._ends = np.cumsum(self._lengths)
            self._epoch = epoch
        first, last = window * WINDOW_ROWS, min((window + 1) * WINDOW_ROWS, self.rows)
        rows = stream(self._order, self._lengths, self._ends, self.seq_len, first, last)
        return rows.reorder(permutation(rows.rows, *self.key, _ROW_ORDER, epoch, window))
