"""Muon: momentum orthogonalised by Newton-Schulz, for matrices (arXiv:2502.16982)."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

# Of the quintic iteration: steep at zero, so that singular values end in about [0.7, 1.2] after few steps.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


def orthogonalize(g: Tensor) -> Tensor:
    """g [N, R, C] -> the nearest semi-orthogonal matrices, roughly: U V^T of each SVD. bf16 on CUDA, else fp32."""
    a, b, c = COEFFICIENTS
    x = g.to(torch.bfloat16 if g.is_cuda else torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(g.dtype)


class Muon:
    """Over named parameters of two or more dimensions; matrices of one shape are orthogonalised together.

    A parameter of more than two dimensions is a stack of matrices; ``splits`` cuts a fused matrix (such as q|k|v) into
    the independent ones it holds. The update is scaled by 0.2 sqrt(max(R, C)), which gives it AdamW's size.
    """

    def __init__(self, momentum: float = 0.95) -> None:
        self.momentum = momentum
        self.state: dict[str, Tensor] = {}

    @torch.no_grad()
    def step(
        self,
        params: dict[str, Tensor],
        splits: dict[str, tuple[int, ...]],
        lr: dict[str, float],
        decay: dict[str, float],
    ) -> None:
        """One update of every parameter that has a gradient; all arguments by parameter name."""
        by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor, float]]] = defaultdict(list)
        for name, p in params.items():
            if p.grad is None:
                continue
            m = self.state.get(name)
            if m is None:
                m = self.state[name] = torch.zeros_like(p)
            m.lerp_(p.grad, 1 - self.momentum)
            update = p.grad.lerp(m, self.momentum)  # Nesterov
            if decay[name]:
                p.mul_(1 - lr[name] * decay[name])
            cut = splits.get(name, ())
            for part, u in zip(_matrices(p, cut), _matrices(update, cut), strict=True):
                by_shape[part.shape[-2], part.shape[-1]].append((part, u, lr[name]))
        for (rows, cols), items in by_shape.items():
            batch = orthogonalize(torch.cat([u for _, u, _ in items]))
            scale = 0.2 * max(rows, cols) ** 0.5
            for (p, _, rate), u in zip(items, batch.split([len(p) for p, _, _ in items]), strict=True):
                p.add_(u, alpha=-rate * scale)


def _matrices(p: Tensor, splits: tuple[int, ...]) -> list[Tensor]:
    """Views [N, R, C] of the independent matrices in a parameter."""
    stacked = p.view(-1, *p.shape[-2:])
    return list(stacked.split(splits, dim=1)) if splits else [stacked]
