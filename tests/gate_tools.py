"""Arguments of `memory_gate` and its definition, for the tests of its forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.memory_gate import GateState, memory_gate, reference

EPS, DILATION = 1e-3, 2
Arguments = dict[str, Tensor | None]


def arguments(
    B: int, T: int, M: int, D: int, *, width: int | None = 4, dilation: int = DILATION, where: str = "plain"
) -> Arguments:
    """In fp64. ``where``: any of "padded" (one row of nothing where B > 2), "documents" and "state" in one string.

    Scores are away from zero, where the root is steep in fp32 and has no two-sided slope at all.
    """

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    h = randn(B, T, M, D)
    found: Arguments = {"h": h, "key": randn(B, T, M, D) + 2 * randn(B, T, M, 1).sign() * h, "value": randn(B, T, D)}
    found |= {"gain": 1 + 0.3 * randn(M, D), "conv_gain": None, "conv_weight": None}
    found |= {"valid": None, "segments": None, "values": None, "scales": None}
    if width is not None:
        found |= {"conv_gain": 1 + 0.3 * randn(M, D), "conv_weight": randn(M, D, width)}
    if "padded" in where:
        found["valid"] = (torch.rand(B, T) < 0.6) & (torch.arange(B) != 2)[:, None]
    if "documents" in where:
        found["segments"] = (torch.rand(B, T) < 0.3).long().cumsum(1) + 100 * torch.arange(B)[:, None]
    if "state" in where and width is not None:
        reach = (width - 1) * dilation
        found |= {"values": randn(B, reach, D), "scales": randn(B, reach, M)}
    return found


def cast(args: Arguments, dtype: torch.dtype) -> Arguments:
    """Activations in this dtype, parameters and scales in fp32 at least, as a model has them; floats are leaves."""
    wide, narrow = torch.promote_types(dtype, torch.float32), ("h", "key", "value", "values")
    return {
        name: t
        if t is None or not t.is_floating_point()
        else t.detach().to(dtype if name in narrow else wide).requires_grad_()
        for name, t in args.items()
    }


def history(args: Arguments) -> GateState | None:
    values, scales = args["values"], args["scales"]
    return None if values is None or scales is None else GateState(values, scales)


def run(args: Arguments, gate: str = "signed_sqrt", dilation: int = DILATION) -> list[Tensor]:
    """-> [y, alpha], and the state's two tensors where one was given."""
    call: Any = {name: t for name, t in args.items() if name not in ("values", "scales")}
    y, alpha, state = memory_gate(**call, dilation=dilation, eps=EPS, gate=gate, state=history(args))
    return [y, alpha, *(state or ())]


def define(args: Arguments, gate: str = "signed_sqrt", dilation: int = DILATION) -> list[Tensor]:
    """The same by the definition."""
    call: Any = {name: t for name, t in args.items() if name not in ("values", "scales")}
    y, alpha, state = reference.recurrent(**call, dilation=dilation, eps=EPS, gate=gate, state=history(args))
    return [y, alpha, *(state or ())]


def gradients(outputs: Sequence[Tensor], above: Sequence[Tensor], args: Arguments) -> list[Tensor]:
    """Of every float argument. The definition of nothing but invalid tokens depends on none of them."""
    leaves = [t for t in args.values() if t is not None and t.is_floating_point()]
    used = [(t, g.to(t.dtype)) for t, g in zip(outputs, above, strict=True) if t.requires_grad]
    if not used:
        return [torch.zeros_like(t) for t in leaves]
    tensors, above = zip(*used, strict=True)
    return list(torch.autograd.grad(tensors, leaves, above, allow_unused=True, materialize_grads=True))
