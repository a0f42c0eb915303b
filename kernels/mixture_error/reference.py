"""|a - w P|^2 = |a|^2 - 2 w . (P a) + w G w^T with G = P P^T, so that D is met in products alone.

With r = w G - a P^T and the gradient g of the sum:  dw = 2 g s r,   dP = -2 g (s w)^T a,   dG = g (s w)^T w
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.library import Tensors


def whole(weights: Tensor, points: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
    """The definition."""
    return ((targets - weights @ points).square().sum(1) * shares).sum()


def forward(tensors: Tensors, options: Sequence[float], backend: str) -> list[Tensor]:
    """-> [sum, r]."""
    weights, points, products, targets, shares = _present(tensors)
    rest = weights @ products
    square = torch.linalg.vecdot(weights, rest)
    rest.addmm_(targets, points.T, alpha=-1)
    square = 2 * torch.linalg.vecdot(weights, rest) - square + torch.linalg.vector_norm(targets, dim=1).square()
    return [square @ shares, rest]


def backward(
    tensors: Tensors,
    saved: Sequence[Tensor],
    grads: Tensors,
    needs: Sequence[bool],
    options: Sequence[float],
    backend: str,
) -> Tensors:
    weights, _, _, targets, shares = _present(tensors)
    (rest,), (grad,) = saved, _present(grads)
    share = (grad * shares)[:, None]
    counted = weights * share
    # Transposed, the wide product is the faster one on a CPU.
    d_points = (targets.T @ counted).T.mul(-2) if needs[1] else None
    d_products = counted.T @ weights if needs[2] else None
    return rest * (2 * share) if needs[0] else None, d_points, d_products, None, None


def _present(tensors: Tensors) -> list[Tensor]:
    return [t for t in tensors if t is not None]
