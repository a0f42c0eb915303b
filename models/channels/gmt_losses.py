"""The pressures on a memory cell (arXiv:2604.23862), as raw scalars; weights are in its config."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kernels.gmt_cell import Hop
from kernels.gram import gram
from kernels.mixture_error import mixture_error

if TYPE_CHECKING:
    from models.channels.gmt import GMT, Tables

LOSSES = ("tracking", "orthogonality", "usage", "target_usage", "edge_entropy", "edge_contrast")


class Usage(NamedTuple):
    """The mean weight of each slot over the tokens, [F]."""

    source: Tensor
    target: Tensor


def losses(cell: GMT, hop: Hop, usage: Usage, tables: Tables, after: Tensor, keep: Tensor) -> dict[str, Tensor]:
    """after [N, D]: the residual stream behind the cell, detached. Those whose weight is zero are not computed."""
    cfg = cell.cfg
    made = {
        "tracking": lambda: (1 - cell.write_momentum.sigmoid()) * tracking(hop.source, tables, after, keep),
        "orthogonality": lambda: off_diagonal_mean(cosines(wide(cell.slots)).square()),
        "usage": lambda: shortfall(usage.source, cfg.usage_target),
        "target_usage": lambda: shortfall(usage.target, cfg.usage_target),
        "edge_entropy": lambda: (cfg.edge_entropy_floor - entropy(tables.edges)).relu().mean(),
        "edge_contrast": lambda: off_diagonal_mean(cosines(tables.edges)),
    }
    with torch.autocast(after.device.type, enabled=False):
        return {name: make() for name, make in made.items() if getattr(cfg, f"{name}_weight")}


def tracking(source: Tensor, tables: Tables, after: Tensor, keep: Tensor) -> Tensor:
    """Mean square of after - w_src C'."""
    points = tables.points
    return mixture_error(source, points, tables.products, after.to(source.dtype), keep) / points.shape[1]


def shortfall(usage: Tensor, wanted: float) -> Tensor:
    """How far the effective number of slots in use falls short of the number that is wanted, over the former."""
    return (wanted / effective(usage).clamp(min=1) - 1).relu()


def effective(weights: Tensor) -> Tensor:
    """weights [F] -> exp of their entropy: how many equal ones would have it."""
    return entropy(weights).exp()


def entropy(weights: Tensor) -> Tensor:
    """Of rows that sum to 1, in nats; a weight of zero (every slot's edge to itself) adds nothing and gets a finite gradient."""
    return torch.special.entr(weights.clamp(min=torch.finfo(weights.dtype).tiny)).sum(-1)


def usage(hop: Hop, keep: Tensor, valid: Tensor | None) -> Usage:
    if valid is None:  # a sum of all is faster than a weighted one
        return Usage(*(w.sum(0) / max(len(w), 1) for w in (hop.source, hop.target)))
    return Usage(keep @ hop.source, keep @ hop.target)


def shares(like: Tensor, valid: Tensor | None) -> Tensor:
    """What each of N tokens counts in a mean: 1 / N, and nothing where it is not valid."""
    if valid is None:
        return like.new_full((len(like),), 1 / max(len(like), 1))
    keep = valid.flatten().to(like.dtype)
    return keep / keep.sum().clamp(min=1)


def cosines(rows: Tensor) -> Tensor:
    """[F, D] -> [F, F]."""
    products = gram(rows)
    inverse = inverse_lengths(products)
    return products * inverse[:, None] * inverse


def inverse_lengths(products: Tensor) -> Tensor:
    """Products [F, F] of rows with each other -> 1 / |row| [F]; of a row of zeros, a finite number."""
    return products.diagonal().clamp(min=1e-24).rsqrt()


def off_diagonal_mean(square: Tensor) -> Tensor:
    n = len(square)
    return (square.sum() - square.diagonal().sum()) / (n * (n - 1))


def wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
