"""Spread and combine by gathers alone, forward and backward: each flat row has one slot, each slot one flat row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.library import Tensors


def spread(tensors: Tensors, options: Sequence[float], backend: str) -> list[Tensor]:
    """x [T, C], token [N], inv [T, S] -> y [N, C], y_n = x_token(n)."""
    x, token, _ = tensors
    assert x is not None
    assert token is not None
    return [x.index_select(0, token)]


def spread_backward(
    tensors: Tensors,
    saved: Sequence[Tensor],
    grads: Tensors,
    needs: Sequence[bool],
    options: Sequence[float],
    backend: str,
) -> Tensors:
    """dx_t = sum of dy over the rows of t's slots."""
    dy, inv = grads[0], tensors[2]
    assert dy is not None
    assert inv is not None
    return [_bag(dy, inv, None), None, None]


def combine(tensors: Tensors, options: Sequence[float], backend: str) -> list[Tensor]:
    """o [N, C], w [T, S], perm [N], inv [T, S] -> y [T, C], y_t = sum_s w_ts o_inv(t,s)."""
    o, w, _, inv = tensors
    assert o is not None
    assert inv is not None
    return [_bag(o, inv, w)]


def combine_backward(
    tensors: Tensors,
    saved: Sequence[Tensor],
    grads: Tensors,
    needs: Sequence[bool],
    options: Sequence[float],
    backend: str,
) -> Tensors:
    """do_n = w_perm(n) dy_token(n), dw_ts = <dy_t, o_inv(t,s)>."""
    o, w, perm, inv = tensors
    dy = grads[0]
    assert o is not None
    assert w is not None
    assert perm is not None
    assert inv is not None
    assert dy is not None
    wide = torch.promote_types(o.dtype, torch.float32)
    rows = dy.index_select(0, perm // w.shape[1]).to(wide)  # [N, C]
    dw = torch.linalg.vecdot(rows, o.to(wide))[inv].to(w.dtype) if needs[1] else None
    do = rows.mul_(w.to(wide).flatten()[perm][:, None]).to(o.dtype) if needs[0] else None
    return [do, dw, None, None]


def _bag(rows: Tensor, inv: Tensor, w: Tensor | None) -> Tensor:
    """rows [N, C], inv [T, S], w [T, S] or None for ones -> sum_s w_ts rows_inv(t,s) [T, C], added in at least fp32."""
    if rows.device.type == "cpu" and rows.dtype in (torch.float32, torch.float64):  # one pass over memory
        rows = rows.contiguous()
        return F.embedding_bag(inv, rows, mode="sum", per_sample_weights=None if w is None else w.to(rows.dtype))
    wide = torch.promote_types(rows.dtype, torch.float32)
    total = torch.zeros((), dtype=wide, device=rows.device)
    for s in range(inv.shape[1]):
        row = rows.index_select(0, inv[:, s]).to(wide)
        total = total + (row if w is None else row * w[:, s, None].to(wide))
    return total.to(rows.dtype)
