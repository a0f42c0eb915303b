"""A training step of the memory cell, whole: ours against the same equations written down as they stand (arXiv:2604.23862)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.floors import Peaks, cell_floor
from bench.gpu_layers import train_task
from bench.gpu_scans import peak_bytes, ratio, rounds
from bench.kernels import Case
from models.channels.gmt import GMT, GMTConfig
from models.channels.mlp import SwiGLU, SwiGLUConfig
from models.types import Ctx, Site


def cases(device: str, tiny: bool = False) -> list[Case]:
    """Output, every loss and the sums that a step writes, of the paper's cell and of the corrected one; on a GPU under autocast."""
    d, slots, rows = (64, 16, 64) if tiny else (768, 128, 1024 if device == "cpu" else 16384)
    found = []
    for fidelity in ("paper", "corrected"):
        cell = GMT(GMTConfig(slots=slots, width=slots, fidelity=fidelity), Site(d, norm="layernorm", slot="channel"))
        cell.reset_parameters(torch.Generator().manual_seed(0), 1)
        cell = cell.to(device).train()
        ctx = _context(2, rows, device)
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


# -- on an accelerator


def run(limits: Peaks, device: str, pairs: int, tiny: bool) -> tuple[list[dict[str, Any]], str]:
    """The cell alone, as a model under autocast has it, beside its equations and beside a SwiGLU of 4 D."""
    d, slots, tokens = (64, 16, 64) if tiny else (768, 128, 65536)
    site, rows = Site(d, norm="layernorm", slot="channel"), []
    forward, backward = (floor.seconds(limits) * 1e9 for floor in cell_floor(d, slots))
    rival = SwiGLU(SwiGLUConfig(), site).to(device)
    rival.reset_parameters(torch.Generator().manual_seed(0), 1)
    for fidelity in ("paper", "corrected"):
        cell = GMT(GMTConfig(slots=slots, width=slots, fidelity=fidelity), site)
        cell.reset_parameters(torch.Generator().manual_seed(0), 1)
        cell = cell.to(device).eval()
        ctx = _context(1, tokens, device)
        x = torch.randn(1, tokens, d, device=device).requires_grad_()

        def plain(x: Tensor, cell: GMT = cell, ctx: Ctx = ctx) -> Tensor:
            return as_it_stands(cell, ctx, x)[0]

        def fused(x: Tensor, cell: GMT = cell, ctx: Ctx = ctx) -> Tensor:
            hop = cell.hop(cell.norm(x).flatten(0, 1), cell.tables_of_slots(), cell.temperature(ctx.progress))
            return hop.y.view_as(x)

        tasks = {
            "ours": train_task(fused, x, list(cell.parameters())),
            "equations": train_task(plain, x, list(cell.parameters())),
            "swiglu": train_task(lambda x, ctx=ctx: rival(x, ctx)[0], x, list(rival.parameters())),
        }
        seconds = rounds(tasks, pairs)
        nanoseconds = statistics.median(seconds["ours"]) / tokens * 1e9
        row: dict[str, Any] = {"cell": fidelity, "shape": f"{tokens}x{d}, F={slots}", "pairs": pairs}
        row |= {"ns_per_token": nanoseconds, "of_floor": (forward + backward) / nanoseconds}
        row |= {f"over_{name}": ratio(seconds, name) for name in ("equations", "swiglu")}
        rows.append(row | {"peak_bytes": {name: peak_bytes(task, device) for name, task in tasks.items()}})
    return rows, cell_table(rows)


def cell_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| memory cell, forward + backward | shape | ns per token | of the physical limit | speed ours / equations "
        "| ours / SwiGLU of 4 D | peak MiB, equations', SwiGLU's |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        peak = ", ".join("-" if b is None else f"{b / 2**20:.0f}" for b in r["peak_bytes"].values())
        lines.append(
            f"| {r['cell']} | {r['shape']} | {r['ns_per_token']:.2f} | {r['of_floor']:.1%} | {r['over_equations']:.2f} "
            f"| {r['over_swiglu']:.2f} | {peak} |"
        )
    return "\n".join(lines)


def _context(batch: int, tokens: int, device: str) -> Ctx:
    positions = torch.arange(tokens, device=device).expand(batch, -1)
    ids = torch.randint(257, (batch, tokens), device=device)
    return Ctx(ids, positions, None, None, torch.tensor(0.5, device=device), {}, {})


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
