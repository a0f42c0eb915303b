"""Plain forms of RMSNorm. ``whole`` is the definition, ``eager`` saves passes over memory where nothing fuses them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def whole(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition."""
    wide = x.to(_wide(x))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)).to(x.dtype)


def eager(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Equal to ``whole``; the backward is written out: with n = x r and u = g w, dx = r (u - n mean(u n)), dw = sum(g n)."""
    if not torch.is_grad_enabled():
        return _forward(x, weight, eps)[0]
    return _RMSNorm.apply(x, weight, eps)  # pyright: ignore[reportReturnType]


def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """-> (the result, 1 / sqrt(mean(x^2) + eps))."""
    wide = x.to(_wide(x))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    rstd = torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(eps))
    return (wide * rstd).mul_(weight).to(x.dtype), rstd


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = _forward(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, rstd = ctx.saved_tensors
        normed = x.to(rstd.dtype) * rstd
        grad = grad.to(rstd.dtype)
        product = grad * normed
        grad_w = product.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_w, None
        mean = (product @ weight.to(product.dtype)).unsqueeze(-1).div_(-x.shape[-1])
        grad_x = torch.mul(grad, weight, out=product).addcmul_(normed, mean).mul_(rstd)
        return grad_x.to(x.dtype), grad_w, None
