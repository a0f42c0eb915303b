"""How the one softmax of B'MOJO is shared out among its kinds of keys, from the arguments of `kernels.memory_attention` themselves.

Query by query as that op defines it, chunk after chunk, in fp64: slow, exact, and it gives the output too, so that whoever asks for
the weights can see that they are those of the layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.chunks import chunks

KINDS = ("window", "fading", "eidetic")


class Shares(NamedTuple):
    """Of N flat rows, in fp64. Rows that belong to no segment have zeros."""

    window: Tensor  # [N, H], the weight on all keys of the window
    fading: Tensor  # [N, H]
    eidetic: Tensor  # [N, H, m], on each row that is kept for the chunk
    keys: Tensor  # [N, 3], how many keys a query sees of each of KINDS
    o: Tensor  # [N, H, K], what is read with these weights

    @property
    def by_kind(self) -> Tensor:
        """[N, H, 3], in the order of KINDS."""
        return torch.stack((self.window, self.fading, self.eidetic.sum(2)), 2)


class _Keys(NamedTuple):
    """Of one kind, for the R queries of one chunk."""

    k: Tensor  # [n, Hkv, K]
    v: Tensor  # [n, Hkv, K]
    seen: Tensor  # bool [R, n]
    memory: bool  # asked by the query of the memory


@torch.no_grad()
def shared_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    index: Tensor | None = None,
    since: Tensor | None = None,
    pool: tuple[Tensor, Tensor] | None = None,
    fading: str = "chunk",
    fading_k: Tensor | None = None,
    fading_v: Tensor | None = None,
    memory_q: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Shares:
    """Arguments as of `kernels.memory_attention.memory_attention`."""
    (B, T, H, K), heads = q.shape, k.shape[2]
    m = 0 if index is None else index.shape[1]
    at = chunks(B, T, cu_seqlens, window, q.device)
    end = B * T if cu_seqlens is None else int(cu_seqlens[-1])
    queries = [x.flatten(0, 1).unflatten(1, (heads, -1)).double() for x in (q, q if memory_q is None else memory_q)]
    k, v = k.flatten(0, 1), v.flatten(0, 1)
    like = {"dtype": torch.float64, "device": q.device}
    found = Shares(
        torch.zeros(B * T, H, **like),
        torch.zeros(B * T, H, **like),
        torch.zeros(B * T, H, m, **like),
        torch.zeros(B * T, 3, **like),
        torch.zeros(B * T, H, K, **like),
    )
    fading_rows = None if fading_k is None or fading_v is None else (fading_k, fading_v)

    def kinds(slot: int, row: int, before: int, rows: slice) -> Iterator[_Keys]:
        yield _band(k, v, row - before, rows, 0, window, memory=False)
        if fading_rows is not None and fading == "chunk":
            here = torch.full((rows.stop - row, fading_rows[0].shape[1]), before > 0, device=q.device)
            yield _Keys(fading_rows[0][slot], fading_rows[1][slot], here, True)
        elif fading_rows is not None:
            low, high = {"point": (window, window + 1), "band": (window, 2 * window), "self": (0, 1)}[fading]
            own_k, own_v = (x.flatten(0, 1) for x in fading_rows)
            yield _band(own_k, own_v, row - before, rows, low, high, memory=True)
        else:
            yield _Keys(k[:0], v[:0], torch.zeros(rows.stop - row, 0, dtype=torch.bool, device=q.device), True)
        if index is not None:
            yield _kept(index[slot], None if since is None else since[slot], (k, v) if pool is None else pool, rows)

    for slot, (row, before, count) in enumerate(zip(*(x.tolist() for x in at[:3]), strict=True)):
        if count <= 0 or row >= end:
            continue
        rows = slice(row, row + count)
        keys = [*kinds(slot, row, before, rows)]
        asked = [queries[int(one.memory)][rows] for one in keys]
        scores = [
            torch.einsum("rhgk,nhk->rhgn", mine, one.k.double()).masked_fill(~one.seen[:, None, None], -float("inf"))
            for mine, one in zip(asked, keys, strict=True)
        ]
        weights = (torch.cat(scores, -1) * (K**-0.5 if scale is None else scale)).softmax(-1)
        parts = weights.split([len(one.k) for one in keys], -1)
        said = [torch.einsum("rhgn,nhk->rhgk", p, one.v.double()) for p, one in zip(parts, keys, strict=True)]
        found.o[rows] = torch.stack(said).sum(0).flatten(1, 2)
        for n, (p, one) in enumerate(zip(parts, keys, strict=True)):
            found.keys[rows, n] = one.seen.sum(1).double()
            found[n][rows] = p.flatten(1, 2) if n == 2 else p.flatten(1, 2).sum(-1)
    return found


def _band(k: Tensor, v: Tensor, start: int, rows: slice, low: int, high: int, memory: bool) -> _Keys:
    """Rows of a segment from ``start`` on that are at least ``low`` and less than ``high`` tokens old."""
    first, last = max(start, rows.start - high + 1), max(start, rows.stop - low)
    here = slice(first, last)
    age = torch.arange(rows.start, rows.stop, device=k.device)[:, None] - torch.arange(first, last, device=k.device)
    return _Keys(k[here], v[here], (age >= low) & (age < high), memory)


def _kept(index: Tensor, since: Tensor | None, pool: tuple[Tensor, Tensor], rows: slice) -> _Keys:
    """Rows ``index`` [m] of a pool, each seen from its offset on."""
    offset = torch.arange(rows.stop - rows.start, device=index.device)[:, None]
    seen = (index >= 0).expand(len(offset), -1)
    if since is not None:
        seen = seen & (since <= offset)
    at = index.clamp(min=0)
    return _Keys(pool[0][at], pool[1][at], seen, True)
