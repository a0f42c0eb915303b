"""How the slots of a memory cell change outside the optimizer (arXiv:2604.23862): what a forward writes, what a commit makes of it.

Once per optimizer step, from the sums of all micro-batches and ranks: a slot moves towards the mean of the tokens that were nearest
to it, and how much it is used is followed. On schedule, slots that are not used, and of two that point the same way the one that is
used less, start again at a token of this step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.gmt_cell import Hop
from models.channels.gmt_losses import cosines
from models.types import CommitInfo, Ctx, RowReset, Write

if TYPE_CHECKING:
    from models.channels.gmt import GMT

CANDIDATES = 4  # tokens per slot that a step remembers for slots that start again
_MIX = (-7046029254386353131, -4658895280553007687, -7723592293110705685)  # odd 64-bit numbers that mix well


def writes(hop: Hop, tokens: Tensor, ctx: Ctx, slots: int) -> dict[str, Write]:
    """tokens [N, D], detached: the states that slots move to."""
    with torch.no_grad():
        tokens = tokens.to(hop.source.dtype)
        nearest = hop.nearest.long()
        keep = tokens.new_ones(len(tokens)) if ctx.valid is None else ctx.valid.flatten().to(tokens.dtype)
        kept = tokens if ctx.valid is None else tokens * keep[:, None]
        if tokens.device.type == "cpu":
            sums = tokens.new_zeros(slots, tokens.shape[1]).index_add_(0, nearest, kept)
            counts = tokens.new_zeros(slots).index_add_(0, nearest, keep)
        else:  # adding by index is in no fixed order there
            belongs = F.one_hot(nearest, slots).to(tokens.dtype)
            sums, counts = belongs.T @ kept, belongs.T @ keep
        return {
            "sums": Write(sums),
            "counts": Write(counts),
            "weights": Write(hop.source.sum(0) if ctx.valid is None else keep @ hop.source),
            "tokens": Write(keep.sum()),
            "candidates": candidates(tokens, ctx, CANDIDATES * slots),
        }


def candidates(tokens: Tensor, ctx: Ctx, count: int) -> Write:
    """``count`` tokens by lot: those with the largest keys. Below zero, a key is that of no token."""
    lots = keys(ctx).flatten()
    missing = max(count - len(lots), 0)
    lots, rows = lots.sort(descending=True, stable=True)
    lots, drawn = lots[:count], tokens[rows[:count]]
    if ctx.valid is not None:
        drawn = torch.where(lots[:, None] < 0, 0.0, drawn)
    if missing:
        lots, drawn = F.pad(lots, (0, missing), value=-1.0), F.pad(drawn, (0, 0, 0, missing))
    return Write(drawn, "topk_by_key", lots)


def keys(ctx: Ctx) -> Tensor:
    """Pseudo-random numbers in [0, 1), [B, T]; -1 for invalid tokens. A function of the row up to the token and of the
    progress, so that it does not matter in which micro-batch or on which rank a row is. In fp64: no two are equal by chance."""
    a, b, c = _MIX
    seen = ctx.tokens * a + ctx.positions * b
    seen = (seen ^ (seen >> 29)) * b
    if ctx.valid is not None:
        seen = seen.masked_fill(~ctx.valid, 0)
    seen = seen.cumsum(1)
    step = (ctx.progress.double() * 2.0**40).long()
    mixed = (seen + step * c) * a
    mixed = (mixed ^ (mixed >> 32)) * c
    mixed = (mixed ^ (mixed >> 29)) & (2**53 - 1)
    lots = mixed.double() * 2.0**-53
    return lots if ctx.valid is None else lots.masked_fill(~ctx.valid, -1.0)


def commit(cell: GMT, said: Mapping[str, Write], info: CommitInfo) -> list[RowReset]:
    """One step of the memory, the same on every rank. -> the slots that started again."""
    cfg, now = cell.cfg, {name: write.value for name, write in said.items()}
    times = info.micro_batches if cfg.rate == "reference" else 1
    share = now["weights"] / now["tokens"].clamp(min=1)
    slow = cfg.usage_momentum**times
    cell.usage.copy_(torch.where(now["tokens"] > 0, slow * cell.usage + (1 - slow) * share, cell.usage))
    cell.slots.copy_(written_back(cell, now["sums"], now["counts"], times))
    cell.age.add_(times)
    if not cfg.maintenance_every or info.step % cfg.maintenance_every:
        return []
    rows = _maintain(cell, said["candidates"], info)
    return [RowReset("slots", rows)] if len(rows) else []


def written_back(cell: GMT, sums: Tensor, counts: Tensor, times: int = 1) -> Tensor:
    """m C + (1 - m) mean, normalised; slots that no token was nearest to keep their direction."""
    mean = sums / counts[:, None].clamp(min=1)
    if cell.cfg.write_norm == "unit":
        mean = F.normalize(mean, dim=1)
    momentum = cell.write_momentum.sigmoid().to(mean.dtype) ** times
    slots = cell.slots.to(mean.dtype)
    moved = torch.where(counts[:, None] > 0, momentum * slots + (1 - momentum) * mean, slots)
    return F.normalize(moved, dim=1).to(cell.slots.dtype)


def _maintain(cell: GMT, lots: Write, info: CommitInfo) -> Tensor:
    """Give dead slots, then doubles, a new start. -> int64 [R], which."""
    fresh = _Fresh(distinct(lots), cell, info)
    dead = (cell.usage < cell.cfg.dead_below).nonzero().flatten()
    if 2 * len(dead) > len(cell.usage):  # tokens would not tell so many apart
        starts = fresh.directions(len(dead))
    else:
        starts = fresh.tokens(len(dead))
    _start_again(cell, dead, starts)
    merged = []
    for i, j in _doubles(cell):
        a, b = cell.slots[i].double(), cell.slots[j].double()
        if F.cosine_similarity(a, b, dim=0) <= cell.cfg.merge_above:
            continue  # one of the two has moved meanwhile
        less = i if cell.usage[i] < cell.usage[j] else j
        row = torch.tensor([less], device=cell.slots.device)
        _start_again(cell, row, fresh.tokens(1))
        merged.append(row)
    return torch.cat([dead, *merged]).unique()


def distinct(lots: Write) -> Tensor:
    """The candidates [R, D], of equal keys the first: rows that begin alike, as after one start token, bring the same states, and
    slots that start at one point are doubles from the start."""
    assert lots.key is not None
    new = lots.key >= 0
    new[1:] &= lots.key[1:] != lots.key[:-1]
    return lots.value[new]


def _doubles(cell: GMT) -> list[tuple[int, int]]:
    """Pairs i < j of old enough slots that point the same way."""
    old = cell.age >= cell.cfg.cooldown
    close = (cosines(cell.slots.double()) > cell.cfg.merge_above) & old[:, None] & old
    return [(i, j) for i, j in close.triu(1).nonzero().tolist()]


def _start_again(cell: GMT, rows: Tensor, starts: Tensor) -> None:
    cell.slots.index_copy_(0, rows, starts.to(cell.slots))
    cell.usage.index_fill_(0, rows, 1 / len(cell.usage))
    cell.age.index_fill_(0, rows, 0.0)


class _Fresh:
    """Starting points of one commit: tokens by lot, each once while there are any, or directions drawn from the seed."""

    def __init__(self, tokens: Tensor, cell: GMT, info: CommitInfo) -> None:
        self.left, self.width = tokens, cell.slots.shape[1]
        seed = (info.seed * 1_000_003 + info.step) * 1_009 + cell.site.layer
        self.generator = torch.Generator().manual_seed(seed % 2**63)

    def tokens(self, count: int) -> Tensor:
        """[count, D], of length 1; directions where tokens run out."""
        taken, self.left = self.left[:count], self.left[count:]
        if len(taken) < count:
            return torch.cat([F.normalize(taken, dim=1), self.directions(count - len(taken))])
        return F.normalize(taken, dim=1)

    def directions(self, count: int) -> Tensor:
        drawn = torch.randn(count, self.width, generator=self.generator, dtype=torch.float64)
        return F.normalize(drawn, dim=1).to(self.left)
