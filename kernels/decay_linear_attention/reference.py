"""Plain forms of linear attention with a scalar decay. ``recurrent`` is the definition, ``forward`` and ``backward`` are fast.

Per chunk of C rows, with the cumulative decay gamma_i = g_1 + ... + g_i inside it, S the state that enters, s the scale
(arXiv:2405.21060, section 6; arXiv:2312.06635, section 4):

    Gamma_ij = exp(gamma_i - gamma_j) for i >= j, else 0          P = (Q K^T) * Gamma
    O = s (P V + exp(gamma) * (Q S))          S' = exp(gamma_C) S + K^T (exp(gamma_C - gamma) * V)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
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
    g: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T;  o_t = scale S_t^T q_t. Arguments and results as of the public function."""
    wide = wide_dtype(v)
    b, t, heads, width = v.shape
    g = v.new_zeros(heads, dtype=wide) if g is None else g.to(wide)
    decay = g.expand(b, t, heads).flatten(0, 1).exp()[:, :, None, None]
    q, k = (x.to(wide).repeat_interleave(heads // x.shape[2], 2).flatten(0, 1) for x in (q, k))
    rows = v.to(wide).flatten(0, 1)
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
    state = c.state(h0)
    before = c.layout.scan(c.unfold(c.k.mT @ c.fold(_times(c.v, c.to_end))), c.decay, state).flatten(-2)
    out = c.weights(c.q @ c.k.mT) @ c.v
    read = c.rows(c.q @ before)
    out = out.add_(read) if c.from_start is None else out.addcmul_(read, c.from_start)
    return [c.layout.join(out.flatten(1, 2), v.shape, v.dtype), c.public(state) if options[1] else state.new_empty(0)]


def backward(
    tensors: Tensors,
    saved: Sequence[Tensor],
    grads: Tensors,
    needs: Sequence[bool],
    options: Sequence[float],
    backend: str,
) -> Tensors:
    """The states are computed again, which costs less than keeping them. With dS' of the state that leaves:

    dP = (dO V^T) * Gamma, summed over the value heads of a key head
    dQ = s (dP K + (exp(gamma) * dO) S^T)     dK = s dP^T Q + (exp(gamma_C - gamma) * V) dS'^T
    dV = s P^T dO + exp(gamma_C - gamma) * (K dS')     dS = exp(gamma_C) dS' + s Q^T (exp(gamma) * dO)
    dgamma = rows of (P * dO V^T) - its columns + what q read from S - what k wrote to S'
    """
    q, k, v, g, h0, _ = tensors
    assert q is not None
    assert k is not None
    assert v is not None
    c = _Chunks(tensors, options[0])
    do = c.heads(v.new_zeros(v.shape) if grads[0] is None else grads[0])
    written, reads = c.fold(_times(c.v, c.to_end)), c.fold(_times(do, c.from_start))
    dstate = c.state(grads[1])
    before = c.layout.scan(c.unfold(c.k.mT @ written), c.decay, c.state(h0)).flatten(-2)
    after = c.layout.scan(c.unfold(c.q.mT @ reads), c.decay, dstate, reverse=True).flatten(-2)

    weights = c.weights(c.q @ c.k.mT)
    dv_state = _times(c.rows(c.k @ after), c.to_end)
    dv = (weights.mT @ do).add_(dv_state)
    dweights, dq_state = do @ c.v.mT, reads @ before.mT
    dg = None
    if needs[3] and g is not None and c.decay is not None:
        z = (dweights * weights).tril_(-1)  # the diagonal of P does not depend on the decay
        if c.groups == 1:
            read = (dq_state * c.q).sum(-1).unsqueeze(2)
        else:
            read = _times(do * c.rows(c.q @ before), c.from_start).sum(-1)
        wrote = (c.v * dv_state).sum(-1)
        carried = (c.unfold(before) * c.unfold(after)).sum((2, 4)) * c.decay[:, :, 0, :, 0]
        dgamma = z.sum(-1) - z.sum(-2) + read - wrote
        dgamma[..., -1] += wrote.sum(-1) + carried
        dg = (dgamma @ dgamma.new_ones(c.layout.size, c.layout.size).tril_()).flatten(1, 2).unsqueeze(-1)
        dg = c.layout.join(dg, torch.Size((*v.shape[:3], 1)), c.wide).squeeze(-1)
        dg = (dg.sum((0, 1)) if g.ndim == 1 else dg).to(g.dtype)
    dproduct = c.weights(dweights).sum(2) if c.groups > 1 else c.weights(dweights).squeeze(2)
    dq = (dproduct @ c.k).add_(dq_state).mul_(options[0])
    dk = (dproduct.mT @ c.q).add_(written @ after.mT)
    return [
        c.layout.join(dq, q.shape, q.dtype),
        c.layout.join(dk, k.shape, k.dtype),
        c.layout.join(dv.flatten(1, 2), v.shape, v.dtype),
        dg,
        None if h0 is None else c.public(dstate).to(h0.dtype),
        None,
    ]


class _Chunks:
    """The inputs, chunk by chunk, G value heads beside their key head: q (scaled) and k [N, H, C, K], v [N, H, G, C, V].

    States stand as [N, H, K, G, V], so that one product serves all value heads. Without decay the factors are None.
    """

    def __init__(self, tensors: Tensors, scale: float) -> None:
        q, k, v, g, _, cu_seqlens = tensors
        assert q is not None
        assert k is not None
        assert v is not None
        b, t, heads, self.width = v.shape
        self.wide = wide_dtype(v)
        self.groups = heads // k.shape[2]
        self.layout = levels(b, t, cu_seqlens, CHUNK)
        self.segments = b if cu_seqlens is None else len(cu_seqlens) - 1
        self.q = self.layout.split(q, self.wide).mul_(scale)
        self.k = self.layout.split(k, self.wide)
        self.v = self.heads(v)
        self.gamma = self.from_start = self.to_end = self.decay = None
        if g is not None:
            # In fp64 until differences are taken: after a strong decay, what is left of a small one would be rounding.
            g = g.double().expand(b, t, heads).unsqueeze(-1)
            gamma = self.layout.split(g, torch.float64).unflatten(1, (-1, self.groups)).cumsum_(-2)
            self.gamma = gamma.squeeze(-1)
            self.from_start = gamma.exp().to(self.wide)
            self.to_end = (gamma[..., -1:, :] - gamma).exp_().to(self.wide)
            self.decay = self.from_start[..., -1, 0][:, :, None, :, None]

    def heads(self, x: Tensor) -> Tensor:
        """[B, T, HV, V] -> [N, H, G, C, V]."""
        return self.layout.split(x, self.wide).unflatten(1, (-1, self.groups))

    def fold(self, x: Tensor) -> Tensor:
        """[N, H, G, C, V] -> [N, H, C, G * V]."""
        return x.squeeze(2) if self.groups == 1 else x.transpose(2, 3).flatten(3)

    def unfold(self, x: Tensor) -> Tensor:
        """[..., G * V] -> [..., G, V], a view."""
        return x.unflatten(-1, (self.groups, self.width))

    def rows(self, x: Tensor) -> Tensor:
        """[N, H, C, G * V] -> [N, H, G, C, V], a view."""
        return self.unfold(x).transpose(2, 3)

    def weights(self, product: Tensor) -> Tensor:
        """A product of rows with rows, [N, H, C, C] or [N, H, G, C, C] -> the same times Gamma, [N, H, G or 1, C, C]; the
        argument is overwritten where it has that shape."""
        product = product if product.ndim == 5 else product.unsqueeze(2)
        if self.gamma is None:
            return product.tril_()
        return product.mul_(self.decays) if self.groups == product.shape[2] else product * self.decays

    @cached_property
    def decays(self) -> Tensor:
        """Gamma [N, H, G, C, C]."""
        assert self.gamma is not None
        gamma = torch.empty((*self.gamma.shape, self.layout.size), dtype=self.wide, device=self.gamma.device)
        torch.sub(self.gamma.unsqueeze(-1), self.gamma.unsqueeze(-2), out=gamma)
        above = torch.ones(gamma.shape[-2:], dtype=torch.bool, device=gamma.device).triu_(1)
        return gamma.masked_fill_(above, float("-inf")).exp_()

    def state(self, state: Tensor | None) -> Tensor:
        """[S, HV, K, V] -> [S, H, K, G, V], sorted as the layout wants it; zeros for None."""
        heads, width = self.k.shape[1], self.k.shape[-1]
        if state is None:
            return self.k.new_zeros(self.segments, heads, width, self.groups, self.width)
        return self.layout.sort(state.unflatten(1, (heads, self.groups)).transpose(2, 3), self.wide)

    def public(self, state: Tensor) -> Tensor:
        return self.layout.unsort(state).transpose(2, 3).flatten(1, 2)


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor
