"""Looked-up memory on an accelerator (arXiv:2601.07372): rows out of a table on the device and out of pinned host memory, updates of
touched rows, and a whole layer beside the matrix products that it cannot do without."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.floors import Peaks, best, engram_floor, gather_floor, update_floor
from bench.gpu_layers import train_task
from bench.gpu_scans import peak_bytes, ratio, rounds
from kernels import dispatch
from kernels.ngram_gather import gather_rows
from kernels.row_update import RULES, Hyper, row_update
from models.memories.engram import Engram, EngramConfig
from models.stores import build_store
from models.types import Ctx, Site

WIDTHS = (64, 80, 128, 256)  # numbers in a bf16 row: 128, 160, 256, 512 bytes
SHAPES = ((1, 768), (1, 2560), (4, 2560))  # residual branches, width
EXACT = 1e-4  # of a layer in fp32 against its plain form


def run(limits: Peaks, device: str, pairs: int, tiny: bool) -> tuple[list[dict[str, Any]], str]:
    rows = measure_rows(limits, device, tiny)
    layers = [measure_layer(limits, device, pairs, m, d, tiny) for m, d in (((2, 24),) if tiny else SHAPES)]
    return [*rows, *layers], f"{rows_table(rows)}\n\n{layers_table(layers)}"


def measure_rows(limits: Peaks, device: str, tiny: bool) -> list[dict[str, Any]]:
    """A million rows drawn from a table of 4 GiB, and half a million distinct ones of it changed."""
    size, count = (1 << 14, 100) if tiny else (1 << 32, 1 << 20)
    found = []
    for width in WIDTHS[:2] if tiny else WIDTHS:
        table = torch.zeros(size // (2 * width), width, dtype=torch.bfloat16, device=device)
        rows = torch.randint(len(table), (count,), device=device)
        moved = gather_floor(2 * width).bytes * count
        found.append(_row("gather", width, moved, limits.bandwidth, lambda t=table, r=rows: gather_rows(t, r), device))
    if device == "cuda":
        link = link_bandwidth(device)
        for width in WIDTHS:
            table = torch.zeros(size // (8 * width), width, dtype=torch.bfloat16, pin_memory=True)
            rows = torch.randint(len(table), (count // 4,), device=device)
            moved = 2 * width * len(rows)
            found.append(_row("gather, host", width, moved, link, lambda t=table, r=rows: gather_rows(t, r), device))
    width = WIDTHS[1]
    for rule in RULES:
        height = size // (16 * width)
        wide = [torch.zeros(height, width, device=device) for _ in range(3 if rule == "lazy_adam" else 1)]
        moments = [*wide[1:], *([] if wide[1:] else [torch.zeros(height, device=device)])]
        moments.append(torch.zeros(height, dtype=torch.int32, device=device))
        rows = torch.randperm(height, device=device)[: count // 2].sort().values
        grad = torch.randn(len(rows), width, device=device)

        def update(values=wide[0], moments=moments, rows=rows, grad=grad, rule=rule) -> object:
            return row_update(values, moments, rows, grad, rule, Hyper(1e-3, 0.9, 0.95, 1e-8))

        moved = update_floor(width, rule).bytes * len(rows)
        found.append(_row(f"update, {rule}", width, moved, limits.bandwidth, update, device))
    return found


def _row(
    what: str, width: int, moved: float, bandwidth: float, task: Callable[[], object], device: str
) -> dict[str, Any]:
    seconds = best(task, device)
    return {"rows": what, "width": width, "microseconds": seconds * 1e6, "of_limit": moved / seconds / bandwidth}


def link_bandwidth(device: str) -> float:
    """Bytes per second of a copy of 256 MiB out of pinned memory."""
    source = torch.zeros(1 << 26, pin_memory=True)
    target = torch.empty_like(source, device=device)
    return source.nbytes / best(lambda: target.copy_(source, non_blocking=True), device)


def measure_layer(limits: Peaks, device: str, pairs: int, branches: int, width: int, tiny: bool) -> dict[str, Any]:
    """Gather, projection, gate and convolution, forward and backward up to the gradient of the rows, in bf16 autocast."""
    tokens, base = (40, 61) if tiny else (16384, 200_000)
    cfg = EngramConfig(row_width=8 if tiny else 80, base=base)
    part = Engram(cfg, Site(width, branches=branches, vocab_size=1000, slot="memory"))
    part.table = build_store(cfg.store, base, cfg.row_width)
    part.table.reset(torch.Generator().manual_seed(0))
    part.reset_parameters(torch.Generator().manual_seed(0), 1)
    torch.nn.init.normal_(part.get_parameter("conv"))
    part = part.to(device)
    rows = torch.randint(base, (1, tokens, 2 * cfg.heads), device=device)
    zeros = torch.zeros(1, tokens, dtype=torch.int64, device=device)
    ctx = Ctx(zeros, zeros, None, None, torch.zeros((), device=device), {}, {})
    x = torch.randn(1, tokens, branches, width, device=device, requires_grad=True)

    def forward(x: Tensor) -> Tensor:
        part.table.clear_grad()
        return x + part.fuse(x, part.table.wait(part.table.fetch(rows)), ctx, None)[0]

    with torch.no_grad():
        found = forward(x)
        with dispatch.use("reference"):
            error = ((found - forward(x)).norm() / found.norm()).item()
    if not error <= EXACT:
        raise RuntimeError(f"engram differs from its plain form by {error:.1e}: no speed is reported")
    ours = train_task(forward, x, list(part.parameters()))

    def plain() -> object:
        with dispatch.use("reference"):
            return ours()

    seconds = rounds({"ours": ours, "plain": plain}, pairs)
    floors = engram_floor(width, branches, cfg.width)
    limit = sum(floor.seconds(limits) for floor in floors) * tokens
    spent = statistics.median(seconds["ours"])
    row: dict[str, Any] = {
        "layer": "engram",
        "shape": f"{tokens}x{branches}x{width}, d_mem={cfg.width}",
        "pairs": pairs,
    }
    row |= {"ns_per_token": spent / tokens * 1e9, "over_floor": spent / limit, "over_plain": ratio(seconds, "plain")}
    products = sum(floor.flops for floor in floors) * tokens / limits.flops
    return row | {"over_products": spent / products, "peak_bytes": peak_bytes(ours, device)}


def rows_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| rows of a table | numbers in a row | microseconds | of the bandwidth of a copy |",
        "| --- | --- | --- | --- |",
    ]
    lines += [f"| {r['rows']} | {r['width']} | {r['microseconds']:.1f} | {r['of_limit']:.0%} |" for r in rows]
    return "\n".join(lines)


def layers_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| looked-up memory, forward + backward | ns per token | times its products at peak | times the physical limit "
        "| speed ours / plain PyTorch | peak MiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        peak = "-" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**20:.0f}"
        lines.append(
            f"| {r['shape']} | {r['ns_per_token']:.2f} | {r['over_products']:.2f} | {r['over_floor']:.2f} "
            f"| {r['over_plain']:.2f} | {peak} |"
        )
    return "\n".join(lines)
