"""RMSNorm and a gate in one pass over memory: the output of most linear-time mixers.

``RMSNorm(x) * weight * act(gate)`` (RetNet, arXiv:2307.08621, eq. 8; GLA, arXiv:2312.06635, section 4.4), or gate first,
``RMSNorm(x * act(gate)) * weight`` (Mamba-2, arXiv:2405.21060, section 7.1). RMSNorm: arXiv:1910.07467, eq. 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import dispatch
from kernels.gated_rms_norm import reference
from kernels.library import Op, Tensors

ACTIVATIONS = ("silu", "sigmoid")
MAX_WIDTH = 8192  # of the Triton form, whose programs hold whole rows


def gated_rms_norm(
    x: Tensor,
    weight: Tensor,
    gate: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str = "silu",
    norm_before_gate: bool = True,
) -> Tensor:
    """x [..., V], weight [V], gate [..., V] -> [..., V] in the dtype of x; the mean square is over V, in at least fp32.

    Without a gate it is RMSNorm. ``activation`` of the gate: "silu" or "sigmoid". Raises ValueError for anything that does not fit.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation '{activation}'; valid: {', '.join(ACTIVATIONS)}")
    if weight.shape != x.shape[-1:] or (gate is not None and gate.shape != x.shape):
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, weight, gate) if t is not None)
        raise ValueError(f"expected x [..., V], weight [V] and gate [..., V], got {shapes}")
    dtype, width = x.dtype, x.shape[-1]
    backend = dispatch.choose("gated_rms_norm", x.device, lambda: _why_not(dtype, width))
    options = (eps, activation == "silu", norm_before_gate)
    (y,) = _op(x, weight, gate, options=options, backend=backend)
    return y


def _why_not(dtype: torch.dtype, width: int) -> str | None:
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"x is {dtype}"
    return None if width <= MAX_WIDTH else f"rows are wider than {MAX_WIDTH}"


def _form(backend: str) -> Any:
    if backend == "reference":
        return reference
    from kernels.gated_rms_norm import triton

    return triton


def _fake(tensors: Tensors, options: Sequence[float], backend: str) -> list[Tensor]:
    x = tensors[0]
    assert x is not None
    wide = torch.promote_types(x.dtype, torch.float32)
    return [torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(*x.shape[:-1], 1, dtype=wide)]


_op = Op(
    "gated_rms_norm",
    lambda *args: _form(args[-1]).forward(*args),
    lambda *args: _form(args[-1]).backward(*args),
    _fake,
    outputs=1,
)
