"""Plain forms of the selective scan. ``recurrent`` is the definition, ``forward`` and ``backward`` are fast.

No product of matrices takes the place of this recurrence: every one of its D x N numbers decays by itself, and a form in pairs of
rows would need an exponential per pair. So the work is elementwise, and what counts is that it is done in the cache: a block is
chunks of some segments, [n, C, N, D], and all that belongs to it is made, used and dropped there. Of the states only those before
chunks are kept; the backward makes the others again, from the last chunk to the first. Channels stand last, where vectors are long.

The recurrence itself is a step over rows [n, G, N, D] at a time, one multiply-add in place. Where that is too little to be worth
a call, chunks are cut into G pieces that step together from zero, with the product of their decays beside them, and each piece then
gets what the one before it leaves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.chunks import slots
from kernels.levels import Levels, levels
from kernels.library import Tensors
from kernels.scan_arguments import wide_dtype

BLOCK = 1 << 18  # numbers of a block: a megabyte in fp32
CHUNKS = (16, 64)  # the shortest and the longest chunk
STEP = 1 << 12  # numbers below which a step costs its call and little else


def recurrent(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t^T;  y_t = h_t C_t + D u_t. Arguments and results as of the public function."""
    wide = wide_dtype(u)
    batch, time, channels = u.shape
    rows, steps, keys, queries = (x.to(wide).flatten(0, 1) for x in (u, delta, B, C))
    rates = A.to(wide)
    ends = [i * time for i in range(batch + 1)] if cu_seqlens is None else cu_seqlens.tolist()
    outs, states = [], []
    for i, (start, end) in enumerate(pairwise(ends)):
        state = rows.new_zeros(rates.shape) if initial_state is None else initial_state[i].to(wide)
        for r in range(start, end):
            step = steps[r][:, None]
            state = (step * rates).exp() * state + step * rows[r][:, None] * keys[r]
            outs.append(state @ queries[r] + (0 if D is None else D.to(wide) * rows[r]))
        states.append(state)
    outs += [rows.new_zeros(channels)] * (batch * time - len(outs))
    return torch.stack(outs).view(u.shape).to(u.dtype), torch.stack(states)


def kept_states(u: Tensor, A: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Memory for the states before the chunks [slots, N, D]: as many as there may be, which the host knows without looking."""
    batch, time, channels = u.shape
    width = A.shape[1]
    segments = batch if cu_seqlens is None else len(cu_seqlens) - 1
    count = slots(batch, time, cu_seqlens, _chunk(segments, width * channels))
    return u.new_empty(count, width, channels, dtype=wide_dtype(u))


def forward(tensors: Tensors, options: Sequence[float], backend: str) -> list[Tensor]:
    """(u, delta, A, B, C, D, initial state, cu_seqlens), (whether the final state is wanted, whether a backward follows)
    -> [y, final state or nothing, and for the backward the states before the chunks]."""
    u, _, A, _, _, D, h0, cu_seqlens = tensors
    assert u is not None
    assert A is not None
    c = _Chunks(tensors)
    kept = kept_states(u, A, cu_seqlens) if options[1] else None
    state, y = c.state(h0), torch.empty_like(c.u)
    for block in c.blocks():
        now, rows = state[block.segments], block.rows
        if kept is not None:
            kept[rows] = now
        _, h = c.states(rows, now)
        y[rows] = (c.C[rows].unsqueeze(2) @ h).squeeze(2)
        now.copy_(h[:, -1])
    if D is not None:
        y.addcmul_(c.u, D.to(y.dtype))
    results = [c.join(y, u), c.public(state) if options[0] else state.new_empty(0)]
    return results if kept is None else [*results, kept]


def backward(
    tensors: Tensors,
    saved: Sequence[Tensor],
    grads: Tensors,
    needs: Sequence[bool],
    options: Sequence[float],
    backend: str,
) -> Tensors:
    """With a = exp(delta A) and dh the gradient of a state, that of the later rows included:

    dh_t = dy_t C_t^T + a_{t+1} * dh_{t+1}    dC_t = h_t^T dy_t         dB_t = dh_t^T (delta_t u_t)       s_t = dh_t B_t
    g_t = dh_t * a_t * h_{t-1}                dA = sum_t delta_t g_t    ddelta_t = u_t s_t + sum_n A g_t  du_t = delta_t s_t + D dy_t
    """
    u, delta, A, B, C, D, h0, _ = tensors
    assert u is not None
    assert delta is not None
    assert A is not None
    assert B is not None
    assert C is not None
    c = _Chunks(tensors)
    dy = torch.zeros_like(c.u) if grads[0] is None else c.split(grads[0])
    dstate, drates = c.state(grads[1]), torch.zeros_like(c.rates)
    du, ddelta, dB, dC = (torch.empty_like(x) for x in (c.u, c.delta, c.B, c.C))
    for block in c.blocks(reverse=True):
        rows, now = block.rows, dstate[block.segments]
        before = saved[0][rows]
        decay, h = c.states(rows, before)
        seen = dy[rows].unsqueeze(2)
        dC[rows] = (seen @ h.mT).squeeze(2)
        dh = c.C[rows].unsqueeze(3) * seen
        _scan(torch.cat((decay[:, 1:], torch.ones_like(decay[:, :1])), 1), dh, now, c.pieces, reverse=True)
        dB[rows] = (c.written[rows].unsqueeze(2) @ dh.mT).squeeze(2)
        through = (c.B[rows].unsqueeze(2) @ dh).squeeze(2)
        passed = decay.mul_(dh)
        now.copy_(passed[:, 0])
        passed[:, 1:].mul_(h[:, :-1])
        passed[:, 0].mul_(before)
        steps = c.delta[rows]
        torch.mul(through, steps, out=du[rows])
        torch.addcmul((passed * c.rates).sum(2), through, c.u[rows], out=ddelta[rows])
        drates += passed.mul_(steps.unsqueeze(2)).sum((0, 1))
    dD = None
    if D is not None:
        dD = (dy * c.u).sum((0, 1)).to(D.dtype)
        du.addcmul_(dy, D.to(du.dtype))
    return [
        c.join(du, u),
        c.join(ddelta, delta),
        drates.mT.to(A.dtype),
        c.join(dB, B),
        c.join(dC, C),
        dD,
        None if h0 is None else c.public(dstate).to(h0.dtype),
        None,
    ]


class _Block(NamedTuple):
    rows: slice  # of the chunks
    segments: slice  # of the states


class _Chunks:
    """The inputs, chunk by chunk: u, delta and their product [M, C, D], B and C [M, C, N], and A^T [N, D]."""

    def __init__(self, tensors: Tensors) -> None:
        u, delta, A, B, C, _, _, cu_seqlens = tensors
        assert u is not None
        assert delta is not None
        assert A is not None
        assert B is not None
        assert C is not None
        self.wide = wide_dtype(u)
        batch, time, _ = u.shape
        self.count = batch if cu_seqlens is None else len(cu_seqlens) - 1
        self.rates = A.to(self.wide).mT.contiguous()
        self.exponents = self.rates * math.log2(math.e)  # powers of 2 take a third of the time of powers of e
        self.layout: Levels = levels(batch, time, cu_seqlens, _chunk(self.count, A.numel()))
        size = self.layout.size
        self.per_block = max(1, BLOCK // (size * A.numel()))
        self.pieces = _pieces(min(self.count, self.per_block) * A.numel(), size)
        self.u, self.delta, self.B, self.C = (self.split(x) for x in (u, delta, B, C))
        self.written = self.u * self.delta

    def blocks(self, reverse: bool = False) -> Iterator[_Block]:
        """Chunks of a level in groups, level after level."""
        ends = torch.tensor(self.layout.counts).cumsum(0).tolist()
        found = list(zip(ends, self.layout.counts, strict=True))
        for end, count in reversed(found) if reverse else found:
            for first in range(0, count, self.per_block):
                last, start = min(first + self.per_block, count), end - count
                yield _Block(slice(start + first, start + last), slice(first, last))

    def states(self, rows: slice, before: Tensor) -> tuple[Tensor, Tensor]:
        """Of these chunks, decays and states after each row [n, C, N, D]; ``before`` [n, N, D] the states that enter."""
        decay = (self.delta[rows].unsqueeze(2) * self.exponents).exp2_()
        h = self.B[rows].unsqueeze(3) * self.written[rows].unsqueeze(2)
        _scan(decay if self.pieces == 1 else decay.clone(), h, before, self.pieces)
        return decay, h

    def split(self, x: Tensor) -> Tensor:
        """[B, T, .] -> [M, C, .]."""
        return self.layout.split(x.unsqueeze(2), self.wide).squeeze(1)

    def join(self, x: Tensor, like: Tensor) -> Tensor:
        shape = torch.Size((*like.shape[:2], 1, like.shape[2]))
        return self.layout.join(x.unsqueeze(1), shape, like.dtype).squeeze(2)

    def state(self, state: Tensor | None) -> Tensor:
        """[S, D, N] -> [S, N, D], sorted as the layout wants it; zeros for None."""
        if state is None:
            return self.rates.new_zeros(self.count, *self.rates.shape)
        return self.layout.sort(state, self.wide).mT.contiguous()

    def public(self, state: Tensor) -> Tensor:
        return self.layout.unsort(state).mT.contiguous()


def _scan(decay: Tensor, x: Tensor, carry: Tensor, pieces: int, reverse: bool = False) -> None:
    """x_i += decay_i x_{i-1} along the rows of chunks [n, C, N, D], in place, with carry [n, N, D] for x_{-1}; ``reverse``: from
    the last row to the first. With more than one piece ``decay`` is overwritten."""
    order = -1 if reverse else 1
    groups = [t.unflatten(1, (pieces, -1)) for t in (decay, x)]
    decays, rows = (t.unbind(2)[::order] for t in groups)  # each [n, G, N, D]
    first = 0 if order == 1 else -1
    rows[0][:, first].addcmul_(decays[0][:, first], carry)
    for i in range(1, len(rows)):
        rows[i].addcmul_(decays[i], rows[i - 1])
        if pieces > 1:
            decays[i].mul_(decays[i - 1])
    products, pieces_of = (t.unbind(1)[::order] for t in groups)  # each [n, C / G, N, D]
    for (_, earlier), (product, piece) in pairwise(zip(products, pieces_of, strict=True)):
        piece.addcmul_(product, earlier[:, -1 if order == 1 else 0].unsqueeze(1))


def _chunk(segments: int, numbers: int) -> int:
    """Rows C, a power of two, for states of so many numbers: as many as a block of all segments holds, within bounds."""
    fits = max(1, BLOCK // (segments * numbers))
    return min(max(CHUNKS[0], 1 << (fits.bit_length() - 1)), CHUNKS[1])


def _pieces(numbers: int, size: int) -> int:
    """G, a power of two, for chunks of ``size`` rows and steps of so many numbers: enough to fill a step, at most sqrt(size)."""
    wanted = 1 << max(0, (STEP // numbers).bit_length() - 1) if numbers < STEP else 1
    return min(wanted, 1 << (size.bit_length() - 1) // 2)
