"""Batches as a pure function of (sources, seed, position).

There is one global sequence of rows. A step with batch size b on W ranks takes the next W*b rows, rank r the r-th b of
them; so the position is a plain number that does not depend on W, and two ranks see what one sees with twice the batch.
B batch rows, T places in a row.
"""

from collections.abc import Iterator

import numpy as np
import torch

from data.errors import DataError
from data.packing import WINDOW_DOCUMENTS, WINDOW_ROWS, DocumentRows, Plan, StreamRows, pack, stream
from data.randomness import permutation, uniform
from data.shards import Shards
from data.stream import Batch, Stream
from data.tokenizer import Tokenizer

Row = tuple[Shards, Plan, int]
_MIXTURE, _MIXTURE_BLOCK = 4, 4096
_SUBSET = 5


class Collator:
    """Gathers rows of plans from the shards into one batch.

    tokens, targets, positions int64 [B, T]; loss_mask bool [B, T]; valid bool [B, T] and cu_seqlens int32
    [B*max_docs_per_row + 1], or None for both. With `documents` packing cu_seqlens holds the segment ends over the
    flattened B*T (the unused tail of a row is a segment), filled up with empty segments; positions restart in every
    segment. If every row is one full segment, and always with `stream` packing, cu_seqlens and valid are None.
    """

    def __init__(self, tokenizer: Tokenizer, seq_len: int, packing: str, max_docs_per_row: int):
        self.bos, self.eos = tokenizer.bos_id, tokenizer.eos_id
        self.seq_len, self.stream, self.max_segments = seq_len, packing == "stream", max_docs_per_row

    def __call__(self, rows: list[Row | None]) -> Batch:
        """The batch of these rows; None is a row without any valid place."""
        size = self.seq_len
        tokens = np.full((len(rows), size), self.eos, dtype=np.int64)
        targets = np.full((len(rows), size), self.eos, dtype=np.int64)
        scored = np.zeros(len(rows), dtype=np.int64)
        segments: list[int] = []
        for r, row in enumerate(rows):
            if row is None:
                segments.append(size)
                continue
            shards, plan, index = row
            used = self._fill(tokens[r], targets[r], shards, plan, index, segments)
            if used < size:
                segments.append(size - used)
            scored[r] = plan.scored[index]
        loss_mask = np.arange(size) < scored[:, None]
        plain = self.stream or (len(segments) == len(rows) and bool((scored == size).all()))
        batch: Batch = {
            "tokens": torch.from_numpy(tokens),
            "targets": torch.from_numpy(targets),
            "loss_mask": torch.from_numpy(loss_mask),
            "positions": torch.from_numpy(self._positions(len(rows), segments)),
            "cu_seqlens": None,
            "valid": None,
        }
        if not plain:
            ends = np.full(len(rows) * self.max_segments + 1, len(rows) * size, dtype=np.int32)
            ends[0] = 0
            ends[1 : len(segments) + 1] = np.cumsum(segments)
            batch["cu_seqlens"] = torch.from_numpy(ends)
            batch["valid"] = torch.from_numpy(loss_mask.copy())
        return batch

    def _fill(
        self, tokens: np.ndarray, targets: np.ndarray, shards: Shards, plan: Plan, index: int, segments: list[int]
    ) -> int:
        """Write one row's pieces, note their lengths, and return how many places they take."""
        at = 0
        first, last = plan.row_ptr[index], plan.row_ptr[index + 1]
        pieces = zip(plan.doc[first:last].tolist(), plan.start[first:last].tolist(), plan.length[first:last].tolist())
        for doc, start, length in pieces:
            following = shards.read(doc, start, start + length)
            targets[at : at + len(following)] = following
            if start:
                tokens[at : at + length] = shards.read(doc, start - 1, start - 1 + length)
            else:
                tokens[at] = self.bos
                tokens[at + 1 : at + length] = following[: length - 1]
            at += length
            segments.append(length)
        return at

    def _positions(self, rows: int, segments: list[int]) -> np.ndarray:
        if self.stream:
            return np.tile(np.arange(self.seq_len, dtype=np.int64), (rows, 1))
        lengths = np.array(segments, dtype=np.int64)
        restarts = np.repeat(np.cumsum(lengths) - lengths, lengths)
        return (np.arange(rows * self.seq_len, dtype=np.int64) - restarts).reshape(rows, self.seq_len)


class _Cursor:
    """The endless row sequence of one source; `place` is (epoch, window, row) of the next row."""

    def __init__(self, shards: Shards, order: DocumentRows | StreamRows):
        self.shards, self.order = shards, order
        self.place = (0, 0, 0)
        self._at: tuple[int, int] | None = None
        self._plan: Plan | None = None

    def next(self) -> Row:
        epoch, window, row = self.place
        if self._at != (epoch, window) or self._plan is None:
            self._plan, self._at = self.order.plan(epoch, window), (epoch, window)
        if row + 1 < self._plan.rows:
            self.place = (epoch, window, row + 1)
        elif window + 1 < self.order.windows:
            self.place = (epoch, window + 1, 0)
        else:
            self.place = (epoch + 1, 0, 0)
        return self.shards, self._plan, row


class _Producer:
    """Makes the batches in order. Owned by one thread at a time."""

    def __init__(
        self, cursors: list[_Cursor], weights: np.ndarray, seed: int, collate: Collator, share: tuple[int, int, int]
    ):
        self.cursors, self.edges, self.seed, self.collate = cursors, np.cumsum(weights / weights.sum()), seed, collate
        self.batch_size, self.rank, self.world = share
        self.row = 0
        self._block, self._chosen = -1, np.empty(0, np.int64)

    def _source(self, row: int) -> int:
        if len(self.cursors) == 1:
            return 0
        block, at = divmod(row, _MIXTURE_BLOCK)
        if block != self._block:
            drawn = uniform(_MIXTURE_BLOCK, self.seed, _MIXTURE, block)
            self._chosen = np.minimum(np.searchsorted(self.edges, drawn, side="right"), len(self.edges) - 1)
            self._block = block
        return int(self._chosen[at])

    def next(self) -> Batch:
        rows = [self.cursors[self._source(self.row + i)].next() for i in range(self.batch_size * self.world)]
        self.row += len(rows)
        return self.collate(list(rows[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]))

    def position(self) -> dict:
        return {"row": self.row, "sources": [list(c.place) for c in self.cursors]}

    def seek(self, position: dict) -> None:
        self.row = position["row"]
        for cursor, (epoch, window, row) in zip(self.cursors, position["sources"]):
            cursor.place = (epoch, window, row)


class Loader(Stream):
    """Endless training batches of one rank (see `Collator` for their content).

    `batch_size` is rows per rank and call. A source's share of the rows is its weight; which source a row comes from
    is a draw from (seed, row number). With `prefetch` > 0 a thread prepares that many batches ahead. `state_dict` is
    the position after the last batch that `next` returned; it is plain JSON and does not depend on rank or world size.
    """

    def __init__(
        self,
        sources: list[tuple[Shards, float]],
        tokenizer: Tokenizer,
        seq_len: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        packing: str = "documents",
        max_docs_per_row: int = 32,
        prefetch: int = 2,
    ):
        _check_arguments(packing, seq_len, batch_size, max_docs_per_row)
        if seed < 0 or not 0 <= rank < world or not sources:
            raise DataError(
                f"loader: needs a source, seed >= 0 and rank < world, got seed {seed}, rank {rank} of {world}"
            )
        identity = {
            "seed": seed,
            "seq_len": seq_len,
            "packing": packing,
            "max_docs_per_row": max_docs_per_row if packing == "documents" else None,
            "sources": [[shards.fingerprint, float(weight)] for shards, weight in sources],
        }
        cursors = []
        for i, (shards, _) in enumerate(sources):
            if packing == "stream":
                order: DocumentRows | StreamRows = StreamRows(shards.lengths, seq_len, seed, i)
            else:
                order = DocumentRows(shards.lengths, seq_len, seed, i, max_docs_per_row)
            cursors.append(_Cursor(shards, order))
        collate = Collator(tokenizer, seq_len, packing, max_docs_per_row)
        weights = np.array([weight for _, weight in sources], dtype=np.float64)
        super().__init__(_Producer(cursors, weights, seed, collate, (batch_size, rank, world)), identity, prefetch)


def iterate_once(
    shards: Shards,
    tokenizer: Tokenizer,
    seq_len: int,
    batch_size: int,
    packing: str = "documents",
    max_docs_per_row: int = 32,
    rank: int = 0,
    world: int = 1,
    limit_tokens: int | None = None,
) -> Iterator[Batch]:
    """Score every transition of `shards` exactly once, in an order that never changes.

    `limit_tokens` scores exactly that many transitions (or all, if there are fewer): whole documents in a fixed
    shuffled order, the last one cut short, so the choice does not depend on seq_len, batch_size or world. The last
    batch is filled up with rows without valid places; all ranks get the same number of batches.
    """
    _check_arguments(packing, seq_len, batch_size, max_docs_per_row)
    if limit_tokens is not None and limit_tokens < 1:
        raise DataError(f"limit_tokens must be at least 1, got {limit_tokens}")
    docs, transitions = np.arange(len(shards)), shards.lengths + 1
    if limit_tokens is not None and limit_tokens < transitions.sum():
        order = permutation(len(shards), _SUBSET)
        ends = np.cumsum(transitions[order])
        count = int(np.searchsorted(ends, limit_tokens)) + 1
        docs, transitions = order[:count], transitions[order[:count]]
        transitions[-1] -= ends[count - 1] - limit_tokens
    collate = Collator(tokenizer, seq_len, packing, max_docs_per_row)
    step = batch_size * world
    waiting: list[Row | None] = []
    for plan in _plans_once(docs, transitions, seq_len, packing, max_docs_per_row):
        waiting += [(shards, plan, r) for r in range(plan.rows)]
        whole = len(waiting) - len(waiting) % step
        for first in range(0, whole, step):
            yield collate(waiting[first + rank * batch_size : first + (rank + 1) * batch_size])
        waiting = waiting[whole:]
    if waiting:
        waiting += [None] * (step - len(waiting))
        yield collate(waiting[rank * batch_size : (rank + 1) * batch_size])


def _plans_once(docs: np.ndarray, transitions: np.ndarray, seq_len: int, packing: str, max_docs: int) -> Iterator[Plan]:
    if packing == "stream":
        ends = np.cumsum(transitions)
        rows = -(-int(ends[-1]) // seq_len)
        for first in range(0, rows, WINDOW_ROWS):
            yield stream(docs, transitions, ends, seq_len, first, min(first + WINDOW_ROWS, rows))
        return
    for first in range(0, len(docs), WINDOW_DOCUMENTS):
        some = slice(first, first + WINDOW_DOCUMENTS)
        yield pack(docs[some], transitions[some], seq_len, max_docs)


def _check_arguments(packing: str, seq_len: int, batch_size: int, max_docs_per_row: int) -> None:
    if packing not in ("documents", "stream"):
        raise DataError(f"loader: unknown packing {packing!r}; there is documents and stream")
    if min(seq_len, batch_size) < 1 or max_docs_per_row < 2:
        raise DataError(
            f"loader: seq_len {seq_len}, batch_size {batch_size} or max_docs_per_row {max_docs_per_row} too small"
        )
