"""How far mixtures of F points are from where they should be: sum_n s_n |a_n - w_n P|^2, and no [N, D] is made for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import dispatch
from kernels.library import Op, Tensors
from kernels.mixture_error import reference


def mixture_error(weights: Tensor, points: Tensor, products: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
    """weights w [N, F], points P [F, D], their products G = P P^T [F, F], targets a [N, D], shares s [N] -> 0-d, all in one dtype.

    Gradients of weights, points and products, through which a part of the points' gradient goes; the others get none. Raises
    ValueError for shapes that do not fit.
    """
    (n, f), d = weights.shape, points.shape[-1]
    shapes = {"points": (points, (f, d)), "products": (products, (f, f))}
    for name, (t, shape) in (shapes | {"targets": (targets, (n, d)), "shares": (shares, (n,))}).items():
        if tuple(t.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)} beside weights {[n, f]}, got {list(t.shape)}")
    backend = dispatch.choose("mixture_error", weights.device, None)
    return _op(weights, points, products, targets.detach(), shares.detach(), backend=backend)[0]


def _fake(tensors: Tensors, options: Sequence[float], backend: str) -> list[Tensor]:
    weights = tensors[0]
    assert weights is not None
    return [weights.new_empty(()), torch.empty_like(weights, memory_format=torch.contiguous_format)]


_op = Op("mixture_error", reference.forward, reference.backward, _fake, outputs=1)
