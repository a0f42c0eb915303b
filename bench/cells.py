"""A training step of the memory cell, whole: ours against the same equations written down as they stand (arXiv:2604.23862)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels import Case
from models.channels.gmt import GMT, GMTConfig
from models.types import Ctx, Site


def cases(device: str, tiny: bool = False) -> list[Case]:
    """Output, every loss and the sums that a step writes, of the paper's cell and of the corrected one; on a GPU under autocast."""
    d, slots, rows = (64, 16, 64) if tiny else (768, 128, 1024 if device == "cpu" else 16384)
    found = []
    for fidelity in ("paper", "corrected"):
        cell = GMT(GMTConfig(slots=slots, width=slots, fidelity=fidelity), Site(d, norm="layernorm", slot="channel"))
        cell.reset_parameters(torch.Generator().manual_seed(0), 1)
        cell = cell.to(device).train()
        tokens = torch.randint(257, (2, rows), device=device)
        positions = torch.arange(rows, device=device).expand(2, -1)
        ctx = Ctx(tokens, positions, None, None, torch.tensor(0.5, device=device), {}, {})
        x = torch.randn(2, rows, d, device=device).requires_grad_()
        # The gradient of a bias that moves all slots alike is what is left of large numbers.
        learned = [p for name, p in cell.named_parameters() if name != "norm_slots.bias"]
        case = Case(
            f"gmt cell, {fidelity}",
            f"2x{rows}x{d}, F={slots}",
            partial(_run, ours, device != "cpu", cell, ctx),
            partial(_run, as_it_stands, device != "cpu", cell, ctx),
            (x, *learned),
            peer_name="the paper's equations",
            truth=partial(_run, as_it_stands, False, cell, ctx),
            error=1e-3 if device == "cpu" else 0.1,  # a token between two slots may count for the other one
        )
        found.append(case)
    return found


def _run(form: Callable[..., tuple[Tensor, ...]], narrow: bool, cell: GMT, ctx: Ctx, x: Tensor, *_: Tensor) -> Any:
    with torch.autocast(x.device.type, torch.bfloat16, enabled=narrow):
        return form(cell, ctx, x)


def ours(cell: GMT, ctx: Ctx, x: Tensor) -> tuple[Tensor, ...]:
    """-> (y, all losses, weighted; what the step writes)."""
    y, _, aux = cell(x, ctx)
    weights = cell.loss_weights()
    total = torch.stack([loss * weights[name] for name, loss in aux.losses.items()]).sum()
    return y, total, *(aux.writes[name].value for name in ("sums", "counts", "weights"))


def as_it_stands(cell: GMT, ctx: Ctx, x: Tensor) -> tuple[Tensor, ...]:
    """Line by line, by autograd."""
    cfg, f = cell.cfg, cell.cfg.slots
    h, points = cell.norm(x), cell.norm_slots(cell.slots)
    with torch.autocast(x.device.type, enabled=False):  # narrow, it would send tokens elsewhere
        similarity = F.normalize(h, dim=-1) @ F.normalize(points, dim=1).T
    source = (1 / ((1 - similarity).clamp(min=cfg.floor) * cell.temperature(ctx.progress))).softmax(-1)
    own = torch.eye(f, dtype=torch.bool, device=x.device)
    edges = cell.edges.masked_fill(own, -math.inf).softmax(1)
    hop = source @ edges
    if cell.edge_scale is not None:
        hop = cell.edge_scale.exp() * (hop + 1e-6).log()
    target = (hop + cell.query(h) @ cell.key(points).T / math.sqrt(cfg.width)).softmax(-1)
    move = target @ points - source @ points
    if cell.norm_move is not None:
        move = cell.norm_move(move)
    else:
        move = move * torch.rsqrt(move.square().mean(-1, keepdim=True) + 1e-5)
    y = cell.gate.sigmoid() * move
    after = (x + y).detach()
    losses = {
        "tracking": (1 - cell.write_momentum.sigmoid()) * (after - source @ points).square().mean(),
        "orthogonality": _cosines(cell.slots)[~own].square().mean(),
        "usage": _shortfall(source, cfg.usage_target),
        "edge_entropy": (cfg.edge_entropy_floor + (edges * (edges + 1e-8).log()).sum(1)).relu().mean(),
        "edge_contrast": _cosines(edges)[~own].mean(),
    }
    if cfg.target_usage_weight:
        losses["target_usage"] = _shortfall(target, cfg.usage_target)
    weights = cell.loss_weights()
    total = torch.stack([loss * weights[name] for name, loss in losses.items()]).sum()
    with torch.no_grad():
        nearest = F.one_hot(source.argmax(-1).flatten(), f).to(x.dtype)
        sums = nearest.T @ after.flatten(0, 1)
        return y, total, sums, nearest.sum(0), source.sum((0, 1))


def _cosines(rows: Tensor) -> Tensor:
    rows = F.normalize(rows, dim=1)
    return rows @ rows.T


def _shortfall(weights: Tensor, wanted: float) -> Tensor:
    mean = weights.mean((0, 1))
    return (wanted / torch.exp(-(mean * (mean + 1e-8).log()).sum()).clamp(min=1) - 1).relu()
