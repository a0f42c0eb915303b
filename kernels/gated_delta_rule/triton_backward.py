"""The three kernels of the backward; see `kernels.gated_delta_rule.triton` for what they hand on and to whom."""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false
# (the checker takes what Triton compiles for Python)

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gated_delta_rule.triton_forward import BETA, FROM_K, FROM_Q, HIGH, K_NORM, LOW, PLANES, Q_NORM, TO_K
from kernels.gated_delta_rule.triton_tiles import decay_between
from kernels.triton import chunk_of_slot, clear_rows, load_tile, segment_rows, square, store_tile

Q_DQ, SAME, QK = (tl.constexpr(i) for i in range(3))
LEAST_BETA = tl.constexpr(2.0**-8)


@triton.jit
def off_zero(beta):
    """What a key writes goes with beta, so its gradient over beta is that of beta: of a beta kept off zero until it has."""
    return tl.where(tl.abs(beta) < LEAST_BETA, LEAST_BETA, beta)


@triton.jit(do_not_specialize=["segments", "total", "time"])
def scan_back(
    q, k, do, cu, inverse, reads, factors, dfinal, dv, dstates, dinitial,
    segments, total, time, q_stride: tl.constexpr, k_stride: tl.constexpr, do_stride: tl.constexpr,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """One segment, one value head, BV columns of v: from the last chunk to the row, the gradient of the state in registers."""
    tiles: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    head, segment = program // tiles % HV, program // (tiles * HV)
    start, end, slot = segment_rows(cu, segment, segments, total, time, C, VARLEN)
    length = (end - start).to(tl.int32)
    c, keys, columns = tl.arange(0, C), tl.arange(0, BK), program % tiles * BV + tl.arange(0, BV)
    inside = keys < K
    q += head // GROUP * K
    k += head // GROUP * K
    do += head * V
    dv += head * V
    narrow: tl.constexpr = k.dtype.element_ty
    dstate = tl.zeros((BK, BV), tl.float32)
    at = (segment.to(tl.int64) * HV + head) * (K * V)
    if dfinal is not None:
        dstate = load_tile(dfinal + at, V, keys, inside, columns, V, V % BV == 0).to(tl.float32)
    chunks = tl.cdiv(length, C)
    for back in tl.range(0, chunks, disable_licm=True):
        chunk = chunks - 1 - back
        first = chunk * C
        row, here = start + first, first + c < length
        place = (slot + chunk) * HV + head
        plane = factors + place * (PLANES * C)
        from_q, from_k = tl.load(plane + FROM_Q * C + c), tl.load(plane + FROM_K * C + c)
        to_k = tl.load(plane + TO_K * C + c)
        decay = tl.exp(tl.load(plane + HIGH * C + C - 1) + tl.load(plane + LOW * C + C - 1))
        k_tile = load_tile(k + row * k_stride, k_stride, c, here, keys, K, K == BK)
        q_tile = load_tile(q + row * q_stride, q_stride, c, here, keys, K, K == BK)
        do_tile = load_tile(do + row * do_stride, do_stride, c, here, columns, V, V % BV == 0)
        inverse_tile = tl.load(square(inverse + place * (C * C), C))
        reads_tile = tl.load(square(reads + place * (C * C), C))
        leaving = dstate.to(narrow)
        store_tile(dstates + place * (K * V), V, keys, inside, columns, leaving, V, V % BV == 0)
        derror = to_k[:, None] * tl.dot(k_tile, leaving, input_precision=PRECISION)
        derror = tl.dot(tl.trans(reads_tile), do_tile, derror, input_precision=PRECISION)
        dwrong = tl.dot(tl.trans(inverse_tile), derror.to(narrow), input_precision=PRECISION)
        store_tile(dv + row * (HV * V), HV * V, c, here, columns, dwrong, V, V % BV == 0)
        read = (from_q[:, None] * do_tile.to(tl.float32)).to(narrow)
        dstate = tl.dot(tl.trans(q_tile), read, dstate * decay, input_precision=PRECISION)
        read = (-from_k[:, None] * dwrong).to(narrow)
        dstate = tl.dot(tl.trans(k_tile), read, dstate, input_precision=PRECISION)
    if dinitial is not None:
        store_tile(dinitial + at, V, keys, inside, columns, dstate, V, V % BV == 0)


@triton.jit(do_not_specialize=["segments", "total", "time"])
def query_gradients(
    q, k, do, errors, states, dv, factors, cu, pairs, sums, dq,
    scale, segments, total, time, q_stride: tl.constexpr, k_stride: tl.constexpr, do_stride: tl.constexpr,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    VARLEN: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """One chunk of one value head: dq, and what `key_gradients` needs. Clears dq in rows of no segment.

    Products of a row with itself do not depend on g and are kept apart (SAME): its gradient would be a small difference of large
    numbers. dq is first that of the normalised q times |q|^-1; then dq - q |q|^-2 <q, dq> is left.
    """
    slot, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    segment, start, end = chunk_of_slot(cu, slot, segments, total, time, C, VARLEN, SEARCH)
    if start >= end:
        return
    c = tl.arange(0, C)
    here = c < (end - start).to(tl.int32)
    dq += (start * HV + head) * K
    if VARLEN and segment == segments:
        clear_rows(dq, HV * K, here, C, K, BK)
        return
    q += start * q_stride + head // GROUP * K
    k += start * k_stride + head // GROUP * K
    do += start * do_stride + head * V
    dv += (start * HV + head) * V
    errors += (start * HV + head) * V
    place = slot * HV + head
    states += place * (K * V)
    pairs += place * (2 * C * C)
    factors += place * (PLANES * C)
    narrow: tl.constexpr = k.dtype.element_ty
    q_norm, k_norm = tl.load(factors + Q_NORM * C + c), tl.load(factors + K_NORM * C + c)
    beta = tl.load(factors + BETA * C + c)
    lifted = off_zero(beta)
    high, low = tl.load(factors + HIGH * C + c), tl.load(factors + LOW * C + c)
    factor = decay_between(high, low, c[:, None] > c[None, :]) * (lifted * k_norm)[None, :]

    erase = tl.zeros((C, C), tl.float32)
    for at in range(0, V, BV):
        columns = at + tl.arange(0, BV)
        dv_tile = load_tile(dv, HV * V, c, here, columns, V, V % BV == 0)
        error = load_tile(errors, HV * V, c, here, columns, V, V % BV == 0)
        erase = tl.dot(dv_tile, tl.trans(error), erase, input_precision=PRECISION)
    tl.store(square(pairs + C * C, C), (erase * factor * -k_norm[:, None]).to(narrow))
    read, same = tl.zeros((C, C), tl.float32), tl.zeros((C,), tl.float32)
    for at in range(0, V, BV):
        columns = at + tl.arange(0, BV)
        do_tile = load_tile(do, do_stride, c, here, columns, V, V % BV == 0)
        error = load_tile(errors, HV * V, c, here, columns, V, V % BV == 0)
        read = tl.dot(do_tile, tl.trans(error), read, input_precision=PRECISION)
        same += tl.sum(do_tile.to(tl.float32) * error.to(tl.float32), 1)
    same *= scale * q_norm * k_norm
    read_tile = (read * factor * (scale * q_norm)[:, None]).to(narrow)
    tl.store(square(pairs, C), read_tile)

    from_q = tl.load(factors + FROM_Q * C + c)
    q_dq, qk = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
    for at in tl.range(0, K, BK, disable_licm=True):
        keys = at + tl.arange(0, BK)
        dq_tile = tl.zeros((C, BK), tl.float32)
        for value in range(0, V, BV):
            columns = value + tl.arange(0, BV)
            state = load_tile(states, V, keys, keys < K, columns, V, V % BV == 0)
            do_tile = load_tile(do, do_stride, c, here, columns, V, V % BV == 0)
            dq_tile = tl.dot(do_tile, tl.trans(state), dq_tile, input_precision=PRECISION)
        k_wide = load_tile(k, k_stride, c, here, keys, K, K % BK == 0).to(tl.float32)
        k_read = ((beta / lifted)[:, None] * k_wide).to(narrow)
        dq_tile = tl.dot(read_tile, k_read, dq_tile * from_q[:, None], input_precision=PRECISION)
        q_wide = load_tile(q, q_stride, c, here, keys, K, K % BK == 0).to(tl.float32)
        q_dq += tl.sum(dq_tile * q_wide, 1)
        qk += tl.sum(q_wide * k_wide, 1)
        dq_tile += (same * beta)[:, None] * k_wide
        if NORM and K <= BK:
            dq_tile -= q_wide * (q_norm * q_norm * (q_dq + same * beta * qk))[:, None]
        store_tile(dq, HV * K, c, here, keys, dq_tile, K, K % BK == 0)
    sums += place * (3 * C)
    tl.store(sums + Q_DQ * C + c, q_dq)
    tl.store(sums + SAME * C + c, same)
    tl.store(sums + QK * C + c, qk)
    if NORM and K > BK:
        along = q_norm * q_norm * (q_dq + same * beta * qk)
        tl.debug_barrier()  # what follows reads what was just written
        for at in range(0, K, BK):
            keys = at + tl.arange(0, BK)
            q_wide = load_tile(q, q_stride, c, here, keys, K, K % BK == 0).to(tl.float32)
            dq_tile = load_tile(dq, HV * K, c, here, keys, K, K % BK == 0).to(tl.float32)
            store_tile(dq, HV * K, c, here, keys, dq_tile - q_wide * along[:, None], K, K % BK == 0)


@triton.jit(do_not_specialize=["segments", "total", "time"])
def key_gradients(
    q, k, errors, states, dstates, factors, cu, pairs, sums, dk, dv, dg, dbeta,
    segments, total, time, q_stride: tl.constexpr, k_stride: tl.constexpr,
    HV: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    VARLEN: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """One chunk of one value head: dk, dg and dbeta. Reads dv; clears all four in rows of no segment."""
    slot, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    segment, start, end = chunk_of_slot(cu, slot, segments, total, time, C, VARLEN, SEARCH)
    if start >= end:
        return
    c = tl.arange(0, C)
    here = c < (end - start).to(tl.int32)
    dk += (start * HV + head) * K
    dv += (start * HV + head) * V
    if VARLEN and segment == segments:
        clear_rows(dk, HV * K, here, C, K, BK)
        clear_rows(dv, HV * V, here, C, V, BV)
        zero = tl.zeros((C,), tl.float32)
        if dg is not None:
            tl.store(dg + start * HV + head + c * HV, zero.to(dg.dtype.element_ty), mask=here)
        if dbeta is not None:
            tl.store(dbeta + start * HV + head + c * HV, zero.to(dbeta.dtype.element_ty), mask=here)
        return
    q += start * q_stride + head // GROUP * K
    k += start * k_stride + head // GROUP * K
    errors += (start * HV + head) * V
    place = slot * HV + head
    states += place * (K * V)
    dstates += place * (K * V)
    pairs += place * (2 * C * C)
    factors += place * (PLANES * C)
    sums += place * (3 * C)
    narrow: tl.constexpr = k.dtype.element_ty
    k_norm, from_k = tl.load(factors + K_NORM * C + c), tl.load(factors + FROM_K * C + c)
    beta = tl.load(factors + BETA * C + c)
    lifted = off_zero(beta)
    ratio = beta / lifted
    high, low = tl.load(factors + HIGH * C + c), tl.load(factors + LOW * C + c)
    high_end, low_end = tl.load(factors + HIGH * C + C - 1), tl.load(factors + LOW * C + C - 1)
    to_k = lifted * k_norm * tl.exp((high_end - high) + (low_end - low))
    same, qk = tl.load(sums + SAME * C + c), tl.load(sums + QK * C + c)
    k_read, k_write, written = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
    for at in tl.range(0, K, BK, disable_licm=True):
        keys = at + tl.arange(0, BK)
        dk_tile = tl.zeros((C, BK), tl.float32)  # of k where it reads
        for value in range(0, V, BV):
            columns = value + tl.arange(0, BV)
            state = load_tile(states, V, keys, keys < K, columns, V, V % BV == 0)
            dv_tile = load_tile(dv, HV * V, c, here, columns, V, V % BV == 0)
            dk_tile = tl.dot(dv_tile, tl.trans(state), dk_tile, input_precision=PRECISION)
        k_tile = load_tile(k, k_stride, c, here, keys, K, K % BK == 0)
        reader = (ratio[:, None] * k_tile.to(tl.float32)).to(narrow)
        erase = tl.load(square(pairs + C * C, C))
        dk_tile = tl.dot(erase, reader, dk_tile * -from_k[:, None], input_precision=PRECISION)
        k_read += tl.sum(dk_tile * k_tile.to(tl.float32), 1)
        write = tl.zeros((C, BK), tl.float32)  # of k where it writes, for lifted beta
        for value in range(0, V, BV):
            columns = value + tl.arange(0, BV)
            dstate = load_tile(dstates, V, keys, keys < K, columns, V, V % BV == 0)
            error = load_tile(errors, HV * V, c, here, columns, V, V % BV == 0)
            write = tl.dot(error, tl.trans(dstate), write, input_precision=PRECISION)
        write *= to_k[:, None]
        written += tl.sum(write * k_tile.to(tl.float32), 1)
        write = tl.dot(tl.trans(erase), k_tile, write, input_precision=PRECISION)
        q_tile = load_tile(q, q_stride, c, here, keys, K, K % BK == 0)
        write = tl.dot(tl.trans(tl.load(square(pairs, C))), q_tile, write, input_precision=PRECISION)
        k_write += tl.sum(write * k_tile.to(tl.float32), 1)
        dk_tile += ratio[:, None] * write + (same * beta)[:, None] * q_tile.to(tl.float32)
        if NORM and K <= BK:
            along = k_norm * k_norm * (k_read + ratio * k_write + same * beta * qk)
            dk_tile -= along[:, None] * k_tile.to(tl.float32)
        store_tile(dk, HV * K, c, here, keys, dk_tile, K, K % BK == 0)
    if dbeta is not None:
        strength = k_write / lifted + same * qk
        tl.store(dbeta + start * HV + head + c * HV, strength.to(dbeta.dtype.element_ty), mask=here)
    if dg is not None:
        carried = tl.zeros((BV,), tl.float32)
        for at in range(0, K, BK):
            keys = at + tl.arange(0, BK)
            for value in range(0, V, BV):
                columns = value + tl.arange(0, BV)
                state = load_tile(states, V, keys, keys < K, columns, V, V % BV == 0)
                dstate = load_tile(dstates, V, keys, keys < K, columns, V, V % BV == 0)
                carried += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 0)
        # What is written into the leaving state passes the decays after its row, what is carried through passes all.
        written *= ratio
        dgamma = tl.load(sums + Q_DQ * C + c) + k_read - (ratio * k_write - written)
        dgamma += tl.where(c == C - 1, tl.exp(high_end + low_end) * tl.sum(carried, 0), 0.0)
        dgamma = tl.cumsum(dgamma, 0, reverse=True) + tl.cumsum(written, 0) - written
        tl.store(dg + start * HV + head + c * HV, dgamma.to(dg.dtype.element_ty), mask=here)
    if NORM and K > BK:
        along = k_norm * k_norm * (k_read + ratio * k_write + same * beta * qk)
        tl.debug_barrier()  # what follows reads what was just written
        for at in range(0, K, BK):
            keys = at + tl.arange(0, BK)
            k_wide = load_tile(k, k_stride, c, here, keys, K, K % BK == 0).to(tl.float32)
            dk_tile = load_tile(dk, HV * K, c, here, keys, K, K % BK == 0).to(tl.float32)
            store_tile(dk, HV * K, c, here, keys, dk_tile - k_wide * along[:, None], K, K % BK == 0)
