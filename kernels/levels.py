"""Rows laid out as chunks by level: the form in which the PyTorch references of scans work.

A chunk's level is its place within its segment. All first chunks stand together, then all second ones, and so on, each level in
the order of the segments by length, the longest first. So the chunks that a step of a scan over levels touches are one slice, for
sequences of equal length and for ragged ones alike, and nothing is gathered inside the loop.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Levels(NamedTuple):
    """N chunks of C rows; rows of a chunk past its segment's end hold zeros. Legend: B, T, H, K; S segments."""

    size: int  # C, a power of two
    counts: list[int]  # chunks of each level, descending; their sum is N
    order: Tensor | None  # int64 [S], segments by length, longest first; None: equally long
    place: Tensor | None  # int64 [rows in use], where each flat row stands among the N * C; None: equally long

    def split(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, T, H, K] -> [N, H, C, K], contiguous."""
        b, t, h, k = x.shape
        n, c = sum(self.counts), self.size
        if self.place is not None:
            flat = x.new_zeros(n * c, h, k).index_copy_(0, self.place, x.flatten(0, 1)[: len(self.place)])
            return flat.view(n, c, h, k).transpose(1, 2).to(dtype, memory_format=torch.contiguous_format, copy=True)
        steps = len(self.counts)
        out = x.new_empty(steps, b, h, c, k, dtype=dtype)
        whole = t // c
        out[:whole].copy_(x[:, : whole * c].view(b, whole, c, h, k).permute(1, 0, 3, 2, 4))
        if whole < steps:
            rest = t - whole * c
            out[whole, :, :, :rest].copy_(x[:, whole * c :].transpose(1, 2))
            out[whole, :, :, rest:].zero_()
        return out.view(n, h, c, k)

    def join(self, x: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The reverse, [N, H, C, K] -> ``shape`` [B, T, H, K]; rows of no segment become zero."""
        b, t, h, k = shape
        n, c = sum(self.counts), self.size
        if self.place is not None:
            flat = x.transpose(1, 2).reshape(n * c, h, k).index_select(0, self.place)
            out = x.new_zeros(b * t, h, k, dtype=dtype)
            out[: len(self.place)] = flat
            return out.view(shape)
        whole = t // c
        out = x.new_empty(shape, dtype=dtype)
        x = x.view(len(self.counts), b, h, c, k)
        out[:, : whole * c].view(b, whole, c, h, k).copy_(x[:whole].permute(1, 0, 3, 2, 4))
        if whole < len(self.counts):
            out[:, whole * c :] = x[whole, :, :, : t - whole * c].transpose(1, 2)
        return out

    def sort(self, state: Tensor, dtype: torch.dtype) -> Tensor:
        """States of segments in the order of ``counts``; always a copy."""
        return state.to(dtype, copy=True) if self.order is None else state.to(dtype)[self.order]

    def unsort(self, state: Tensor) -> Tensor:
        return state if self.order is None else torch.empty_like(state).index_copy_(0, self.order, state)

    def scan(self, update: Tensor, decay: Tensor | None, state: Tensor, reverse: bool = False) -> Tensor:
        """state = decay * state + update, chunk after chunk of each segment (``reverse``: from the last to the first).

        update [N, ...]: overwritten with the state before each chunk, and returned. ``decay`` broadcasts to it (None: 1).
        state [S, ...], sorted: overwritten with what comes out after the last chunk.
        """
        ends = torch.tensor(self.counts).cumsum(0).tolist()
        levels = list(zip(ends, self.counts, strict=True))
        for end, count in reversed(levels) if reverse else levels:
            chunk, now = update[end - count : end], state[:count]
            after = chunk + now if decay is None else torch.addcmul(chunk, decay[end - count : end], now)
            chunk.copy_(now)
            now.copy_(after)
        return update


def levels(batch: int, time: int, cu_seqlens: Tensor | None, size: int) -> Levels:
    """Chunks of at most ``size`` rows (a power of two), fewer where no segment is that long. Reads ``cu_seqlens`` on the host."""
    if cu_seqlens is None:
        size = min(size, _power_of_two(time))
        return Levels(size, [batch] * (-(-time // size)), None, None)
    cu = cu_seqlens.long()
    lengths = cu.diff()
    size = min(size, _power_of_two(int(lengths.max())))
    chunks = (lengths + size - 1) // size
    order = torch.argsort(chunks, descending=True, stable=True)
    counts = (chunks[:, None] > torch.arange(int(chunks.max()), device=cu.device)).sum(0)
    segment = torch.repeat_interleave(torch.arange(len(lengths), device=cu.device), lengths)
    inside = torch.arange(len(segment), device=cu.device) - cu[segment]
    first = counts.cumsum(0) - counts
    place = (first[inside // size] + torch.argsort(order)[segment]) * size + inside % size
    return Levels(size, counts.tolist(), order, place)


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
