"""Pieces of the kernels of the gated delta rule: decays inside a chunk, inverses of triangular matrices."""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false
# (the checker takes what Triton compiles for Python)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decay_between(high, low, seen):
    """exp(gamma_i - gamma_j) where ``seen`` [i, j] is true, else 0; what is not seen may not reach exp. gamma is the sum of two
    fp32: after a strong decay, what is left of a small one would be rounding in one."""
    difference = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    return tl.exp(tl.where(seen, difference, float("-inf")))


# -- (I + lower)^-1 of M matrices [M, 2 N, 2 N], strictly lower triangular: that of [[A, 0], [B, D]] is [[A', 0], [-D' B A', D']]


@triton.jit
def unit_lower_inverse(lower, C: tl.constexpr, PRECISION: tl.constexpr):
    """[C, C], C 16, 32 or 64 -> its (I + lower)^-1."""
    x = tl.reshape(lower, (1, C, C))
    if C == 16:
        x = _inverse_16(x, PRECISION)
    elif C == 32:
        x = _inverse_32(x, 1, PRECISION)
    else:
        a, b, d = _quarters(x, 1, 32)
        a, d = _unpaired(_inverse_32(_paired(a, d, 1, 32), 2, PRECISION), 1, 32)
        x = _assembled(a, _corner(a, b, d, PRECISION), d, 1, 32)
    return tl.reshape(x, (C, C))


@triton.jit
def _inverse_32(x, M: tl.constexpr, PRECISION: tl.constexpr):
    a, b, d = _quarters(x, M, 16)
    a, d = _unpaired(_inverse_16(_paired(a, d, M, 16), PRECISION), M, 16)
    return _assembled(a, _corner(a, b, d, PRECISION), d, M, 16)


@triton.jit
def _inverse_16(lower, PRECISION: tl.constexpr):
    """From diagonal blocks of b rows to those of 2 b rows: X - X Y X, Y the corners between the blocks."""
    i, j = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    x = tl.where(i == j, 1.0, 0.0) - tl.where(i // 2 == j // 2, lower, 0.0)
    for step in tl.static_range(1, 4):
        around = i // 2 ** (step + 1) == j // 2 ** (step + 1)
        corners = tl.where(around & (i // 2**step != j // 2**step), lower, 0.0)
        x -= tl.dot(x, tl.dot(corners, x, input_precision=PRECISION), input_precision=PRECISION)
    return x


@triton.jit
def _corner(a, b, d, PRECISION: tl.constexpr):
    return -tl.dot(d, tl.dot(b, a, input_precision=PRECISION), input_precision=PRECISION)


@triton.jit
def _quarters(x, M: tl.constexpr, N: tl.constexpr):
    """[M, 2 N, 2 N] -> upper left, lower left and lower right quarter, [M, N, N]."""
    left, right = tl.split(tl.permute(tl.reshape(x, (M, 2, N, 2, N)), (0, 2, 4, 1, 3)))
    upper_left, lower_left = tl.split(left)
    _, lower_right = tl.split(right)
    return upper_left, lower_left, lower_right


@triton.jit
def _assembled(upper_left, lower_left, lower_right, M: tl.constexpr, N: tl.constexpr):
    """The reverse, with zeros in the upper right quarter."""
    left = tl.join(upper_left, lower_left)
    right = tl.join(tl.zeros_like(lower_right), lower_right)
    return tl.reshape(tl.permute(tl.join(left, right), (0, 3, 1, 4, 2)), (M, 2 * N, 2 * N))


@triton.jit
def _paired(a, d, M: tl.constexpr, N: tl.constexpr):
    """Two [M, N, N] -> one [2 M, N, N]."""
    return tl.reshape(tl.permute(tl.join(a, d), (0, 3, 1, 2)), (2 * M, N, N))


@triton.jit
def _unpaired(x, M: tl.constexpr, N: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(x, (M, 2, N, N)), (0, 2, 3, 1)))
