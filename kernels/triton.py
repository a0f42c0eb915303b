"""Pieces that the kernels of several ops share: where the chunks of ragged rows are, tiles in memory, and how products are rounded.

Rows of S segments (``cu_seqlens``) are cut into chunks of C rows, none across two segments. Chunk c of segment s has the slot
cu[s] // C + s + c: a closed form, so that the kernels of one op agree about slots without a table of them. A few slots stay
without a chunk. The rows past cu[S] count as segment S.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor


def slots(batch: int, time: int, cu_seqlens: Tensor | None, size: int) -> int:
    """How many slots of chunks there are."""
    if cu_seqlens is None:
        return batch * -(-time // size)
    return batch * time // size + len(cu_seqlens)


def precision(dtype: torch.dtype) -> str:
    """Of products: fp32 stays fp32 (NVIDIA's tensor cores in three passes), narrower inputs are exact anyway."""
    return "tf32x3" if dtype == torch.float32 and torch.version.hip is None else "ieee"


def roomy(device: torch.device) -> bool:
    """Whether a program may use 227 KiB of shared memory, as on Hopper. Also where nothing is known: interpreted, or traced."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return True
    return torch.version.hip is None and _shared_memory(device.index or 0) >= 232448


@functools.cache
def _shared_memory(index: int) -> int:
    return torch.cuda.get_device_properties(index).shared_memory_per_block_optin


def padded(width: int) -> int:
    """The tile of a width: products need at least 16."""
    return max(16, 1 << (width - 1).bit_length())


def search_width(segments: int) -> int:
    return 1 << segments.bit_length()


def by_rows(x: Tensor) -> Tensor:
    """x [B, T, H, K] itself where row b * T + t starts at that multiple of stride(1) and holds H * K numbers; else a copy."""
    b, t, h, k = x.shape
    heads_adjoin = x.stride(3) == 1 and (h == 1 or x.stride(2) == k)
    rows_adjoin = b == 1 or x.stride(0) == t * x.stride(1)
    # No .contiguous(): for T = 1 it may return x with a stride(1) that says nothing.
    return x if heads_adjoin and rows_adjoin else x.clone(memory_format=torch.contiguous_format)


@triton.jit
def offsets(rows, columns, stride: tl.constexpr):
    """Of a tile. A constant stride and wide integers let the compiler see that those of one thread differ by constants: it then
    keeps one pointer in place of many."""
    return rows.to(tl.int64)[:, None] * stride + columns.to(tl.int64)[None, :]


@triton.jit
def load_tile(base, stride, rows, here, columns, WIDTH: tl.constexpr, FULL: tl.constexpr):
    """Rows of a matrix at base, zeros where ``here`` is false; FULL: every column lies inside WIDTH.

    Strides are constants and offsets 64 bits wide: so the compiler sees that those of one thread differ by constants, and keeps
    one pointer instead of many.
    """
    mask = here[:, None] if FULL else here[:, None] & (columns < WIDTH)[None, :]
    return tl.load(
        base + (rows[:, None].to(tl.int64) * stride + columns[None, :].to(tl.int64)),
        mask=mask,
        other=0.0,
    )


@triton.jit
def store_tile(base, stride, rows, here, columns, x, WIDTH: tl.constexpr, FULL: tl.constexpr):
    mask = here[:, None] if FULL else here[:, None] & (columns < WIDTH)[None, :]
    tl.store(
        base + (rows[:, None].to(tl.int64) * stride + columns[None, :].to(tl.int64)),
        x.to(base.dtype.element_ty),
        mask=mask,
    )


@triton.jit
def clear_rows(base, stride, here, C: tl.constexpr, WIDTH: tl.constexpr, B: tl.constexpr):
    """Zeros in all columns."""
    for at in range(0, WIDTH, B):
        columns = at + tl.arange(0, B)
        store_tile(base, stride, tl.arange(0, C), here, columns, tl.zeros((C, B), tl.float32), WIDTH, WIDTH % B == 0)


@triton.jit
def square(base, C: tl.constexpr):
    """Pointers to [C, C]."""
    return base + (tl.arange(0, C)[:, None].to(tl.int64) * C + tl.arange(0, C)[None, :].to(tl.int64))


@triton.jit
def two_floats(x):
    """fp64 -> two fp32 that sum to it."""
    high = x.to(tl.float32)
    return high, (x - high.to(tl.float64)).to(tl.float32)


@triton.jit
def segment_rows(cu, segment, segments, rows, time, C: tl.constexpr, VARLEN: tl.constexpr):
    """-> (first row, row past the last one, slot of the first chunk) of a segment."""
    if VARLEN:
        live = segment < segments
        start = tl.load(cu + segment).to(tl.int64)
        end = tl.load(cu + segment + 1, mask=live, other=0).to(tl.int64)
        return start, tl.where(live, end, rows), start // C + segment
    else:
        start = segment.to(tl.int64) * time
        return start, start + time, segment.to(tl.int64) * tl.cdiv(time, C)


@triton.jit
def chunk_of_slot(cu, slot, segments, rows, time, C: tl.constexpr, VARLEN: tl.constexpr, SEARCH: tl.constexpr):
    """-> (segment, first row of the chunk, row past the segment's last one). SEARCH: a power of two above S."""
    if VARLEN:
        s = tl.arange(0, SEARCH)
        first = tl.load(cu + s, mask=s <= segments, other=rows).to(tl.int64) // C + s
        segment = tl.sum((first <= slot).to(tl.int32), 0) - 1
        start, end, base = segment_rows(cu, segment, segments, rows, time, C, VARLEN)
        return segment, start + (slot - base) * C, end
    else:
        per = tl.cdiv(time, C)
        segment = slot // per
        start = segment.to(tl.int64) * time
        return segment, start + (slot % per) * C, start + time
