"""Plain forms of gated linear attention. ``recurrent`` is the definition, ``forward`` and ``backward`` are fast.

Per chunk of C rows, gamma the cumulative decay inside it, S the state that enters, s the scale (arXiv:2312.06635, section 4):

    P_ij = sum_c q_ic k_jc exp(gamma_ic - gamma_jc) for i >= j, else 0
    O = s (P V + (Q * exp(gamma)) S)          S' = diag(exp(gamma_C)) S + (K * exp(gamma_C - gamma))^T V

P is no product of two factors with exponents below zero, but its blocks are: rows of the upper half of a block of 2 s rows see
those of its lower half through the row m between them, exp(gamma_i - gamma_j) = exp(gamma_i - gamma_m) exp(gamma_m - gamma_j).
Blocks of 2, 4, ..., C rows together hold every pair i > j once. So each row takes log2 C exponentials per channel, never one
above zero, and all else is products of matrices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from kernels.levels import levels
from kernels.library import Tensors
from kernels.scan_arguments import wide_dtype

CHUNK = 64


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T;  o_t = scale S_t^T q_t. Arguments and results as of the public function."""
    wide = wide_dtype(v)
    b, t, heads, width = v.shape
    q, k, g = (x.to(wide).repeat_interleave(heads // x.shape[2], 2).flatten(0, 1) for x in (q, k, g))
    decay, rows = g.exp().unsqueeze(-1), v.to(wide).flatten(0, 1)
    ends = [i * t for i in range(b + 1)] if cu_seqlens is None else cu_seqlens.tolist()
    outs, states = [], []
    for i, (start, end) in enumerate(pairwise(ends)):
        state = q.new_zeros(heads, q.shape[-1], width) if initial_state is None else initial_state[i].to(wide)
        for r in range(start, end):
            state = decay[r] * state + k[r][:, :, None] * rows[r][:, None]
            outs.append(scale * torch.einsum("hkv,hk->hv", state, q[r]))
        states.append(state)
    outs += [rows.new_zeros(heads, width)] * (b * t - len(outs))
    return torch.stack(outs).view(v.shape).to(v.dtype), torch.stack(states)


def forward(tensors: Tensors, options: Sequence[float], backend: str) -> list[Tensor]:
    """(q, k, v, g, initial state, cu_seqlens), (scale, whether the final state is wanted) -> [o, final state or nothing]."""
    v, h0 = tensors[2], tensors[4]
    assert v is not None
    c = _Chunks(tensors, options[0])
    weights = c.zeros_of_pairs()
    for block in c.blocks():
        block.corner(weights).copy_(block.q @ block.k.mT)
    torch.diagonal(weights, dim1=-2, dim2=-1).copy_(torch.linalg.vecdot(c.q, c.k))
    state = c.state(h0)
    before = c.layout.scan((c.k * c.to_end()).mT @ c.v, c.decay(), state)
    out = (weights @ c.v).add_((c.q * c.from_start()) @ before)
    return [c.layout.join(c.heads(out), v.shape, v.dtype), c.public(state) if options[1] else state.new_empty(0)]


def backward(
    tensors: Tensors,
    saved: Sequence[Tensor],
    grads: Tensors,
    needs: Sequence[bool],
    options: Sequence[float],
    backend: str,
) -> Tensors:
    """The states are computed again, which costs less than keeping them. With dS' of the state that leaves, dP = dO V^T:

    dQ_i = s sum_j dP_ij k_j exp(gamma_i - gamma_j) + s exp(gamma) * (dO S^T)          dgamma = Q * dQ - K * dK, and at the
    dK_j = s sum_i dP_ij q_i exp(gamma_i - gamma_j) + exp(gamma_C - gamma) * (V dS'^T)   last row what the state carries
    dV = s P^T dO + (K * exp(gamma_C - gamma)) dS'          dS = diag(exp(gamma_C)) dS' + s (Q * exp(gamma))^T dO
    """
    q, k, v, g, h0, _ = tensors
    assert q is not None
    assert k is not None
    assert v is not None
    assert g is not None
    c = _Chunks(tensors, options[0])
    do = c.rows(v.new_zeros(v.shape) if grads[0] is None else grads[0])
    dpairs = do @ c.v.mT
    weights, dq, dk = c.zeros_of_pairs(), torch.zeros_like(c.q), torch.zeros_like(c.k)
    for block in c.blocks():
        block.corner(weights).copy_(block.q @ block.k.mT)
        seen = block.corner(dpairs).contiguous()
        block.upper(dq).addcmul_(seen @ block.k, block.q_decay)
        block.lower(dk).addcmul_(seen.mT @ block.q, block.k_decay)
    torch.diagonal(weights, dim1=-2, dim2=-1).copy_(torch.linalg.vecdot(c.q, c.k))

    decay, from_start, to_end = c.decay(), c.from_start(), c.to_end()
    written, reads = c.k * to_end, c.q * from_start
    dstate = c.state(grads[1])
    before = c.layout.scan(written.mT @ c.v, decay, c.state(h0))
    after = c.layout.scan(reads.mT @ do, decay, dstate, reverse=True)
    dv = (weights.mT @ do).add_(written @ after)
    dq.addcmul_(do @ before.mT, from_start)
    dk_state = (c.v @ after.mT).mul_(to_end)
    dk.add_(dk_state)

    dg = None
    if needs[3]:
        dgamma = (c.q * dq).addcmul_(c.k, dk, value=-1)  # the diagonal of P, not yet in dq and dk, does not depend on g
        dgamma[..., -1, :] += (c.k * dk_state).sum(-2) + torch.linalg.vecdot(before, after) * decay.squeeze(-1)
        later = dgamma.new_ones(c.layout.size, c.layout.size).triu_()
        dg = c.layout.join(later @ dgamma, g.shape, g.dtype)
    same = torch.diagonal(dpairs, dim1=-2, dim2=-1).unsqueeze(-1)
    dq.addcmul_(same, c.k).mul_(options[0])
    dk.addcmul_(same, c.q)
    return [
        c.layout.join(dq, q.shape, q.dtype),
        c.layout.join(dk, k.shape, k.dtype),
        c.layout.join(c.heads(dv), v.shape, v.dtype),
        dg,
        None if h0 is None else c.public(dstate).to(h0.dtype),
        None,
    ]


class _Block:
    """All blocks of 2 s rows: q of their upper halves and k of their lower ones, decayed to the row between, [N, H, n, s, K]."""

    def __init__(self, q: Tensor, k: Tensor, q_decay: Tensor, k_decay: Tensor, size: int) -> None:
        self.size, self.q_decay, self.k_decay = size, q_decay, k_decay
        self.q, self.k = self.upper(q) * q_decay, self.lower(k) * k_decay

    def _halves(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, 2, self.size))

    def upper(self, x: Tensor) -> Tensor:
        """Rows [N, H, C, .] -> those of upper halves [N, H, n, s, .], a view."""
        return self._halves(x)[:, :, :, 1]

    def lower(self, x: Tensor) -> Tensor:
        return self._halves(x)[:, :, :, 0]

    def corner(self, pairs: Tensor) -> Tensor:
        """[N, H, C, C] -> where upper rows see lower ones, [N, H, n, s, s], a view."""
        halves = pairs.unflatten(3, (-1, 2, self.size)).unflatten(2, (-1, 2, self.size))
        return halves[:, :, :, 1, :, :, 0].diagonal(dim1=2, dim2=4).movedim(-1, 2)


class _Chunks:
    """The inputs, chunk by chunk: q (scaled), k, g [N, H, C, K], v [N, H, C, G * V] with the G value heads of a key head."""

    def __init__(self, tensors: Tensors, scale: float) -> None:
        q, k, v, g, _, cu_seqlens = tensors
        assert q is not None
        assert k is not None
        assert v is not None
        assert g is not None
        b, t, heads, self.width = v.shape
        self.wide = wide_dtype(v)
        self.groups = heads // k.shape[2]
        self.layout = levels(b, t, cu_seqlens, CHUNK)
        self.segments = b if cu_seqlens is None else len(cu_seqlens) - 1
        self.q = self.layout.split(q, self.wide).mul_(scale)
        self.k = self.layout.split(k, self.wide)
        self.v = self.rows(v)
        # Decay since the start of the block that a row is in, its own included, and until that block's end, its own not.
        self._since = self.layout.split(g, self.wide)
        self._until = torch.zeros_like(self._since)

    def blocks(self) -> Iterator[_Block]:
        """Of 2, 4, ..., C rows. Sums of g grow from block to block, so that small ones are no difference of large ones."""
        size = 1
        while size < self.layout.size:
            since, until = (x.unflatten(2, (-1, 2, size)) for x in (self._since, self._until))
            lower, upper = since[:, :, :, 0, -1:].clone(), since[:, :, :, 1, -1:].clone()
            yield _Block(self.q, self.k, since[:, :, :, 1].exp(), until[:, :, :, 0].exp(), size)
            since[:, :, :, 1] += lower
            until[:, :, :, 0] += upper
            size *= 2

    def from_start(self) -> Tensor:
        """exp(gamma), once the blocks are done."""
        return self._since.exp()

    def to_end(self) -> Tensor:
        """exp(gamma_C - gamma), once the blocks are done."""
        return self._until.exp()

    def decay(self) -> Tensor:
        """exp(gamma_C) [N, H, K, 1], once the blocks are done."""
        return self._since[..., -1, :].exp().unsqueeze(-1)

    def zeros_of_pairs(self) -> Tensor:
        return self.k.new_zeros(*self.k.shape[:3], self.layout.size)

    def rows(self, x: Tensor) -> Tensor:
        """[B, T, HV, V] -> [N, H, C, G * V]."""
        x = x.unflatten(2, (-1, self.groups)).flatten(3)
        return self.layout.split(x, self.wide)

    def heads(self, x: Tensor) -> Tensor:
        """[N, H, C, G * V] -> [N, HV, C, V]."""
        return x.unflatten(-1, (self.groups, self.width)).transpose(2, 3).flatten(1, 2)

    def state(self, state: Tensor | None) -> Tensor:
        """[S, HV, K, V] -> [S, H, K, G * V], sorted as the layout wants it; zeros for None."""
        heads, width = self.k.shape[1], self.k.shape[-1]
        if state is None:
            return self.k.new_zeros(self.segments, heads, width, self.groups * self.width)
        return self.layout.sort(state.unflatten(1, (heads, self.groups)).transpose(2, 3).flatten(3), self.wide)

    def public(self, state: Tensor) -> Tensor:
        state = self.layout.unsort(state).unflatten(-1, (self.groups, self.width))
        return state.transpose(2, 3).flatten(1, 2)
