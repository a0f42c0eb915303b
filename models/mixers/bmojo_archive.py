"""B'MOJO's memory in storage: the tokens that the eidetic memory gave up, found again by what is asked of them.

The paper promises retrieval from a store that is updated asynchronously (arXiv:2407.06324, section 1) and gives no algorithm; this
one is a choice. Where a chunk begins, the tokens that the eidetic memory dropped, or did not take, go to the archive of their
sequence. Then each key-value head asks it for the ``rows`` whose keys have the largest inner product with the sum of the queries
of the chunk before, so that no query sees its own future and every split of a text asks the same. What any head found is seen by
all heads of the chunk that begins, as eidetic rows are; a token is never in both memories.

An archive belongs to a state: calls without one, which is how a model trains, do without. Rows lie in host memory, without a
gradient. They are filed by one thread in the background; a search waits for what was put before it, less the last ``staleness``
chunks, so that results depend on that number and never on timing. Not for compiled graphs, and a device waits at every token.

Legend: B sequences, n rows, Hkv key-value heads of width K, S = Hkv * rows the slots of a chunk.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.errors import UserError
from models.mixers.rules import wide
from models.parsing import choice, from_dict

DROPS = ("oldest", "lowest")
INDEXES = ("exact", "ivf")
BLOCK = 8192  # rows whose keys are widened at once
_log = logging.getLogger("loci.archive")


@dataclass(frozen=True)
class ArchiveConfig:
    """Per sequence and layer."""

    rows: int = 8  # that each key-value head asks for; all heads see all that were found
    max_rows: int = 65536  # held at most (twice that while they are filed); then some leave
    drop: str = "oldest"  # which leave: "oldest", or "lowest" in score, of equals the last that came
    min_score: float = 0.0  # tokens below it are let go
    staleness: int = 0  # chunks by which a search lags behind: time for the filing
    # "exact": every row is looked at. "ivf": that, up to exact_rows; beyond, only those in the ``probe`` cells nearest to the query,
    # of cells around k-means centroids (faiss). They are drawn anew when as many rows have come as they were drawn from.
    index: str = "exact"
    exact_rows: int = 4096
    cells: int = 0  # 0: the square root of the number of rows
    probe: int = 8

    def __post_init__(self) -> None:
        for name in ("rows", "max_rows", "exact_rows", "probe"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("min_score", "staleness", "cells"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must not be negative, got {getattr(self, name)}")
        choice("drop", self.drop, DROPS)
        choice("index", self.index, INDEXES)


def parse(raw: Any) -> ArchiveConfig | None:
    """A mapping, the number of ``rows`` alone, or 0 or null for no archive."""
    if isinstance(raw, int) and not isinstance(raw, bool):
        raw = {"rows": raw} if raw else None
    return None if raw is None else from_dict(ArchiveConfig, raw, "archive")


class Rows(NamedTuple):
    """Tokens as attention sees them, in host memory."""

    k: Tensor  # [n, Hkv, K]
    v: Tensor  # [n, Hkv, K]
    position: Tensor  # int64 [n]
    score: Tensor  # fp32 [n]

    @property
    def count(self) -> int:
        return len(self.position)

    def at(self, index: Tensor | slice) -> Rows:
        return Rows(*(x[index] for x in self))

    def filed(self, min_score: float) -> Rows:
        """On the host, by rising position, without those below ``min_score``."""
        rows = Rows(*(x.detach().cpu() for x in self))
        order = rows.position.argsort()
        return rows.at(order[rows.score[order] >= min_score])

    @classmethod
    def none(cls, heads: int, width: int, dtype: torch.dtype) -> Rows:
        k = torch.empty(0, heads, width, dtype=dtype)
        return cls(k, k.clone(), torch.empty(0, dtype=torch.int64), torch.empty(0))

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        return cls(*(torch.cat(x) for x in zip(*parts, strict=True)))


# -- one sequence


class Pages:
    """Rows that are added at the end and never changed: any number of shelves may look at those before their own end."""

    def __init__(self, rows: Rows, room: int) -> None:
        with torch.inference_mode(False):  # or the thread that writes them might not
            self.rows = Rows(*(x.new_empty(room, *x.shape[1:]) for x in rows))
        self.used = 0
        self.add(rows)

    @property
    def room(self) -> int:
        return self.rows.count - self.used

    def add(self, rows: Rows) -> Tensor:
        """-> the places of these rows, int64 [n]."""
        place = torch.arange(self.used, self.used + rows.count)
        for page, x in zip(self.rows, rows, strict=True):
            page[self.used : self.used + rows.count] = x
        self.used += rows.count
        return place


class Cells:
    """The places of rows in pages, by the nearest of some centroids: one inverted file per key-value head."""

    def __init__(self, centroids: Tensor, drawn_from: int) -> None:
        """centroids fp32 [Hkv, C, K]."""
        faiss = _faiss()
        self.centroids, self.drawn_from, self.lock = centroids, drawn_from, threading.Lock()
        self.files = []
        for own in centroids:
            near = faiss.IndexFlatIP(own.shape[1])
            near.add(own.numpy())
            self.files.append(faiss.IndexIVFFlat(near, own.shape[1], len(own), faiss.METRIC_INNER_PRODUCT))

    @classmethod
    def drawn(cls, k: Tensor, cells: int) -> Cells:
        """By k-means with a fixed seed from keys [n, Hkv, K], by inner product as the search."""
        faiss = _faiss()
        found = []
        for own in k.float().unbind(1):
            means = faiss.Kmeans(own.shape[1], min(cells, len(own)), seed=1, spherical=True, min_points_per_centroid=1)
            means.train(own.contiguous().numpy())
            found.append(torch.from_numpy(means.centroids.copy()))
        return cls(torch.stack(found), len(k))

    def add(self, k: Tensor, place: Tensor) -> None:
        with self.lock:
            for file, own in zip(self.files, k.float().unbind(1), strict=True):
                file.add_with_ids(own.contiguous().numpy(), place.numpy())

    def search(self, query: Tensor, count: int, among: Tensor, probe: int) -> Tensor:
        """query [Hkv, K] -> places of ``among`` [n], at most ``count`` per head, each once."""
        faiss = _faiss()
        chosen = faiss.IDSelectorBatch(among.numpy())
        how = faiss.SearchParametersIVF(sel=chosen, nprobe=probe)
        with self.lock:
            found = [
                torch.from_numpy(file.search(q[None].numpy(), count, params=how)[1][0])
                for file, q in zip(self.files, query.float(), strict=True)
            ]
        places = torch.cat(found).unique()
        return places[places >= 0]  # -1: fewer in those cells


class Shelf(NamedTuple):
    """The rows of one sequence at one moment. A value: `plus` makes another one, and what both hold lies in memory once."""

    pages: Pages
    live: Tensor  # int64 [n], places of the rows that are held, in the order in which they came
    end: int  # used places of the pages when this shelf was made
    cells: Cells | None = None
    fresh: int = 0  # rows that came since the centroids were drawn

    @classmethod
    def of(cls, rows: Rows) -> Shelf:
        pages = Pages(rows, max(64, 2 * rows.count))
        return cls(pages, torch.arange(rows.count), pages.used)

    def rows(self) -> Rows:
        return self.pages.rows.at(self.live)

    def plus(self, rows: Rows, cfg: ArchiveConfig) -> Shelf:
        """With these rows too; without those that then have to leave."""
        pages, live, cells = self.pages, self.live, self.cells
        moved = pages.used != self.end or pages.room < rows.count  # the place behind ours is another's, or none
        if moved:
            pages = Pages(self.rows(), max(64, min(2 * (len(live) + rows.count), 2 * cfg.max_rows + rows.count)))
            live = torch.arange(pages.used)
        new = pages.add(rows)
        held = torch.cat((live, new))
        held = held[_staying(pages.rows.at(held), cfg)]
        fresh = self.fresh + rows.count
        if cfg.index == "ivf" and len(held) > cfg.exact_rows and _faiss() is not None:
            if cells is None or fresh >= cells.drawn_from:
                cells = Cells.drawn(pages.rows.k[held], cfg.cells or math.isqrt(len(held)))
                fresh, new = 0, held
            elif moved:
                cells, new = Cells(cells.centroids, cells.drawn_from), held
            cells.add(pages.rows.k[new], new)
        return Shelf(pages, held, pages.used, cells, fresh)

    def search(self, query: Tensor, cfg: ArchiveConfig) -> Rows:
        """query [Hkv, K] -> what its heads ask for, by rising position."""
        if self.cells is None or len(self.live) <= cfg.exact_rows:
            place = self.live[_nearest(self.pages.rows.k[: self.end], self.live, query, cfg.rows)]
        else:
            place = self.cells.search(query, cfg.rows, self.live, cfg.probe)
        return self.pages.rows.at(place[self.pages.rows.position[place].argsort()])


def _staying(rows: Rows, cfg: ArchiveConfig) -> Tensor:
    """int64, the numbers of the rows that may stay, in their order."""
    if rows.count <= cfg.max_rows:
        return torch.arange(rows.count)
    worth = rows.position if cfg.drop == "oldest" else rows.score
    return worth.sort(descending=True, stable=True).indices[: cfg.max_rows].sort().values


def _nearest(k: Tensor, live: Tensor, query: Tensor, count: int) -> Tensor:
    """k [P, Hkv, K], query [Hkv, K] -> numbers in ``live`` of the ``count`` largest products of any head; of equals the first."""
    dtype = wide(k.dtype)
    products = [torch.linalg.vecdot(block.to(dtype), query.to(dtype)).mT for block in k.split(BLOCK)]
    by_head = torch.cat(products, 1)[:, live]
    count = min(count, len(live))
    least = by_head.topk(count, dim=1).values[:, -1:]
    better, equal = by_head > least, by_head == least
    chosen = better | (equal & (equal.cumsum(1) <= count - better.sum(1, keepdim=True)))
    return chosen.any(0).nonzero()[:, 0]


# -- the host object of a state


class Put(NamedTuple):
    rows: Rows
    shelf: Future[Shelf]  # with them


class Archive:
    """Of B sequences. A value like all states: `put` makes another archive, and a branch shares the rows it has in common."""

    def __init__(self, cfg: ArchiveConfig, like: Rows, sequences: Sequence[tuple[Put, ...]]) -> None:
        """``like``: no rows, of the shape and dtype of all. The last ``staleness`` + 1 puts of each sequence."""
        self.cfg, self.like, self.sequences = cfg, like, tuple(sequences)

    @classmethod
    def empty(cls, cfg: ArchiveConfig, batch: int, heads: int, width: int, dtype: torch.dtype) -> Archive:
        like = Rows.none(heads, width, dtype)
        return cls(cfg, like, [_history(cfg, Shelf.of(like), like)] * batch)

    def put(self, sequence: int, rows: Rows) -> Archive:
        """Once per chunk, with or without rows. Returns at once."""
        rows, before = rows.filed(self.cfg.min_score), self.sequences[sequence]
        shelf = before[-1].shelf
        if rows.count:
            shelf = _filing(os.getpid()).submit(lambda last, cfg: last.result().plus(rows, cfg), shelf, self.cfg)
        return self._with(sequence, (*before[1:], Put(rows, shelf)))

    def search(self, sequence: int, query: Tensor) -> Rows:
        """query [Hkv, K] -> at most Hkv * ``rows`` rows of what had been put ``staleness`` puts ago."""
        return self.sequences[sequence][0].shelf.result().search(query.detach().cpu(), self.cfg)

    def held(self, sequence: int) -> Rows:
        """Everything that was put and did not leave."""
        return self.sequences[sequence][-1].shelf.result().rows()

    def _with(self, sequence: int, puts: tuple[Put, ...]) -> Archive:
        before = self.sequences
        return Archive(self.cfg, self.like, (*before[:sequence], puts, *before[sequence + 1 :]))

    # the verbs of `models.state`

    def select_rows(self, index: Tensor) -> Archive:
        return Archive(self.cfg, self.like, [self.sequences[i] for i in index.tolist()])

    def tensors(self) -> dict[str, Tensor]:
        """Per sequence: its rows, ``late`` [n] how many puts ago a search may see them, and the centroids if there are some."""
        found = {}
        for i, (first, *later) in enumerate(self.sequences):
            shelf = first.shelf.result()
            parts = [shelf.rows(), *(put.rows for put in later)]
            late = torch.cat([torch.full((part.count,), n) for n, part in enumerate(parts)])
            found |= {f"{i}/{name}": x for name, x in Rows.joined(parts)._asdict().items()} | {f"{i}/late": late}
            if shelf.cells is not None:
                found[f"{i}/centroids"] = shelf.cells.centroids
                found[f"{i}/drawn"] = torch.tensor([shelf.cells.drawn_from, shelf.fresh])
        return found

    def with_tensors(self, tensors: dict[str, Tensor]) -> Archive:
        batch = len({name.split("/")[0] for name in tensors})
        return Archive(self.cfg, self.like, [self._read(str(i), tensors) for i in range(batch)])

    def _read(self, sequence: str, tensors: dict[str, Tensor]) -> tuple[Put, ...]:
        given = {name.removeprefix(f"{sequence}/"): t.cpu() for name, t in tensors.items()}
        if any(name not in given or given[name].shape[1:] != x.shape[1:] for name, x in self.like._asdict().items()):
            raise UserError("not a state of this model (its archive does not match)")
        rows, late = Rows(*(given[name].to(x.dtype) for name, x in self.like._asdict().items())), given["late"]
        shelf = Shelf.of(rows.at(late == 0))
        if "centroids" in given and _faiss() is not None:
            drawn_from, fresh = given["drawn"].tolist()
            cells = Cells(given["centroids"], drawn_from)
            cells.add(shelf.rows().k, shelf.live)
            shelf = shelf._replace(cells=cells, fresh=fresh)
        puts = _history(self.cfg, shelf, self.like)
        for n in range(1, max(len(puts), int(late.max()) + 1 if len(late) else 0)):
            shelf, new = puts[-1].shelf.result(), rows.at(late == n)
            puts = (*puts[1:], Put(new, _known(shelf.plus(new, self.cfg)) if new.count else puts[-1].shelf))
        return puts


def _history(cfg: ArchiveConfig, shelf: Shelf, none: Rows) -> tuple[Put, ...]:
    return (Put(none, _known(shelf)),) * (cfg.staleness + 1)


def _known(shelf: Shelf) -> Future[Shelf]:
    future: Future[Shelf] = Future()
    future.set_result(shelf)
    return future


@functools.cache
def _filing(process: int) -> ThreadPoolExecutor:
    """One thread, so that rows are filed in the order in which they were put. Of each process its own: threads survive no fork."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="archive")


@functools.cache
def _faiss() -> Any:
    """The library, or None where it is not installed."""
    try:
        import faiss  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        _log.warning("archives are searched exactly, whatever their size: %s (pip install faiss-cpu)", error)
        return None
    return faiss


# -- what the mixer keeps of it in its state


class Recall(NamedTuple):
    """Of B sequences."""

    store: Archive
    query: Tensor  # [B, Hkv, K], at least fp32: the sum of the queries of the chunk so far
    k: Tensor  # [B, S, Hkv, K], what was found for it
    v: Tensor
    position: Tensor  # int64 [B, S], -1 for none

    @classmethod
    def empty(
        cls, cfg: ArchiveConfig, batch: int, heads: int, width: int, device: torch.device | str, dtype: torch.dtype
    ) -> Recall:
        S = heads * cfg.rows
        k = torch.zeros(batch, S, heads, width, device=device, dtype=dtype)
        return cls(
            Archive.empty(cfg, batch, heads, width, dtype),
            torch.zeros(batch, heads, width, device=device, dtype=wide(dtype)),
            k,
            k.clone(),
            torch.full((batch, S), -1, device=device),
        )

    @torch.no_grad()
    def heard(self, q: Tensor, valid: Tensor | None) -> Recall:
        """One token's query: q [B, 1, H, K], valid [B, 1]; None: all are."""
        new = _per_key_head(q, self.query)[:, 0]
        return self._replace(query=self.query + (new if valid is None else new.where(valid[..., None], 0)))

    @torch.no_grad()
    def turned(self, turn: Tensor, known: Rows, kept: Tensor) -> Recall:
        """Where a chunk ends, turn [B, 1]: ``known`` are all rows [B, n, ...] that could be kept, -1 for none; ``kept`` [B, m] the
        positions of those that are."""
        store, k, v, position = self.store, self.k.clone(), self.v.clone(), self.position.clone()
        for i in turn[:, 0].nonzero()[:, 0].tolist():
            mine = Rows(*(x[i] for x in known))
            gone = (mine.position >= 0) & ~torch.isin(mine.position, kept[i])
            store = store.put(i, mine.at(gone))
            _lay(store.search(i, self.query[i]), k[i], v[i], position[i])
        return Recall(store, self.query.where(~turn[..., None], 0), k, v, position)

    @torch.no_grad()
    def turned_often(
        self, start: Tensor, end: Tensor, size: int, base: Tensor, q: Tensor, index: Tensor, pool: Rows
    ) -> tuple[Recall, Rows]:
        """All boundaries of a call that brings the tokens from ``start`` to ``end`` (int64 [B, 1]) of chunks of ``size``, in a line
        that starts at ``base`` [B, 1].

        q [B, N, H, K], zero where there is no new token; ``index`` int64 [B, C, m]: what is kept before each chunk, by number in
        ``pool``, which begins with the B * N tokens of the line. -> (the new state, what each chunk sees [B, C, S, ...])
        """
        (B, N), C = q.shape[:2], index.shape[1]
        query = F.pad(_per_key_head(q, self.query), (0, 0, 0, 0, 0, C * size - N)).unflatten(1, (C, size)).sum(2)
        first, now = ((at - base) // size for at in (start, end))
        sequence = torch.arange(B, device=q.device)
        query[sequence, first[:, 0]] += self.query
        k, v, position = (x[:, None].repeat(1, C, *[1] * (x.ndim - 1)) for x in (self.k, self.v, self.position))
        k, v = k.to(pool.k.dtype), v.to(pool.v.dtype)
        store, own = self.store, torch.arange(B * N, device=q.device).view(B, N)
        for i, (begin, last) in enumerate(torch.cat((first, now), 1).tolist()):
            for c in range(begin + 1, last + 1):
                could = torch.cat((index[i, c - 1], own[i, (c - 1) * size : c * size]))
                gone = could[(could >= 0) & ~torch.isin(could, index[i, c])]
                store = store.put(i, pool.at(gone))
                _lay(store.search(i, query[i, c - 1]), k[i, c], v[i, c], position[i, c])
                for x in (k, v, position):
                    x[i, c + 1 :] = x[i, c]
        at = (sequence, now[:, 0])
        after = Recall(store, query[at], k[at].to(self.k.dtype), v[at].to(self.v.dtype), position[at])
        return after, Rows(k, v, position, torch.zeros_like(position, dtype=torch.float32))


def _per_key_head(q: Tensor, like: Tensor) -> Tensor:
    """q [B, T, H, K] -> [B, T, Hkv, K], the sum over the heads that read the same key, in the dtype of ``like`` [B, Hkv, K]."""
    return q.detach().to(like.dtype).unflatten(2, (like.shape[1], -1)).sum(3)


def _lay(found: Rows, k: Tensor, v: Tensor, position: Tensor) -> None:
    """Into the slots of one chunk: k, v [S, Hkv, K], position [S]; those without a row are zero and -1."""
    n = found.count
    for slots, rows, none in ((k, found.k, 0), (v, found.v, 0), (position, found.position, -1)):
        slots[:n] = rows.to(slots)
        slots[n:] = none
