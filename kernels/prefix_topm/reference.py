"""Plain forms of the selection. ``streaming`` is the definition, ``forward`` is fast.

Key and order are one integer, the key's bits above the rank's complement, so no two candidates are equal and the rank comes back
out of the winner. Stores of single chunks are joined over 1, 2, 4, ... chunks.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from kernels.chunks import chunks, slots

NOTHING = torch.iinfo(torch.int64).min
RANKS = 0x7FFFFFFF


def streaming(key: Tensor, initial: Tensor, cu_seqlens: Tensor | None, size: int, m: int) -> Tensor:
    """Row after row. Arguments and result as of the public function."""
    B, T = key.shape
    ends = [b * T for b in range(B + 1)] if cu_seqlens is None else cu_seqlens.tolist()
    found = torch.full((slots(B, T, cu_seqlens, size), m), -1)
    for s, (start, end) in enumerate(pairwise(ends)):
        store: list[tuple[float, int, int]] = []  # (key, -rank, row)
        first = s * -(-T // size) if cu_seqlens is None else start // size + s
        old = range(initial.shape[1] if len(initial) else 0)
        arrivals = [(float(initial[s, i]), B * T + s * initial.shape[1] + i) for i in old]
        arrivals += [(float(key.flatten()[row]), row) for row in range(start, end)]
        for rank, (value, row) in enumerate(arrivals):
            place = rank - len(old)
            if place >= 0 and place % size == 0:
                kept = sorted(store, key=lambda item: -item[1])
                found[first + place // size, : len(kept)] = torch.tensor([item[2] for item in kept], dtype=torch.int64)
            if value == -float("inf"):
                continue
            if len(store) < m:
                store.append((value, -rank, row))
            elif value > min(store)[0]:
                store[store.index(min(store))] = (value, -rank, row)
    return found


def forward(key: Tensor, initial: Tensor, cu_seqlens: Tensor | None, size: int, m: int) -> Tensor:
    """key [B, T], initial [B, M], both fp32 -> int64 [G, m]."""
    B, T = key.shape
    M, at = initial.shape[1], chunks(B, T, cu_seqlens, size, key.device)
    G = len(at.row)
    inside = at.before[at.slot] + at.offset  # rank among the rows of the segment
    own = torch.full((G, size), NOTHING, device=key.device)
    own[at.slot, at.offset] = _ordered(key.flatten(), inside + M)
    store = _best(own, m)
    start = torch.full((G, m), NOTHING, device=key.device)  # what a segment starts with
    number, first = at.before // size, at.before == 0
    if M:
        rank = torch.arange(M, device=key.device).expand(B, M)
        start = _best(_ordered(initial, rank), m)[torch.arange(G, device=key.device) // (G // B)]
        store = torch.where(first[:, None], _best(torch.cat((store, start), 1), m), store)
    step = 1
    while step < G:  # after it, a store holds what is best in this chunk and the 2 step - 1 before it
        earlier = torch.cat((store.new_full((step, m), NOTHING), store[:-step]))
        store = _best(torch.cat((store, earlier.where((number >= step)[:, None], NOTHING)), 1), m)
        step *= 2
    kept = torch.cat((store[:1], store[:-1])).where(~first[:, None], start)
    rank = torch.where(kept == NOTHING, RANKS, RANKS - (kept & RANKS)).sort(dim=1).values
    row = (at.row - at.before)[:, None] + rank - M
    if M:
        sequence = torch.arange(G, device=key.device)[:, None] // (G // B)
        row = torch.where(rank < M, B * T + sequence * M + rank, row)
    return torch.where((rank == RANKS) | (at.count <= 0)[:, None], -1, row)


def _ordered(key: Tensor, rank: Tensor) -> Tensor:
    """fp32 keys and ranks -> int64 in the order of (key, -rank)."""
    bits = (key + 0.0).view(torch.int32)  # + 0: a negative zero is a zero
    bits = bits ^ ((bits >> 31) & RANKS)
    return torch.where(key == -float("inf"), NOTHING, (bits.long() << 32) | (RANKS - rank))


def _best(keys: Tensor, m: int) -> Tensor:
    """[G, n] -> [G, m], the largest."""
    if keys.shape[1] < m:
        return torch.cat((keys, keys.new_full((len(keys), m - keys.shape[1]), NOTHING)), 1)
    return keys.topk(m, dim=1).values
