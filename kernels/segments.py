"""Chunks of ragged sequences, with static shapes and no look at the values from the host.

A batch of sequences of unequal length is one flat row axis cut by ``cu_seqlens`` [S+1]: segment s holds the rows
``cu_seqlens[s] : cu_seqlens[s+1]``; empty segments are legal, rows past the last end belong to nobody. A chunk is a run of at
most C rows of one segment.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Chunks(NamedTuple):
    """n chunk slots, chunks of a segment in order and next to each other; surplus slots stand last and have no rows."""

    segment: Tensor  # int32 [n]; S in surplus slots
    start: Tensor  # int32 [n], the first row
    rows: Tensor  # int32 [n], 0 to C
    first: Tensor  # int32 [S+1], each segment's first slot; the last entry is the number of chunks that hold rows


def slots(rows: int, segments: int, size: int) -> int:
    """How many chunks ``rows`` rows in ``segments`` segments need at most."""
    return rows // size + segments


def chunk_table(cu_seqlens: Tensor, rows: int, size: int) -> Chunks:
    """cu_seqlens int [S+1] over ``rows`` flat rows -> the chunks of ``size`` rows."""
    cu = cu_seqlens.long()
    segments, n = len(cu) - 1, slots(rows, len(cu) - 1, size)
    first = torch.zeros_like(cu)
    torch.cumsum((cu.diff() + size - 1) // size, 0, out=first[1:])
    slot = torch.arange(n, device=cu.device)
    segment = torch.searchsorted(first[1:].contiguous(), slot, right=True)
    inside = segment.clamp(max=segments - 1)
    start = cu[inside] + (slot - first[inside]) * size
    count = (cu[inside + 1] - start).clamp(0, size)
    count = torch.where(segment < segments, count, 0)
    return Chunks(*(t.int() for t in (segment, start, count, first)))


def whole_rows(batch: int, time: int, device: torch.device | str) -> Tensor:
    """The ``cu_seqlens`` of B sequences of T rows each: int32 [B+1]."""
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * time
