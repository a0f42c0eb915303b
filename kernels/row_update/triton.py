"""Triton kernels of row updates: sums of repeated rows in one launch, a rule in one, both at once in one.

A program has R of the touched rows with all their columns. Repeated rows come as segments of a sorted list, and a segment is added
from its first entry to its last, by one program: nothing depends on the order in which threads arrive. Every operation is rounded
by itself, as in ``reference``: no fused multiply-add, no approximate quotient or root. Arrays may be in pinned host memory: then
only touched rows cross the link, twice.
"""

# pyright: reportGeneralTypeIssues=false
# (the checker takes what Triton compiles for Python)

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.compilation import Compilation
from kernels.row_update.reference import corrections, sorted_segments
from kernels.triton import offsets

if TYPE_CHECKING:
    from kernels.row_update import Hyper

TILE = 2048  # numbers of one array that a program holds at once
COLUMNS = 1024  # of them, at most
AHEAD = 4  # entries of a segment that are on their way at once


@triton.jit
def _gradient(
    grad, order, starts, u, live, columns,
    W: tl.constexpr, SUM: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Of rows u, fp32 [R, BW]: SUM: the entries starts[u] to starts[u + 1] of the list, added in its order; else the given one."""
    within = (columns < W)[None, :]
    if SUM:
        start = tl.load(starts + u, mask=live, other=0)
        count = tl.load(starts + u + 1, mask=live, other=0) - start
        total = tl.zeros((u.shape[0], columns.shape[0]), tl.float32)
        for j in tl.range(0, tl.max(count, 0), AHEAD):
            for i in tl.static_range(AHEAD):
                here = j + i < count
                entry = tl.load(order + start + j + i, mask=here, other=0)
                more = tl.load(grad + offsets(entry, columns, W), mask=here[:, None] & within, other=0.0)
                total += more.to(tl.float32)
        return total
    else:
        return tl.load(grad + offsets(u, columns, W), mask=live[:, None] & within, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["count"])
def _sums(
    grad, order, starts, sums, count,
    W: tl.constexpr, R: tl.constexpr, BW: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Program: R segments."""
    u = tl.program_id(0) * R + tl.arange(0, R)
    live = u < count
    for start in tl.range(0, W, BW):
        columns = start + tl.arange(0, BW)
        total = _gradient(grad, order, starts, u, live, columns, W, True, AHEAD)
        tl.store(sums + offsets(u, columns, W), total, mask=live[:, None] & (columns < W)[None, :])


@triton.jit(do_not_specialize=["count", "last1", "last2"])
def _update(
    values, m, v, steps, rows, grad, order, starts, corrections1, corrections2, count, last1, last2,
    lr, beta1, rest1, beta2, rest2, eps,
    W: tl.constexpr, ROWWISE: tl.constexpr, ROWS: tl.constexpr, SUM: tl.constexpr,
    R: tl.constexpr, BW: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Program: R touched rows. ROWS: where they stand is listed; else grad is of all rows. corrections[min(s, last)] = 1 - beta^s;
    rest = 1 - beta."""
    u = tl.program_id(0) * R + tl.arange(0, R)
    live = u < count
    row = u.to(tl.int64)
    if ROWS:
        row = tl.load(rows + u, mask=live, other=0)
    step = tl.load(steps + row, mask=live, other=0) + 1
    tl.store(steps + row, step, mask=live)
    second = tl.load(corrections2 + tl.minimum(step, last2), mask=live, other=1.0)
    g = _gradient(grad, order, starts, u, live, tl.arange(0, BW), W, SUM, AHEAD)
    if ROWWISE:
        square = tl.sum(g * g, 1)
        for start in tl.range(BW, W, BW):
            more = _gradient(grad, order, starts, u, live, start + tl.arange(0, BW), W, SUM, AHEAD)
            square += tl.sum(more * more, 1)
        moment = tl.load(v + row, mask=live, other=0.0) * beta2 + tl.div_rn(square, W * 1.0) * rest2
        tl.store(v + row, moment, mask=live)
        rate = tl.div_rn(lr, tl.sqrt_rn(tl.div_rn(moment, second)) + eps)
    else:
        first = tl.load(corrections1 + tl.minimum(step, last1), mask=live, other=1.0)
    for start in tl.static_range(0, W, BW):
        columns = start + tl.arange(0, BW)
        if start > 0:
            g = _gradient(grad, order, starts, u, live, columns, W, SUM, AHEAD)
        at, mask = offsets(row, columns, W), live[:, None] & (columns < W)[None, :]
        if ROWWISE:
            change = g * rate[:, None]
        else:
            mean = tl.load(m + at, mask=mask, other=0.0) * beta1 + g * rest1
            tl.store(m + at, mean, mask=mask)
            spread = tl.load(v + at, mask=mask, other=0.0) * beta2 + g * g * rest2
            tl.store(v + at, spread, mask=mask)
            mean = tl.div_rn(mean, tl.broadcast_to(first[:, None], (R, BW)))
            spread = tl.div_rn(spread, tl.broadcast_to(second[:, None], (R, BW)))
            change = tl.div_rn(mean, tl.sqrt_rn(spread) + eps) * lr
        tl.store(values + at, tl.load(values + at, mask=mask, other=0.0) - change, mask=mask)


def sum_rows(rows: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """As ``reference.sum_rows``."""
    if not len(rows):
        return rows, grad.float()
    unique, order, starts = sorted_segments(rows)
    sums = grad.new_empty(len(unique), grad.shape[1], dtype=torch.float32)
    sizes = _sizes(grad.shape[1])
    launch: Any = _sums[_grid(len(unique), sizes)]
    launch(grad.contiguous(), order, starts, sums, len(unique), **sizes)
    return unique, sums


def row_update(
    values: Tensor, moments: Sequence[Tensor], rows: Tensor | None, grad: Tensor, rule: str, hyper: Hyper
) -> None:
    """As ``reference.row_update``."""
    _launch(values, moments, rows, grad, None, len(grad), rule, hyper)


def sum_update(values: Tensor, moments: Sequence[Tensor], rows: Tensor, grad: Tensor, rule: str, hyper: Hyper) -> None:
    """As ``reference.sum_update``; the sums are never in memory."""
    if len(rows):
        unique, *segments = sorted_segments(rows)
        _launch(values, moments, unique, grad, segments, len(unique), rule, hyper)


def _launch(
    values: Tensor, moments: Sequence[Tensor], rows: Tensor | None, grad: Tensor, segments: list[Tensor] | None,
    count: int, rule: str, hyper: Hyper,
) -> None:  # fmt: skip
    if not count:
        return
    *wide, steps = moments
    betas = (hyper.beta1 if rule == "lazy_adam" else 0.0, hyper.beta2)
    known = [corrections(beta, torch.float32, grad.device) for beta in betas]
    grad, sizes = grad.contiguous(), _sizes(values.shape[1])
    order, starts = segments or (grad, grad)
    numbers = (count, *(len(k) - 1 for k in known), hyper.lr, *(x for b in betas for x in (b, 1 - b)), hyper.eps)
    launch: Any = _update[_grid(count, sizes)]
    launch(
        values, wide[0], wide[-1], steps, grad if rows is None else rows.contiguous(), grad, order, starts, *known, *numbers,
        **_constants(rule, rows is not None, segments is not None), **sizes,
    )  # fmt: skip


def _constants(rule: str, rows: bool, summed: bool) -> dict[str, Any]:
    return {"ROWWISE": rule == "rowwise", "ROWS": rows, "SUM": summed, "enable_fp_fusion": False}


def _sizes(width: int) -> dict[str, Any]:
    columns = min(1 << (width - 1).bit_length(), COLUMNS)
    return {"W": width, "BW": columns, "R": TILE // max(columns, 16), "AHEAD": AHEAD, "num_warps": 4}


def _grid(count: int, sizes: dict[str, Any]) -> tuple[int]:
    return (-(-count // sizes["R"]),)


def compilations() -> Iterator[Compilation]:
    wide, whole, counts = (torch.empty(64, dtype=t, device="meta") for t in (torch.float32, torch.int64, torch.int32))
    for width in (16, 64, 80, 256, 1500):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            name, grad = f"{width}-{str(dtype).removeprefix('torch.')}", torch.empty(64, dtype=dtype, device="meta")
            args = (grad, counts, counts, wide, 4096)
            yield Compilation("row_update", f"sums-{name}", _sums, args, _sizes(width), wgmma=False)
            for rule in ("lazy_adam", "rowwise"):
                for rows, summed in ((True, False), (False, False), (True, True)):
                    if dtype != torch.float32 and not summed:
                        continue  # summed gradients are in fp32
                    numbers = (4096, 100, 100, 0.1, 0.9, 0.1, 0.95, 0.05, 1e-8)
                    args = (wide, wide, wide, counts, whole, grad, counts, counts, wide, wide, *numbers)
                    kind = "fused" if summed else "rows" if rows else "all"
                    constants = {**_constants(rule, rows, summed), **_sizes(width)}
                    yield Compilation("row_update", f"{rule}-{kind}-{name}", _update, args, constants, wgmma=False)
