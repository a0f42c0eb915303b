"""Linear attention with a scalar decay per head: S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t.

Without decay it is linear attention (arXiv:2006.16236, the numerator), with a constant one the retention of RetNet
(arXiv:2307.08621, eq. 5), with one per token Mamba-2's state space dual (arXiv:2405.21060: q = C, k = B, v = dt x, g = dt A).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import dispatch
from kernels.decay_linear_attention import reference
from kernels.library import Op, Tensors
from kernels.scan_arguments import check_like, check_scan, wide_dtype


def decay_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """q, k [B, T, H, K], v [B, T, HV, V]: value head j uses the q and k of head j // (HV / H) -> (o [B, T, HV, V], state).

    ``g``: the logarithm of the decay, at most 0; [B, T, HV], or [HV] where it is constant, or None. ``scale``: K^-1/2.
    States are [B, HV, K, V], in fp32 (fp64 for fp64 inputs). ``cu_seqlens`` int [S + 1] cuts the B * T rows into segments, each
    with a state of its own ([S, HV, K, V]); a segment may be empty; rows past the last end give zeros. Raises ValueError for
    shapes that do not fit, TypeError for a scale that is not a float.
    """
    scale = check_scan(q, k, v, scale, initial_state, cu_seqlens)
    check_like("g", g, (tuple(v.shape[:3]), tuple(v.shape[2:3])))
    dtype, width = v.dtype, q.shape[-1]
    backend = dispatch.choose("decay_linear_attention", v.device, lambda: _form("triton").why_not(dtype, width))
    tensors = (q, k, v, g, initial_state, cu_seqlens)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    o, state = _op(*tensors, options=(scale, output_final_state, keep), backend=backend)
    return o, state if output_final_state else None


def _form(backend: str) -> Any:
    if backend == "reference":
        return reference
    from kernels.decay_linear_attention import triton

    return triton


def _fake(tensors: Tensors, options: Sequence[float], backend: str) -> list[Tensor]:
    q, _, v, _, _, cu_seqlens = tensors
    assert q is not None
    assert v is not None
    segments = v.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    shape = (segments, v.shape[2], q.shape[3], v.shape[3]) if options[1] else (0,)
    results = [torch.empty_like(v, memory_format=torch.contiguous_format), v.new_empty(shape, dtype=wide_dtype(v))]
    keeps = backend == "triton" and options[2]
    return [*results, _form(backend).fake_states(q, v, cu_seqlens)] if keeps else results


_op = Op(
    "decay_linear_attention",
    lambda *args: _form(args[-1]).forward(*args),
    lambda *args: _form(args[-1]).backward(*args),
    _fake,
    outputs=2,
)
