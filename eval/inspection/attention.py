"""Where attention looks: how much of it lies how far back, on the first token, and how evenly, head by head.

Weights are computed again from the queries and keys that the layer itself formed, in at least fp32, under its own mask (a window,
the ends of short rows). Distances are in tokens, 0 is the token itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eval.inspection.hooks import changed
from eval.inspection.numbers import plain
from eval.inspection.text import Text, read
from models import LM
from models.mixers.attention import Attention
from models.types import Ctx


class Looked(NamedTuple):
    """Of one layer, sums over queries, in fp64 on the CPU."""

    mass: Tensor  # [H, n], of weights at each distance
    evenly: Tensor  # [n], the same if every visible key had the same weight
    entropy: Tensor  # [H], nats
    evenly_entropy: Tensor  # [], nats: ln of the keys in sight
    first: Tensor  # [H], of weights on the first token of a window, of queries behind it
    queries: Tensor  # []
    later: Tensor  # [], queries behind the first token

    def __add__(self, other: object) -> Looked:
        assert isinstance(other, Looked)
        n = max(self.mass.shape[-1], other.mass.shape[-1])
        return Looked(*(_longer(a, n, i) + _longer(b, n, i) for i, (a, b) in enumerate(zip(self, other, strict=True))))


def _longer(t: Tensor, n: int, field: int) -> Tensor:
    """The first two fields reach as far back as the longest window."""
    return torch.nn.functional.pad(t, (0, n - t.shape[-1])) if field < 2 else t


def layers(model: LM) -> dict[str, Attention]:
    """By full name; also those that another part nests."""
    return {name: part for name, part in model.named_modules() if isinstance(part, Attention)}


def weights(part: Attention, q: Tensor, k: Tensor, ctx: Ctx) -> tuple[Tensor, Tensor]:
    """q [B, H, T, K], k [B, Hkv, T, K] -> (attention weights [B, H, T, T], which keys a query sees [B, 1, T, T])."""
    view = ctx.shared[part._view_key]
    T = q.shape[2]
    seen = view.mask
    if seen is None:
        seen = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()[None, None]
    q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k))
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q @ k.mT * part.head_dim**-0.5
    return scores.masked_fill(~seen, float("-inf")).softmax(-1), seen.expand(len(q), 1, T, T)


def summed(weight: Tensor, seen: Tensor, valid: Tensor) -> Looked:
    """Weights [H, T, T] and what is seen [T, T] of one row whose first ``valid`` tokens are some."""
    weight, seen = weight[:, :valid, :valid].double().cpu(), seen[:valid, :valid].cpu()
    n = len(seen)
    age = (torch.arange(n)[:, None] - torch.arange(n)).clamp(min=0).flatten()
    keys = seen.sum(1).double()
    even = seen / keys[:, None]
    mass = torch.zeros(len(weight) + 1, n, dtype=torch.float64)
    mass.index_add_(1, age, torch.cat((weight, even[None])).flatten(1))
    return Looked(
        mass[:-1],
        mass[-1],
        torch.special.entr(weight).sum((1, 2)),
        keys.log().sum(),
        weight[:, 1:, 0].sum(1),
        torch.tensor(float(n), dtype=torch.float64),
        torch.tensor(float(n - 1), dtype=torch.float64),
    )


def observe(model: LM, text: Text) -> dict[str, Looked]:
    """Of every attention layer, over all queries of the text."""
    found: dict[str, Looked] = {}
    kept: dict[str, tuple[Tensor, Tensor, Ctx]] = {}
    parts = layers(model)

    def watch(name: str) -> Any:
        def change(_: Any, heads: Any) -> Any:
            def formed(h: Tensor, ctx: Ctx) -> Any:
                q, k, v = heads(h, ctx)
                kept[name] = (q, k, ctx)
                return q, k, v

            return formed

        return change

    with contextlib.ExitStack() as stack:
        for name, part in parts.items():
            stack.enter_context(changed([part], "_heads", watch(name)))
        for _, valid in read(model, text):
            for name, (q, k, ctx) in kept.items():
                for row in _rows(parts[name], q, k, ctx, valid):
                    found[name] = found[name] + row if name in found else row
            kept.clear()
    return found


@torch.no_grad()
def _rows(part: Attention, q: Tensor, k: Tensor, ctx: Ctx, valid: Tensor) -> Iterator[Looked]:
    """One row after another: weights of all of them would be large."""
    view = ctx.shared[part._view_key]
    for b, length in enumerate(valid.sum(1)):
        mask = None if view.mask is None else view.mask[b if len(view.mask) > 1 else 0][None]
        one = ctx._replace(shared={part._view_key: view._replace(mask=mask)})
        weight, seen = weights(part, q[b : b + 1], k[b : b + 1], one)
        yield summed(weight[0], seen[0, 0], length)


# -- plain numbers


def edges(longest: int) -> list[int]:
    """Where bins of distances begin, and the end of the last: 0, 1, 2, 4, 8, ..."""
    found = [0, 1]
    while found[-1] < longest:
        found.append(min(2 * found[-1], longest))
    return found


def measure(model: LM, text: Text) -> list[dict[str, Any]]:
    """Of every attention layer: shares of its attention by distance and head, entropies in nats, mean over queries."""
    found = []
    for name, looked in observe(model, text).items():
        bins = edges(looked.mass.shape[1])
        binned = torch.stack([looked.mass[:, a:b].sum(1) for a, b in pairwise(bins)], dim=1)
        even = torch.stack([looked.evenly[a:b].sum() for a, b in pairwise(bins)])
        distance = torch.arange(looked.mass.shape[1], dtype=torch.float64)
        part = layers(model)[name]
        found.append(
            {
                "name": name,
                "layer": part.site.layer,
                "window": part.cfg.window,
                "distances": bins,
                "mass": plain(binned / looked.queries),
                "evenly": plain(even / looked.queries),
                "distance": plain(looked.mass @ distance / looked.queries),
                "entropy": plain(looked.entropy / looked.queries),
                "evenly_entropy": plain(looked.evenly_entropy / looked.queries),
                "first": plain(looked.first / looked.later.clamp(min=1)),
            }
        )
    return found
