"""The memory cell by the book (arXiv:2604.23862), token by token and slot by slot, with its losses: slow and plain on purpose."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from models.channels.gmt import GMT

EPS = 1e-5


def layer_norm(row: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    centred = row - row.mean()
    out = centred / (centred.square().mean() + EPS).sqrt() * weight
    return out if bias is None else out + bias


def softmax(row: Tensor) -> Tensor:
    powers = (row - row.max()).exp()
    return powers / powers.sum()


def entropy(row: Tensor) -> Tensor:
    return -sum((p * p.log() for p in row if p > 0), start=row.new_zeros(()))


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return a @ b / (a.norm() * b.norm())


def edge_rows(cell: GMT) -> list[Tensor]:
    """S, row by row; no slot leads to itself."""
    rows = []
    for i, logits in enumerate(cell.edges):
        others = [j for j in range(len(logits)) if j != i]
        row = torch.zeros_like(logits)
        rows.append(row.index_add(0, torch.tensor(others), softmax(logits[others])))
    return rows


def points(cell: GMT) -> list[Tensor]:
    return [layer_norm(slot, cell.norm_slots.weight, cell.norm_slots.bias) for slot in cell.slots]


def token(cell: GMT, x: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """x [D], after the pre-norm -> (y, w_src, w_tgt)."""
    cfg, places, edges = cell.cfg, points(cell), edge_rows(cell)
    distance = torch.stack([(1 - cosine(x, c)).clamp(min=cfg.floor) for c in places])
    source = softmax(1 / (distance * temperature))
    hop = sum(w * row for w, row in zip(source, edges, strict=True))
    assert isinstance(hop, Tensor)
    if cell.edge_scale is not None:
        hop = cell.edge_scale.exp() * (hop + 1e-6).log()
    asked = cell.query.weight @ x
    scores = torch.stack([asked @ (cell.key.weight @ c) / math.sqrt(cfg.width) for c in places])
    target = softmax(hop + scores)
    move = sum((b - a) * c for a, b, c in zip(source, target, places, strict=True))
    assert isinstance(move, Tensor)
    if cell.norm_move is not None:
        move = layer_norm(move, cell.norm_move.weight, cell.norm_move.bias)
    elif cfg.displacement == "rms":
        move = move / (move.square().mean() + EPS).sqrt()
    return cell.gate.sigmoid() * move, source, target


def run(cell: GMT, x: Tensor, temperature: float, keep: list[bool] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """x [N, D], the residual stream -> (y [N, D], losses)."""
    pre: Any = cell.norm
    said = [token(cell, layer_norm(row, pre.weight, pre.bias), temperature) for row in x]
    y = torch.stack([s[0] for s in said])
    used = [i for i in range(len(x)) if keep is None or keep[i]]
    cfg, places, edges = cell.cfg, points(cell), edge_rows(cell)
    f, d = cell.slots.shape
    pairs = [(i, j) for i in range(f) for j in range(f) if i != j]

    def mean(values: list[Tensor]) -> Tensor:
        return torch.stack(values).mean()

    def shortfall(which: int) -> Tensor:
        weights = torch.stack([said[i][which] for i in used]).mean(0)
        return (cfg.usage_target / entropy(weights).exp().clamp(min=1) - 1).clamp(min=0)

    errors = []
    for i in used:
        read = sum(w * c for w, c in zip(said[i][1], places, strict=True))
        errors.append(((x[i] + y[i]).detach() - read).square().sum() / d)
    return y, {
        "tracking": (1 - cell.write_momentum.sigmoid()) * mean(errors),
        "orthogonality": mean([cosine(cell.slots[i], cell.slots[j]) ** 2 for i, j in pairs]),
        "usage": shortfall(1),
        "target_usage": shortfall(2),
        "edge_entropy": mean([(cfg.edge_entropy_floor - entropy(row)).clamp(min=0) for row in edges]),
        "edge_contrast": mean([cosine(edges[i], edges[j]) for i, j in pairs]),
    }
