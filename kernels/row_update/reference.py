"""Row updates in PyTorch: a radix sort, one gather that adds, one pass over the touched rows.

Only additions, products, quotients and roots touch a row, one operation at a time: IEEE fixes their bits, while a fused
multiply-add or an exponential may come out differently in the vector body and in the tail of a loop.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from kernels.row_update import Hyper


PIECE = 1 << 17  # numbers updated at once on a CPU: what was gathered is still in its cache when it is written back


def sum_rows(rows: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """See `kernels.row_update.sum_rows`."""
    grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
    if not len(rows):
        return rows, grad
    unique, order, starts = sorted_segments(rows)
    if len(rows) == len(unique):
        return unique, grad.index_select(0, order)
    return unique, F.embedding_bag(order, grad.contiguous(), starts[:-1], mode="sum")


def sorted_segments(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """rows [n] -> (the distinct rows, sorted [U]; the places of equal rows in ``rows``, side by side and in order [n]; where
    those of each distinct row begin, and n [U+1])."""
    ordered, order = torch.sort(rows, stable=True)
    unique, counts = torch.unique_consecutive(ordered, return_counts=True)
    index = torch.int32 if len(rows) < 2**31 else torch.int64  # half the index is half the time
    starts = F.pad(counts.cumsum(0), (1, 0))
    return unique, order.to(index), starts.to(index)


def row_update(
    values: Tensor, moments: Sequence[Tensor], rows: Tensor | None, grad: Tensor, rule: str, hyper: Hyper
) -> None:
    """See `kernels.row_update.row_update`."""
    step = _lazy_adam if rule == "lazy_adam" else _rowwise
    arrays = [values, *moments]
    if rows is None:
        step(arrays, grad.to(values.dtype), hyper)
        return
    size = max(1, PIECE // values.shape[1]) if rows.device.type == "cpu" else max(1, len(rows))
    for some, g in zip(rows.split(size), grad.split(size), strict=True):
        held = [a.index_select(0, some) for a in arrays]
        step(held, g.to(values.dtype), hyper)
        for array, new in zip(arrays, held, strict=True):
            array.index_copy_(0, some, new)


def sum_update(values: Tensor, moments: Sequence[Tensor], rows: Tensor, grad: Tensor, rule: str, hyper: Hyper) -> None:
    """See `kernels.row_update.sum_update`."""
    row_update(values, moments, *sum_rows(rows, grad), rule, hyper)


def _lazy_adam(arrays: Sequence[Tensor], grad: Tensor, hyper: Hyper) -> None:
    """In place on values, m, v [U, W] and steps [U]."""
    values, m, v, steps = arrays
    steps.add_(1)
    first, second = (_debias(steps, beta, values.dtype)[:, None] for beta in (hyper.beta1, hyper.beta2))
    m.mul_(hyper.beta1).add_(grad * (1 - hyper.beta1))
    v.mul_(hyper.beta2).add_((grad * grad).mul_(1 - hyper.beta2))
    scale = (v / second).sqrt_().add_(hyper.eps)
    values.sub_((m / first).div_(scale).mul_(hyper.lr))


def _rowwise(arrays: Sequence[Tensor], grad: Tensor, hyper: Hyper) -> None:
    """In place on values [U, W], v and steps [U]."""
    values, v, steps = arrays
    steps.add_(1)
    v.mul_(hyper.beta2).add_((grad * grad).mean(dim=1).mul_(1 - hyper.beta2))
    scale = (v / _debias(steps, hyper.beta2, v.dtype)).sqrt_().add_(hyper.eps)
    values.sub_(grad * (hyper.lr / scale)[:, None])


def _debias(steps: Tensor, beta: float, dtype: torch.dtype) -> Tensor:
    """1 - beta^s of int steps, looked up: a power would have other bits in other places of a loop."""
    known = corrections(beta, dtype, steps.device)
    return known.index_select(0, steps.clamp(max=len(known) - 1))


@functools.lru_cache(maxsize=16)
def corrections(beta: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """1 - beta^s for s = 0, 1, ... until it is 1 in ``dtype``."""
    last = 1 if beta == 0 else math.ceil(math.log(torch.finfo(dtype).eps / 4) / math.log(beta))
    return (1 - beta ** torch.arange(last + 1, dtype=torch.float64)).to(device, dtype)


def sinkhorn_update(
    values: Tensor,
    momentum: Tensor,
    grad: Tensor,
    lr: float,
    beta: float,
    rounds: int,
    threshold: float,
    scale: float,
    eps: float,
) -> None:
    """See `kernels.row_update.sinkhorn_update`."""
    fresh = grad.to(values.dtype) * (1 - beta)
    momentum.mul_(beta).add_(fresh)
    u = (momentum * beta).add_(fresh)
    norm = torch.linalg.vector_norm(u, dim=1, keepdim=True)
    u.masked_fill_(norm <= threshold * norm.mean(), 0)
    for i in range(rounds):
        u.div_(torch.linalg.vector_norm(u, dim=1 - i % 2, keepdim=True).clamp_(min=eps))
    values.sub_(u.mul_(scale * lr * math.sqrt(values.shape[1])))
