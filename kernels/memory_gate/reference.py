"""Plain forms of the memory gate. ``recurrent`` is the definition, ``forward`` and ``backward`` are fast.

With p = <h * gain, k>, a = 1 / rms(h), b = 1 / rms(k), q = mean(v^2), c = alpha (alpha^2 q + eps)^-1/2, W = conv_gain * conv_weight:

    s = p a b / sqrt(D)        z_t = sum_i W_i c_{t(i)} v_{t(i)}, t(i) the token (w-1-i) * dilation back        y = alpha v + silu(z)

A tap out of reach has c = 0. So with dz = silu'(z) dy, for the tap at u = t(i):

    dW_i = sum_t dz_t c_u v_u        dc_u = <W_i dz_t, v_u>        dv_u = c_u W_i dz_t
    dalpha = <dy, v> + dc eps (alpha^2 q + eps)^-3/2               dq = -dc alpha^3 (alpha^2 q + eps)^-3/2 / 2
    dv += alpha dy + 2 dq v / D      ds = dalpha alpha (1 - alpha), times 1 / (2 sqrt|s|), or 0 where |s| <= 1e-6
    dh = ds a b / sqrt(D) gain k - ds s a^2 h / D                  dk, dgain alike

Work goes branch by branch over blocks of time that stay in the cache. Where there is a mask, the valid tokens of each row are moved
to its front first, so that a tap is a shift in any case.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.library import Tensors

DEAD_ZONE = 1e-6  # below this |s| the root is that of the bound, and has no slope
BLOCK = 1 << 17  # numbers in a block: half a megabyte of fp32


def recurrent(
    h: Tensor,
    key: Tensor,
    value: Tensor,
    gain: Tensor,
    conv_gain: Tensor | None,
    conv_weight: Tensor | None,
    dilation: int,
    eps: float,
    gate: str,
    valid: Tensor | None = None,
    segments: Tensor | None = None,
    state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Token by token, with the window of the convolution as a list. Arguments and results as of the public function."""
    wide = torch.promote_types(h.dtype, torch.float32)
    h, key, value, gain = (x.to(wide) for x in (h, key, value, gain))
    B, T, M, D = h.shape
    width = 1 if conv_weight is None else conv_weight.shape[-1]
    reach = (width - 1) * dilation
    ys, alphas, newest = [], [], []
    for b in range(B):
        window: list[tuple[Tensor, Tensor, int]] = []  # (value, scale, document)
        if state is not None:
            window = [(v.to(wide), c.to(wide), 0) for v, c in zip(state[0][b], state[1][b], strict=True)]
        for t in range(T):
            if valid is not None and not valid[b, t]:
                ys.append(h.new_zeros(M, D))
                alphas.append(h.new_zeros(M))
                continue
            s = (_normalised(h[b, t], eps) * gain * _normalised(key[b, t], eps)).sum(-1) / D**0.5
            if gate == "signed_sqrt":
                s = s.sign() * s.abs().clamp(min=DEAD_ZONE).sqrt()
            alpha, v, document = s.sigmoid(), value[b, t], 0 if segments is None or state else int(segments[b, t])
            y = alpha[:, None] * v
            window.append((v, alpha / (y.square().mean(-1) + eps).sqrt(), document))
            if conv_weight is not None and conv_gain is not None:
                z = torch.zeros_like(y)
                for i in range(width):
                    back = len(window) - 1 - (width - 1 - i) * dilation
                    if back >= 0 and window[back][2] == document:
                        z = z + conv_weight[..., i] * conv_gain * window[back][1][:, None] * window[back][0]
                y = y + F.silu(z)
            ys.append(y)
            alphas.append(alpha)
        newest.append(window[len(window) - reach :])
    y, alpha = torch.stack(ys).view(B, T, M, D), torch.stack(alphas).view(B, T, M)
    if state is None:
        return y, alpha, None
    values, scales = (
        torch.stack([torch.stack([*(entry[i] for entry in row), old.new_zeros(old.shape[2])])[:-1] for row in newest])
        for i, old in enumerate(state)
    )
    return y, alpha, (values.to(state[0].dtype), scales.to(state[1].dtype))


def _normalised(x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def forward(tensors: Tensors, options: Sequence[float], backend: str) -> list[Tensor]:
    """(h, key, value, gain, W, valid, segments, state values, state scales), (dilation, eps, whether the signed root) ->
    [y, alpha, newest values, newest scales (empty without a state); s, 1 / rms(h), 1 / rms(k), mean(v^2)].

    What is kept for the backward has the valid tokens at the front.
    """
    rows, (dilation, eps, rooted) = _arranged(tensors), _read(options)
    h, key, value = rows.h, rows.key, rows.value
    B, T, M, D = h.shape
    wide = torch.promote_types(h.dtype, torch.float32)
    gain = rows.gain.to(wide)
    score, inv_h, inv_k = (h.new_empty(B, T, M, dtype=wide) for _ in range(3))
    power = h.new_empty(B, T, dtype=wide)
    for a, b in _blocks(B, T, D):
        power[:, a:b] = _mean_square(value[:, a:b].to(wide))
        for m in range(M):
            x, k = h[:, a:b, m].to(wide), key[:, a:b, m].to(wide)
            inv_h[:, a:b, m] = _mean_square(x).add_(eps).rsqrt_()
            inv_k[:, a:b, m] = _mean_square(k).add_(eps).rsqrt_()
            score[:, a:b, m] = torch.mul(x, k) @ gain[m]
    score.mul_(inv_h).mul_(inv_k).mul_(D**-0.5)
    alpha = _gate(score, rooted)
    if rows.live is not None:
        alpha.mul_(rows.live[..., None])
    y = torch.empty_like(h, memory_format=torch.contiguous_format)
    line = _line(rows, alpha, power, eps)
    taps = _taps(rows, line, dilation)
    for a, b in _blocks(B, T, D):
        for m in range(M):
            out = value[:, a:b].to(wide) * alpha[:, a:b, m, None]
            if taps:
                out += F.silu(_convolve(taps, line, m, a, b), inplace=True)
            y[:, a:b, m] = out
    outputs = _restored(y, rows.order), _restored(alpha, rows.order)
    return [*outputs, *_newest(rows, line), score, inv_h, inv_k, power]


def backward(
    tensors: Tensors,
    saved: Sequence[Tensor],
    grads: Tensors,
    needs: Sequence[bool],
    options: Sequence[float],
    backend: str,
) -> Tensors:
    """One gradient per tensor of ``forward``, none for the masks."""
    rows, (dilation, eps, rooted) = _arranged(tensors), _read(options)
    h, key, value = rows.h, rows.key, rows.value
    score, inv_h, inv_k, power, alpha = saved
    alpha = _ordered(alpha, rows.order)
    B, T, M, D = h.shape
    gain = rows.gain.to(alpha.dtype)
    line = _line(rows, alpha, power, eps)
    d_alpha, d_line, d_taps = _into_line(rows, alpha, line, grads, dilation)
    d_value = d_line.values[:, -T:]

    scale = (alpha.square() * power[..., None]).add_(eps).rsqrt_()
    d_scale = d_line.scales[:, -T:] * scale.pow(3)
    d_alpha += d_scale * eps
    d_power = (d_scale * alpha.pow(3)).sum(-1).mul_(-0.5)
    d_score = d_alpha * alpha * (1 - alpha)  # zero for an invalid token, whose alpha is
    if rooted:
        d_score *= torch.where(score.abs() > DEAD_ZONE, 0.5 * score.abs().rsqrt(), 0.0)
    across = d_score * inv_h * inv_k * D**-0.5
    along = d_score * score * (-1 / D)
    along_h, along_k = along * inv_h.square(), along * inv_k.square()
    dh, dk, d_gain = torch.empty_like(h), torch.empty_like(key), torch.zeros_like(gain)
    for a, b in _blocks(B, T, D):
        d_value[:, a:b].addcmul_(value[:, a:b].to(gain.dtype), d_power[:, a:b, None], value=2 / D)
        for m in range(M):
            x, k, weight = h[:, a:b, m].to(gain.dtype), key[:, a:b, m].to(gain.dtype), across[:, a:b, m, None]
            dh[:, a:b, m] = (k * weight).mul_(gain[m]).addcmul_(x, along_h[:, a:b, m, None])
            dk[:, a:b, m] = (x * weight).mul_(gain[m]).addcmul_(k, along_k[:, a:b, m, None])
            d_gain[m] += weight.flatten() @ torch.mul(x, k).flatten(0, 1)
    before = line.values.shape[1] - T
    d_states = d_line.values[:, :before], d_line.scales[:, :before]
    d_rows = (_restored(x, rows.order) for x in (dh, dk, d_value))
    found = [*d_rows, d_gain, d_taps, None, None, *d_states]
    return [None if g is None or t is None else g.to(t.dtype) for g, t in zip(found, tensors, strict=True)]


def _into_line(
    rows: _Rows, alpha: Tensor, line: _Line, grads: Tensors, dilation: int
) -> tuple[Tensor, _Line, Tensor | None]:
    """What the outputs' gradients give to alpha [B, T, M] (not by way of c), to the line and to W [M, D, w]."""
    dy, d_alpha = (None if g is None else _ordered(g, rows.order) for g in grads[:2])
    d_alpha = torch.zeros_like(alpha) if d_alpha is None else d_alpha.clone(memory_format=torch.contiguous_format)
    d_line = _Line(torch.zeros_like(line.values, dtype=alpha.dtype), torch.zeros_like(line.scales))
    d_taps = None if rows.weight is None else torch.zeros_like(rows.weight)
    _newest_backward(grads[2], grads[3], rows, d_line)
    if dy is None:
        return d_alpha, d_line, d_taps
    B, T, M, D = rows.h.shape
    d_value, taps = d_line.values[:, -T:], _taps(rows, line, dilation)
    for a, b in _blocks(B, T, D):
        v = rows.value[:, a:b].to(alpha.dtype)
        for m in range(M):
            above = dy[:, a:b, m].to(alpha.dtype)
            d_alpha[:, a:b, m] += (above * v).sum(-1)
            d_value[:, a:b].addcmul_(above, alpha[:, a:b, m, None])
            if d_taps is not None:
                dz = torch.ops.aten.silu_backward(above, _convolve(taps, line, m, a, b))
                _convolve_backward(dz, taps, line, d_line, d_taps[m], m, a, b)
    return d_alpha, d_line, d_taps


class _Rows(NamedTuple):
    """The arguments, the valid tokens of each row at its front."""

    h: Tensor  # [B, T, M, D]
    key: Tensor
    value: Tensor  # [B, T, D]
    gain: Tensor  # [M, D]
    weight: Tensor | None  # W [M, D, w]
    live: Tensor | None  # bool [B, T]; None: all
    segments: Tensor | None  # int [B, T]
    order: Tensor | None  # int64 [B, T], the position of each row of this arrangement; None: its own
    values: Tensor | None  # state [B, R, D]
    scales: Tensor | None  # state [B, R, M]


class _Line(NamedTuple):
    """What taps may meet: the state, then the tokens."""

    values: Tensor  # v [B, R+T, D], R = 0 without a state
    scales: Tensor  # c [B, R+T, M]


class _Tap(NamedTuple):
    """One tap of all branches: what each token reads ``back`` tokens before it."""

    weight: Tensor  # [M, D]
    back: int
    first: int  # the first token that finds something there
    reached: Tensor | None  # bool [B, T - first], whether it may; None: all may
    scales: Tensor  # c [B, T - first, M], zero where it may not


def _arranged(tensors: Tensors) -> _Rows:
    h, key, value, gain, weight, valid, segments, values, scales = tensors
    assert h is not None
    assert key is not None
    assert value is not None
    assert gain is not None
    if valid is None:
        return _Rows(h, key, value, gain, weight, None, segments, None, values, scales)
    order = torch.argsort(~valid, dim=1, stable=True)
    h, key, value, live = (_ordered(x, order) for x in (h, key, value, valid))
    segments = None if segments is None else _ordered(segments, order)
    return _Rows(h, key, value, gain, weight, live, segments, order, values, scales)


def _ordered(x: Tensor, order: Tensor | None) -> Tensor:
    """x [B, T, ...] -> row t is the old row order[t]."""
    return x if order is None else x.gather(1, _spread(order, x))


def _restored(x: Tensor, order: Tensor | None) -> Tensor:
    """The reverse."""
    return x if order is None else torch.empty_like(x).scatter_(1, _spread(order, x), x)


def _spread(order: Tensor, x: Tensor) -> Tensor:
    return order.view(*order.shape, *(1,) * (x.ndim - 2)).expand(*order.shape, *x.shape[2:])


def _read(options: Sequence[float]) -> tuple[int, float, bool]:
    return int(options[0]), options[1], bool(options[2])


def _gate(score: Tensor, rooted: bool) -> Tensor:
    if not rooted:
        return score.sigmoid()
    return score.abs().clamp_(min=DEAD_ZONE).sqrt_().mul_(score.sign()).sigmoid_()


def _mean_square(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1).square_().div_(x.shape[-1])


def _line(rows: _Rows, alpha: Tensor, power: Tensor, eps: float) -> _Line:
    scales = (alpha.square() * power[..., None]).add_(eps).rsqrt_().mul_(alpha)
    if rows.values is None or rows.scales is None:
        return _Line(rows.value, scales)
    values = torch.cat((rows.values.to(rows.value.dtype), rows.value), dim=1)
    return _Line(values, torch.cat((rows.scales.to(scales.dtype), scales), dim=1))


def _taps(rows: _Rows, line: _Line, dilation: int) -> list[_Tap]:
    """The token's own first; those that no token reaches are left out."""
    if rows.weight is None:
        return []
    T, found = rows.value.shape[1], []
    before = line.scales.shape[1] - T
    for i, weight in enumerate(rows.weight.flip(-1).permute(2, 0, 1).contiguous()):
        back = i * dilation
        first = max(back - before, 0)
        if first >= T:
            break
        reached = None if rows.live is None else rows.live[:, first:]
        if rows.segments is not None and back:
            same = rows.segments[:, first:] == rows.segments[:, : T - first]
            reached = same if reached is None else reached & same
        scales = line.scales[:, before + first - back :][:, : T - first]
        scales = scales if reached is None else scales * reached[..., None]
        found.append(_Tap(weight, back, first, reached, scales))
    return found


def _convolve(taps: list[_Tap], line: _Line, m: int, a: int, b: int) -> Tensor:
    """z of branch m, tokens a to b: [B, b-a, D]."""
    batch, width = len(line.values), line.values.shape[-1]
    z = taps[0].weight.new_zeros(batch, b - a, width)
    for tap, start, at in _reaching(taps, line, a, b):
        c = tap.scales[:, start - tap.first : b - tap.first, m, None]
        z[:, start - a :].addcmul_(line.values[:, at] * c, tap.weight[m])
    return z


def _convolve_backward(
    dz: Tensor, taps: list[_Tap], line: _Line, d_line: _Line, d_weight: Tensor, m: int, a: int, b: int
) -> None:
    """Adds what tokens a to b give to the gradients of the line and of W [D, w]."""
    for i, (tap, start, at) in enumerate(_reaching(taps, line, a, b)):
        inside, here = slice(start - tap.first, b - tap.first), dz[:, start - a :]
        c, product = tap.scales[:, inside, m], here * line.values[:, at]
        d_weight[:, -1 - i] += c.flatten() @ product.flatten(0, 1)
        d_c = product @ tap.weight[m]
        d_line.scales[:, at, m] += d_c if tap.reached is None else d_c * tap.reached[:, inside]
        d_line.values[:, at].addcmul_(here * c[..., None], tap.weight[m])


def _reaching(taps: list[_Tap], line: _Line, a: int, b: int) -> Iterator[tuple[_Tap, int, slice]]:
    """Of tokens a to b: (tap, the first that it serves, where what they read stands on the line)."""
    T = taps[0].scales.shape[1]  # the token's own tap serves all
    before = line.values.shape[1] - T
    for tap in taps:
        start = max(a, tap.first)
        if start < b:
            yield tap, start, slice(start + before - tap.back, b + before - tap.back)


def _newest(rows: _Rows, line: _Line) -> list[Tensor]:
    """The last R valid entries of the line, in the dtypes of the state."""
    if rows.values is None or rows.scales is None:
        return [rows.h.new_empty(0), rows.h.new_empty(0)]
    at = _last(rows)
    return [
        _ordered(x, at).to(old.dtype, copy=True, memory_format=torch.contiguous_format)
        for x, old in ((line.values, rows.values), (line.scales, rows.scales))
    ]


def _newest_backward(d_values: Tensor | None, d_scales: Tensor | None, rows: _Rows, d_line: _Line) -> None:
    if rows.values is None:
        return
    at = _last(rows)
    for grad, total in ((d_values, d_line.values), (d_scales, d_line.scales)):
        if grad is not None and grad.numel():
            total.scatter_add_(1, _spread(at, total), grad.to(total.dtype))


def _last(rows: _Rows) -> Tensor:
    """int64 [B, R], where the newest entries stand on the line."""
    assert rows.values is not None
    B, R = rows.values.shape[:2]
    at = torch.arange(R, device=rows.value.device).expand(B, R)
    return at + (rows.value.shape[1] if rows.live is None else rows.live.sum(1, keepdim=True))


def _blocks(B: int, T: int, D: int) -> list[tuple[int, int]]:
    size = max(BLOCK // (B * D), 1)
    return [(a, min(a + size, T)) for a in range(0, T, size)]
