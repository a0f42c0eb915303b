"""Plain forms of the fused-head rotation. ``whole`` is the definition, ``eager`` saves passes over memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., K] rotated: (a, b) -> (a cos - b sin, b cos + a sin) for the halves a, b of the last dimension."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def whole(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """The definition: split, rotate q and k."""
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=2)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def eager(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Equal to ``whole``: one buffer for q and k, and a backward that writes the gradient of the fused tensor in place."""
    if not torch.is_grad_enabled():
        return *_rotated(qkv, cos.to(qkv.dtype), sin.to(qkv.dtype), heads, kv_heads), qkv[:, :, heads + kv_heads :]
    return _SplitRotate.apply(qkv, cos, sin, heads, kv_heads)  # pyright: ignore[reportReturnType]


def _rotate_into(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    torch.mul(a, cos, out=out[..., :half]).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=out[..., half:]).addcmul_(a, sin)


def _rotated(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor]:
    """-> q and k, parts of one new buffer."""
    qk = qkv.new_empty(*qkv.shape[:2], heads + kv_heads, qkv.shape[-1])
    _rotate_into(qk, qkv[:, :, : heads + kv_heads], cos, sin)
    return qk[:, :, :heads], qk[:, :, heads:]


class _SplitRotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        cos, sin = cos.to(qkv.dtype), sin.to(qkv.dtype)
        ctx.save_for_backward(cos, sin)
        ctx.heads = (heads, kv_heads, kv_heads)
        return *_rotated(qkv, cos, sin, heads, kv_heads), qkv[:, :, heads + kv_heads :].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = ctx.saved_tensors
        like = grads[0]
        grad = like.new_empty(*like.shape[:2], sum(ctx.heads), like.shape[-1])
        q, k, v = grad.split(ctx.heads, dim=2)
        _rotate_into(q, grads[0], cos, -sin)
        _rotate_into(k, grads[1], cos, -sin)
        v.copy_(grads[2])
        return grad, None, None, None, None
