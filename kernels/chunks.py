"""Chunks of ragged rows with a number that is a closed form of their place: slots.

Rows of S segments (``cu_seqlens`` int [S+1] over the flattened B * T; None: B segments of T rows) are cut into chunks of C rows,
none across two segments. Chunk c of segment s has the slot cu[s] // C + s + c, or s * ceil(T / C) + c for whole rows: whoever
needs a table by chunk agrees about its rows without knowing lengths. A few slots stay without a chunk. The rows past cu[S]
count as segment S.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Chunks(NamedTuple):
    """What stands in each of G slots, and the slot of each of N flat rows."""

    row: Tensor  # int64 [G], the flat row where the chunk starts
    before: Tensor  # int64 [G], rows of its segment before the chunk: a multiple of C
    count: Tensor  # int64 [G], rows of the chunk; 0 or less: a slot without one
    slot: Tensor  # int64 [N]
    offset: Tensor  # int64 [N], place of the row within its chunk


def slots(batch: int, time: int, cu_seqlens: Tensor | None, size: int) -> int:
    """How many slots of chunks of ``size`` rows there are."""
    if cu_seqlens is None:
        return batch * -(-time // size)
    return batch * time // size + len(cu_seqlens)


def chunks(
    batch: int, time: int, cu_seqlens: Tensor | None, size: int, device: torch.device | str | None = None
) -> Chunks:
    """The host reads no number of ``cu_seqlens``; ``device`` says where the tables go without it."""
    rows, total = batch * time, slots(batch, time, cu_seqlens, size)
    if cu_seqlens is None:
        per = -(-time // size)
        row, slot = torch.arange(rows, device=device), torch.arange(total, device=device)
        before, inside = slot % per * size, row % time
        return Chunks(
            slot // per * time + before,
            before,
            (time - before).clamp(max=size),
            row // time * per + inside // size,
            inside % size,
        )
    cu = cu_seqlens.long()
    row, slot = torch.arange(rows, device=cu.device), torch.arange(total, device=cu.device)
    first = cu // size + torch.arange(len(cu), device=cu.device)  # the slot of each segment's first chunk
    end = torch.cat((cu[1:], cu.new_full((1,), rows)))
    owner = torch.searchsorted(first, slot, right=True) - 1
    before = (slot - first[owner]) * size
    start = cu[owner] + before
    segment = torch.searchsorted(cu[1:].contiguous(), row, right=True)
    inside = row - cu[segment]
    return Chunks(start, before, (end[owner] - start).clamp(max=size), first[segment] + inside // size, inside % size)
