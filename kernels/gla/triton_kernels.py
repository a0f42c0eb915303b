"""The kernels of gated linear attention; see `kernels.gla.triton` for what they hand on and to whom.

Rows of one half of a block see those of the other through the row between, whose decay programs read from memory (``gamma``): that
asks nothing of other threads, and tiles stay in registers as they were loaded.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false
# (the checker takes what Triton compiles for Python)

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton import chunk_of_slot, clear_rows, load_tile, segment_rows, square, store_tile, two_floats

FORGOTTEN = tl.constexpr(-128.0)  # its exponential is zero in fp32; with a bound sums of g stay small, and finite


@triton.jit
def _levels(C: tl.constexpr, LEVELS: tl.constexpr):
    """[C, C]: at which level row i sees row j, the highest bit in which they differ; -1 where it does not, i <= j."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    found = tl.full((C, C), -1, tl.int32)
    for bit in tl.static_range(LEVELS):
        found = tl.where((i > j) & ((i ^ j) >> bit > 0), bit, found)
    return found


@triton.jit
def _since(high, low, gamma, rows, keys, C: tl.constexpr, K: tl.constexpr, FULL: tl.constexpr, TWO: tl.constexpr):
    """Decay of each row of [C, BK] = (high, low) since row ``rows`` [C] of its chunk, that row's own not included."""
    every = rows >= 0
    since = high - load_tile(gamma, K, rows, every, keys, K, FULL)
    if TWO:
        since += low - load_tile(gamma + C * K, K, rows, every, keys, K, FULL)
    return since


@triton.jit
def _to_middle(high, low, gamma, level, keys, C: tl.constexpr, K: tl.constexpr, FULL: tl.constexpr, TWO: tl.constexpr):
    """exp of the decay between each row and the last one of the lower half of its block of 2^(level + 1) rows."""
    c = tl.arange(0, C)
    middle = (((c >> level) | 1) << level) - 1
    since = _since(high, low, gamma, middle, keys, C, K, FULL, TWO)
    return tl.exp(tl.where((c > middle)[:, None], since, -since))


@triton.jit
def _to_end(high, low, gamma, keys, C: tl.constexpr, K: tl.constexpr, FULL: tl.constexpr, TWO: tl.constexpr):
    """exp of the decay after each row."""
    last = tl.full((C,), C - 1, tl.int32)
    return tl.exp(-_since(high, low, gamma, last, keys, C, K, FULL, TWO))


@triton.jit(do_not_specialize=["segments", "rows", "time"])
def prepare(
    q, k, g, cu, o, pairs, reads, writes, gamma,
    scale, segments, rows, time, q_stride: tl.constexpr, k_stride: tl.constexpr, g_stride: tl.constexpr,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, TWO: tl.constexpr,
    PRECISION: tl.constexpr, VARLEN: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """One chunk of one key head: what does not depend on the state. Clears o in rows of no segment."""
    slot, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    segment, start, end = chunk_of_slot(cu, slot, segments, rows, time, C, VARLEN, SEARCH)
    if start >= end:
        return
    c = tl.arange(0, C)
    here = c < (end - start).to(tl.int32)
    if VARLEN and segment == segments:
        clear_rows(o + (start * H + head) * (GROUP * V), H * GROUP * V, here, C, GROUP * V, BK)
        return
    q += start * q_stride + head * K
    k += start * k_stride + head * K
    g += start * g_stride + head * K
    reads += (start * H + head) * K
    writes += (start * H + head) * K
    place = slot * H + head
    gamma += place * ((2 if TWO else 1) * C * K)
    narrow: tl.constexpr = pairs.dtype.element_ty
    levels = _levels(C, LEVELS)
    weights, same = tl.zeros((C, C), tl.float32), tl.zeros((C,), tl.float32)
    for at in tl.range(0, K, BK, disable_licm=True):
        keys = at + tl.arange(0, BK)
        g_tile = load_tile(g, g_stride, c, here, keys, K, K % BK == 0).to(tl.float32)
        g_tile = tl.maximum(g_tile, FORGOTTEN)
        if TWO:
            high, low = two_floats(tl.cumsum(g_tile.to(tl.float64), 0))
            store_tile(gamma + C * K, K, c, c >= 0, keys, low, K, K % BK == 0)
        else:
            high, low = tl.cumsum(g_tile, 0), g_tile
        store_tile(gamma, K, c, c >= 0, keys, high, K, K % BK == 0)
        tl.debug_barrier()  # what follows reads what was just written
        q_wide = load_tile(q, q_stride, c, here, keys, K, K % BK == 0).to(tl.float32)
        k_wide = load_tile(k, k_stride, c, here, keys, K, K % BK == 0).to(tl.float32)
        same += tl.sum(q_wide * k_wide, 1)
        for level in tl.range(0, LEVELS, disable_licm=True):
            decay = _to_middle(high, low, gamma, level, keys, C, K, K % BK == 0, TWO)
            reader, writer = (q_wide * decay).to(narrow), (k_wide * decay).to(narrow)
            seen = tl.dot(reader, tl.trans(writer), input_precision=PRECISION)
            weights += tl.where(levels == level, seen, 0.0)
        store_tile(reads, H * K, c, here, keys, q_wide * tl.exp(high) * scale, K, K % BK == 0)
        to_end = _to_end(high, low, gamma, keys, C, K, K % BK == 0, TWO)
        store_tile(writes, H * K, c, here, keys, k_wide * to_end, K, K % BK == 0)
    weights += tl.where(c[:, None] == c[None, :], same[:, None], 0.0)
    tl.store(square(pairs + place * (C * C), C), (weights * scale).to(narrow))


@triton.jit(do_not_specialize=["segments", "rows", "time"])
def scan(
    x, y, v, cu, pairs, gamma, initial, out, states, final,
    segments, rows, time, v_stride: tl.constexpr,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, TWO: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """One segment, one value head, BV columns of v, the state in registers. Forward x = reads, y = writes, v = v, out = o; in
    reverse x = writes, y = reads, v = dO, out = dv."""
    tiles: tl.constexpr = (V + BV - 1) // BV
    HV: tl.constexpr = H * GROUP
    program = tl.program_id(0)
    head, segment = program // tiles % HV, program // (tiles * HV)
    start, end, slot = segment_rows(cu, segment, segments, rows, time, C, VARLEN)
    length = (end - start).to(tl.int32)
    c, keys, columns = tl.arange(0, C), tl.arange(0, BK), program % tiles * BV + tl.arange(0, BV)
    inside = keys < K
    x += head // GROUP * K
    y += head // GROUP * K
    v += head * V
    out += head * V
    narrow: tl.constexpr = v.dtype.element_ty
    state = tl.zeros((BK, BV), tl.float32)
    this = (segment.to(tl.int64) * HV + head) * (K * V)
    if initial is not None:
        state = load_tile(initial + this, V, keys, inside, columns, V, V % BV == 0).to(tl.float32)
    chunks = tl.cdiv(length, C)
    for step in tl.range(0, chunks, disable_licm=True):
        chunk = chunks - 1 - step if REVERSE else step
        first = chunk * C
        row, here = start + first, first + c < length
        place = (slot + chunk) * H + head // GROUP
        x_tile = load_tile(x + row * (H * K), H * K, c, here, keys, K, K == BK)
        y_tile = load_tile(y + row * (H * K), H * K, c, here, keys, K, K == BK)
        v_tile = load_tile(v + row * v_stride, v_stride, c, here, columns, V, V % BV == 0)
        pairs_tile = tl.load(square(pairs + place * (C * C), C))
        if REVERSE:
            pairs_tile = tl.trans(pairs_tile)
        last = gamma + place * ((2 if TWO else 1) * C * K) + (C - 1) * K
        decay = tl.exp(tl.load(last + keys, mask=inside, other=0.0))
        entering = state.to(narrow)
        if states is not None:
            kept = states + ((slot + chunk) * HV + head) * (K * V)
            store_tile(kept, V, keys, inside, columns, entering, V, V % BV == 0)
        result = tl.dot(x_tile, entering, input_precision=PRECISION)
        result = tl.dot(pairs_tile, v_tile, result, input_precision=PRECISION)
        store_tile(out + row * (HV * V), HV * V, c, here, columns, result, V, V % BV == 0)
        state = tl.dot(tl.trans(y_tile), v_tile, state * decay[:, None], input_precision=PRECISION)
    if final is not None:
        store_tile(final + this, V, keys, inside, columns, state, V, V % BV == 0)


@triton.jit(do_not_specialize=["segments", "rows", "time"])
def gradients(
    q, k, v, do, cu, gamma, states, dstates, dpairs, dq, dk, dg, dv,
    scale, segments, rows, time, q_stride: tl.constexpr, k_stride: tl.constexpr,
    v_stride: tl.constexpr, do_stride: tl.constexpr,
    H: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, TWO: tl.constexpr,
    PRECISION: tl.constexpr, VARLEN: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """One chunk of one key head: dq, dk and dg. Clears all four gradients in rows of no segment.

    ``dpairs`` is memory of its own: what is read from there may be transposed, which of a product in registers Hopper's compilers
    get wrong, and takes no registers meanwhile.
    """
    slot, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    HV: tl.constexpr = H * GROUP
    segment, start, end = chunk_of_slot(cu, slot, segments, rows, time, C, VARLEN, SEARCH)
    if start >= end:
        return
    c = tl.arange(0, C)
    here = c < (end - start).to(tl.int32)
    dq += (start * H + head) * K
    dk += (start * H + head) * K
    if dg is not None:
        dg += (start * H + head) * K
    if VARLEN and segment == segments:
        clear_rows(dq, H * K, here, C, K, BK)
        clear_rows(dk, H * K, here, C, K, BK)
        if dg is not None:
            clear_rows(dg, H * K, here, C, K, BK)
        clear_rows(dv + (start * H + head) * (GROUP * V), HV * V, here, C, GROUP * V, BV)
        return
    q += start * q_stride + head * K
    k += start * k_stride + head * K
    v += start * v_stride + head * GROUP * V
    do += start * do_stride + head * GROUP * V
    states += (slot * HV + head * GROUP) * (K * V)
    dstates += (slot * HV + head * GROUP) * (K * V)
    dpairs += (slot * H + head) * (C * C)
    gamma += (slot * H + head) * ((2 if TWO else 1) * C * K)
    narrow: tl.constexpr = v.dtype.element_ty

    met = tl.zeros((C, C), tl.float32)
    for member in tl.range(0, GROUP, disable_licm=True):
        for at in tl.range(0, V, BV, disable_licm=True):
            columns = at + tl.arange(0, BV)
            v_tile = load_tile(v + member * V, v_stride, c, here, columns, V, V % BV == 0)
            do_tile = load_tile(do + member * V, do_stride, c, here, columns, V, V % BV == 0)
            met = tl.dot(do_tile, tl.trans(v_tile), met, input_precision=PRECISION)
    met *= scale
    same = tl.sum(tl.where(c[:, None] == c[None, :], met, 0.0), 1)
    tl.store(square(dpairs, C), met.to(narrow))
    tl.debug_barrier()  # what follows reads what was just written

    levels = _levels(C, LEVELS)
    for first in tl.range(0, K, BK, disable_licm=True):
        keys = first + tl.arange(0, BK)
        high = load_tile(gamma, K, c, c >= 0, keys, K, K % BK == 0)
        low = load_tile(gamma + C * K, K, c, c >= 0, keys, K, K % BK == 0) if TWO else high
        dq_tile, dk_tile = tl.zeros((C, BK), tl.float32), tl.zeros((C, BK), tl.float32)
        for level in tl.range(0, LEVELS, disable_licm=True):
            q_wide = load_tile(q, q_stride, c, here, keys, K, K % BK == 0).to(tl.float32)
            k_wide = load_tile(k, k_stride, c, here, keys, K, K % BK == 0).to(tl.float32)
            decay = _to_middle(high, low, gamma, level, keys, C, K, K % BK == 0, TWO)
            reader, writer = (q_wide * decay).to(narrow), (k_wide * decay).to(narrow)
            seen = tl.where(levels == level, tl.load(square(dpairs, C)), 0.0)
            dq_tile += decay * tl.dot(seen, writer, input_precision=PRECISION)
            dk_tile += decay * tl.dot(tl.trans(seen), reader, input_precision=PRECISION)

        from_state, to_state = tl.zeros((C, BK), tl.float32), tl.zeros((C, BK), tl.float32)
        carried = tl.zeros((BK,), tl.float32)
        for member in tl.range(0, GROUP, disable_licm=True):
            for at in tl.range(0, V, BV, disable_licm=True):
                columns, of_member = at + tl.arange(0, BV), member * (K * V)
                v_tile = load_tile(v + member * V, v_stride, c, here, columns, V, V % BV == 0)
                do_tile = load_tile(do + member * V, do_stride, c, here, columns, V, V % BV == 0)
                state = load_tile(states + of_member, V, keys, keys < K, columns, V, V % BV == 0)
                dstate = load_tile(dstates + of_member, V, keys, keys < K, columns, V, V % BV == 0)
                from_state = tl.dot(do_tile, tl.trans(state), from_state, input_precision=PRECISION)
                to_state = tl.dot(v_tile, tl.trans(dstate), to_state, input_precision=PRECISION)
                if dg is not None:
                    carried += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1)
        dq_tile += from_state * tl.exp(high) * scale
        to_state *= _to_end(high, low, gamma, keys, C, K, K % BK == 0, TWO)
        q_wide = load_tile(q, q_stride, c, here, keys, K, K % BK == 0).to(tl.float32)
        k_wide = load_tile(k, k_stride, c, here, keys, K, K % BK == 0).to(tl.float32)
        if dg is not None:
            # What is written into the leaving state passes the decays after its row, what is carried through passes all.
            written = k_wide * to_state
            dg_tile = tl.cumsum(q_wide * dq_tile - k_wide * dk_tile, 0, reverse=True) + tl.cumsum(written, 0) - written
            carried *= tl.exp(tl.load(gamma + (C - 1) * K + keys, mask=keys < K, other=0.0))
            store_tile(dg, H * K, c, here, keys, dg_tile + carried[None, :], K, K % BK == 0)
        # Products of a row with itself do not depend on g: with them q dq - k dk were a small difference of large numbers.
        dq_tile += same[:, None] * k_wide
        dk_tile += to_state + same[:, None] * q_wide
        store_tile(dq, H * K, c, here, keys, dq_tile, K, K % BK == 0)
        store_tile(dk, H * K, c, here, keys, dk_tile, K, K % BK == 0)
