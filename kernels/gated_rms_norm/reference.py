"""Plain forms of the gated norm. ``whole`` is the definition; ``forward`` and ``backward`` go block by block through the cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.library import Tensors

BLOCK = 1 << 17  # numbers in a block of rows: half a megabyte of fp32


def whole(x: Tensor, weight: Tensor, gate: Tensor | None, eps: float, silu: bool, norm_first: bool) -> Tensor:
    """The definition, in at least fp32."""
    wide = _wide(x)
    h, factor = x.to(wide), torch.ones((), dtype=wide)
    if gate is not None:
        factor = F.silu(gate.to(wide)) if silu else torch.sigmoid(gate.to(wide))
    if not norm_first:
        h = h * factor
    y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * weight.to(wide)
    return (y * factor if norm_first else y).to(x.dtype)


def forward(tensors: Tensors, options: Sequence[float], backend: str) -> list[Tensor]:
    """(x, weight, gate), (eps, silu, norm first) -> [y, 1 / sqrt(mean square + eps) [..., 1]]."""
    x, weight, gate = tensors
    assert x is not None
    assert weight is not None
    eps, silu, norm_first = options[0], bool(options[1]), bool(options[2])
    wide = _wide(x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rstd = x.new_empty(*x.shape[:-1], 1, dtype=wide)
    out, scales, weight = _rows(y), _rows(rstd), weight.to(wide)
    x, gate = _rows(x), None if gate is None else _rows(gate)
    for a, b in _blocks(x):
        h, act = x[a:b].to(wide), None if gate is None else _act(gate[a:b].to(wide), silu)[0]
        if act is not None and not norm_first:
            h = h * act
        scale = torch.linalg.vector_norm(h, dim=-1, keepdim=True).square_().div_(h.shape[-1]).add_(eps).rsqrt_()
        scales[a:b] = scale
        h = (h * scale).mul_(weight)
        out[a:b] = h if act is None or not norm_first else h.mul_(act)
    return [y, rstd]


def backward(
    tensors: Tensors,
    saved: Sequence[Tensor],
    grads: Tensors,
    needs: Sequence[bool],
    options: Sequence[float],
    backend: str,
) -> Tensors:
    """With the act a of the gate, n = r h normalised and du its gradient: dh = r (du - n mean(du n)).

    Norm first: h = x, du = w a dy, dw = sum of a n dy, da = w n dy. Gate first: h = a x, du = w dy, dw = sum of n dy, da = x dh.
    """
    x, weight, gate = tensors
    dy, rstd = grads[0], saved[0]
    assert x is not None
    assert weight is not None
    assert dy is not None
    silu, norm_first, wide = bool(options[1]), bool(options[2]), rstd.dtype
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dgate = None if gate is None else torch.empty_like(gate, memory_format=torch.contiguous_format)
    w, dw = weight.to(wide), torch.zeros_like(weight, dtype=wide)
    rows, dy, rstd, dx_rows = (_rows(t) for t in (x, dy, rstd, dx))
    z, dz_rows = (None if t is None else _rows(t) for t in (gate, dgate))
    for a, b in _blocks(rows):
        h, d, scale = rows[a:b].to(wide), dy[a:b].to(wide), rstd[a:b]
        act, slope = (None, None) if z is None else _act(z[a:b].to(wide), silu, slope=True)
        if norm_first or act is None or slope is None:
            n = h * scale
            product = d * n
            dact = product * w
            if act is not None and slope is not None and dz_rows is not None:
                dz_rows[a:b] = dact * slope
                product, dact, d = product.mul_(act), dact.mul_(act), d * act
            dw += product.sum(0)
            dx_rows[a:b] = (d * w).addcmul_(n, dact.mean(-1, keepdim=True), value=-1).mul_(scale)
        else:
            n = h * act * scale
            product = d * n
            dw += product.sum(0)
            dh = (d * w).addcmul_(n, product.mul_(w).mean(-1, keepdim=True), value=-1).mul_(scale)
            dx_rows[a:b] = dh * act
            if dz_rows is not None:
                dz_rows[a:b] = dh.mul_(h).mul_(slope)
    return [dx, dw.to(weight.dtype), dgate]


def _act(z: Tensor, silu: bool, slope: bool = False) -> tuple[Tensor, Tensor | None]:
    """-> (the activation, its derivative where wanted)."""
    s = torch.sigmoid(z)
    if not silu:
        return s, s - s * s if slope else None
    act = z * s
    return act, (s + act).addcmul_(act, s, value=-1) if slope else None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _blocks(x: Tensor) -> Iterator[tuple[int, int]]:
    size = max(BLOCK // max(x.shape[1], 1), 1)
    return ((a, min(a + size, len(x))) for a in range(0, len(x), size))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
