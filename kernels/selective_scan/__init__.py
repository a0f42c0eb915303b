"""The selective scan of Mamba: h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t^T, y_t = h_t C_t + D u_t, all D x N decays their own.

arXiv:2312.00752, algorithm 2 with the discretisation of section 3.6 (zero-order hold of A, Euler for B).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import dispatch
from kernels.library import Op, Tensors
from kernels.scan_arguments import check_like, wide_dtype
from kernels.selective_scan import reference


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """u [B, T, D], delta [B, T, D], A [D, N], B and C [B, T, N], D [D] -> (y [B, T, D] in the dtype of u, state).

    ``delta``: step sizes, after the softplus, at least 0; ``A``: at most 0. Both in fp32, as is D; ``D=None``: no skip.
    States are [B, D, N], in fp32 (fp64 for fp64 inputs). ``cu_seqlens`` int [S + 1] cuts the B * T rows into segments, each with a
    state of its own ([S, D, N]); a segment may be empty; rows past the last end give zeros. Raises ValueError for shapes that do not
    fit.
    """
    _check(u, delta, A, B, C, D, initial_state, cu_seqlens)
    dtype, width = u.dtype, A.shape[1]
    backend = dispatch.choose("selective_scan", u.device, lambda: _form("triton").why_not(dtype, width))
    tensors = (u, delta, A, B, C, D, initial_state, cu_seqlens)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    y, state = _op(*tensors, options=(output_final_state, keep), backend=backend)
    return y, state if output_final_state else None


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    if u.ndim != 3 or A.ndim != 2 or u.shape[2] != A.shape[0]:
        raise ValueError(f"expected u [B, T, D] and A [D, N]: {tuple(u.shape)}, {tuple(A.shape)}")
    batch, time, channels = u.shape
    width = A.shape[1]
    if batch == 0 or time == 0:
        raise ValueError("no rows: B and T must be at least 1")
    check_like("delta", delta, (tuple(u.shape),))
    check_like("B", B, ((batch, time, width),))
    check_like("C", C, ((batch, time, width),))
    check_like("D", D, ((channels,),))
    if cu_seqlens is not None and (cu_seqlens.ndim != 1 or cu_seqlens.is_floating_point() or len(cu_seqlens) < 2):
        raise ValueError("cu_seqlens must be integers [S + 1]")
    segments = batch if cu_seqlens is None else len(cu_seqlens) - 1
    check_like("initial_state", initial_state, ((segments, channels, width),))


def _form(backend: str) -> Any:
    if backend == "reference":
        return reference
    from kernels.selective_scan import triton

    return triton


def _fake(tensors: Tensors, options: Sequence[float], backend: str) -> list[Tensor]:
    u, _, A, *_, cu_seqlens = tensors
    assert u is not None
    assert A is not None
    segments = u.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    shape = (segments, *A.shape) if options[0] else (0,)
    results = [torch.empty_like(u, memory_format=torch.contiguous_format), u.new_empty(shape, dtype=wide_dtype(u))]
    return [*results, _form(backend).kept_states(u, A, cu_seqlens)] if options[1] else results


_op = Op(
    "selective_scan",
    lambda *args: _form(args[-1]).forward(*args),
    lambda *args: _form(args[-1]).backward(*args),
    _fake,
    outputs=2,
)
