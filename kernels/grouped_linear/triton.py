"""Triton kernels of the grouped product. A program finds its group and rows from the offsets on the device, so the grid needs
only a bound: N / BM + E + 1 tiles of rows, those of no group included, because they are written too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.compilation import TARGETS, Compilation
from kernels.library import Tensors
from kernels.triton import precision


@triton.jit(do_not_specialize=["rows"])
def _product(
    x,
    maps,
    offsets,
    y,
    rows,
    sx: tl.constexpr,
    se,
    si: tl.constexpr,
    so: tl.constexpr,
    D: tl.constexpr,
    OUT: tl.constexpr,
    E: tl.constexpr,
    GROUPS: tl.constexpr,
    BM: tl.constexpr,
    BO: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y[rows of e] = x[rows of e] @ maps[e]; element (e, d, o) of maps stands at e se + d si + o so. GROUPS: a power of two
    above E. Program: tile of rows, and of columns the fastest. Strides are constants so that the compiler sees how rows are
    aligned: their length is rarely a multiple of 16 numbers."""
    columns: tl.constexpr = (OUT + BO - 1) // BO
    tile, column = tl.program_id(0) // columns, tl.program_id(0) % columns
    group = tl.arange(0, GROUPS)
    starts = tl.load(offsets + group, mask=group <= E, other=rows)
    ends = tl.load(offsets + group + 1, mask=group < E, other=rows)  # group E: the rows of no group
    tiles = tl.cumsum((ends - starts + BM - 1) // BM, 0)  # up to and with each group
    e = tl.sum((tiles <= tile).to(tl.int32), 0)
    if e <= E:
        here = group == e
        start = tl.sum(tl.where(here, starts, 0), 0)
        end = tl.sum(tl.where(here, ends, 0), 0)
        first = tl.max(tl.where(tiles <= tile, tiles, 0), 0)
        r = start.to(tl.int64) + (tile - first) * BM + tl.arange(0, BM)
        o, d = column * BO + tl.arange(0, BO), tl.arange(0, BD)
        acc = tl.zeros((BM, BO), tl.float32)
        if e < E:
            x_at = x + r[:, None] * sx + d[None, :]
            map_at = maps + e.to(tl.int64) * se + d[:, None] * si + o[None, :] * so
            for begin in range(0, D, BD):
                in_d = d < D - begin
                a = tl.load(x_at, mask=(r < end)[:, None] & in_d[None, :], other=0.0)
                b = tl.load(map_at, mask=in_d[:, None] & (o < OUT)[None, :], other=0.0)
                acc = tl.dot(a, b, acc, input_precision=PRECISION)
                x_at += BD
                map_at += BD * si
        at = y + r[:, None] * OUT + o[None, :]
        tl.store(at, acc.to(y.dtype.element_ty), mask=(r < end)[:, None] & (o < OUT)[None, :])


@triton.jit
def _outer(
    dy,
    x,
    offsets,
    dw,
    sdy: tl.constexpr,
    sx: tl.constexpr,
    D: tl.constexpr,
    OUT: tl.constexpr,
    BM: tl.constexpr,
    BO: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dw[e] = dy[rows of e]^T @ x[rows of e]. Program (tile of O and D, e)."""
    columns: tl.constexpr = (D + BD - 1) // BD
    tile, e = tl.program_id(0), tl.program_id(1)
    o, d = tile // columns * BO + tl.arange(0, BO), tile % columns * BD + tl.arange(0, BD)
    start, end = tl.load(offsets + e).to(tl.int64), tl.load(offsets + e + 1).to(tl.int64)
    acc = tl.zeros((BO, BD), tl.float32)
    for i in range(tl.cdiv(end - start, BM).to(tl.int32)):
        r = start + i * BM + tl.arange(0, BM)
        inside = (r < end)[:, None]
        a = tl.load(dy + r[:, None] * sdy + o[None, :], mask=inside & (o < OUT)[None, :], other=0.0)
        b = tl.load(x + r[:, None] * sx + d[None, :], mask=inside & (d < D)[None, :], other=0.0)
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
    at = dw + (e.to(tl.int64) * OUT + o[:, None]) * D + d[None, :]
    tl.store(at, acc.to(dw.dtype.element_ty), mask=(o < OUT)[:, None] & (d < D)[None, :])


class Tiles(NamedTuple):
    rows: int  # BM
    out: int  # BO
    width: int  # BD
    warps: int
    stages: int


ALIGNED = 4  # numbers; rows that start at any place are loaded one number at a time, which takes registers
FEW = 32  # rows per group, below which a product is one of matrices and single vectors, as in decoding
PRODUCT = {"half": Tiles(128, 128, 64, 8, 3), "fp32": Tiles(64, 64, 32, 4, 2)}
PRODUCT_FEW = {"half": Tiles(16, 64, 128, 2, 2), "fp32": Tiles(16, 32, 64, 2, 2)}
OUTER = {"half": Tiles(64, 128, 128, 8, 3), "fp32": Tiles(32, 64, 64, 4, 2)}
LOOSE = {
    "half": Tiles(64, 64, 32, 4, 1),
    "fp32": Tiles(32, 32, 32, 2, 1),
}  # of every product of rows that are not aligned


def _kind(dtype: torch.dtype) -> str:
    return "fp32" if dtype == torch.float32 else "half"


def forward(tensors: Tensors, options: Sequence[float], backend: str) -> list[Tensor]:
    """x [N, D], weight [E, O, D], offsets [E+1] -> y [N, O]."""
    x, weight, offsets = tensors
    assert x is not None
    assert weight is not None
    assert offsets is not None
    return [_multiply(x, weight.mT, offsets)]


def backward(
    tensors: Tensors,
    saved: Sequence[Tensor],
    grads: Tensors,
    needs: Sequence[bool],
    options: Sequence[float],
    backend: str,
) -> Tensors:
    x, weight, offsets = tensors
    dy = grads[0]
    assert x is not None
    assert weight is not None
    assert offsets is not None
    assert dy is not None
    dx = _multiply(dy, weight, offsets) if needs[0] else None
    if not needs[1]:
        return [dx, None, None]
    dy, x = _rows(dy), _rows(x)
    dw = torch.empty_like(weight, memory_format=torch.contiguous_format)
    e, o, d = weight.shape
    t = (OUTER if _aligned(d, o) else LOOSE)[_kind(x.dtype)]
    grid = (triton.cdiv(o, t.out) * triton.cdiv(d, t.width), e)
    args: tuple[Any, ...] = (dy, x, offsets, dw, dy.stride(0), x.stride(0))
    _outer[grid](*args, **_constants(d, o, x.dtype, t))
    return [dx, dw, None]


def _multiply(x: Tensor, maps: Tensor, offsets: Tensor) -> Tensor:
    """x [N, D], maps [E, D, O] in any order of memory -> [N, O]."""
    x = _rows(x)
    n, (e, d, o) = len(x), maps.shape
    y = x.new_empty(n, o)
    table = LOOSE if not _aligned(d, o) else PRODUCT_FEW if n <= FEW * e else PRODUCT
    t = table[_kind(x.dtype)]
    grid = ((triton.cdiv(n, t.rows) + e + 1) * triton.cdiv(o, t.out),)
    args: tuple[Any, ...] = (x, maps, offsets, y, n, x.stride(0), *maps.stride())
    constants = {**_groups(e), **_constants(d, o, x.dtype, t)}
    _product[grid](*args, **constants)
    return y


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _aligned(*widths: int) -> bool:
    return all(width % ALIGNED == 0 for width in widths)


def _groups(e: int) -> dict[str, Any]:
    return {"E": e, "GROUPS": 1 << e.bit_length()}


def _constants(d: int, o: int, dtype: torch.dtype, tiles: Tiles) -> dict[str, Any]:
    sizes = {"BM": tiles.rows, "BO": tiles.out, "BD": tiles.width}
    launch = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return {"D": d, "OUT": o, "PRECISION": precision(dtype), **sizes, **launch}


def compilations() -> Iterator[Compilation]:
    """Every table entry, at widths that the tiles divide, and at widths that they do not."""
    offsets = torch.empty(6, dtype=torch.int32, device="meta")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        kind, name = _kind(dtype), str(dtype).removeprefix("torch.")
        products = {"many": PRODUCT[kind], "few": PRODUCT_FEW[kind]}, {"loose": LOOSE[kind]}
        outer = OUTER[kind], LOOSE[kind]
        for d, o, loose in ((1024, 2048, False), (200, 332, False), (100, 33, True)):
            x, y, w = (torch.empty(s, dtype=dtype, device="meta") for s in ((4096, d), (4096, o), (5, o, d)))
            for label, t in products[loose].items():
                for way, maps, read, written in (("forward", w.mT, x, y), ("dx", w, y, x)):
                    _, wide, out = maps.shape
                    args = (read, maps, offsets, written, 4096, wide, *maps.stride())
                    constants = {**_groups(5), **_constants(wide, out, dtype, t)}
                    yield from _by_target(f"{way}-{label}-{name}-{d}x{o}", _product, args, constants)
            constants, args = _constants(d, o, dtype, outer[loose]), (y, x, offsets, w, o, d)
            yield from _by_target(f"dw-{name}-{d}x{o}", _outer, args, constants)


def _by_target(name: str, kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> Iterator[Compilation]:
    """`precision` asks the device's maker, who is not here."""
    if constants["PRECISION"] == "ieee":
        yield Compilation("grouped_linear", name, kernel, args, constants)
        return
    cuda = tuple(target for target, about in TARGETS.items() if about.backend == "cuda")
    hip = tuple(target for target in TARGETS if target not in cuda)
    yield Compilation("grouped_linear", name, kernel, args, constants, targets=cuda)
    yield Compilation("grouped_linear", f"{name}-hip", kernel, args, {**constants, "PRECISION": "ieee"}, targets=hip)
