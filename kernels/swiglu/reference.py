"""Plain forms of the gate. ``whole`` is the definition, ``eager`` writes both halves of the gradient into one buffer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def whole(h: Tensor) -> Tensor:
    """The definition."""
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


def eager(h: Tensor) -> Tensor:
    """Equal to ``whole``; keeps only h for the backward."""
    return _SwiGLU.apply(h)  # pyright: ignore[reportReturnType]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        gate, up = h.chunk(2, dim=-1)
        if h.dtype == torch.bfloat16 or h.dtype == torch.float16:  # products of rounded factors would lose digits
            ctx.save_for_backward(h)
            return F.silu(gate).mul_(up)
        sigmoid = gate.sigmoid()  # the only transcendental: silu and its derivative are products of it
        ctx.save_for_backward(h, sigmoid)
        return (gate * sigmoid).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        h, *rest = ctx.saved_tensors
        gate, up = h.chunk(2, dim=-1)
        out = torch.empty_like(h)
        grad_gate, grad_up = out.chunk(2, dim=-1)
        if not rest:
            torch.mul(F.silu(gate), grad, out=grad_up)
            torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
            return out
        (sigmoid,) = rest
        silu = gate * sigmoid
        torch.mul(silu, grad, out=grad_up)
        slope = torch.addcmul(silu, sigmoid, silu, value=-1).add_(sigmoid)  # silu' = sigmoid + silu (1 - sigmoid)
        torch.mul(slope.mul_(up), grad, out=grad_gate)
        return out
