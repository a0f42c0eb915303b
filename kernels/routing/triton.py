"""Triton kernels that move rows between tokens and memories. One program has a few tokens (or rows) and walks over the width;
sums are over the S slots of a token, in their order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.compilation import Compilation
from kernels.library import Tensors

TILE = 2048  # numbers that a program holds at once
WARPS = 4


@triton.jit(do_not_specialize=["count"])
def _copy(x, source, y, count, sx, C: tl.constexpr, R: tl.constexpr, BC: tl.constexpr):
    """y_n = x_source(n) for R rows n."""
    n = tl.program_id(0) * R + tl.arange(0, R)
    live = n < count
    at = tl.load(source + n, mask=live, other=0).to(tl.int64) * sx
    n = n.to(tl.int64) * C
    for begin in range(0, C, BC):
        c = begin + tl.arange(0, BC)
        mask = live[:, None] & (c < C)[None, :]
        tl.store(y + n[:, None] + c[None, :], tl.load(x + at[:, None] + c[None, :], mask=mask, other=0.0), mask=mask)


@triton.jit(do_not_specialize=["count"])
def _gather_sum(
    rows,
    inv,
    w,
    y,
    count,
    sr,
    C: tl.constexpr,
    S: tl.constexpr,
    WEIGHTED: tl.constexpr,
    R: tl.constexpr,
    BC: tl.constexpr,
):
    """y_t = sum_s w_ts rows_inv(t,s) for R tokens t."""
    t = tl.program_id(0) * R + tl.arange(0, R)
    live = t < count
    out = y + t.to(tl.int64)[:, None] * C
    for begin in range(0, C, BC):
        c = begin + tl.arange(0, BC)
        mask = live[:, None] & (c < C)[None, :]
        acc = tl.zeros((R, BC), tl.float32)
        for s in tl.static_range(S):
            at = tl.load(inv + t * S + s, mask=live, other=0).to(tl.int64) * sr
            row = tl.load(rows + at[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
            if WEIGHTED:
                row *= tl.load(w + t * S + s, mask=live, other=0.0).to(tl.float32)[:, None]
            acc += row
        tl.store(out + c[None, :], acc.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count"])
def _combine_backward(
    o, w, inv, dy, do, dw, count, so, sy, C: tl.constexpr, S: tl.constexpr, R: tl.constexpr, BC: tl.constexpr
):
    """do_inv(t,s) = w_ts dy_t, dw_ts = <dy_t, o_inv(t,s)> for R tokens t: every flat row has one slot, so all are written."""
    t = tl.program_id(0) * R + tl.arange(0, R)
    live = t < count
    for s in tl.static_range(S):  # pyright: ignore[reportGeneralTypeIssues]
        at = tl.load(inv + t * S + s, mask=live, other=0).to(tl.int64)
        weight = tl.load(w + t * S + s, mask=live, other=0.0).to(tl.float32)
        total = tl.zeros((R,), tl.float32)
        for begin in range(0, C, BC):
            c = begin + tl.arange(0, BC)
            mask = live[:, None] & (c < C)[None, :]
            g = tl.load(dy + t.to(tl.int64)[:, None] * sy + c[None, :], mask=mask, other=0.0).to(tl.float32)
            row = tl.load(o + at[:, None] * so + c[None, :], mask=mask, other=0.0).to(tl.float32)
            total += tl.sum(g * row, 1)
            tl.store(do + at[:, None] * C + c[None, :], (g * weight[:, None]).to(do.dtype.element_ty), mask=mask)
        tl.store(dw + t * S + s, total.to(dw.dtype.element_ty), mask=live)


def spread(tensors: Tensors, options: Sequence[float], backend: str) -> list[Tensor]:
    """x [T, C], token [N], inv [T, S] -> y [N, C]."""
    x, token, _ = tensors
    assert x is not None
    assert token is not None
    x = _rows(x)
    y = x.new_empty(len(token), x.shape[1])
    if y.numel():
        _copy[_grid(len(y), x.shape[1])](x, token, y, len(y), x.stride(0), **_sizes(x.shape[1]))
    return [y]


def spread_backward(
    tensors: Tensors,
    saved: Sequence[Tensor],
    grads: Tensors,
    needs: Sequence[bool],
    options: Sequence[float],
    backend: str,
) -> Tensors:
    dy, inv = grads[0], tensors[2]
    assert dy is not None
    assert inv is not None
    return [_sum(dy, inv, None), None, None]


def combine(tensors: Tensors, options: Sequence[float], backend: str) -> list[Tensor]:
    """o [N, C], w [T, S], perm [N], inv [T, S] -> y [T, C]."""
    o, w, _, inv = tensors
    assert o is not None
    assert w is not None
    assert inv is not None
    return [_sum(o, inv, w.contiguous())]


def combine_backward(
    tensors: Tensors,
    saved: Sequence[Tensor],
    grads: Tensors,
    needs: Sequence[bool],
    options: Sequence[float],
    backend: str,
) -> Tensors:
    o, w, _, inv = tensors
    dy = grads[0]
    assert o is not None
    assert w is not None
    assert inv is not None
    assert dy is not None
    o, dy, inv, w = _rows(o), _rows(dy), inv.contiguous(), w.contiguous()
    (count, slots), width = inv.shape, o.shape[1]
    do, dw = torch.empty_like(o, memory_format=torch.contiguous_format), torch.empty_like(w)
    args = (o, w, inv, dy, do, dw, count, o.stride(0), dy.stride(0))
    _combine_backward[_grid(count, width)](*args, **_sizes(width, S=slots))
    return [do, dw, None, None]


def _sum(rows: Tensor, inv: Tensor, w: Tensor | None) -> Tensor:
    rows, inv = _rows(rows), inv.contiguous()
    (count, slots), width = inv.shape, rows.shape[1]
    y = rows.new_empty(count, width)
    if y.numel():
        args = (rows, inv, w if w is not None else rows, y, count, rows.stride(0))
        _gather_sum[_grid(count, width)](*args, **_sizes(width, S=slots, WEIGHTED=w is not None))
    return y


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _sizes(width: int, **constants: Any) -> dict[str, Any]:
    columns = min(1 << (width - 1).bit_length(), 1024)
    return {"C": width, "R": max(1, min(TILE // columns, 64)), "BC": columns, "num_warps": WARPS, **constants}


def _grid(count: int, width: int) -> tuple[int]:
    return (-(-count // _sizes(width)["R"]),)


def compilations() -> Iterator[Compilation]:
    token, inv = (torch.empty(s, dtype=torch.int64, device="meta") for s in ((6144,), (2048, 3)))
    w = torch.empty(2048, 3, device="meta")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for width in (24, 1024, 3072):
            x, rows = (torch.empty(n, width, dtype=dtype, device="meta") for n in (2048, 6144))
            sizes = _sizes(width)
            name = f"{str(dtype).removeprefix('torch.')}-{width}"
            yield Compilation("routing", f"copy-{name}", _copy, (x, token, rows, 6144, width), sizes, wgmma=False)
            for weighted in (False, True):
                args = (rows, inv, w if weighted else rows, x, 2048, width)
                kind = {**sizes, "S": 3, "WEIGHTED": weighted}
                yield Compilation("routing", f"sum-{name}-{weighted}", _gather_sum, args, kind, wgmma=False)
            args = (rows, w, inv, x, rows, w, 2048, width, width)
            yield Compilation(
                "routing", f"combine-backward-{name}", _combine_backward, args, {**sizes, "S": 3}, wgmma=False
            )
