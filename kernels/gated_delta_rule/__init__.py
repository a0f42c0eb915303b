"""The gated delta rule (arXiv:2412.06464, eq. 10): a memory that decays, erases what a key holds, writes, and is read.

    S' = exp(g_t) S_{t-1},  u_t = beta_t (v_t - S'^T k_t),  S_t = S' + k_t u_t^T,  o_t = scale S_t^T q_t

Without g it is the delta rule (arXiv:2406.06484, eq. 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kernels import dispatch
from kernels.gated_delta_rule import reference
from kernels.library import Op, Tensors
from kernels.scan_arguments import check_like, check_scan


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    qk_l2norm: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """q, k [B, T, H, K], v [B, T, HV, V]: value head j uses the q and k of head j // (HV / H) -> (o [B, T, HV, V], state).

    ``g`` [B, T, HV]: the logarithm of the decay, at most 0; None: no decay. ``beta`` [B, T, HV]: how much is erased and written,
    in [0, 1] or, with negative eigenvalues, [0, 2]; None: 1. The rule is a contraction only for keys of norm 1: ``qk_l2norm``
    divides q and k by the norm over K, in at least fp32, with 1e-6 inside the root. ``scale``: K^-1/2.
    States are [B, HV, K, V], in fp32 (fp64 for fp64 inputs). ``cu_seqlens`` int [S + 1] cuts the B * T rows into segments, each
    with a state of its own ([S, HV, K, V]); a segment may be empty; rows past the last end give zeros. Raises ValueError for
    shapes that do not fit, TypeError for a scale that is not a float.
    """
    scale = check_scan(q, k, v, scale, initial_state, cu_seqlens)
    check_like("g", g, (tuple(v.shape[:3]),))
    check_like("beta", beta, (tuple(v.shape[:3]),))
    dtypes, width = (q.dtype, k.dtype, v.dtype), q.shape[-1]
    backend = dispatch.choose("gated_delta_rule", v.device, lambda: _form("triton").why_not(dtypes, width))
    options = (scale, output_final_state, qk_l2norm)
    o, state = _op(q, k, v, g, beta, initial_state, cu_seqlens, options=options, backend=backend)
    return o, state if output_final_state else None


def _form(backend: str) -> Any:
    if backend == "reference":
        return reference
    from kernels.gated_delta_rule import triton

    return triton


def _backward(
    tensors: Tensors,
    saved: Sequence[Tensor],
    grads: Tensors,
    needs: Sequence[bool],
    options: Sequence[float],
    backend: str,
) -> Tensors:
    return _form(backend).backward(tensors, saved, grads, options)


_op = Op(
    "gated_delta_rule",
    lambda tensors, options, backend: _form(backend).forward(tensors, options),
    _backward,
    lambda tensors, options, backend: _form(backend).fake(tensors, options),
    outputs=2,
)
