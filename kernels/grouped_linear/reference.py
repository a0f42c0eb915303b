"""The grouped product in PyTorch: one matrix product per group where the host may look at the offsets, one per memory over all
rows where looking would make it wait."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.library import Tensors


def recurrent(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Row by row in at least fp32, by autograd: the definition."""
    wide = torch.promote_types(x.dtype, torch.float32)
    ends = offsets[1:].tolist()
    rows = []
    for n, row in enumerate(x.to(wide)):
        e = sum(end <= n for end in ends)
        rows.append(weight[e].to(wide) @ row if e < len(ends) else row.new_zeros(weight.shape[1]))
    return torch.stack(rows).to(x.dtype)


def forward(tensors: Tensors, options: Sequence[float], backend: str) -> list[Tensor]:
    """x [N, D], weight [E, O, D], offsets [E+1] -> y [N, O]."""
    x, weight, offsets = tensors
    assert x is not None
    assert weight is not None
    assert offsets is not None
    return [_product(x, weight.mT, offsets)]


def backward(
    tensors: Tensors,
    saved: Sequence[Tensor],
    grads: Tensors,
    needs: Sequence[bool],
    options: Sequence[float],
    backend: str,
) -> Tensors:
    """dx_n = W_e^T dy_n, dW_e = sum of dy_n x_n^T over the rows of e."""
    x, weight, offsets = tensors
    dy = grads[0]
    assert x is not None
    assert weight is not None
    assert offsets is not None
    assert dy is not None
    dx = _product(dy, weight, offsets) if needs[0] else None
    return [dx, _outer(dy, x, weight, offsets) if needs[1] else None, None]


def _product(x: Tensor, maps: Tensor, offsets: Tensor) -> Tensor:
    """x [N, D], maps [E, D, O] -> [N, O], zero in the rows of no group."""
    if x.device.type != "cpu":
        return product_without_looking(x, maps, offsets)
    y = x.new_empty(len(x), maps.shape[2])
    bounds = offsets.tolist()
    for e, (a, b) in enumerate(itertools.pairwise(bounds)):
        if a < b:
            torch.mm(x[a:b], maps[e], out=y[a:b])
    y[bounds[-1] :].zero_()
    return y


def _outer(dy: Tensor, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """dy [N, O], x [N, D] -> [E, O, D]."""
    if x.device.type != "cpu":
        return outer_without_looking(dy, x, weight, offsets)
    dw = torch.empty_like(weight, memory_format=torch.contiguous_format)
    bounds = offsets.tolist()
    for e, (a, b) in enumerate(itertools.pairwise(bounds)):
        if a < b:
            torch.mm(dy[a:b].T, x[a:b], out=dw[e])
        else:
            dw[e].zero_()
    return dw


def product_without_looking(x: Tensor, maps: Tensor, offsets: Tensor) -> Tensor:
    """Every map over every row: E times the work, no wait for the offsets."""
    y = x.new_zeros(len(x), maps.shape[2])
    for e in range(len(maps)):
        y = torch.where(_members(x, offsets, e), x @ maps[e], y)
    return y


def outer_without_looking(dy: Tensor, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return torch.stack([torch.where(_members(x, offsets, e), dy, 0).T @ x for e in range(len(weight))])


def _members(x: Tensor, offsets: Tensor, e: int) -> Tensor:
    """bool [N, 1], the rows of group e."""
    rows = torch.arange(len(x), device=x.device)
    return ((rows >= offsets[e]) & (rows < offsets[e + 1]))[:, None]
