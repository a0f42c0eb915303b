"""The kernels of the memory gate; names and algebra are those of ``reference``.

A program has BT rows (tokens of the flattened batch) and walks over branches or columns, BD columns at a time. The convolution runs
over the valid tokens of a sequence: row r stands for token ``order[r]`` of its sequence where there is a mask, for itself where
there is none, and nothing is moved for it. Everything that is kept per token lies where the token does.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false
# (the checker takes what Triton compiles for Python)

from __future__ import annotations

import triton
import triton.language as tl

from kernels.memory_gate.reference import DEAD_ZONE
from kernels.triton import offsets

_DEAD_ZONE = tl.constexpr(DEAD_ZONE)


@triton.jit(do_not_specialize=["rows"])
def gates(
    h, key, value, gain, valid, alphas, scores, inverses_h, inverses_k, powers, rows, eps,
    stride_h: tl.constexpr, stride_k: tl.constexpr, stride_v: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
    ROOTED: tl.constexpr, VALID: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Program (rows, branch): one pass over h and k, and that of branch 0 over v."""
    first, m = tl.program_id(0).to(tl.int64) * BT, tl.program_id(1)
    r, d = tl.arange(0, BT), tl.arange(0, BD)
    live = r < rows - first
    h += first * stride_h + m * D
    key += first * stride_k + m * D
    product = tl.zeros((BT, BD), tl.float32)
    square_h = tl.zeros((BT, BD), tl.float32)
    square_k = tl.zeros((BT, BD), tl.float32)
    for j in tl.range(0, D, BD):
        mask = live[:, None] & (j + d < D)[None, :]
        x = tl.load(h + j + offsets(r, d, stride_h), mask=mask, other=0.0).to(tl.float32)
        k = tl.load(key + j + offsets(r, d, stride_k), mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(gain + m * D + j + d, mask=j + d < D, other=0.0).to(tl.float32)
        product += x * k * weight[None, :]
        square_h += x * x
        square_k += k * k
    inverse_h = 1.0 / tl.sqrt(tl.sum(square_h, 1) / D + eps)
    inverse_k = 1.0 / tl.sqrt(tl.sum(square_k, 1) / D + eps)
    root: tl.constexpr = D**-0.5
    score = tl.sum(product, 1) * inverse_h * inverse_k * root
    u = score
    if ROOTED:
        u = tl.sqrt(tl.maximum(tl.abs(score), _DEAD_ZONE))
        u = tl.where(score > 0, u, tl.where(score < 0, -u, 0.0))
    alpha = tl.sigmoid(u)
    if VALID:
        alpha = tl.where(tl.load(valid + first + r, mask=live, other=0) != 0, alpha, 0.0)
    at = (first + r) * M + m
    tl.store(alphas + at, alpha, mask=live)
    tl.store(scores + at, score, mask=live)
    tl.store(inverses_h + at, inverse_h, mask=live)
    tl.store(inverses_k + at, inverse_k, mask=live)
    if m == 0:
        square = tl.zeros((BT, BD), tl.float32)
        value += first * stride_v
        for j in tl.range(0, D, BD):
            mask = live[:, None] & (j + d < D)[None, :]
            v = tl.load(value + j + offsets(r, d, stride_v), mask=mask, other=0.0).to(tl.float32)
            square += v * v
        tl.store(powers + first + r, tl.sum(square, 1) / D, mask=live)


@triton.jit
def _stand(order, counts, r, rows, time, ORDER: tl.constexpr):
    """Rows r of the convolution -> (first row of the sequence, place in it, the token's own row, whether a token is there)."""
    live = r < rows
    sequence = r.to(tl.int32) // time  # of 64 bits it would be a call, with a stack
    start = (sequence * time).to(tl.int64)
    t = r - start
    if ORDER:
        token = start + tl.load(order + r, mask=live, other=0)
        return start, t, token, live & (t < tl.load(counts + sequence, mask=live, other=0))
    else:
        return start, t, r, live


@triton.jit
def _other(
    order, segments, start, t, token, live, shift, time,
    ORDER: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """What stands ``shift`` valid tokens after: -> (row of its token, whether it is there, in the same document)."""
    there = live & (t + shift >= 0) & (t + shift < time)
    if ORDER:
        found = start + tl.load(order + start + t + shift, mask=there, other=0)
    else:
        found = token + shift
    if SEGMENTS:
        own = tl.load(segments + token, mask=there, other=0)
        there &= own == tl.load(segments + found, mask=there, other=0)
    return found, there


@triton.jit
def _tile(base, rows, columns, here, stride: tl.constexpr, D: tl.constexpr):
    return tl.load(base + offsets(rows, columns, stride), mask=here[:, None] & (columns < D)[None, :], other=0.0).to(
        tl.float32
    )


@triton.jit
def _scale(alphas, powers, token, here, m, eps, M: tl.constexpr):
    """c = alpha / rms(alpha v), 0 where nothing is."""
    alpha = tl.load(alphas + token * M + m, mask=here, other=0.0)
    power = tl.load(powers + token, mask=here, other=0.0)
    return alpha / tl.sqrt(alpha * alpha * power + eps)


@triton.jit
def _tap(taps, m, d, i, D: tl.constexpr, W: tl.constexpr):
    """W of the tap i steps back, for columns d."""
    return tl.load(taps + (m * D + d) * W + (W - 1 - i), mask=d < D, other=0.0)


@triton.jit
def _seen(
    value, alphas, powers, order, segments, values, scales, start, t, token, live, d, i, m, time, reach, eps,
    stride: tl.constexpr, M: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr,
    ORDER: tl.constexpr, SEGMENTS: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """c v of tap i, [BT, BD]: of a token, or of the state before the first one."""
    found, there = _other(order, segments, start, t, token, live, -i * STEP, time, ORDER, SEGMENTS)
    seen = _tile(value, found, d, there, stride, D) * _scale(alphas, powers, found, there, m, eps, M)[:, None]
    if STATE:
        at = reach + t - i * STEP
        before = live & (t < i * STEP) & (at >= 0)
        at += start.to(tl.int32) // time * reach
        c = tl.load(scales + at * M + m, mask=before, other=0.0).to(tl.float32)
        seen += _tile(values, at, d, before, D, D) * c[:, None]
    return seen


@triton.jit(do_not_specialize=["rows", "time", "reach"])
def mix(
    value, taps, alphas, powers, order, counts, segments, values, scales, y, rows, time, reach, eps,
    stride: tl.constexpr, M: tl.constexpr, D: tl.constexpr, W: tl.constexpr, STEP: tl.constexpr,
    ORDER: tl.constexpr, SEGMENTS: tl.constexpr, STATE: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Program (rows, columns): y of all branches. W = 0: no convolution."""
    r = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    start, t, token, live = _stand(order, counts, r, rows, time, ORDER)
    v = _tile(value, token, d, live, stride, D)
    for m in tl.range(0, M, disable_licm=True):
        out = v * tl.load(alphas + token * M + m, mask=live, other=0.0)[:, None]
        if W > 0:
            z = tl.zeros((BT, BD), tl.float32)
            for i in tl.static_range(W):
                z += (
                    _seen(
                        value, alphas, powers, order, segments, values, scales, start, t, token, live, d, i, m, time,
                        reach, eps, stride, M, D, STEP, ORDER, SEGMENTS, STATE,
                    )
                    * _tap(taps, m, d, i, D, W)[None, :]
                )  # fmt: skip
            out += z * tl.sigmoid(z)
        at = y + m * D + offsets(token, d, M * D)
        tl.store(at, out.to(y.dtype.element_ty), mask=(r < rows)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["rows", "time"])
def mix_gradient(
    value, taps, alphas, powers, order, counts, segments, dy, dz, d_alphas, d_value, d_taps, rows, time, eps,
    stride: tl.constexpr, M: tl.constexpr, D: tl.constexpr, W: tl.constexpr, STEP: tl.constexpr,
    ORDER: tl.constexpr, SEGMENTS: tl.constexpr, SUMS: tl.constexpr,
    TILES: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Program (TILES tiles of rows, columns): dz of the rows; of their tokens, what these columns give to <dy, v> (d_alphas
    [columns, rows, M]) and alpha dy summed over branches (d_value); these rows' share of d_taps [programs, M W, D]. SUMS: a
    power of two, at least M W."""
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    sums = tl.arange(0, SUMS)
    total = tl.zeros((SUMS, BD), tl.float32)
    d_alphas += tl.program_id(1).to(tl.int64) * rows * M
    for tile in tl.range(0, TILES, disable_licm=True):
        r = (tl.program_id(0).to(tl.int64) * TILES + tile) * BT + tl.arange(0, BT)
        start, t, token, live = _stand(order, counts, r, rows, time, ORDER)
        inside = (r < rows)[:, None] & (d < D)[None, :]
        v = _tile(value, token, d, live, stride, D)
        back = tl.zeros((BT, BD), tl.float32)
        for m in tl.range(0, M, disable_licm=True):
            above = _tile(dy + m * D, token, d, live, M * D, D)
            tl.store(d_alphas + token * M + m, tl.sum(above * v, 1), mask=r < rows)
            back += above * tl.load(alphas + token * M + m, mask=live, other=0.0)[:, None]
            if W > 0:
                z = tl.zeros((BT, BD), tl.float32)
                for i in tl.static_range(W):
                    seen = _seen(
                        value, alphas, powers, order, segments, value, value, start, t, token, live, d, i, m, time,
                        0, eps, stride, M, D, STEP, ORDER, SEGMENTS, False,
                    )  # fmt: skip
                    z += seen * _tap(taps, m, d, i, D, W)[None, :]
                s = tl.sigmoid(z)
                above *= s + z * s * (1 - s)
                tl.store(dz + m * D + offsets(r, d, M * D), above.to(dz.dtype.element_ty), mask=inside)
                for i in tl.static_range(W):
                    seen = _seen(
                        value, alphas, powers, order, segments, value, value, start, t, token, live, d, i, m, time,
                        0, eps, stride, M, D, STEP, ORDER, SEGMENTS, False,
                    )  # fmt: skip
                    total += tl.where((sums == m * W + i)[:, None], tl.sum(above * seen, 0)[None, :], 0.0)
        tl.store(d_value + offsets(token, d, D), back, mask=inside)
    if W > 0:
        at = tl.program_id(0).to(tl.int64) * (M * W * D) + (sums[:, None] * D + d[None, :])
        tl.store(d_taps + at, total, mask=(sums < M * W)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["rows", "time"])
def value_gradient(
    value, taps, alphas, powers, order, counts, segments, dz, d_scales, d_value, rows, time, eps,
    stride: tl.constexpr, M: tl.constexpr, D: tl.constexpr, W: tl.constexpr, STEP: tl.constexpr,
    ORDER: tl.constexpr, SEGMENTS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Program (rows, columns): what later tokens' taps give to c (d_scales [columns, rows, M]) and to v (added to d_value)."""
    r = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    d_scales += tl.program_id(1).to(tl.int64) * rows * M
    start, t, token, live = _stand(order, counts, r, rows, time, ORDER)
    inside = (r < rows)[:, None] & (d < D)[None, :]
    v = _tile(value, token, d, live, stride, D)
    at = d_value + offsets(token, d, D)
    back = tl.load(at, mask=inside, other=0.0)
    for m in tl.range(0, M, disable_licm=True):
        pull = tl.zeros((BT, BD), tl.float32)
        for i in tl.static_range(W):
            _, there = _other(order, segments, start, t, token, live, i * STEP, time, ORDER, SEGMENTS)
            pull += _tile(dz + m * D, r + i * STEP, d, there, M * D, D) * _tap(taps, m, d, i, D, W)[None, :]
        tl.store(d_scales + token * M + m, tl.sum(pull * v, 1), mask=r < rows)
        back += pull * _scale(alphas, powers, token, live, m, eps, M)[:, None]
    tl.store(at, back, mask=inside)


@triton.jit(do_not_specialize=["rows", "tiles"])
def gate_gradient(
    d_alphas, d_scales, given, alphas, scores, inverses_h, inverses_k, powers, across, along_h, along_k, d_powers,
    rows, tiles, eps,
    M: tl.constexpr, D: tl.constexpr, ROOTED: tl.constexpr, CONV: tl.constexpr, GIVEN: tl.constexpr,
    BT: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Program: rows with all branches. The shares of the columns are added in their order; then the weights with which k and h
    enter dh and dk: dh = across gain k + along_h h, dk = across gain h + along_k k; and 2 dq / D (d_powers)."""
    r, m = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT), tl.arange(0, BM)
    mask = (r < rows)[:, None] & (m < M)[None, :]
    at = offsets(r, m, M)
    d_alpha = tl.zeros((BT, BM), tl.float32)
    d_scale = tl.zeros((BT, BM), tl.float32)
    for tile in range(tiles):
        shift = tl.cast(tile, tl.int64) * rows * M
        d_alpha += tl.load(d_alphas + shift + at, mask=mask, other=0.0)
        if CONV:
            d_scale += tl.load(d_scales + shift + at, mask=mask, other=0.0)
    if GIVEN:
        d_alpha += tl.load(given + at, mask=mask, other=0.0)
    alpha = tl.load(alphas + at, mask=mask, other=0.0)
    if CONV:
        power = tl.load(powers + r, mask=r < rows, other=1.0)[:, None]
        scale = 1.0 / tl.sqrt(alpha * alpha * power + eps)
        d_scale *= scale * scale * scale
        d_alpha += d_scale * eps
        d_power = tl.sum(d_scale * alpha * alpha * alpha, 1)
        tl.store(d_powers + r, -d_power / D, mask=r < rows)
    score = tl.load(scores + at, mask=mask, other=1.0)
    d_score = d_alpha * alpha * (1.0 - alpha)
    if ROOTED:
        size = tl.abs(score)
        d_score = tl.where(size > _DEAD_ZONE, d_score * 0.5 / tl.sqrt(tl.maximum(size, _DEAD_ZONE)), 0.0)
    inverse_h = tl.load(inverses_h + at, mask=mask, other=0.0)
    inverse_k = tl.load(inverses_k + at, mask=mask, other=0.0)
    root: tl.constexpr = D**-0.5
    along = d_score * score * (-1.0 / D)
    tl.store(across + at, d_score * inverse_h * inverse_k * root, mask=mask)
    tl.store(along_h + at, along * inverse_h * inverse_h, mask=mask)
    tl.store(along_k + at, along * inverse_k * inverse_k, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def token_gradient(
    h, key, value, gain, across, along_h, along_k, d_powers, d_wide, dh, dk, dv, d_gain, rows,
    stride_h: tl.constexpr, stride_k: tl.constexpr, stride_v: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
    CONV: tl.constexpr, TILES: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Program (TILES tiles of rows, columns, branch): dh, dk and these rows' share of d_gain [programs, M, D]; branch 0 also ends
    the gradient of v."""
    d, m = tl.program_id(1) * BD + tl.arange(0, BD), tl.program_id(2)
    weight = tl.load(gain + m * D + d, mask=d < D, other=0.0).to(tl.float32)
    total = tl.zeros((BT, BD), tl.float32)
    for tile in tl.range(0, TILES, disable_licm=True):
        r = (tl.program_id(0).to(tl.int64) * TILES + tile) * BT + tl.arange(0, BT)
        live = r < rows
        mask = live[:, None] & (d < D)[None, :]
        x = _tile(h + m * D, r, d, live, stride_h, D)
        k = _tile(key + m * D, r, d, live, stride_k, D)
        a = tl.load(across + r * M + m, mask=live, other=0.0)[:, None]
        of_h = tl.load(along_h + r * M + m, mask=live, other=0.0)[:, None]
        of_k = tl.load(along_k + r * M + m, mask=live, other=0.0)[:, None]
        at = m * D + offsets(r, d, M * D)
        tl.store(dh + at, (a * weight[None, :] * k + of_h * x).to(dh.dtype.element_ty), mask=mask)
        tl.store(dk + at, (a * weight[None, :] * x + of_k * k).to(dk.dtype.element_ty), mask=mask)
        total += a * x * k
        if m == 0:
            found = tl.load(d_wide + offsets(r, d, D), mask=mask, other=0.0)
            if CONV:
                pull = tl.load(d_powers + r, mask=live, other=0.0)
                found += _tile(value, r, d, live, stride_v, D) * pull[:, None]
            tl.store(dv + offsets(r, d, D), found.to(dv.dtype.element_ty), mask=mask)
    at = (tl.program_id(0).to(tl.int64) * M + m) * D + d
    tl.store(d_gain + at, tl.sum(total, 0), mask=d < D)
