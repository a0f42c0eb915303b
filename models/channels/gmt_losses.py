"""The pressures on a memory cell (arXiv:2604.23862), as raw scalars; weights are in its config."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.gmt_cell import Hop

if TYPE_CHECKING:
    from models.channels.gmt import GMT, Tables

LOSSES = ("tracking", "orthogonality", "usage", "target_usage", "edge_entropy", "edge_contrast")


def losses(cell: GMT, hop: Hop, tables: Tables, after: Tensor, keep: Tensor) -> dict[str, Tensor]:
    """after [N, D]: the residual stream behind the cell, detached. Those whose weight is zero are not computed."""
    cfg = cell.cfg
    made = {
        "tracking": lambda: (1 - cell.write_momentum.sigmoid()) * tracking(hop.source, tables.points, after, keep),
        "orthogonality": lambda: off_diagonal_mean(cosines(wide(cell.slots)).square()),
        "usage": lambda: shortfall(hop.source, keep, cfg.usage_target),
        "target_usage": lambda: shortfall(hop.target, keep, cfg.usage_target),
        "edge_entropy": lambda: (cfg.edge_entropy_floor - entropy(tables.edges)).relu().mean(),
        "edge_contrast": lambda: off_diagonal_mean(cosines(tables.edges)),
    }
    with torch.autocast(after.device.type, enabled=False):
        return {name: make() for name, make in made.items() if getattr(cfg, f"{name}_weight")}


def tracking(source: Tensor, points: Tensor, after: Tensor, keep: Tensor) -> Tensor:
    """Mean square of after - w_src C', which is never made: |h|^2 - 2 w . (C' h) + w G w^T with G = C' C'^T."""
    after = after.to(source.dtype)
    asked = after @ points.T
    square = torch.linalg.vecdot(after, after) + torch.linalg.vecdot(source @ (points @ points.T) - 2 * asked, source)
    return (square * keep).sum() / points.shape[1]


def shortfall(weights: Tensor, keep: Tensor, wanted: float) -> Tensor:
    """How far the effective number of slots in use falls short of the number that is wanted, over the former."""
    return (wanted / effective(mean_weights(weights, keep)).clamp(min=1) - 1).relu()


def effective(weights: Tensor) -> Tensor:
    """weights [F] -> exp of their entropy: how many equal ones would have it."""
    return entropy(weights).exp()


def entropy(weights: Tensor) -> Tensor:
    """Of rows that sum to 1, in nats; a weight of zero (every slot's edge to itself) adds nothing and gets a finite gradient."""
    return -(weights * weights.clamp(min=torch.finfo(weights.dtype).tiny).log()).sum(-1)


def mean_weights(weights: Tensor, keep: Tensor) -> Tensor:
    """weights [N, F] -> their mean [F]."""
    return keep @ weights


def shares(like: Tensor, valid: Tensor | None) -> Tensor:
    """What each of N tokens counts in a mean: 1 / N, and nothing where it is not valid."""
    if valid is None:
        return like.new_full((len(like),), 1 / max(len(like), 1))
    keep = valid.flatten().to(like.dtype)
    return keep / keep.sum().clamp(min=1)


def cosines(rows: Tensor) -> Tensor:
    rows = F.normalize(rows, dim=1)
    return rows @ rows.T


def off_diagonal_mean(square: Tensor) -> Tensor:
    n = len(square)
    return (square.sum() - square.diagonal().sum()) / (n * (n - 1))


def wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
