"""Rows laid out in chunks, and the three kinds of keys that a tile of queries has: two neighbouring chunks, one key of its own, and
the rows kept for its chunk. Legend: H, Hkv, K; G chunks of C cells; Z = Hkv * G; g = H / Hkv; R queries of a tile."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kernels.chunks import chunks

TILE = 128  # queries of a chunk at once


class Grid(NamedTuple):
    """Cells without a row hold zeros."""

    heads: int  # Hkv
    size: int  # C
    number: Tensor  # int64 [G], place of the chunk within its segment
    slot: Tensor | None  # int64 [G], the slot of each chunk; None: as they come
    cell: (
        Tensor | None
    )  # int64 [rows in use], of each flat row among the G * C; None: T rows in the chunks of each of B
    lead: tuple[int, int]  # B, T
    inside: Tensor | None = None  # bool [B T, 1, 1], whether a row in use belongs to a segment; None: it does

    @property
    def tiles(self) -> list[slice]:
        return [slice(a, min(a + TILE, self.size)) for a in range(0, self.size, TILE)]

    def cells(self, x: Tensor) -> Tensor:
        """x [B, T, H, K] -> [H, G, C, K], contiguous, in at least fp32."""
        (B, T), G = self.lead, len(self.number)
        h, width = x.shape[2:]
        out = x.new_zeros(h, G * self.size, width, dtype=torch.promote_types(x.dtype, torch.float32))
        if self.cell is None:
            out.view(h, B, -1, width)[:, :, :T].copy_(x.permute(2, 0, 1, 3))
        else:
            rows = self._own(x.flatten(0, 1)[: len(self.cell)])
            out.index_copy_(1, self.cell, rows.transpose(0, 1).to(out.dtype))
        return out.view(h, G, self.size, width)

    def queries(self, x: Tensor) -> Tensor:
        """x [B, T, H, K] -> [Z, g, C, K]; head j reads key head j // g."""
        return self.cells(x).unflatten(0, (self.heads, -1)).transpose(1, 2).flatten(0, 1).contiguous()

    def rows(self, x: Tensor) -> Tensor:
        """The reverse: x [Z, g, C, K] -> [B, T, H, K]."""
        (B, T), width = self.lead, x.shape[-1]
        x = (
            x.unflatten(0, (self.heads, -1))
            .transpose(1, 2)
            .flatten(0, 1)
            .reshape(-1, len(self.number) * self.size, width)
        )
        if self.cell is None:
            return x.view(len(x), B, -1, width)[:, :, :T].permute(1, 2, 0, 3).contiguous()
        out = x.new_zeros(B, T, len(x), width)
        out.flatten(0, 1)[: len(self.cell)] = self._own(x.index_select(1, self.cell).transpose(0, 1))
        return out

    def _own(self, rows: Tensor) -> Tensor:
        return rows if self.inside is None else rows.where(self.inside, 0)


def grid(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, window: int) -> Grid:
    """Chunks shorter than the window where no segment fills one. Of ragged rows only the slots in use, where looking is free: on a
    CPU; elsewhere all."""
    (B, T), heads = q.shape[:2], k.shape[2]
    if cu_seqlens is None:
        per = -(-T // window)
        return Grid(heads, min(window, T), torch.arange(per, device=q.device).repeat(B), None, None, (B, T))
    at = chunks(B, T, cu_seqlens, window)
    if not host_may_look(q):
        inside = (torch.arange(B * T, device=q.device) < cu_seqlens[-1])[:, None, None]
        return Grid(heads, window, at.before // window, None, at.slot * window + at.offset, (B, T), inside)
    used = int(cu_seqlens[-1])
    slot, inverse = at.slot[: max(used, 1)].unique(return_inverse=True)  # never none, so that nothing is without chunks
    size = int(at.count[slot].max())
    return Grid(
        heads, size, at.before[slot] // window, slot, (inverse * size + at.offset[: len(inverse)])[:used], (B, T)
    )


def host_may_look(x: Tensor) -> bool:
    return x.device.type == "cpu"


class Branch(Protocol):
    """Keys of one kind, for the query number ``query`` of two. q, up [Z, g R, K] are those of ``tile``; weights [Z, g R, n]."""

    query: int

    def scores(self, q: Tensor, tile: slice) -> Tensor:
        """q K^T, -inf where a key is not seen; fresh."""
        ...

    def read(self, weights: Tensor, tile: slice) -> Tensor:
        """W V [Z, g R, K]."""
        ...

    def agreement(self, up: Tensor, tile: slice) -> Tensor:
        """dO V^T, fresh."""
        ...

    def pull(self, ds: Tensor, tile: slice) -> Tensor:
        """dS K [Z, g R, K]."""
        ...

    def push(self, ds: Tensor, q: Tensor, p: Tensor, up: Tensor, tile: slice) -> None:
        """Adds dS^T q to the gradient of the keys and P^T dO to that of the values."""
        ...

    def gradients(self) -> list[tuple[int, Tensor]]:
        """(place among the op's tensors, gradient)."""
        ...


class Window:
    """Rows C lag .. C (lag + 1) - 1 before the query. All chunks stand in one line behind lag + 1 of zeros, so that each sees
    the two it reads as one view; those of the first chunks of a segment are another's, and masked."""

    def __init__(self, at: Grid, k: Tensor, v: Tensor, places: tuple[int, int], lag: int, query: int) -> None:
        self.at, self.places, self.lag, self.query = at, places, lag, query
        self.k, self.v = self._line(k), self._line(v)
        self.grads: list[Tensor] = []

    def _line(self, x: Tensor) -> Tensor:
        """[B, T, Hkv, K] -> [lag + 1 + Z, C, K]."""
        cells = self.at.cells(x).flatten(0, 1)
        return torch.cat((cells.new_zeros(self.lag + 1, *cells.shape[1:]), cells))

    def _seen(self, line: Tensor, tile: slice) -> Tensor:
        """-> [Z, C + R - 1, K]: of the 2 C cells that a chunk reads, those between its first query's oldest and its last query."""
        C, width, Z = self.at.size, line.shape[-1], len(line) - self.lag - 1
        return line.as_strided(
            (Z, C + tile.stop - tile.start - 1, width), (C * width, width, 1), (tile.start + 1) * width
        )

    def _hidden(self, tile: slice) -> Tensor:
        """bool [G, R, C + R - 1]."""
        C, R, number = self.at.size, tile.stop - tile.start, self.at.number[:, None, None]
        key, query = torch.arange(C + R - 1, device=number.device), torch.arange(R, device=number.device)[:, None]
        outside = (key < query) | (key > query + C - 1)
        return outside | (number < torch.where(key < C - 1 - tile.start, self.lag + 1, self.lag))

    def scores(self, q: Tensor, tile: slice) -> Tensor:
        return _masked(q @ self._seen(self.k, tile).mT, self._hidden(tile), self.at)

    def read(self, weights: Tensor, tile: slice) -> Tensor:
        return weights @ self._seen(self.v, tile)

    def agreement(self, up: Tensor, tile: slice) -> Tensor:
        return up @ self._seen(self.v, tile).mT

    def pull(self, ds: Tensor, tile: slice) -> Tensor:
        return ds @ self._seen(self.k, tile)

    def push(self, ds: Tensor, q: Tensor, p: Tensor, up: Tensor, tile: slice) -> None:
        self.grads = self.grads or [torch.zeros_like(self.k), torch.zeros_like(self.v)]
        old = self.at.size - 1 - tile.start  # cells of the earlier chunk
        for line, found in zip(self.grads, (ds.mT @ q, p.mT @ up), strict=True):
            line[: len(found), tile.start + 1 :] += found[:, :old]
            line[1 : len(found) + 1, : tile.stop] += found[:, old:]

    def gradients(self) -> list[tuple[int, Tensor]]:
        found = [self.at.rows(line[self.lag + 1 :, None]) for line in self.grads]
        return list(zip(self.places, found, strict=True))


class Own:
    """One row per query, its own or, ``lag`` = 1, the one C before it."""

    def __init__(self, at: Grid, k: Tensor, v: Tensor, places: tuple[int, int], lag: int, query: int) -> None:
        self.at, self.places, self.lag, self.query = at, places, lag, query
        self.k, self.v = self._shifted(k), self._shifted(v)
        self.grads: list[Tensor] = []

    def _shifted(self, x: Tensor) -> Tensor:
        """[B, T, Hkv, K] -> [Z, 1, C, K]."""
        cells = self.at.cells(x).flatten(0, 1)
        return torch.cat((cells.new_zeros(self.lag, *cells.shape[1:]), cells[: len(cells) - self.lag]))[:, None]

    def _of_group(self, x: Tensor, tile: slice) -> Tensor:
        """[Z, g R, n] -> [Z, g, R, n]."""
        return x.unflatten(1, (-1, tile.stop - tile.start))

    def scores(self, q: Tensor, tile: slice) -> Tensor:
        scores = (self._of_group(q, tile) * self.k[:, :, tile]).sum(-1, keepdim=True).flatten(1, 2)
        return _masked(scores, (self.at.number < self.lag)[:, None, None], self.at)

    def read(self, weights: Tensor, tile: slice) -> Tensor:
        return (self._of_group(weights, tile) * self.v[:, :, tile]).flatten(1, 2)

    def agreement(self, up: Tensor, tile: slice) -> Tensor:
        return (self._of_group(up, tile) * self.v[:, :, tile]).sum(-1, keepdim=True).flatten(1, 2)

    def pull(self, ds: Tensor, tile: slice) -> Tensor:
        return (self._of_group(ds, tile) * self.k[:, :, tile]).flatten(1, 2)

    def push(self, ds: Tensor, q: Tensor, p: Tensor, up: Tensor, tile: slice) -> None:
        self.grads = self.grads or [torch.zeros_like(self.k), torch.zeros_like(self.v)]
        self.grads[0][:, 0, tile] = self._of_group(ds * q, tile).sum(1)
        self.grads[1][:, 0, tile] = self._of_group(p * up, tile).sum(1)

    def gradients(self) -> list[tuple[int, Tensor]]:
        found = [torch.cat((x[self.lag :], x.new_zeros(self.lag, *x.shape[1:]))) for x in self.grads]
        return [(place, self.at.rows(x)) for place, x in zip(self.places, found, strict=True)]


class Kept:
    """The n rows of each chunk: ``index`` [G, n] of tables [rows, Hkv, K], each seen from offset ``since`` [G, n] on."""

    def __init__(
        self, at: Grid, k: Tensor, v: Tensor, index: Tensor, since: Tensor, places: tuple[int, int], query: int
    ) -> None:
        self.at, self.index, self.since, self.places, self.query = at, index, since, places, query
        self.tables = [k.shape, v.shape]
        self.k, self.v = self._picked(k), self._picked(v)
        self.grads: list[Tensor] = []

    def _picked(self, table: Tensor) -> Tensor:
        """-> [Z, n, K]."""
        wide = torch.promote_types(table.dtype, torch.float32)
        return table[self.index].to(wide).permute(2, 0, 1, 3).flatten(0, 1)

    def scores(self, q: Tensor, tile: slice) -> Tensor:
        offset = torch.arange(tile.start, tile.stop, device=q.device)[:, None]
        return _masked(q @ self.k.mT, self.since[:, None] > offset, self.at)

    def read(self, weights: Tensor, tile: slice) -> Tensor:
        return weights @ self.v

    def agreement(self, up: Tensor, tile: slice) -> Tensor:
        return up @ self.v.mT

    def pull(self, ds: Tensor, tile: slice) -> Tensor:
        return ds @ self.k

    def push(self, ds: Tensor, q: Tensor, p: Tensor, up: Tensor, tile: slice) -> None:
        found = [ds.mT @ q, p.mT @ up]
        self.grads = [old + new for old, new in zip(self.grads, found, strict=True)] if self.grads else found

    def gradients(self) -> list[tuple[int, Tensor]]:
        """Rows that several chunks keep get the sum."""
        found = []
        for place, shape, grad in zip(self.places, self.tables, self.grads, strict=True):
            by_chunk = grad.unflatten(0, (self.at.heads, -1)).permute(1, 2, 0, 3).flatten(0, 1)
            found.append((place, grad.new_zeros(shape).index_add_(0, self.index.flatten(), by_chunk)))
        return found


def _masked(scores: Tensor, hidden: Tensor, at: Grid) -> Tensor:
    """scores [Z, g R, n], hidden [G, R or 1, n or 1] -> scores, -inf where hidden."""
    by_query = scores.view(at.heads, len(hidden), -1, *scores.shape[-1:])
    if hidden.shape[1] > 1:
        by_query = by_query.unflatten(2, (-1, hidden.shape[1]))
        hidden = hidden[:, None]
    by_query.masked_fill_(hidden, -float("inf"))
    return scores
