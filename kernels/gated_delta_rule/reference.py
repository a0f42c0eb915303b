"""Plain forms of the gated delta rule. ``recurrent`` is the definition, ``forward`` and ``backward`` are fast.

Per chunk of C rows, with the cumulative decay gamma_i = g_1 + ... + g_i inside it, S the state that enters, s the scale
(arXiv:2406.06484, section 3.2, with the decay of arXiv:2412.06464, section 3.3; all in terms of u, so that no other C x K
product than K itself is needed):

    Gamma_ij = exp(gamma_i - gamma_j) for i >= j, else 0          A = diag(beta) stril(K K^T * Gamma)
    (I + A) U = X = beta (V - exp(gamma) K S)
    O = s (exp(gamma) Q S + (Q K^T * Gamma) U)          S' = exp(gamma_C) S + K^T (exp(gamma_C - gamma) U)
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.levels import levels
from kernels.library import Tensors
from kernels.scan_arguments import wide_dtype

WIDE = 64  # from this width of q, k or v on, chunks of 64 rows are faster than chunks of 32
NORM_EPS = 1e-6


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    qk_l2norm: bool,
) -> tuple[Tensor, Tensor]:
    """Token by token. Arguments and results as of the public function."""
    wide = wide_dtype(v)
    b, t, heads, width = v.shape
    one = v.new_ones(b * t, heads, dtype=wide)
    decay = one if g is None else g.flatten(0, 1).to(wide).exp()
    beta = one if beta is None else beta.flatten(0, 1).to(wide)
    q, k = (Normalised.of(x.to(wide)).unit if qk_l2norm else x.to(wide) for x in (q, k))
    q, k = (x.repeat_interleave(heads // x.shape[2], 2).flatten(0, 1) for x in (q, k))
    rows = v.to(wide).flatten(0, 1)
    ends = [i * t for i in range(b + 1)] if cu_seqlens is None else cu_seqlens.tolist()
    outs, states = [], []
    for i, (start, end) in enumerate(itertools.pairwise(ends)):
        state = q.new_zeros(heads, q.shape[-1], width) if initial_state is None else initial_state[i].to(wide)
        for r in range(start, end):
            state = decay[r][:, None, None] * state
            u = beta[r][:, None] * (rows[r] - torch.einsum("hkv,hk->hv", state, k[r]))
            state = state + k[r][:, :, None] * u[:, None]
            outs.append(scale * torch.einsum("hkv,hk->hv", state, q[r]))
        states.append(state)
    outs += [rows.new_zeros(heads, width)] * (b * t - len(outs))
    return torch.stack(outs).view(v.shape).to(v.dtype), torch.stack(states)


def forward(tensors: Tensors, options: Sequence[float]) -> list[Tensor]:
    """(q, k, v, g, beta, initial state, cu_seqlens), (scale, whether the final state is wanted, whether q and k are to be
    normalised) -> [o, final state or nothing, U by rows]."""
    v, h0 = tensors[2], tensors[5]
    assert v is not None
    c = _Chunks(tensors, options)
    state, inverse = c.state(h0), c.inverse()
    before = state.new_empty(len(c.k), *state.shape[1:])
    x, u = c.beta * c.v, torch.empty_like(c.v)
    for now, chunks in c.steps(state):
        before[chunks] = now
        x_now = torch.baddbmm(_flat(x[chunks]), _flat(c.erasing[chunks]), _flat(now), alpha=-1)
        torch.bmm(_flat(inverse[chunks]), x_now, out=_flat(u[chunks]))
        c.decay_(now, chunks)
        _flat(now).baddbmm_(_flat(c.writing[chunks]).mT, _flat(u[chunks]))
    out = torch.matmul(c.reading, before) + c.masked(c.q @ c.k.mT) @ u
    state = c.layout.unsort(state) if options[1] else state.new_empty(0)
    return [c.layout.join(out, v.shape, v.dtype), state, c.layout.join(u, v.shape, c.wide)]


def fake(tensors: Tensors, options: Sequence[float]) -> list[Tensor]:
    """What ``forward`` returns, computing nothing."""
    q, _, v, _, _, _, cu_seqlens = tensors
    assert q is not None
    assert v is not None
    segments = v.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    shape = (segments, v.shape[2], q.shape[3], v.shape[3]) if options[1] else (0,)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    return [o, v.new_empty(shape, dtype=wide_dtype(v)), torch.empty_like(o, dtype=wide_dtype(v))]


def backward(tensors: Tensors, saved: Sequence[Tensor], grads: Tensors, options: Sequence[float]) -> Tensors:
    """What a query reads is linear in the state, and so is what a key reads before it erases: its cotangent is -beta dX, with
    dX = (I + A)^-T dU. From the last chunk to the first, with dS' of the state that leaves:

        dU = s (Q K^T * Gamma)^T dO + exp(gamma_C - gamma) K dS'          dV = beta dX
        dS = exp(gamma_C) dS' + s Q^T (exp(gamma) dO) - K^T (exp(gamma) beta dX)

    Then, for all chunks at once, E = dO U^T * Gamma, F = stril(dX U^T) * Gamma:

        dQ = s (exp(gamma) dO S^T + E K)          Y = exp(gamma) dX S^T + F K
        dK = W - beta Y,  W = exp(gamma_C - gamma) U dS'^T + s E^T Q - (beta F)^T K          dbeta = dX . V - K . Y
        dgamma = Q . dQ - K . beta Y - K . W;  dgamma_C += K . exp(gamma_C - gamma) U dS'^T + exp(gamma_C) <S, dS'>
    """
    q, k, v, g, beta, h0, _ = tensors
    assert q is not None
    assert k is not None
    assert v is not None
    c = _Chunks(tensors, options)
    inverse = c.inverse()
    u, do = (c.layout.split(x, c.wide) for x in (saved[0], v.new_zeros(v.shape) if grads[0] is None else grads[0]))
    before = c.layout.scan(c.writing.mT @ u, c.decay, c.state(h0))

    dstate = c.state(grads[1])
    after = torch.empty_like(before)
    du, dx = c.masked(c.q @ c.k.mT).mT @ do, torch.empty_like(u)
    dread = c.reading.mT @ do
    for now, chunks in c.steps(dstate, reverse=True):
        after[chunks] = now
        du_now = _flat(du[chunks]).baddbmm_(_flat(c.writing[chunks]), _flat(now))
        dx_now = torch.bmm(_flat(inverse[chunks]).mT, du_now, out=_flat(dx[chunks]))
        c.decay_(now, chunks).add_(dread[chunks])
        _flat(now).baddbmm_(_flat(c.erasing[chunks]).mT, dx_now, alpha=-1)

    e, f = c.masked(do @ u.mT), c.masked(dx @ u.mT, diagonal=-1)
    dq, y = scaled(do @ before.mT, c.from_start) + e @ c.k, scaled(dx @ before.mT, c.from_start) + f @ c.k
    w_state = scaled(u @ after.mT, c.to_end)
    w = e.mT @ c.q - (c.beta * f).mT @ c.k + w_state
    k_y = (c.k * y).sum(-1)
    dbeta = (dx * c.v).sum(-1) - k_y
    dg = None
    if g is not None and c.decay is not None:
        dgamma = (c.q * dq - c.k * w).sum(-1) - c.beta.squeeze(-1) * k_y
        dgamma[..., -1] += (c.k * w_state).sum((2, 3)) + c.decay.flatten(1) * (before * after).sum((2, 3))
        dg = c.rows(dgamma.flip(-1).cumsum(-1).flip(-1), g)
    return [
        c.key_rows(dq.mul_(options[0]), c.q_norm, q),
        c.key_rows(w - c.beta * y, c.k_norm, k),
        c.layout.join(c.beta * dx, v.shape, v.dtype),
        dg,
        None if beta is None else c.rows(dbeta, beta),
        None if h0 is None else c.layout.unsort(dstate).to(h0.dtype),
        None,
    ]


class _Chunks:
    """The inputs, chunk by chunk: q (scaled) and k [N, HV, C, K], v [N, HV, C, V], factors of rows [N, HV, C, 1].

    Without decay, its factors are None.
    """

    def __init__(self, tensors: Tensors, options: Sequence[float]) -> None:
        q, k, v, g, beta, _, cu_seqlens = tensors
        assert q is not None
        assert k is not None
        assert v is not None
        self.wide = wide_dtype(v)
        self.layout = levels(v.shape[0], v.shape[1], cu_seqlens, 64 if max(k.shape[3], v.shape[3]) >= WIDE else 32)
        segments = v.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        self.state_shape = (segments, v.shape[2], k.shape[3], v.shape[3])
        self.groups = v.shape[2] // k.shape[2]
        q, k, self.v = (self.layout.split(x, self.wide) for x in (q, k, v))
        self.q_norm = self.k_norm = None
        if options[2]:
            q, k = self.q_norm, self.k_norm = Normalised.of(q), Normalised.of(k)
            q, k = q.unit, k.unit
        self.q, self.k = self._grouped(q * options[0]), self._grouped(k)
        beta = v.new_ones(v.shape[:3], dtype=self.wide) if beta is None else beta
        self.beta = self.layout.split(beta.unsqueeze(-1), self.wide)
        self.gamma = self.from_start = self.to_end = self.decay = None
        if g is not None:
            # In fp64 until differences are taken: after a strong decay, what is left of a small one would be rounding.
            self.gamma = self.layout.split(g.unsqueeze(-1), torch.float64).cumsum_(-2)
            self.from_start = self.gamma.exp().to(self.wide)
            self.to_end = (self.gamma[..., -1:, :] - self.gamma).exp_().to(self.wide)
            self.decay = self.from_start[..., -1:, :]
        self.reading = scaled(self.q, self.from_start)
        self.erasing = self.k * scaled(self.beta, self.from_start)
        self.writing = scaled(self.k, self.to_end)

    def inverse(self) -> Tensor:
        """(I + A)^-1, [N, HV, C, C]."""
        return unit_lower_inverse(self.masked(self.k @ self.k.mT, diagonal=-1).mul_(self.beta))

    def masked(self, product: Tensor, diagonal: int = 0) -> Tensor:
        """A product of rows with rows [N, HV, C, C], overwritten with itself times Gamma, zeros above the diagonal."""
        if self.gamma is None or diagonal:
            product.tril_(diagonal)
        return product if self.gamma is None else product.mul_(self._gamma_differences)

    @functools.cached_property
    def _gamma_differences(self) -> Tensor:
        assert self.gamma is not None
        shape = (*self.gamma.shape[:-1], self.layout.size)
        differences = torch.empty(shape, dtype=self.wide, device=self.gamma.device)
        torch.sub(self.gamma, self.gamma.mT, out=differences)
        return differences.exp_().tril_()  # what overflows above the diagonal is dropped, not multiplied by zero

    def state(self, state: Tensor | None) -> Tensor:
        """A copy of [S, HV, K, V], sorted as the layout wants it; zeros for None."""
        return self.k.new_zeros(self.state_shape) if state is None else self.layout.sort(state, self.wide)

    def steps(self, state: Tensor, reverse: bool = False) -> Iterator[tuple[Tensor, slice]]:
        """Chunk after chunk of each segment: (the states of the segments that are so long, a view; their chunks)."""
        ends = itertools.accumulate(self.layout.counts)
        found = [(state[:count], slice(end - count, end)) for end, count in zip(ends, self.layout.counts, strict=True)]
        return iter(reversed(found) if reverse else found)

    def decay_(self, state: Tensor, chunks: slice) -> Tensor:
        """exp(gamma_C) state, in place."""
        return state if self.decay is None else state.mul_(self.decay[chunks])

    def rows(self, x: Tensor, like: Tensor) -> Tensor:
        """[N, HV, C] -> ``like`` [B, T, HV]."""
        return self.layout.join(x.unsqueeze(-1), torch.Size((*like.shape, 1)), like.dtype).squeeze(-1)

    def key_rows(self, x: Tensor, norm: Normalised | None, like: Tensor) -> Tensor:
        """The gradient of grouped q or k [N, HV, C, K] -> that of what came in, ``like`` [B, T, H, K]."""
        if self.groups > 1:
            x = x.unflatten(1, (-1, self.groups)).sum(2)
        return self.layout.join(x if norm is None else norm.backward(x), like.shape, like.dtype)

    def _grouped(self, x: Tensor) -> Tensor:
        """[N, H, C, K] -> [N, HV, C, K]."""
        return x if self.groups == 1 else x.repeat_interleave(self.groups, 1)


class Normalised(NamedTuple):
    """unit = x rstd, rstd = (sum x^2 + eps)^-1/2 over the last dimension; zero stays zero."""

    unit: Tensor
    rstd: Tensor

    @staticmethod
    def of(x: Tensor) -> Normalised:
        rstd = torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS)
        return Normalised(x * rstd, rstd)

    def backward(self, grad: Tensor) -> Tensor:
        """dx = rstd (dy - y <y, dy>)."""
        return (grad - self.unit * (self.unit * grad).sum(-1, keepdim=True)) * self.rstd


def unit_lower_inverse(lower: Tensor) -> Tensor:
    """lower [..., C, C], strictly lower triangular, C a power of two -> (I + lower)^-1.

    The inverse of [[A, 0], [B, D]] is [[A', 0], [-D' B A', D']]: from the inverses of all diagonal blocks of b rows to those of
    2 b rows. Much faster than a batched triangular solve, and as exact.
    """
    size = lower.shape[-1]
    lower = lower.contiguous()
    inverse = torch.zeros_like(lower)
    inverse.diagonal(0, -2, -1).fill_(1)
    b = 1
    while b < size:
        above, below, corner = (_blocks(inverse, b, *at) for at in ((0, 0), (1, 1), (1, 0)))
        corner.copy_(below @ (_blocks(lower, b, 1, 0) @ above) if b > 1 else _blocks(lower, b, 1, 0)).neg_()
        b *= 2
    return inverse


def _blocks(x: Tensor, b: int, row: int, column: int) -> Tensor:
    """Block (row, column) of each of the n diagonal blocks of 2 b rows: a view [M, n, b, b] of x [..., C, C]."""
    size = x.shape[-1]
    pairs = x.view(-1, size // (2 * b), 2, b, size // (2 * b), 2, b)[:, :, row, :, :, column]
    return pairs.diagonal(0, 1, 3).movedim(-1, 1)


def scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def _flat(x: Tensor) -> Tensor:
    """[N, HV, ...] -> [N * HV, ...], a view."""
    return x.flatten(0, 1)
