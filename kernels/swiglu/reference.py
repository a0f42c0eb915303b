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
    """Equal to ``whole``; keeps h and silu(gate) for the backward."""
    if not torch.is_grad_enabled():
        return whole(h)
    return _SwiGLU.apply(h)  # pyright: ignore[reportReturnType]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        gate, up = h.chunk(2, dim=-1)
        silu = F.silu(gate)
        ctx.save_for_backward(h, silu)
        return silu * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        h, silu = ctx.saved_tensors
        gate, up = h.chunk(2, dim=-1)
        out = torch.empty_like(h)
        grad_gate, grad_up = out.chunk(2, dim=-1)
        torch.mul(silu, grad, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return out
