"""The short causal convolution before a linear-time mixer: each channel sees its own last W inputs, and no other segment's.

y_t = act(b + sum_{i<W} w_i x_{t-W+1+i}) (Mamba, arXiv:2312.00752, section 3.4). Inputs from before a segment come from its state:
the last W - 1 inputs, in time order, zeros where there was nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import dispatch
from kernels.causal_conv1d import reference
from kernels.library import Op, Tensors
from kernels.memory_slots import check_slots

ACTIVATIONS = (None, "silu")
MAX_WIDTH = 4  # of the Triton form, whose backward unrolls W * W steps; wider ones are not in use


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """x [B, T, C], weight [C, W], bias [C] -> (y [B, T, C] in the dtype of x, added in at least fp32; state or None).

    States are [B, W-1, C], or [S, W-1, C] with ``cu_seqlens`` int [S+1], which cuts the B * T rows into segments (some may be
    empty); rows past the last end give zeros. A final state has the dtype of the initial one, else that of x. ``activation``:
    None or "silu". Raises ValueError for anything that does not fit.
    """
    b, t, channels = _check(x, weight, bias, activation)
    if t == 0 or b == 0:
        raise ValueError("no rows: B and T must be at least 1")
    if cu_seqlens is not None and (cu_seqlens.ndim != 1 or cu_seqlens.is_floating_point() or len(cu_seqlens) < 2):
        raise ValueError("cu_seqlens must be integers [S + 1]")
    segments = b if cu_seqlens is None else len(cu_seqlens) - 1
    wanted = (segments, weight.shape[1] - 1, channels)
    if initial_state is not None and initial_state.shape != wanted:
        raise ValueError(f"initial_state must be {wanted}: {tuple(initial_state.shape)}")
    dtype, width = x.dtype, weight.shape[1]
    backend = dispatch.choose("causal_conv1d", x.device, lambda: _why_not(dtype, width))
    options = (activation == "silu", output_final_state)
    y, state = _op(x, weight, bias, initial_state, cu_seqlens, options=options, backend=backend)
    return y, state if output_final_state else None


def causal_conv1d_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    *,
    activation: str | None = None,
    index: Tensor | None = None,
    donate: bool = False,
) -> tuple[Tensor, Tensor]:
    """One more input for S of E states: x [B, S, C], state [B, E, W-1, C] -> (y [B, S, C], state).

    ``index`` int [B, S] says which state slot s continues, -1: none (y = 0); those of one row are distinct. Without it S = E.
    States that no slot continues keep their bytes. ``donate``: the result may be the passed state, overwritten (only where no
    gradient is recorded).
    """
    _check(x, weight, bias, activation)
    check_slots(x, state, index)
    if state.shape[2:] != (weight.shape[1] - 1, weight.shape[0]):
        raise ValueError(f"state must be [B, E, {weight.shape[1] - 1}, {weight.shape[0]}]: {tuple(state.shape)}")
    silu, dtype, width = activation == "silu", x.dtype, weight.shape[1]
    if torch.is_grad_enabled():
        dispatch.choose("causal_conv1d_step", x.device, None)  # the kernel writes over what a backward would need
        return reference.step(x, weight, bias, state, silu, index, False)
    if dispatch.choose("causal_conv1d_step", x.device, lambda: _why_not(dtype, width)) == "reference":
        return reference.step(x, weight, bias, state, silu, index, donate)
    written = state if donate and state.is_contiguous() else state.clone(memory_format=torch.contiguous_format)
    run = _traced_step if torch.compiler.is_compiling() else _form("triton").step
    y = run(x, weight, bias, written, silu, index)
    return y, state.copy_(written) if donate and written is not state else written


@torch.library.custom_op("loci::causal_conv1d_step", mutates_args=("state",))
def _traced_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, silu: bool, index: Tensor | None
) -> Tensor:
    return _form("triton").step(x, weight, bias, state, silu, index)


@_traced_step.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, silu: bool, index: Tensor | None) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> torch.Size:
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation '{activation}'; valid: {', '.join(map(str, ACTIVATIONS))}")
    if x.ndim != 3 or weight.ndim != 2 or x.shape[2] != weight.shape[0] or weight.shape[1] < 1:
        raise ValueError(f"expected x [., ., C] and weight [C, W], got {tuple(x.shape)} and {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be {tuple(weight.shape[:1])}: {tuple(bias.shape)}")
    return x.shape


def _why_not(dtype: torch.dtype, width: int) -> str | None:
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"x is {dtype}"
    return None if width <= MAX_WIDTH else f"the width is {width}, above {MAX_WIDTH}"


def _form(backend: str) -> Any:
    if backend == "reference":
        return reference
    from kernels.causal_conv1d import triton

    return triton


def _fake(tensors: Tensors, options: Sequence[float], backend: str) -> list[Tensor]:
    x, weight, _, initial, cu_seqlens = tensors
    assert x is not None
    assert weight is not None
    segments = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    shape = (segments, weight.shape[1] - 1, x.shape[2]) if options[1] else (0,)
    state = (x if initial is None else initial).new_empty(shape)
    return [torch.empty_like(x, memory_format=torch.contiguous_format), state]


_op = Op(
    "causal_conv1d",
    lambda *args: _form(args[-1]).forward(*args),
    lambda *args: _form(args[-1]).backward(*args),
    _fake,
    outputs=2,
)
