"""The kernels: a scan over the chunks of a segment, and the gradients of q and k of a chunk. The algebra is in ``reference``."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton import chunk_of_slot, offsets, segment_rows


@triton.jit
def _decays(g, head, first, c, inside, HV: tl.constexpr, DECAY: tl.constexpr):
    """-> (cumulative decay of rows first + c, its last value). DECAY: 1 constant, 2 of each row."""
    if DECAY == 1:
        value = tl.where(inside, tl.load(g + head).to(tl.float32), 0.0)
    else:
        value = tl.load(g + first * HV + head + c * HV, mask=inside, other=0.0).to(tl.float32)
    # exp(-128) is zero in fp32; without the bound one strong decay would cost all later differences their last digits.
    value = tl.maximum(value, -128.0)
    return tl.cumsum(value, 0), tl.sum(value, 0)


@triton.jit(do_not_specialize=["segments", "rows", "time"])
def scan(
    x,
    y,
    v,
    g,
    cu,
    initial,
    out,
    states,
    final,
    segments,
    rows,
    time,
    sx: tl.constexpr,
    sy: tl.constexpr,
    sv: tl.constexpr,
    scale,
    K: tl.constexpr,
    V: tl.constexpr,
    H: tl.constexpr,
    HV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    DECAY: tl.constexpr,
    REVERSE: tl.constexpr,
    VARLEN: tl.constexpr,
    INITIAL: tl.constexpr,
    STATES: tl.constexpr,
    FINAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (tile of V, value head, segment). Forward x = q, y = k, v = v; in reverse x = k, y = q, v = dO."""
    head, segment = tl.program_id(1), tl.program_id(2)
    live = segment < segments
    found = segment_rows(cu, segment, segments, rows, time, C, VARLEN)
    start, end, slot = found  # pyright: ignore[reportGeneralTypeIssues]
    length = (end - start).to(tl.int32)
    n = tl.cdiv(length, C)
    c, kk, vv = tl.arange(0, C), tl.arange(0, BK), tl.program_id(0) * BV + tl.arange(0, BV)
    in_k, in_v = kk < K, vv < V
    in_state = in_k[:, None] & in_v[None, :]
    at_x, at_y, at_v = offsets(c, kk, sx), offsets(c, kk, sy), offsets(c, vv, sv)
    at_out, at_state = offsets(c, vv, HV * V), offsets(kk, vv, V)
    x += start * sx + head // (HV // H) * K
    y += start * sy + head // (HV // H) * K
    v += start * sv + head * V
    out += (start * HV + head) * V
    seen = c[:, None] <= c[None, :] if REVERSE else c[:, None] >= c[None, :]
    read_scale = 1.0 if REVERSE else scale
    write_scale = scale if REVERSE else 1.0

    state = tl.zeros((BK, BV), tl.float32)
    this = (segment.to(tl.int64) * HV + head) * (K * V)
    if INITIAL:
        state = tl.load(initial + this + at_state, mask=in_state & live, other=0.0).to(tl.float32)
    if FINAL and n == 0:
        tl.store(final + this + at_state, state, mask=in_state & live)
    for i in tl.range(n, disable_licm=True):
        chunk = slot + (n - 1 - i if REVERSE else i)
        row = (chunk - slot) * C
        stored = c < length - (n - 1 - i if REVERSE else i) * C
        inside = stored & live
        x_tile = tl.load(x + row * sx + at_x, mask=inside[:, None] & in_k[None, :], other=0.0)
        y_tile = tl.load(y + row * sy + at_y, mask=inside[:, None] & in_k[None, :], other=0.0)
        v_tile = tl.load(v + row * sv + at_v, mask=inside[:, None] & in_v[None, :], other=0.0)
        if STATES:
            here = states + (chunk * HV + head) * (K * V)
            tl.store(here + at_state, state.to(states.dtype.element_ty), mask=in_state & live)
        pairs = tl.dot(x_tile, tl.trans(y_tile), input_precision=PRECISION) * scale
        if DECAY:
            gamma, total = _decays(g, head, start + row, c, inside, HV, DECAY)
            between = gamma[None, :] - gamma[:, None] if REVERSE else gamma[:, None] - gamma[None, :]
            pairs *= tl.exp(tl.where(seen, between, float("-inf")))
        else:
            pairs = tl.where(seen, pairs, 0.0)
        pairs = pairs.to(v_tile.dtype)
        result = tl.dot(x_tile, state.to(x_tile.dtype), input_precision=PRECISION) * read_scale
        if DECAY:
            result *= tl.exp(total - gamma if REVERSE else gamma)[:, None]
        result = tl.dot(pairs, v_tile, result, input_precision=PRECISION)
        here = out + row * (HV * V)
        tl.store(here + at_out, result.to(out.dtype.element_ty), mask=stored[:, None] & in_v[None, :])
        if DECAY:
            state *= tl.exp(total)
            v_tile = v_tile.to(tl.float32) * (tl.exp(gamma if REVERSE else total - gamma) * write_scale)[:, None]
        elif REVERSE:
            v_tile = v_tile.to(tl.float32) * write_scale
        state = tl.dot(tl.trans(y_tile), v_tile.to(y_tile.dtype), state, input_precision=PRECISION)
        # Inside the loop, so that its addresses take no registers while the loop runs.
        if FINAL and i == n - 1:
            tl.store(final + this + at_state, state, mask=in_state & live)


@triton.jit(do_not_specialize=["segments", "rows", "time"])
def gradient(
    a,
    b,
    x,
    y,
    g,
    cu,
    states,
    entered,
    dy,
    dg,
    segments,
    rows,
    time,
    sa: tl.constexpr,
    sb: tl.constexpr,
    sx: tl.constexpr,
    sy: tl.constexpr,
    scale,
    K: tl.constexpr,
    V: tl.constexpr,
    H: tl.constexpr,
    HV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    DECAY: tl.constexpr,
    REVERSE: tl.constexpr,
    VARLEN: tl.constexpr,
    SEARCH: tl.constexpr,
    GRADIENT_OF_DECAY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (slot of a chunk, tile of K, key head): dy of y = q (a = dO, b = V, x = k, ``states`` those that entered) or, in
    reverse, of y = k (a = V, b = dO, x = q, ``states`` the gradients of those that left, ``entered`` those that entered).

    dg [tiles of K, rows, HV] is each tile's share of the sum over K; in reverse it adds to what is there. Products of a row with
    itself join last: they do not depend on the decay, and q dq - k dk would be a small difference of large numbers with them.
    """
    slot, head = tl.program_id(0).to(tl.int64), tl.program_id(2)
    found = chunk_of_slot(cu, slot, segments, rows, time, C, VARLEN, SEARCH)
    segment, first, end = found
    c, kk = tl.arange(0, C), tl.program_id(1) * BK + tl.arange(0, BK)
    in_k = kk < K
    stored = c < (end - first).to(tl.int32)
    inside = stored & (segment < segments)
    used = (segment < segments) & (first < end)
    here = inside[:, None] & in_k[None, :]
    x_tile = tl.load(x + first * sx + head * K + offsets(c, kk, sx), mask=here, other=0.0)
    y_tile = tl.load(y + first * sy + head * K + offsets(c, kk, sy), mask=here, other=0.0)
    other = c[:, None] < c[None, :] if REVERSE else c[:, None] > c[None, :]
    total_gradient = tl.zeros((C, BK), tl.float32)
    same = tl.zeros((C,), tl.float32)
    for j in tl.range(HV // H, disable_licm=True):
        value_head = head * (HV // H) + j
        state_of_head = (slot * HV + value_head) * (K * V)
        pairs = tl.zeros((C, C), tl.float32)
        gradient = tl.zeros((C, BK), tl.float32)
        for tile in tl.range(tl.cdiv(V, BV), disable_licm=True):
            vv = tile * BV + tl.arange(0, BV)
            in_v = inside[:, None] & (vv < V)[None, :]
            a_tile = tl.load(a + first * sa + value_head * V + offsets(c, vv, sa), mask=in_v, other=0.0)
            b_tile = tl.load(b + first * sb + value_head * V + offsets(c, vv, sb), mask=in_v, other=0.0)
            in_state = in_k[:, None] & (vv < V)[None, :] & used
            state = tl.load(states + state_of_head + offsets(kk, vv, V), mask=in_state, other=0.0)
            pairs = tl.dot(a_tile, tl.trans(b_tile), pairs, input_precision=PRECISION)
            gradient = tl.dot(a_tile, tl.trans(state), gradient, input_precision=PRECISION)
        same += tl.sum(tl.where(c[:, None] == c[None, :], pairs, 0.0), 1)
        pairs = tl.where(other, pairs * scale, 0.0)
        if not REVERSE:
            gradient *= scale
        if DECAY:
            gamma, total = _decays(g, value_head, first, c, inside, HV, DECAY)
            gradient *= tl.exp(total - gamma if REVERSE else gamma)[:, None]
            between = gamma[None, :] - gamma[:, None] if REVERSE else gamma[:, None] - gamma[None, :]
            pairs *= tl.exp(tl.where(other, between, 0.0))
        if GRADIENT_OF_DECAY and REVERSE:
            ends = tl.sum(y_tile.to(tl.float32) * gradient)
            for tile in tl.range(tl.cdiv(V, BV), disable_licm=True):
                vv = tile * BV + tl.arange(0, BV)
                at_state = state_of_head + offsets(kk, vv, V)
                in_state = in_k[:, None] & (vv < V)[None, :] & used
                state = tl.load(entered + at_state, mask=in_state, other=0.0).to(tl.float32)
                dstate = tl.load(states + at_state, mask=in_state, other=0.0).to(tl.float32)
                ends += tl.sum(state * dstate) * tl.exp(total)
        gradient = tl.dot(pairs.to(x_tile.dtype), x_tile, gradient, input_precision=PRECISION)
        total_gradient += gradient
        if GRADIENT_OF_DECAY:
            dgamma = tl.sum(y_tile.to(tl.float32) * gradient, 1)
            at = dg + (tl.program_id(1) * rows.to(tl.int64) + first) * HV + value_head + c * HV
            if REVERSE:
                share = tl.load(at, mask=inside, other=0.0) - tl.cumsum(dgamma, 0, reverse=True) + ends
            else:
                share = tl.cumsum(dgamma, 0, reverse=True)
            tl.store(at, share, mask=stored)
    total_gradient += (same * scale)[:, None] * x_tile.to(tl.float32)
    at = dy + (first * H + head) * K + offsets(c, kk, H * K)
    tl.store(at, total_gradient.to(dy.dtype.element_ty), mask=stored[:, None] & in_k[None, :])
