"""Rotary positions (arXiv:2104.09864, eq. 34; halves are rotated instead of neighbouring pairs) on fused heads."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import dispatch
from kernels.rope import reference


def rope_table(positions: Tensor, theta: float, head_dim: int) -> tuple[Tensor, Tensor]:
    """positions [B, T] -> cos, sin [B, T, 1, K/2] in fp32 (arXiv:2104.09864, eq. 34, halves rotated instead of pairs)."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angle = positions[..., None, None].float() * theta**-exponent
    return angle.cos(), angle.sin()


def split_rotate(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [B, T, heads + 2 kv_heads, K]; cos, sin [B, T, 1, K/2] -> q [B, T, heads, K] and k, rotated, and v [B, T, kv_heads, K]."""
    if qkv.device.type != "cpu" or torch.compiler.is_compiling():
        return reference.whole(qkv, cos, sin, heads, kv_heads)
    dispatch.choose("split_rotate", qkv.device, None)
    return reference.eager(qkv, cos, sin, heads, kv_heads)


rotate = reference.rotate
