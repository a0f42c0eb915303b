"""Triton kernels of hashed n-gram lookup: one launch for all layers' rows, one for the rows and values of a layer.

A program has R flat rows, that is (token, order, head); each finds its token's window by itself, which costs N loads from the
cache, and then the rows of the table pass through the program in tiles of columns. A table in pinned host memory is read where it
is: the launcher turns the host's pointer into the device's, and only the bytes of wanted rows cross the link.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.compilation import Compilation
from kernels.triton import offsets as tile_offsets

ROWS = 128  # flat rows of a program, one a thread: a 64-bit remainder is the dearest thing that happens to one
TILE = 8192  # numbers of the table that a program holds at once


@triton.jit
def _hash(
    line, segments, place, multipliers, primes, shifts, flat, live, time, classes, pad,
    N: tl.constexpr, K: tl.constexpr, SEGMENTS: tl.constexpr, PLACE: tl.constexpr,
):  # fmt: skip
    """The rows of the table for flat rows int64 [R]."""
    H: tl.constexpr = (N - 1) * K
    token = (flat // H).to(tl.int32)
    head = (flat % H).to(tl.int32)
    sequence = token // time
    at = sequence.to(tl.int64) * (time + N - 1)
    reached = live
    if PLACE:
        own = tl.load(place + token, mask=live, other=-1)
        reached &= own >= 0
        at += own
    else:
        at += token - sequence * time + (N - 1)
    if SEGMENTS:
        home = tl.load(segments + at, mask=reached, other=0)
    mix = tl.zeros_like(flat)
    for i in tl.static_range(N):
        value = tl.load(line + at - i, mask=reached, other=-1)
        reached &= (value >= 0) & (value < classes)
        if SEGMENTS and i > 0:
            reached &= tl.load(segments + at - i, mask=reached, other=-1) == home
        product = tl.where(reached, value, pad) * tl.load(multipliers + i)
        mix ^= tl.where(i < head // K + 2, product, 0)
    size = tl.load(primes + head, mask=live, other=1)
    row = mix % size  # with the sign of mix
    return tl.where(row < 0, row + size, row) + tl.load(shifts + head, mask=live, other=0)


@triton.jit(do_not_specialize=["count", "time", "classes", "pad"])
def _all_rows(
    line, segments, place, multipliers, primes, shifts, rows, count, time, classes, pad,
    N: tl.constexpr, K: tl.constexpr, SEGMENTS: tl.constexpr, PLACE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program (block of flat rows, layer)."""
    layer = tl.program_id(1).to(tl.int64)
    flat = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = flat < count
    multipliers += layer * N
    primes += layer * ((N - 1) * K)
    shifts += layer * ((N - 1) * K)
    found = _hash(
        line, segments, place, multipliers, primes, shifts, flat, live, time, classes, pad, N, K, SEGMENTS, PLACE
    )
    tl.store(rows + layer * count + flat, found, mask=live)


@triton.jit(do_not_specialize=["count", "time", "classes", "pad", "height"])
def _gather(
    table, line, segments, place, multipliers, primes, shifts, rows, values, count, time, classes, pad, height,
    N: tl.constexpr, K: tl.constexpr, SEGMENTS: tl.constexpr, PLACE: tl.constexpr, HASH: tl.constexpr,
    W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program: a block of flat rows. HASH: rows are found and written; else they are given. Rows that the table does not have
    read as zeros."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    r = tl.arange(0, ROWS)
    live = first + r < count
    if HASH:
        row = _hash(
            line, segments, place, multipliers, primes, shifts, first + r, live, time, classes, pad,
            N, K, SEGMENTS, PLACE,
        )  # fmt: skip
        tl.store(rows + first + r, row, mask=live)
    else:
        row = tl.load(rows + first + r, mask=live, other=-1)
    known = live & (row >= 0) & (row < height)
    values += first * W
    for start in tl.static_range(0, W, COLUMNS):  # pyright: ignore[reportGeneralTypeIssues]
        c = start + tl.arange(0, COLUMNS)
        within = (c < W)[None, :]
        tile = tl.load(table + tile_offsets(row, c, W), mask=known[:, None] & within, other=0.0)
        tl.store(values + tile_offsets(r, c, W), tile, mask=live[:, None] & within)


def rows(
    line: Tensor, segments: Tensor | None, place: Tensor | None,
    multipliers: Tensor, primes: Tensor, offsets: Tensor, classes: int, pad: int,
) -> Tensor:  # fmt: skip
    """As `reference.rows`, the line in parts."""
    layers, back, heads = primes.shape
    batch, time = len(line), line.shape[1] - back
    found = line.new_empty(layers, batch, time, back * heads)
    count = batch * time * back * heads
    constants = {"N": back + 1, "K": heads, **_modes(segments, place), **_rows_sizes()}
    launch: Any = _all_rows[(triton.cdiv(count, ROWS), layers)]
    launch(
        *_pointers(line, segments, place, multipliers, primes, offsets), found, count, time, classes, pad, **constants
    )
    return found


def both(
    table: Tensor, line: Tensor, segments: Tensor | None, place: Tensor | None,
    multipliers: Tensor, primes: Tensor, offsets: Tensor, classes: int, pad: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> (values [B, T, (N-1) K W], rows [B, T, (N-1) K])."""
    back, heads = primes.shape
    batch, time, width = len(line), line.shape[1] - back, table.shape[1]
    found = line.new_empty(batch, time, back * heads)
    values = table.new_empty((batch, time, back * heads * width), device=line.device)
    hashed = _pointers(line, segments, place, multipliers, primes, offsets)
    constants = {"N": back + 1, "K": heads, **_modes(segments, place), "HASH": True}
    _launch(table, hashed, found, values, (time, classes, pad), constants)
    return values, found


def gather(table: Tensor, rows: Tensor) -> Tensor:
    """rows [...] -> [..., W]."""
    rows = rows.contiguous()
    values = table.new_empty((*rows.shape, table.shape[1]), device=rows.device)
    constants = {"N": 2, "K": 1, **_modes(None, None), "HASH": False}
    _launch(table, (rows,) * 6, rows, values, (1, 1, 0), constants)
    return values


def _launch(
    table: Tensor,
    hashed: tuple[Tensor, ...],
    rows: Tensor,
    values: Tensor,
    numbers: tuple[int, int, int],
    constants: Any,
) -> None:
    count, table = rows.numel(), table.contiguous()
    if not values.numel():
        return
    sizes = _sizes(table.shape[1])
    launch: Any = _gather[(triton.cdiv(count, sizes["ROWS"]),)]
    launch(table, *hashed, rows, values, count, *numbers, len(table), **constants, **sizes)


def _pointers(line: Tensor, segments: Tensor | None, place: Tensor | None, *hashing: Tensor) -> tuple[Tensor, ...]:
    """A kernel wants a pointer even for what it does not read."""
    line = line.contiguous()
    return (line, *(line if t is None else t.contiguous() for t in (segments, place, *hashing)))


def _modes(segments: object, place: object) -> dict[str, bool]:
    return {"SEGMENTS": segments is not None, "PLACE": place is not None}


def _rows_sizes() -> dict[str, int]:
    return {"ROWS": ROWS, "num_warps": 4, "num_stages": 1}


def _sizes(width: int) -> dict[str, int]:
    columns = min(1 << (width - 1).bit_length(), TILE // ROWS)
    return {"W": width, "COLUMNS": columns, **_rows_sizes()}


def compilations() -> Iterator[Compilation]:
    """The published shapes (orders up to 3 of rows 64 and 80 wide, up to 4 of 256) and small ones; every mode of the hash."""
    line, whole = (
        torch.empty(4096, dtype=torch.int64, device="meta"),
        torch.empty(4096, dtype=torch.int64, device="meta"),
    )
    numbers, modes = (65536, 2048, 99092, 2), [(False, False), (True, False), (False, True), (True, True)]
    for segments, place in modes:
        for order, heads in ((2, 2), (3, 8), (4, 8)):
            kind = {"N": order, "K": heads, "SEGMENTS": segments, "PLACE": place}
            name = f"N{order}-K{heads}{'-segments' * segments}{'-place' * place}"
            yield Compilation(
                "ngram_gather", f"rows-{name}", _all_rows, (line,) * 6 + (whole, *numbers), {**kind, **_rows_sizes()}, wgmma=False
            )  # fmt: skip
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        table, kind = torch.empty(4096, dtype=dtype, device="meta"), str(dtype).removeprefix("torch.")
        for order, heads, width in ((3, 8, 16), (3, 8, 64), (3, 8, 80), (4, 8, 256)):
            common = (table, *(line,) * 6, whole, table)
            for segments, place in modes if dtype == torch.bfloat16 and width == 64 else [(True, False)]:
                constants = {
                    "N": order,
                    "K": heads,
                    "SEGMENTS": segments,
                    "PLACE": place,
                    "HASH": True,
                    **_sizes(width),
                }
                name = f"N{order}-W{width}-{kind}{'-segments' * segments}{'-place' * place}"
                args = (*common, *numbers, 1 << 25)
                yield Compilation("ngram_gather", f"both-{name}", _gather, args, constants, wgmma=False)
            constants = {"N": 2, "K": 1, **_modes(None, None), "HASH": False, **_sizes(width)}
            args = (*common, 65536, 1, 1, 0, 1 << 25)
            yield Compilation("ngram_gather", f"gather-W{width}-{kind}", _gather, args, constants, wgmma=False)
