"""Where the n-grams of a text stand in the tables of a model, and with whom: integers only, no forward.

The n-gram of a token is its last n canonical tokens, itself included, as the model sees them: with PAD for what is out of reach.
A fingerprint is its mix, the 63 bits of which a row is the remainder (`kernels.ngram_gather`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from eval.inspection.engram_cache import best_hits, lfu_hits, lru_hits
from kernels.ngram_gather import reference
from models import LM, Batch
from models.memories.engram import Engram
from models.memories.engram_addressing import EngramAddressing
from models.stores.base import VALUES, Table
from models.types import segment_ids

CACHES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)  # rows of a simulated cache, as a share of the table's
LOOKUPS = 1_000_000  # that a cache is simulated with: the first ones
BINS = 40  # of a histogram of row sizes
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BLOCK = 1 << 16  # rows of a table that are read at once
FIRST, HIT, DIFFERENT = 0, 1, 2  # what a fingerprint finds in its row: nothing, itself, another one's


class Tokens(NamedTuple):
    """Canonical tokens in the order in which they were read."""

    back: Tensor  # int64 [N, tokens], what stands 0, 1, ..., N-1 tokens back
    batch: Tensor  # int64 [tokens], the batch of each token

    def mixes(self, multipliers: Tensor) -> Tensor:
        """multipliers int64 [N] -> fingerprints of orders 2..N [N-1, tokens]."""
        mix, found = self.back[0] * multipliers[0], []
        for ids, m in zip(self.back[1:], multipliers[1:], strict=True):
            mix = mix ^ (ids * m)
            found.append(mix)
        return torch.stack(found)


def addressing_of(model: LM) -> EngramAddressing:
    return next(m for m in model.addressing.values() if isinstance(m, EngramAddressing))


def lookbacks(addressing: EngramAddressing, batch: Batch, pad: int) -> Tensor:
    """-> int64 [N, B, T], on the CPU; ``pad`` for what is out of reach."""
    b, t = batch.tokens.shape
    ids = addressing.canonical.cpu().long()[batch.tokens]
    segments = None if batch.cu_seqlens is None else segment_ids(batch.cu_seqlens, b, t)
    line, _ = reference.align(ids, addressing.init_state(b, "cpu"), segments, batch.valid)
    return torch.stack(reference.lookbacks(line, addressing.max_order, addressing.classes, pad))


def gather(addressing: EngramAddressing, batches: Iterable[Batch], limit: int) -> Tokens:
    """The first ``limit`` tokens."""
    found, numbers, left = [], [], limit
    bar = tqdm(total=limit, desc="n-grams", unit="tok", unit_scale=True, leave=False, disable=None)
    for i, batch in enumerate(batches):
        back = lookbacks(addressing, batch, addressing.pad)
        some = (back.flatten(1) if batch.valid is None else back[:, batch.valid])[:, :left]
        found.append(some)
        numbers.append(torch.full((some.shape[1],), i))
        left -= some.shape[1]
        bar.update(some.shape[1])
        if not left:
            break
    bar.close()
    return Tokens(torch.cat(found, dim=1), torch.cat(numbers))


class Heads(NamedTuple):
    """Of one order in one layer."""

    mix: Tensor  # int64 [tokens]
    rows: Tensor  # int64 [K, tokens], in the table
    sizes: list[int]  # rows of each head


def heads(addressing: EngramAddressing, part: Engram, tokens: Tokens) -> list[Heads]:
    """By order."""
    layer = addressing.keys.index(part.key)
    multipliers, primes, offsets = (
        t[layer].cpu() for t in (addressing.multipliers, addressing.primes, addressing.offsets)
    )
    return [
        Heads(mix, mix % sizes[:, None] + starts[:, None], sizes.tolist())
        for mix, sizes, starts in zip(tokens.mixes(multipliers), primes, offsets, strict=True)
    ]


# -- sharing


def outcomes(mix: Tensor, rows: Tensor) -> Tensor:
    """What each token's fingerprint finds in its row if every token leaves its own there: FIRST, HIT or DIFFERENT [tokens]."""
    order = torch.argsort(rows, stable=True)
    row, fingerprint = rows[order], mix[order]
    found = torch.full_like(rows, FIRST)
    same_row = row[1:] == row[:-1]
    later = torch.where(fingerprint[1:] == fingerprint[:-1], HIT, DIFFERENT)
    found[order[1:]] = torch.where(same_row, later, FIRST)
    return found


def sharing(order: Heads) -> dict[str, Any]:
    """How n-grams of one order share rows. ``load``: distinct n-grams per row; ``occupied``: share of rows that have one, ``ideal``
    that of a random function; ``shared``: distinct n-grams that are not alone, in each head and in all heads at once.

    ``collisions``: by token, and by type, where every distinct n-gram counts as one, with the mean over its tokens: the
    shares of FIRST, HIT and DIFFERENT in each head, and of DIFFERENT in any and in all heads.
    """
    types, kind = torch.unique(order.mix, return_inverse=True)
    found = torch.stack([outcomes(order.mix, rows) for rows in order.rows])  # [K, tokens]
    alone = torch.stack([_alone(types, size) for size in order.sizes])
    load = [len(types) / size for size in order.sizes]
    return {
        "types": len(types),
        "load": load,
        "occupied": [len(torch.unique(types % size)) / size for size in order.sizes],
        "ideal": [-math.expm1(-x) for x in load],
        "shared": (~alone).double().mean(1).tolist(),
        "shared_in_all": (~alone).all(0).double().mean().item(),
        "collisions": {"token": _rates(found, None), "type": _rates(found, kind)},
    }


def _alone(types: Tensor, size: int) -> Tensor:
    """Which distinct fingerprints have a row of their own in a head."""
    _, row, number = torch.unique(types % size, return_inverse=True, return_counts=True)
    return number[row] == 1


def _rates(found: Tensor, kind: Tensor | None) -> dict[str, Any]:
    """found [K, tokens]; ``kind`` [tokens]: the mean is taken over the kinds' means."""
    different = found == DIFFERENT
    return {
        "first": _mean(found == FIRST, kind).tolist(),
        "hit": _mean(found == HIT, kind).tolist(),
        "different": _mean(different, kind).tolist(),
        "any": _mean(different.any(0), kind).item(),
        "all": _mean(different.all(0), kind).item(),
    }


def _mean(flags: Tensor, kind: Tensor | None) -> Tensor:
    """Over the last dimension."""
    flags = flags.double()
    if kind is None:
        return flags.mean(-1)
    times = torch.bincount(kind).double()
    sums = torch.zeros(*flags.shape[:-1], len(times), dtype=torch.float64).index_add_(-1, kind, flags)
    return (sums / times).mean(-1)


# -- traffic


def unique_ratio(rows: Tensor, batch: Tensor, size: int) -> float:
    """rows [heads, tokens] of a table of ``size``, batch [tokens] -> distinct rows per lookup inside a batch, over all batches. Its
    inverse: how often a row is fetched where one fetch would do."""
    return torch.unique(batch * size + rows).numel() / rows.numel()


def caches(rows: Tensor, size: int) -> dict[str, Any]:
    """Hit rates of caches of a table of ``size`` rows, lookup after lookup: rows [heads, tokens], all heads of a token in turn.
    ``best``: of one that always holds the most frequent rows; ``ceiling``: of one with room for everything, in which only first
    lookups miss."""
    asked = rows.T.flatten()[:LOOKUPS].numpy()
    sizes = sorted({max(1, round(share * size)) for share in CACHES})
    listed = asked.tolist()
    return {
        "lookups": len(asked),
        "ceiling": 1 - len(np.unique(asked)) / len(asked),
        "rows": sizes,
        "best": [hits / len(asked) for hits in best_hits(asked, sizes)],
        "lru": [hits / len(asked) for hits in lru_hits(asked, sizes)],
        "lfu": [lfu_hits(listed, capacity) / len(asked) for capacity in sizes],
    }


# -- the table itself


def contents(table: Table, looked_up: Tensor) -> dict[str, Any]:
    """RMS of the rows, of those that training touched and of those that it did not. ``touched``: their share; None where the table
    does not say. ``looked_up``: rows of a text, of which the share is told too."""
    arrays = table.state_dict()
    rms = torch.cat([_rms(block) for block in _blocks(arrays[VALUES])])
    touched = _touched(arrays)
    top = max(rms.nan_to_num(0, 0, 0).max().item(), 1e-12) * (1 + 1e-6)
    groups = {"all": rms} if touched is None else {"touched": rms[touched], "never": rms[~touched]}
    return {
        "rows": table.rows,
        "touched": None if touched is None else touched.double().mean().item(),
        "looked_up": len(torch.unique(looked_up)) / table.rows,
        "top": top,
        "rms": {name: _spread(values, top) for name, values in groups.items() if len(values)},
    }


def _blocks(values: Tensor) -> Iterator[Tensor]:
    for start in range(0, len(values), BLOCK):
        yield values[start : start + BLOCK]


def _rms(block: Tensor) -> Tensor:
    return block.to(torch.promote_types(block.dtype, torch.float32)).square().mean(1).sqrt().cpu()


def _touched(arrays: dict[str, Tensor]) -> Tensor | None:
    """Rows that ever got a gradient, by what the optimizer keeps of them: steps of their own, or a second moment where Adam goes
    over all rows alike. None if it keeps nothing, or nothing yet, as in an exported model."""
    steps, second = arrays.get("steps"), arrays.get("v")
    found = None if steps is None else steps.cpu() > 0
    if found is not None and second is not None and bool(found.all()):
        found = torch.cat([block.reshape(len(block), -1).abs().amax(1).cpu() for block in _blocks(second)]) > 0
    return found if found is not None and bool(found.any()) else None


def _spread(values: Tensor, top: float) -> dict[str, Any]:
    """Mean, quantiles, and a histogram from 0 to ``top``."""
    finite = values[values.isfinite()]
    if not len(finite):
        return {"mean": None, "quantiles": None, "histogram": None}
    some = np.quantile(finite.numpy(), QUANTILES)
    return {
        "mean": finite.mean().item(),
        "quantiles": some.tolist(),
        "histogram": torch.histc(finite, BINS, 0, top).long().tolist(),
    }
