"""The same attention by what torch has: a second witness in tests, and what benches hold the op's time against.

A key is seen by queries that follow one another: rows first .. last - 1. So all keys stand in one line, a kept row once for each
chunk that keeps it, and the mask is two numbers per key:

    rows of k          t .. t + W - 1       eidetic, chunk c      from ``since`` on to the chunk's end
    fading, "point"    t + W                fading, "chunk" c     the chunk, unless it is its segment's first
    "band"             t + W .. t + 2 W - 1
    "self"             t

all cut off at the segment's end. ``memory_q`` is a query with columns of its own, in which rows of the window have zeros. Arguments
are those of `memory_attention`; ``sdpa`` needs B T numbers per key, ``flex`` has no gradient on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from kernels.chunks import chunks

BLOCK = 128  # queries and keys that flex_attention skips together


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, **options: Any) -> Tensor:
    """Through `torch.nn.functional.scaled_dot_product_attention` and one mask of all queries and keys."""
    first, last = spans(q, **options)
    row = torch.arange(q.shape[0] * q.shape[1], device=q.device)[:, None]
    mask = (first <= row) & (row < last)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    o = F.scaled_dot_product_attention(*_line(q, k, v, **options), attn_mask=mask, scale=scale, enable_gqa=True)
    return _rows(o, q, options.get("cu_seqlens"))


def flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    mask: BlockMask | None = None,
    attend: Callable[..., Any] = flex_attention,
    **options: Any,
) -> Tensor:
    """Through `torch.nn.attention.flex_attention`; ``attend``: its compiled form. ``mask``: of ``block_mask``, where it is known."""
    mask = block_mask(q, **options) if mask is None else mask
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    rows = _line(q, k, v, **options)
    if not torch.is_grad_enabled():  # a CPU refuses what could have a gradient, wanted or not
        rows = [x.detach() for x in rows]
    o = attend(*rows, block_mask=mask, scale=scale, enable_gqa=k.shape[2] < q.shape[2])
    return _rows(o, q, options.get("cu_seqlens"))


def block_mask(q: Tensor, **options: Any) -> BlockMask:
    """Which blocks have something to compute, and in which nothing is hidden, without a table of all queries and keys."""
    first, last = spans(q, **options)
    queries, keys = q.shape[0] * q.shape[1], len(first)
    start = torch.arange(0, queries, BLOCK, device=q.device)[:, None]
    end = (start + BLOCK).clamp(max=queries)
    touched = (first < last) & (first < end) & (last > start)
    whole = (first <= start) & (last >= end)
    pad = -keys % BLOCK
    some = F.pad(touched, (0, pad)).unflatten(1, (-1, BLOCK)).any(2)
    full = F.pad(whole, (0, pad)).unflatten(1, (-1, BLOCK)).all(2)

    def seen(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (first[key] <= query) & (query < last[key])

    return BlockMask.from_kv_blocks(
        *_listed(some & ~full), *_listed(full), BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=(queries, keys)
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """bool [Q, KV] -> (how many of each row, which come first), int32 [1, 1, Q] and [1, 1, Q, KV]."""
    order = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]


def spans(
    q: Tensor,
    *,
    window: int,
    index: Tensor | None = None,
    since: Tensor | None = None,
    fading: str = "chunk",
    fading_k: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """-> (first, last), int32 [M], of all keys. Rows of no segment see each other: what they get is not kept."""
    (B, T), at = q.shape[:2], chunks(q.shape[0], q.shape[1], cu_seqlens, window, q.device)
    row = torch.arange(B * T, device=q.device)
    cu = torch.arange(0, B * T + 1, T, device=q.device) if cu_seqlens is None else cu_seqlens.long()
    end = F.pad(cu[1:], (0, 1), value=B * T)[torch.searchsorted(cu[1:].contiguous(), row, right=True)]
    first, last = [row], [torch.minimum(row + window, end)]
    chunk_end = (at.row + at.count)[:, None]
    if index is not None:
        first.append((at.row[:, None] + (torch.zeros_like(index) if since is None else since)).flatten())
        last.append(chunk_end.where(index >= 0, 0).flatten())
    if fading_k is not None and fading == "chunk":
        first.append(at.row.repeat_interleave(fading_k.shape[1]))
        last.append(chunk_end.where(at.before[:, None] > 0, 0).expand(-1, fading_k.shape[1]).flatten())
    elif fading_k is not None:
        age, length = {"point": (window, 1), "band": (window, window), "self": (0, 1)}[fading]
        first.append(row + age)
        last.append(torch.minimum(row + age + length, end))
    return torch.cat(first).int(), torch.cat(last).int()


def _line(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    index: Tensor | None = None,
    pool: tuple[Tensor, Tensor] | None = None,
    fading_k: Tensor | None = None,
    fading_v: Tensor | None = None,
    memory_q: Tensor | None = None,
    **_: Any,
) -> list[Tensor]:
    """-> queries [1, H, B T, .], keys [1, Hkv, M, .] and values [1, Hkv, M, K], in the order of ``spans``."""
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    keys, values = [k], [v]
    if index is not None:
        for found, table in zip((keys, values), pool or (k, v), strict=True):
            found.append(table[index.clamp(min=0).flatten()])
    if fading_k is not None and fading_v is not None:
        keys.append(fading_k.flatten(0, 1))
        values.append(fading_v.flatten(0, 1))
    if memory_q is not None:
        q, blank = torch.cat((q, memory_q.flatten(0, 1)), -1), [torch.zeros_like(x) for x in keys]
        keys = [torch.cat((keys[0], blank[0]), -1), *(torch.cat(pair, -1) for pair in zip(blank[1:], keys[1:]))]
    return [x.transpose(0, 1)[None] for x in (q, torch.cat(keys), torch.cat(values))]


def _rows(o: Tensor, q: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """o [1, H, B T, K] -> [B, T, H, K], zeros for rows of no segment."""
    o = o[0].transpose(0, 1)
    if cu_seqlens is not None:
        o = torch.where((torch.arange(len(o), device=o.device) < cu_seqlens[-1])[:, None, None], o, 0)
    return o.unflatten(0, q.shape[:2])
