"""The kernels of the selective scan; see `kernels.selective_scan.triton` for what they hand on and to whom.

A tile is a chunk of some channels with all of their state, [C, BD, BN]: the scan runs along its first axis, which lies in the
registers of a thread. Rows past the end of a segment have step size 0: they neither decay nor write.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false
# (the checker takes what Triton compiles for Python)

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton import chunk_of_slot, clear_rows, load_tile, segment_rows, store_tile

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _follow(a, x, b, y):
    """The map h -> b h + y after h -> a h + x."""
    return a * b, x * b + y


@triton.jit
def _follow_apart(a, x, p, b, y, q):
    """The same, and beside what comes out what of it was there before the last write."""
    return a * b, x * b + y, x * b + q


@triton.jit
def _load(base, stride, rows, here, columns, WIDTH: tl.constexpr, FULL: tl.constexpr):
    return load_tile(base, stride, rows, here, columns, WIDTH, FULL).to(tl.float32)


@triton.jit
def _decays(delta, rates):
    """delta [C, BD], rates [BD, BN] -> exp(delta A) [C, BD, BN]."""
    return tl.exp2(delta[:, :, None] * (rates * LOG2E)[None, :, :])


@triton.jit(do_not_specialize=["segments", "rows", "time"])
def scan(
    u, delta, rates, b, c, skip, cu, initial, y, states, final,
    segments, rows, time, u_stride: tl.constexpr, delta_stride: tl.constexpr, b_stride: tl.constexpr, c_stride: tl.constexpr,
    D: tl.constexpr, N: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """BD channels of one segment, the state in registers. Keeps the states before the chunks. The segment past the last one is
    the rows of none: zeros."""
    segment = tl.program_id(1)
    start, end, slot = segment_rows(cu, segment, segments, rows, time, C, VARLEN)
    length = (end - start).to(tl.int32)
    at, channels, numbers = tl.arange(0, C), tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, BN)
    inside = channels < D
    if VARLEN and segment == segments:
        for first in tl.range(0, length, C):
            zeros = tl.zeros((C, BD), tl.float32)
            store_tile(y, D, start + first + at, first + at < length, channels, zeros, D, D % BD == 0)
        return
    a = _load(rates, N, channels, inside, numbers, N, N == BN)
    state = tl.zeros((BD, BN), tl.float32)
    this = segment.to(tl.int64) * (D * N)
    if initial is not None:
        state = _load(initial + this, N, channels, inside, numbers, N, N == BN)
    for chunk in tl.range(0, tl.cdiv(length, C)):
        row, here = start + chunk * C + at, chunk * C + at < length
        if states is not None:
            kept = states + (slot + chunk) * (D * N)
            store_tile(kept, N, channels, inside, numbers, state, N, N == BN)
        x = _load(u, u_stride, row, here, channels, D, D % BD == 0)
        step = _load(delta, delta_stride, row, here, channels, D, D % BD == 0)
        keys = _load(b, b_stride, row, here, numbers, N, N == BN)
        queries = _load(c, c_stride, row, here, numbers, N, N == BN)
        writes = (step * x)[:, :, None] * keys[:, None, :]
        product, h = tl.associative_scan((_decays(step, a), writes), 0, _follow)
        h += product * state[None, :, :]
        o = tl.sum(h * queries[:, None, :], 2)
        if skip is not None:
            o += x * tl.load(skip + channels, mask=inside, other=0.0).to(tl.float32)[None, :]
        store_tile(y, D, row, here, channels, o, D, D % BD == 0)
        state = tl.sum(tl.where((at == C - 1)[:, None, None], h, 0.0), 0)
    if final is not None:
        store_tile(final + this, N, channels, inside, numbers, state, N, N == BN)


@triton.jit(do_not_specialize=["segments", "rows", "time"])
def scan_back(
    delta, rates, c, dy, cu, dfinal, dstates, dinitial,
    segments, rows, time, delta_stride: tl.constexpr, c_stride: tl.constexpr, dy_stride: tl.constexpr,
    D: tl.constexpr, N: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """From the last chunk of a segment to the first: the gradients of the states after the chunks, and of the initial one."""
    segment = tl.program_id(1)
    start, end, slot = segment_rows(cu, segment, segments, rows, time, C, VARLEN)
    length = (end - start).to(tl.int32)
    at, channels, numbers = tl.arange(0, C), tl.program_id(0) * BD + tl.arange(0, BD), tl.arange(0, BN)
    inside = channels < D
    a = _load(rates, N, channels, inside, numbers, N, N == BN)
    dstate = tl.zeros((BD, BN), tl.float32)
    this = segment.to(tl.int64) * (D * N)
    if dfinal is not None:
        dstate = _load(dfinal + this, N, channels, inside, numbers, N, N == BN)
    chunks = tl.cdiv(length, C)
    for i in tl.range(0, chunks):
        chunk = chunks - 1 - i
        row, here = start + chunk * C + at, chunk * C + at < length
        store_tile(dstates + (slot + chunk) * (D * N), N, channels, inside, numbers, dstate, N, N == BN)
        step = _load(delta, delta_stride, row, here, channels, D, D % BD == 0)
        queries = _load(c, c_stride, row, here, numbers, N, N == BN)
        seen = _load(dy, dy_stride, row, here, channels, D, D % BD == 0)
        reads = _decays(tl.cumsum(step, 0), a) * seen[:, :, None] * queries[:, None, :]
        dstate = dstate * tl.exp2(tl.sum(step, 0)[:, None] * (a * LOG2E)) + tl.sum(reads, 0)
    if dinitial is not None:
        store_tile(dinitial + this, N, channels, inside, numbers, dstate, N, N == BN)


@triton.jit(do_not_specialize=["segments", "rows", "time"])
def gradients(
    u, delta, rates, b, c, skip, dy, cu, states, dstates, du, ddelta, db, dc, dskip,
    segments, rows, time, u_stride: tl.constexpr, delta_stride: tl.constexpr, b_stride: tl.constexpr, c_stride: tl.constexpr,
    dy_stride: tl.constexpr, D: tl.constexpr, N: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    SPAN: tl.constexpr, VARLEN: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """SPAN channels of one chunk. db and dc [parts, R, N] and dskip [slots, D] are what these channels and this chunk add; what it
    adds to the gradient of the rates takes the place of its dstates. Zeros for rows of no segment and slots without a chunk."""
    slot, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    segment, start, end = chunk_of_slot(cu, slot, segments, rows, time, C, VARLEN, SEARCH)
    at, numbers = tl.arange(0, C), tl.arange(0, BN)
    here = at < (end - start).to(tl.int32)
    row = start + at
    states += slot * (D * N)
    dstates += slot * (D * N)
    dskip += slot * D
    db += part.to(tl.int64) * rows * N
    dc += part.to(tl.int64) * rows * N
    if (start >= end) | (segment >= segments):
        for first in tl.range(0, SPAN, BD):
            channels = part * SPAN + first + tl.arange(0, BD)
            zeros = tl.zeros((BD, BN), tl.float32)
            store_tile(dstates, N, channels, channels < D, numbers, zeros, N, N == BN)
            tl.store(dskip + channels, tl.zeros((BD,), tl.float32), mask=channels < D)
            nothing = tl.zeros((C, BD), tl.float32)
            store_tile(du, D, row, here, channels, nothing, D, D % SPAN == 0)
            store_tile(ddelta, D, row, here, channels, nothing, D, D % SPAN == 0)
        clear_rows(db + start * N, N, here, C, N, BN)
        clear_rows(dc + start * N, N, here, C, N, BN)
        return
    keys = _load(b, b_stride, row, here, numbers, N, N == BN)
    queries = _load(c, c_stride, row, here, numbers, N, N == BN)
    dkeys, dqueries = tl.zeros((C, BN), tl.float32), tl.zeros((C, BN), tl.float32)
    followed = at + 1 < (end - start).to(tl.int32)
    for first in tl.range(0, SPAN, BD, disable_licm=True):
        channels = part * SPAN + first + tl.arange(0, BD)
        inside = channels < D
        a = _load(rates, N, channels, inside, numbers, N, N == BN)
        x = _load(u, u_stride, row, here, channels, D, D % SPAN == 0)
        step = _load(delta, delta_stride, row, here, channels, D, D % SPAN == 0)
        seen = _load(dy, dy_stride, row, here, channels, D, D % SPAN == 0)
        written = step * x
        writes = written[:, :, None] * keys[:, None, :]
        before = _load(states, N, channels, inside, numbers, N, N == BN)
        product, h, old = tl.associative_scan((_decays(step, a), writes, tl.zeros_like(writes)), 0, _follow_apart)
        h += product * before[None, :, :]
        old += product * before[None, :, :]
        dqueries += tl.sum(h * seen[:, :, None], 1)

        later = _load(delta, delta_stride, row + 1, followed & (at < C - 1), channels, D, D % SPAN == 0)
        reads = seen[:, :, None] * queries[:, None, :]
        product, dh = tl.associative_scan((_decays(later, a), reads), 0, _follow, reverse=True)
        dh += product * _load(dstates, N, channels, inside, numbers, N, N == BN)[None, :, :]
        dkeys += tl.sum(dh * written[:, :, None], 1)
        through = tl.sum(dh * keys[:, None, :], 2)
        passed = dh * old
        dx = through * step
        if skip is not None:
            dx += seen * tl.load(skip + channels, mask=inside, other=0.0).to(tl.float32)[None, :]
        store_tile(du, D, row, here, channels, dx, D, D % SPAN == 0)
        dstep = through * x + tl.sum(passed * a[None, :, :], 2)
        store_tile(ddelta, D, row, here, channels, dstep, D, D % SPAN == 0)
        drates = tl.sum(passed * step[:, :, None], 0)
        tl.debug_barrier()  # all threads have read what is now written over
        store_tile(dstates, N, channels, inside, numbers, drates, N, N == BN)
        tl.store(dskip + channels, tl.sum(seen * x, 0), mask=inside)
    store_tile(db, N, row, here, numbers, dkeys, N, N == BN)
    store_tile(dc, N, row, here, numbers, dqueries, N, N == BN)
