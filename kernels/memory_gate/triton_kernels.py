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
    """Rows r of the convolution -> (sequence, place in it, the token's own row, whether a token is there)."""
    live = r < rows
    sequence = (r // time).to(tl.int32)
    t = (r - sequence.to(tl.int64) * time).to(tl.int32)
    if ORDER:
        token = sequence.to(tl.int64) * time + tl.load(order + r, mask=live, other=0)
        return sequence, t, token, live & (t < tl.load(counts + sequence, mask=live, other=0))
    else:
        return sequence, t, r, live


@triton.jit
def _other(order, segments, r, t, token, live, shift, time, ORDER: tl.constexpr, SEGMENTS: tl.constexpr):
    """What stands ``shift`` valid tokens after: -> (row of its token, whether it is there and in the same document)."""
    there = live & (t + shift >= 0) & (t + shift < time)
    if ORDER:
        found = token - t + tl.load(order + r + shift, mask=there, other=0) - tl.load(order + r, mask=there, other=0) + t
    else:
        found = token + shift
    if SEGMENTS:
        own = tl.load(segments + token, mask=there, other=0)
        there &= own == tl.load(segments + found, mask=there, other=0)
    return found, there


@triton.jit
def _scale(alphas, powers, token, mask, m, eps, M: tl.constexpr):
    """c = alpha / rms(alpha v)."""
    alpha = tl.load(alphas + token * M + m, mask=mask, other=0.0)
    power = tl.load(powers + token, mask=mask, other=0.0)
    return alpha / tl.sqrt(alpha * alpha * power + eps)
