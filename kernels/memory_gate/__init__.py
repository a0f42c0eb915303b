"""What a looked-up memory adds to the residual stream: a value, gated by how the stream agrees with a key, and convolved.

    s = <h / rms(h) * gain, k / rms(k)> / sqrt(D),   rms(x) = sqrt(mean(x^2) + eps)
    alpha = sigmoid(sgn(s) sqrt(max(|s|, 1e-6))),    or sigmoid(s)
    y = alpha v + silu(conv(alpha v / rms(alpha v) * conv_gain))

(Engram, arXiv:2601.07372, equations 4 and 5; the signed root is what its authors' code adds.) The convolution is causal,
depthwise, of w taps that lie ``dilation`` tokens apart. All M residual branches share the value, so a normalised gated value is
v times one number c = alpha / rms(alpha v) per token and branch, and that is all a tap has to know: the state is the last values
and their c.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import dispatch
from kernels.library import Op, Tensors
from kernels.memory_gate import reference

GATES = ("signed_sqrt", "sigmoid")


class GateState(NamedTuple):
    """The last R = (w-1) * dilation valid tokens of each sequence, oldest first; scales are zero where there was none yet."""

    values: Tensor  # v [B, R, D]
    scales: Tensor  # c [B, R, M]


def memory_gate(
    h: Tensor,
    key: Tensor,
    value: Tensor,
    gain: Tensor,
    conv_gain: Tensor | None = None,
    conv_weight: Tensor | None = None,
    *,
    dilation: int = 1,
    eps: float = 1e-6,
    gate: str = "signed_sqrt",
    valid: Tensor | None = None,
    segments: Tensor | None = None,
    state: GateState | None = None,
) -> tuple[Tensor, Tensor, GateState | None]:
    """h, key [B, T, M, D], value [B, T, D], gain [M, D] -> (y like h, alpha [B, T, M] in at least fp32, state).

    conv_gain [M, D] and conv_weight [M, D, w] (the last tap is the token's own), or neither: no convolution, and no state.
    ``gate``: "signed_sqrt" or "sigmoid". ``valid`` bool [B, T]: the others get y = 0 and alpha = 0, and taps pass over them.
    ``segments`` int [B, T], ascending in a row: taps stay in their document. ``state``: what came before (never with segments);
    without one none is returned. Norms, gate and sums are in at least fp32. Raises ValueError for anything that does not fit.
    """
    _check(h, key, value, gain, conv_gain, conv_weight, dilation, gate, valid, segments, state)
    taps = None
    if conv_weight is not None and conv_gain is not None:
        wide = torch.promote_types(h.dtype, torch.float32)
        taps = conv_gain.to(wide)[..., None] * conv_weight.to(wide)
    values, scales = (None, None) if state is None else state
    tensors = (h, key, value, gain, taps, valid, segments, values, scales)
    dtypes = {t.dtype for t in (h, key, value)}
    recorded = state is not None and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    backend = dispatch.choose("memory_gate", h.device, lambda: _why_not(dtypes, recorded))
    options = (dilation, eps, gate == "signed_sqrt")
    y, alpha, values, scales = _op(*tensors, options=options, backend=backend)
    return y, alpha, None if state is None else GateState(values, scales)


def empty_state(
    batch: int, reach: int, branches: int, width: int, device: torch.device | str, dtype: torch.dtype
) -> GateState:
    """Of sequences that saw nothing; ``reach`` is (w-1) * dilation, and ``dtype`` that of the values."""
    wide = torch.promote_types(dtype, torch.float32)
    values = torch.zeros(batch, reach, width, device=device, dtype=dtype)
    return GateState(values, torch.zeros(batch, reach, branches, device=device, dtype=wide))


def _check(
    h: Tensor, key: Tensor, value: Tensor, gain: Tensor, conv_gain: Tensor | None, conv_weight: Tensor | None,
    dilation: int, gate: str, valid: Tensor | None, segments: Tensor | None, state: GateState | None,
) -> None:  # fmt: skip
    if h.ndim != 4 or h.numel() == 0:
        raise ValueError(f"h must be [B, T, M, D], not empty: {list(h.shape)}")
    if gate not in GATES:
        raise ValueError(f"unknown gate '{gate}'; valid: {', '.join(GATES)}")
    if dilation < 1:
        raise ValueError(f"dilation must be at least 1: {dilation}")
    if (conv_gain is None) != (conv_weight is None):
        raise ValueError("conv_gain and conv_weight come together or not at all")
    b, t, m, d = h.shape
    shapes = {"key": (key, (b, t, m, d)), "value": (value, (b, t, d)), "gain": (gain, (m, d))}
    shapes |= {"conv_gain": (conv_gain, (m, d)), "valid": (valid, (b, t)), "segments": (segments, (b, t))}
    width = 1
    if conv_weight is not None:
        width = conv_weight.shape[-1]
        shapes["conv_weight"] = conv_weight, (m, d, width)
    if state is not None:
        if segments is not None:
            raise ValueError("segments and a state exclude each other")
        if conv_weight is None:
            raise ValueError("without a convolution there is no state")
        reach = (width - 1) * dilation
        shapes |= {"state.values": (state.values, (b, reach, d)), "state.scales": (state.scales, (b, reach, m))}
    for name, (x, shape) in shapes.items():
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)} beside h {list(h.shape)}: {list(x.shape)}")


def _why_not(dtypes: set[torch.dtype], recorded: bool) -> str | None:
    if dtypes - {torch.float32, torch.float16, torch.bfloat16}:
        return f"there is {', '.join(sorted(map(str, dtypes)))}"
    return "a state is given and gradients are recorded" if recorded else None


def _form(backend: str) -> Any:
    if backend == "reference":
        return reference
    from kernels.memory_gate import triton

    return triton


def _fake(tensors: Tensors, options: Sequence[float], backend: str) -> list[Tensor]:
    h, _, _, _, _, _, _, values, scales = tensors
    assert h is not None
    b, t, m, _ = h.shape
    wide = torch.promote_types(h.dtype, torch.float32)
    alpha, score, inv_h, inv_k = (h.new_empty(b, t, m, dtype=wide) for _ in range(4))
    states = [h.new_empty(0) if s is None else torch.empty_like(s) for s in (values, scales)]
    y = torch.empty_like(h, memory_format=torch.contiguous_format)
    return [y, alpha, *states, score, inv_h, inv_k, h.new_empty(b, t, dtype=wide)]


_op = Op(
    "memory_gate",
    lambda *args: _form(args[-1]).forward(*args),
    lambda *args: _form(args[-1]).backward(*args),
    _fake,
    outputs=4,
    also=(1,),
)
