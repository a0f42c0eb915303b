"""Gated linear attention, a decay per key channel: S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t.

arXiv:2312.06635, eq. 3 with the gate of section 4.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import dispatch
from kernels.gla import reference
from kernels.library import Op, Tensors
from kernels.scan_arguments import check_like, check_scan, wide_dtype


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """q, k [B, T, H, K], v [B, T, HV, V]: value head j uses the q, k and g of head j // (HV / H) -> (o [B, T, HV, V], state).

    ``g`` [B, T, H, K]: the logarithm of the decay of each key channel, at most 0. ``scale``: K^-1/2. States are [B, HV, K, V], in
    fp32 (fp64 for fp64 inputs). ``cu_seqlens`` int [S + 1] cuts the B * T rows into segments, each with a state of its own
    ([S, HV, K, V]); a segment may be empty; rows past the last end give zeros. Raises ValueError for shapes that do not fit,
    TypeError for a scale that is not a float.
    """
    scale = check_scan(q, k, v, scale, initial_state, cu_seqlens)
    check_like("g", g, (tuple(k.shape),))
    dtype, width = v.dtype, q.shape[-1]
    backend = dispatch.choose("gla", v.device, lambda: _form("triton").why_not(dtype, width))
    tensors = (q, k, v, g, initial_state, cu_seqlens)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    o, state = _op(*tensors, options=(scale, output_final_state, keep), backend=backend)
    return o, state if output_final_state else None


def _form(backend: str) -> Any:
    if backend == "reference":
        return reference
    from kernels.gla import triton

    return triton


def _fake(tensors: Tensors, options: Sequence[float], backend: str) -> list[Tensor]:
    if backend == "triton":
        return _form(backend).fake(tensors, options)
    q, _, v, _, _, cu_seqlens = tensors
    assert q is not None
    assert v is not None
    segments = v.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    shape = (segments, v.shape[2], q.shape[3], v.shape[3]) if options[1] else (0,)
    return [torch.empty_like(v, memory_format=torch.contiguous_format), v.new_empty(shape, dtype=wide_dtype(v))]


_op = Op(
    "gla",
    lambda *args: _form(args[-1]).forward(*args),
    lambda *args: _form(args[-1]).backward(*args),
    _fake,
    outputs=2,
)
