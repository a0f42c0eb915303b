"""Triton kernels of the gated norm: one launch forward, one backward and a sum of its partial results.

A program has whole rows, so the mean square stays in registers. Inputs may be slices of wider projections, [..., H, V] with any
two strides, and are read where they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.compilation import Compilation
from kernels.gated_rms_norm import MAX_WIDTH
from kernels.library import Tensors

NUMBERS = 2048  # of a tile, or one row: 16 of a thread, 32 of the widest rows
BACK_TILES = 16  # that share a partial sum of the weight's gradient


@triton.jit
def _rows(x, r, cols, outer, inner, heads, keep):
    """Rows r of [N, heads, V] with two strides, in fp32."""
    at = (r // heads).to(tl.int64) * outer + (r % heads).to(tl.int64) * inner
    return tl.load(x + (at[:, None] + cols[None, :]), mask=keep, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def _forward(
    x, weight, gate, y, rstd, rows, heads, x_outer, x_inner, z_outer, z_inner, eps,
    V: tl.constexpr, GATE: tl.constexpr, SILU: tl.constexpr, NORM_FIRST: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Program: a tile of rows. COLS: a power of two, at least V."""
    r, cols = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    keep = (r < rows)[:, None] & (cols < V)[None, :]
    h = _rows(x, r, cols, x_outer, x_inner, heads, keep)
    if GATE:
        z = _rows(gate, r, cols, z_outer, z_inner, heads, keep)
        act = tl.sigmoid(z)
        if SILU:
            act *= z
        if not NORM_FIRST:
            h *= act
    scale = tl.rsqrt(tl.sum(h * h, 1) / V + eps)
    tl.store(rstd + r, scale, mask=r < rows)
    h *= scale[:, None] * tl.load(weight + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
    if GATE and NORM_FIRST:
        h *= act
    tl.store(y + (r.to(tl.int64)[:, None] * V + cols[None, :]), h.to(y.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["rows"])
def _backward(
    x, weight, gate, rstd, dy, dx, dgate, partial, rows, heads, x_outer, x_inner, z_outer, z_inner, dy_outer, dy_inner,
    V: tl.constexpr, GATE: tl.constexpr, SILU: tl.constexpr, NORM_FIRST: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Program: TILES tiles of rows. partial [programs, V]: each one's share of the weight's gradient."""
    cols = tl.arange(0, COLS)
    w = tl.load(weight + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
    dw = tl.zeros((COLS,), tl.float32)
    for tile in range(TILES):
        r = (tl.program_id(0) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        keep = (r < rows)[:, None] & (cols < V)[None, :]
        h = _rows(x, r, cols, x_outer, x_inner, heads, keep)
        d = _rows(dy, r, cols, dy_outer, dy_inner, heads, keep)
        scale = tl.load(rstd + r, mask=r < rows, other=0.0)[:, None]
        at = r.to(tl.int64)[:, None] * V + cols[None, :]
        if GATE:
            z = _rows(gate, r, cols, z_outer, z_inner, heads, keep)
            s = tl.sigmoid(z)
            if SILU:
                act = z * s
                slope = s + act * (1 - s)
            else:
                act = s
                slope = s * (1 - s)
            if NORM_FIRST:
                dz = d * w * h * scale * slope
                tl.store(dgate + at, dz.to(dgate.dtype.element_ty), mask=keep)
                d *= act
            else:
                plain = h
                h *= act
        n = h * scale
        dw += tl.sum(d * n, 0)
        d *= w
        dh = (d - n * (tl.sum(d * n, 1) / V)[:, None]) * scale
        if GATE and not NORM_FIRST:
            tl.store(dgate + at, (dh * plain * slope).to(dgate.dtype.element_ty), mask=keep)
            dh *= act
        tl.store(dx + at, dh.to(dx.dtype.element_ty), mask=keep)
    tl.store(partial + tl.program_id(0).to(tl.int64) * V + cols, dw, mask=cols < V)


def forward(tensors: Tensors, options: Sequence[float], backend: str) -> list[Tensor]:
    """As of `reference.forward`."""
    x, weight, gate = tensors
    assert x is not None
    assert weight is not None
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rstd = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    rows = rstd.numel()
    x, heads, *strides = _located(x)
    z, _, *z_strides = (x, heads, *strides) if gate is None else _located(gate)
    constants = _constants(x.shape[-1], gate is not None, options, False)
    launch: Any = _forward[(-(-rows // constants["ROWS"]),)]
    if rows:
        launch(x, weight.contiguous(), z, y, rstd, rows, heads, *strides, *z_strides, options[0], **constants)
    return [y, rstd]


def backward(
    tensors: Tensors,
    saved: Sequence[Tensor],
    grads: Tensors,
    needs: Sequence[bool],
    options: Sequence[float],
    backend: str,
) -> Tensors:
    """As of `reference.backward`."""
    x, weight, gate = tensors
    dy = grads[0]
    assert x is not None
    assert weight is not None
    assert dy is not None
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dgate = None if gate is None else torch.empty_like(gate, memory_format=torch.contiguous_format)
    rows = saved[0].numel()
    x, heads, *strides = _located(x)
    z, _, *z_strides = (x, heads, *strides) if gate is None else _located(gate)
    dy, _, *dy_strides = _located(dy)
    constants = _constants(x.shape[-1], gate is not None, options, True)
    programs = -(-rows // (constants["ROWS"] * constants["TILES"]))
    partial = weight.new_empty(programs, len(weight), dtype=torch.float32)
    launch: Any = _backward[(programs,)]
    if rows:
        pointers = (x, weight.contiguous(), z, saved[0], dy, dx, dx if dgate is None else dgate, partial)
        launch(*pointers, rows, heads, *strides, *z_strides, *dy_strides, **constants)
    return [dx, partial.sum(0).to(weight.dtype), dgate]


def _located(x: Tensor) -> tuple[Tensor, int, int, int]:
    """-> (x, H, outer, inner): row n * H + h of x [..., H, V] starts at n * outer + h * inner; a copy where that cannot be said."""
    heads = x.shape[-2] if x.ndim > 1 else 1
    rows = x.reshape(-1, heads, x.shape[-1]) if x.numel() else x
    if x.numel() and (rows.data_ptr() != x.data_ptr() or x.stride(-1) != 1):
        rows = x.contiguous().view(rows.shape)
    return (rows, heads, rows.stride(0), rows.stride(1)) if x.numel() else (x, 1, 1, 1)


def _constants(width: int, gate: bool, options: Sequence[float], backward: bool) -> dict[str, Any]:
    cols = max(16, 1 << (width - 1).bit_length())
    warps = 4 if cols <= NUMBERS else 8
    found = {"V": width, "GATE": gate, "SILU": bool(options[1]), "NORM_FIRST": bool(options[2])}
    found |= {"ROWS": max(NUMBERS // cols, 1), "COLS": cols, "num_warps": warps, "num_stages": 1}
    return {**found, "TILES": BACK_TILES} if backward else found


def compilations() -> Iterator[Compilation]:
    """Every order and activation at the usual widths, every width in one dtype, each dtype at one width."""
    cases = [(torch.bfloat16, width) for width in (32, 64, 128, 256, 1000, 2048, MAX_WIDTH)]
    cases += [(torch.float16, 128), (torch.float32, 128), (torch.float32, MAX_WIDTH)]
    for dtype, width in cases:
        x, rstd = torch.empty(64, width, dtype=dtype, device="meta"), torch.empty(64, device="meta")
        kinds = {"norm first": (True, 0, 1, 1), "gate first": (True, 0, 1, 0), "plain": (False, 0, 1, 1)}
        if width == 128:
            kinds |= {"norm first sigmoid": (True, 0, 0, 1), "gate first sigmoid": (True, 0, 0, 0)}
        for kind, (gate, *options) in kinds.items():
            name, strides = f"{kind} {str(dtype).removeprefix('torch.')} V{width}", (4 * width, width)
            args = (x, rstd, x, x, rstd, 4096, 4, *strides, *strides, 1e-5)
            constants = _constants(width, gate, options, False)
            yield Compilation("gated_rms_norm", f"forward {name}", _forward, args, constants, wgmma=False)
            args = (x, rstd, x, rstd, x, x, x, rstd, 4096, 4, *strides, *strides, *strides)
            constants = _constants(width, gate, options, True)
            yield Compilation("gated_rms_norm", f"backward {name}", _backward, args, constants, wgmma=False)
