"""The two kernels of the forward; see `kernels.gated_delta_rule.triton` for what they hand on and to whom."""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false
# (the checker takes what Triton compiles for Python)

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gated_delta_rule.triton_tiles import decay_between, unit_lower_inverse
from kernels.triton import chunk_of_slot, clear_rows, load_tile, segment_rows, square, store_tile, two_floats

FROM_Q, FROM_K, TO_K, Q_NORM, K_NORM, BETA, HIGH, LOW = (tl.constexpr(i) for i in range(8))
PLANES = tl.constexpr(8)


@triton.jit(do_not_specialize=["segments", "total", "time"])
def prepare(
    q, k, g, beta, cu, o, inverse, reads, factors,
    scale, segments, total, time, q_stride: tl.constexpr, k_stride: tl.constexpr,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    NORM: tl.constexpr, EPS: tl.constexpr, PRECISION: tl.constexpr, SOLVE: tl.constexpr,
    VARLEN: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """One chunk of one value head: what does not depend on the state. Clears o in rows of no segment."""
    slot, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    segment, start, end = chunk_of_slot(cu, slot, segments, total, time, C, VARLEN, SEARCH)
    if start >= end:
        return
    c = tl.arange(0, C)
    here = c < (end - start).to(tl.int32)
    if VARLEN and segment == segments:
        clear_rows(o + (start * HV + head) * V, HV * V, here, C, V, BV)
        return
    q += start * q_stride + head // GROUP * K
    k += start * k_stride + head // GROUP * K
    kk, qk = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    q_norm, k_norm = tl.full((C,), 1.0, tl.float32), tl.full((C,), 1.0, tl.float32)
    if NORM:
        q_norm, k_norm = tl.full((C,), EPS, tl.float32), tl.full((C,), EPS, tl.float32)
    for at in range(0, K, BK):
        columns = at + tl.arange(0, BK)
        q_tile = load_tile(q, q_stride, c, here, columns, K, K % BK == 0)
        k_tile = load_tile(k, k_stride, c, here, columns, K, K % BK == 0)
        kk = tl.dot(k_tile, tl.trans(k_tile), kk, input_precision=PRECISION)
        qk = tl.dot(q_tile, tl.trans(k_tile), qk, input_precision=PRECISION)
        if NORM:
            q_wide, k_wide = q_tile.to(tl.float32), k_tile.to(tl.float32)
            q_norm += tl.sum(q_wide * q_wide, 1)
            k_norm += tl.sum(k_wide * k_wide, 1)
    if NORM:
        q_norm, k_norm = tl.rsqrt(q_norm), tl.rsqrt(k_norm)
    strength = tl.where(here, 1.0, 0.0)
    if beta is not None:
        strength = tl.load(beta + start * HV + head + c * HV, mask=here, other=0.0).to(tl.float32)
    gamma = tl.zeros((C,), tl.float64)
    if g is not None:
        gamma = tl.cumsum(tl.load(g + start * HV + head + c * HV, mask=here, other=0.0).to(tl.float64), 0)
    last = tl.sum(tl.where(c == C - 1, gamma, 0.0), 0)
    from_start, to_end = tl.exp(gamma.to(tl.float32)), tl.exp((last - gamma).to(tl.float32))

    high, low = two_floats(gamma)
    place = slot * HV + head
    factors += place * (PLANES * C)
    tl.store(factors + FROM_Q * C + c, scale * q_norm * from_start)
    tl.store(factors + FROM_K * C + c, k_norm * from_start)
    tl.store(factors + TO_K * C + c, strength * k_norm * to_end)
    tl.store(factors + Q_NORM * C + c, q_norm)
    tl.store(factors + K_NORM * C + c, k_norm)
    tl.store(factors + BETA * C + c, strength)
    tl.store(factors + HIGH * C + c, high)
    tl.store(factors + LOW * C + c, low)

    i, j = c[:, None], c[None, :]
    between = decay_between(high, low, i >= j) * (strength * k_norm)[None, :]
    tl.store(square(reads + place * (C * C), C), (qk * between * (scale * q_norm)[:, None]).to(reads.dtype.element_ty))
    lower = tl.where(i > j, kk * between * k_norm[:, None], 0.0)
    tl.store(square(inverse + place * (C * C), C), unit_lower_inverse(lower, C, SOLVE).to(inverse.dtype.element_ty))


@triton.jit(do_not_specialize=["segments", "total", "time"])
def scan(
    q, k, v, cu, inverse, reads, factors, initial, o, errors, states, final,
    segments, total, time, q_stride: tl.constexpr, k_stride: tl.constexpr, v_stride: tl.constexpr,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """One segment, one value head, BV columns of v: chunk after chunk, the state in registers."""
    tiles: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    head, segment = program // tiles % HV, program // (tiles * HV)
    start, end, slot = segment_rows(cu, segment, segments, total, time, C, VARLEN)
    length = (end - start).to(tl.int32)
    c, keys, columns = tl.arange(0, C), tl.arange(0, BK), program % tiles * BV + tl.arange(0, BV)
    inside = keys < K
    q += head // GROUP * K
    k += head // GROUP * K
    v += head * V
    o += head * V
    errors += head * V
    narrow: tl.constexpr = k.dtype.element_ty
    state = tl.zeros((BK, BV), tl.float32)
    at = (segment.to(tl.int64) * HV + head) * (K * V)
    if initial is not None:
        state = load_tile(initial + at, V, keys, inside, columns, V, V % BV == 0).to(tl.float32)
    for chunk in tl.range(0, tl.cdiv(length, C), disable_licm=True):
        first = chunk * C
        row, here = start + first, first + c < length
        place = (slot + chunk) * HV + head
        plane = factors + place * (PLANES * C)
        from_q, from_k = tl.load(plane + FROM_Q * C + c), tl.load(plane + FROM_K * C + c)
        to_k = tl.load(plane + TO_K * C + c)
        decay = tl.exp(tl.load(plane + HIGH * C + C - 1) + tl.load(plane + LOW * C + C - 1))
        k_tile = load_tile(k + row * k_stride, k_stride, c, here, keys, K, K == BK)
        q_tile = load_tile(q + row * q_stride, q_stride, c, here, keys, K, K == BK)
        v_tile = load_tile(v + row * v_stride, v_stride, c, here, columns, V, V % BV == 0)
        inverse_tile = tl.load(square(inverse + place * (C * C), C))
        reads_tile = tl.load(square(reads + place * (C * C), C))
        entering = state.to(narrow)
        store_tile(states + place * (K * V), V, keys, inside, columns, entering, V, V % BV == 0)
        found = tl.dot(k_tile, entering, input_precision=PRECISION)
        wrong = (v_tile.to(tl.float32) - from_k[:, None] * found).to(narrow)
        error = tl.dot(inverse_tile, wrong, input_precision=PRECISION)
        store_tile(errors + row * (HV * V), HV * V, c, here, columns, error, V, V % BV == 0)
        out = from_q[:, None] * tl.dot(q_tile, entering, input_precision=PRECISION)
        out = tl.dot(reads_tile, error.to(narrow), out, input_precision=PRECISION)
        store_tile(o + row * (HV * V), HV * V, c, here, columns, out, V, V % BV == 0)
        write = (to_k[:, None] * error).to(narrow)
        state = tl.dot(tl.trans(k_tile), write, state * decay, input_precision=PRECISION)
    if final is not None:
        store_tile(final + at, V, keys, inside, columns, state, V, V % BV == 0)
