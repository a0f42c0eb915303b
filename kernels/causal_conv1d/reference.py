"""Plain forms of the short convolution. ``recurrent`` is the definition; ``forward`` and ``backward`` are fast on a CPU.

All B * T rows are convolved as if they were one sequence: W multiply-adds of shifted rows, block by block, so that a block stays in
the cache. Only the first W - 1 rows of each segment come out wrong by that. Their windows (state, then rows) are laid side by
side as [S, 2 (W-1), C], convolved again and put in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.library import Tensors
from kernels.memory_slots import put, take

BLOCK = 1 << 17  # numbers in a block of rows: half a megabyte of fp32


def recurrent(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Token by token with the window as the state. Arguments and results as of the public function."""
    wide = _wide(x)
    b, t, channels = x.shape
    taps = weight.t().to(wide)
    rows, ends = x.flatten(0, 1).to(wide), whole_rows(b, t, "cpu") if cu_seqlens is None else cu_seqlens
    outs, states = [], []
    for i, (start, end) in enumerate(pairwise(ends.tolist())):
        before = rows.new_zeros(len(taps) - 1, channels) if initial_state is None else initial_state[i].to(wide)
        for row in rows[start:end]:
            window = torch.cat((before, row[None]))
            u = (window * taps).sum(0) + (0 if bias is None else bias.to(wide))
            outs.append(F.silu(u) if silu else u)
            before = window[1:]
        states.append(before)
    outs += [rows.new_zeros(channels)] * (b * t - len(outs))
    state = torch.stack(states).to(x.dtype if initial_state is None else initial_state.dtype)
    return torch.stack(outs).view(x.shape).to(x.dtype), state


def forward(tensors: Tensors, options: Sequence[float], backend: str) -> list[Tensor]:
    """(x, weight, bias, initial state, cu_seqlens), (silu, whether the final state is wanted) -> [y, final state or nothing]."""
    x, weight, bias, initial, cu = tensors
    assert x is not None
    assert weight is not None
    silu, final = bool(options[0]), bool(options[1])
    taps, bias = _taps(x, weight, bias)
    rows, heads = x.flatten(0, 1), _heads(x, weight, initial, cu)
    y = torch.empty_like(rows, memory_format=torch.contiguous_format)
    for a, b in _blocks(rows):
        u = _convolve(_window(rows, a, b, len(taps) - 1), taps, bias)
        y[a:b] = F.silu(u, inplace=True) if silu else u
    u = _convolve(heads.windows, taps, bias)
    y[heads.rows[heads.live]] = (F.silu(u) if silu else u)[heads.live].to(y.dtype)
    y[heads.end :] = 0
    state = _last(rows, heads) if final else rows.new_empty(0)
    return [y.view(x.shape), state.to((x if initial is None else initial).dtype)]


def backward(
    tensors: Tensors,
    saved: Sequence[Tensor],
    grads: Tensors,
    needs: Sequence[bool],
    options: Sequence[float],
    backend: str,
) -> Tensors:
    """With u before the activation, computed again, and du = act'(u) dy:

    dx_t = sum_d w_{W-1-d} du_{t+d} inside the segment     dw_{W-1-d} = sum_t du_t x_{t-d}     db = sum_t du_t

    Rows whose window crosses a segment's start count as part of their side-by-side windows only.
    """
    x, weight, bias, initial, cu = tensors
    assert x is not None
    assert weight is not None
    silu = bool(options[0])
    taps, wide_bias = _taps(x, weight, bias)
    rows, heads, reach = x.flatten(0, 1), _heads(x, weight, initial, cu), len(taps) - 1
    dx = torch.zeros_like(rows, memory_format=torch.contiguous_format)
    dtaps = torch.zeros_like(taps)
    dbias = taps.new_zeros(taps.shape[1])
    dwindows = torch.zeros_like(heads.windows)
    if grads[0] is not None:
        dy = grads[0].flatten(0, 1)
        inner = taps.new_ones(len(rows), 1)
        inner[heads.rows[heads.live]] = 0
        inner[heads.end :] = 0
        behind = taps.new_zeros(reach, taps.shape[1])  # du of the rows after the block
        for a, b in reversed(_blocks(rows)):
            n, window, du = b - a, _window(rows, a, b, reach), dy[a:b].to(taps.dtype)
            if silu:
                du = torch.ops.aten.silu_backward(du, _convolve(window, taps, wide_bias))
            du = torch.cat((du * inner[a:b], behind))
            behind = du[:reach].clone()
            dx[a:b] = _convolve(du, taps.flip(0), None)
            du, product = du[:n], torch.empty_like(du[:n])
            for i in range(reach + 1):
                dtaps[i] += torch.mul(du, window[i : i + n], out=product).sum(0)
            dbias += du.sum(0)
        dy = torch.where(heads.live[..., None], dy[heads.rows].to(taps.dtype), 0)
        if silu:
            dy = torch.ops.aten.silu_backward(dy, _convolve(heads.windows, taps, wide_bias))
        dbias += dy.sum((0, 1))
        for i in range(reach + 1):
            dwindows[:, i : i + reach] += dy * taps[i]
            dtaps[i] += (dy * heads.windows[:, i : i + reach]).sum((0, 1))
    if grads[1] is not None:
        _last_backward(grads[1].to(taps.dtype), heads, dx, dwindows)
    dx.index_add_(0, heads.rows[heads.live], dwindows[:, reach:][heads.live].to(dx.dtype))
    return [
        dx.view(x.shape),
        dtaps.t().to(weight.dtype),
        None if bias is None else dbias.to(bias.dtype),
        None if initial is None else dwindows[:, :reach].to(initial.dtype),
        None,
    ]


def step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    silu: bool,
    index: Tensor | None,
    donate: bool,
) -> tuple[Tensor, Tensor]:
    """x [B, S, C], state [B, E, W-1, C], index [B, S] -> (y, state), as of the public function."""
    taps, bias = _taps(x, weight, bias)
    before = state if index is None else take(state, index)
    window = torch.cat((before.to(taps.dtype), x[:, :, None].to(taps.dtype)), dim=2)
    u = (window * taps).sum(2)
    u = u if bias is None else u + bias
    y = F.silu(u) if silu else u
    after = window[:, :, 1:].to(state.dtype)
    if index is None:
        return y.to(x.dtype), state.copy_(after) if donate else after
    y = torch.where((index >= 0)[..., None], y, 0).to(x.dtype)
    return y, put(state, index, after, donate)


class _Heads(NamedTuple):
    """The first W - 1 rows of each segment, with what came before them."""

    windows: Tensor  # [S, 2 (W-1), C], state first; zeros past a segment's end
    rows: Tensor  # int64 [S, W-1], flat rows, clamped to those there are
    live: Tensor  # bool [S, W-1], whether the segment has that row
    start: Tensor  # int64 [S]
    count: Tensor  # int64 [S], rows of the segment
    end: int  # the first row that belongs to no segment


def _heads(x: Tensor, weight: Tensor, initial: Tensor | None, cu: Tensor | None) -> _Heads:
    b, t, channels = x.shape
    cu = whole_rows(b, t, x.device).long() if cu is None else cu.long()
    reach = weight.shape[1] - 1
    start, count, inside = cu[:-1], cu.diff(), torch.arange(reach, device=cu.device)
    rows = (start[:, None] + inside).clamp(max=b * t - 1)
    live = inside < count[:, None]
    own = torch.where(live[..., None], x.flatten(0, 1)[rows], 0).to(_wide(x))
    before = own.new_zeros(len(count), reach, channels) if initial is None else initial.to(own.dtype)
    return _Heads(torch.cat((before, own), 1), rows, live, start, count, int(cu[-1]))


def _last(rows: Tensor, heads: _Heads) -> Tensor:
    """-> [S, W-1, C], the last inputs of each segment, from its window where it is shorter than that."""
    reach = heads.rows.shape[1]
    at = heads.count[:, None] + torch.arange(reach, device=rows.device)  # in state followed by rows
    segments = torch.arange(len(at), device=rows.device)[:, None]
    window = heads.windows[segments, at.clamp(max=max(2 * reach - 1, 0))]
    own = rows[(heads.start[:, None] + at - reach).clamp(0, len(rows) - 1)].to(window.dtype)
    return torch.where((heads.count < reach)[:, None, None], window, own)


def _last_backward(grad: Tensor, heads: _Heads, dx: Tensor, dwindows: Tensor) -> None:
    """Adds the gradients of ``_last`` to those of the rows and of the windows."""
    reach = heads.rows.shape[1]
    at = heads.count[:, None] + torch.arange(reach, device=grad.device)
    long = heads.count >= reach
    dx.index_add_(0, (heads.start[:, None] + at - reach)[long].flatten(), grad[long].flatten(0, 1).to(dx.dtype))
    short = (~long).nonzero()
    dwindows.index_put_((short, at[short[:, 0]]), grad[short[:, 0]], accumulate=True)


def _convolve(window: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    """window [..., R + W-1, C], taps [W, C] -> [..., R, C]."""
    n = window.shape[-2] - len(taps) + 1
    first = window.narrow(-2, 0, n)
    out = first * taps[0] if bias is None else torch.addcmul(bias, first, taps[0])
    for i in range(1, len(taps)):
        out.addcmul_(window.narrow(-2, i, n), taps[i])
    return out


def _window(rows: Tensor, a: int, b: int, reach: int) -> Tensor:
    """Rows a - reach to b, wide; zeros for rows before the first."""
    found = rows[max(a - reach, 0) : b].to(_wide(rows))
    missing = reach + b - a - len(found)
    return found if not missing else F.pad(found, (0, 0, missing, 0))


def _blocks(rows: Tensor) -> list[tuple[int, int]]:
    size = max(BLOCK // max(rows.shape[1], 1), 1)
    return [(a, min(a + size, len(rows))) for a in range(0, len(rows), size)]


def _taps(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """-> (weight [W, C], bias [C]), wide."""
    wide = _wide(x)
    return weight.t().to(wide).contiguous(), None if bias is None else bias.to(wide)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def whole_rows(batch: int, time: int, device: torch.device | str) -> Tensor:
    """The ``cu_seqlens`` of B sequences of T rows each: int32 [B+1]."""
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * time
