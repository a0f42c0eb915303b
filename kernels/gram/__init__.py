"""All inner products of F rows: X X^T, with one product for its gradient, (g + g^T) X, where autograd makes two."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.library import Op, Tensors


def gram(rows: Tensor) -> Tensor:
    """rows [F, D] -> [F, F]."""
    return _op(rows)[0]


def _forward(tensors: Tensors, options: Sequence[float], backend: str) -> list[Tensor]:
    (rows,) = tensors
    assert rows is not None
    return [rows @ rows.T]


def _backward(
    tensors: Tensors,
    saved: Sequence[Tensor],
    grads: Tensors,
    needs: Sequence[bool],
    options: Sequence[float],
    backend: str,
) -> Tensors:
    (rows,), grad = tensors, grads[0]
    assert rows is not None
    assert grad is not None
    return [(grad + grad.T) @ rows]


def _fake(tensors: Tensors, options: Sequence[float], backend: str) -> list[Tensor]:
    (rows,) = tensors
    assert rows is not None
    return [torch.empty(len(rows), len(rows), dtype=rows.dtype, device=rows.device)]


_op = Op("gram", _forward, _backward, _fake, outputs=1)
