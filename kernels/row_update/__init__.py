"""What a table does with its gradient: gradients of repeated rows are added, then the touched rows and their moments change.

    sum_rows:    G_u = sum of g_i over i with r_i = u, in at least fp32, in the order of the list
    row_update:  m <- b1 m + (1 - b1) G,   v <- b2 v + (1 - b2) G^2,   s <- s + 1
                 w <- w - lr m / (1 - b1^s) / (sqrt(v / (1 - b2^s)) + eps)

Every row counts its own steps s. ``lazy_adam`` (arXiv:1412.6980 on the touched rows alone) keeps m and v per entry; ``rowwise``
keeps one v per row, of the mean square of the row's gradient, and no m (b1 = 0): 8 bytes a row. No number of a row depends on
other rows or on where the row stands in an array, so that the bits are the same whoever holds the arrays. `sinkhorn_update` is the
exception: it balances a whole table at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import dispatch
from kernels.row_update import reference

RULES = ("lazy_adam", "rowwise")


class Hyper(NamedTuple):
    """Of one update."""

    lr: float
    beta1: float
    beta2: float
    eps: float


def sum_rows(rows: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """rows [n] int64, grad [n, W] -> (the distinct rows, sorted [U]; their sums [U, W] in at least fp32).

    Equal to the bit from run to run: the sort is stable and sums go in its order.
    """
    if rows.ndim != 1 or grad.ndim != 2 or len(rows) != len(grad):
        raise ValueError(f"expected rows [n] and grad [n, W], got {list(rows.shape)} and {list(grad.shape)}")
    dtype = grad.dtype
    backend = dispatch.choose("sum_rows", rows.device, lambda: _why_not(dtype, None, False))
    return _form(backend).sum_rows(rows, grad)


@torch.no_grad()
def row_update(
    values: Tensor, moments: Sequence[Tensor], rows: Tensor | None, grad: Tensor, rule: str, hyper: Hyper
) -> None:
    """One step of ``rule``, in place: values [R, W], grad [U, W], rows [U] int64, distinct; None: grad is of all rows (U = R).

    ``moments``: m, v [R, W] and steps int32 [R] of ``lazy_adam``; v [R] and steps of ``rowwise``. Raises ValueError for another
    rule, for shapes that do not fit and for tables below fp32, where steps smaller than half a last bit would be lost. Beside a
    gradient on a GPU, the table and its moments may be in pinned host memory.
    """
    _check(values, moments, len(values) if rows is None else len(rows), grad, rule)
    _form(_choose(values, moments, grad)).row_update(values, moments, rows, grad, rule, hyper)


@torch.no_grad()
def sum_update(values: Tensor, moments: Sequence[Tensor], rows: Tensor, grad: Tensor, rule: str, hyper: Hyper) -> None:
    """`sum_rows` and `row_update` at once, where nobody wants the sums in between (a norm to clip by, say): rows [n] int64 may
    repeat, grad [n, W]."""
    _check(values, moments, len(rows), grad, rule)
    _form(_choose(values, moments, grad)).sum_update(values, moments, rows, grad, rule, hyper)


def _check(values: Tensor, moments: Sequence[Tensor], count: int, grad: Tensor, rule: str) -> None:
    R, W = values.shape
    if rule not in RULES:
        raise ValueError(f"unknown rule '{rule}'; valid: {', '.join(RULES)}")
    wide = [(R, W)] * 2 if rule == "lazy_adam" else [(R,)]
    if [tuple(t.shape) for t in moments] != [*wide, (R,)]:
        raise ValueError(f"{rule}: moments {[list(t.shape) for t in moments]} do not fit values {[R, W]}")
    if tuple(grad.shape) != (count, W):
        raise ValueError(f"{rule}: grad {list(grad.shape)} does not fit its rows")
    if values.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{rule}: a table in {values.dtype} would lose small steps; keep it in float32")


def _choose(values: Tensor, moments: Sequence[Tensor], grad: Tensor) -> str:
    usable = _usable(values, moments, grad)
    backend = dispatch.choose("row_update", grad.device, lambda: _why_not(grad.dtype, values.dtype, usable))
    if backend == "reference" and not _beside(values, moments, grad):
        raise ValueError("the plain form wants a table where its gradient is; the Triton form takes pinned host memory")
    return backend


def reaches(values: Tensor, moments: Sequence[Tensor], grad: Tensor) -> bool:
    """Whether `row_update` can change a table where it is: beside the gradient, or in pinned host memory by the Triton form."""
    if _beside(values, moments, grad):
        return True
    usable = _usable(values, moments, grad)
    why_not = dispatch.no_triton(grad.device) or _why_not(grad.dtype, values.dtype, usable)
    return why_not is None and dispatch.setting() != "reference"


def _beside(values: Tensor, moments: Sequence[Tensor], grad: Tensor) -> bool:
    return all(t.device == grad.device for t in (values, *moments))


def _usable(values: Tensor, moments: Sequence[Tensor], grad: Tensor) -> bool:
    """By the Triton form."""
    return all(t.is_contiguous() and (t.device == grad.device or t.is_pinned()) for t in (values, *moments))


def _why_not(dtype: torch.dtype, table: torch.dtype | None, usable: bool) -> str | None:
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the gradient is {dtype}"
    if table not in (None, torch.float32):
        return f"the table is {table}"
    return None if table is None or usable else "the table has gaps, or is in host memory that is not pinned"


def _form(backend: str) -> Any:
    if backend == "reference":
        return reference
    from kernels.row_update import triton

    return triton


@torch.no_grad()
def sinkhorn_update(
    values: Tensor,
    momentum: Tensor,
    grad: Tensor,
    lr: float,
    *,
    beta: float = 0.95,
    rounds: int = 11,
    threshold: float = 1e-3,
    scale: float = 0.18,
    eps: float = 1e-20,
) -> None:
    """Balanced momentum for a whole table, in place: all arguments [R, W]; every row with momentum moves.

        M <- beta M + (1 - beta) G,   U = beta M + (1 - beta) G without rows whose norm is at most threshold x the mean row norm,
        ``rounds`` times: rows of U, then columns, ... then rows to unit norm;   w <- w - scale lr sqrt(W) U

    As the tables of DeepSeek-V4.1 are reported to learn. ``rounds`` is odd, so that rows are last and an entry of a moving row has
    root mean square scale lr, whatever the gradient. Raises ValueError for shapes that differ.
    """
    if not values.shape == momentum.shape == grad.shape:
        raise ValueError(f"expected three tables, got {[list(t.shape) for t in (values, momentum, grad)]}")
    dispatch.choose("sinkhorn_update", values.device, None)
    reference.sinkhorn_update(values, momentum, grad, lr, beta, rounds, threshold, scale, eps)
