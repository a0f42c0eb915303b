"""One token of linear attention, with or without the delta rule, for each of many memories: what a decode step runs.

    S' = exp(g) S,  u = v  or  beta (v - S'^T k),  S <- S' + k u^T,  o = scale S^T q

(arXiv:2412.06464, eq. 10; without beta arXiv:2405.21060, section 6, and with a decay per key channel arXiv:2312.06635, eq. 3.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import dispatch
from kernels.memory_slots import check_slots
from kernels.recurrent_step import reference
from kernels.scan_arguments import check_like, check_scan

MAX_WIDTH = 256  # of K in the Triton form, whose programs hold whole columns


def recurrent_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    scale: float | None = None,
    index: Tensor | None = None,
    qk_l2norm: bool = False,
    donate: bool = False,
) -> tuple[Tensor, Tensor]:
    """q, k [B, S, H, K], v [B, S, HV, V], state [B, E, HV, K, V]: one token for S of E memories -> (o [B, S, HV, V], state).

    ``g``: the logarithm of the decay, at most 0, [B, S, HV] or, per key channel, [B, S, H, K]; None: no decay. ``beta`` [B, S, HV]
    makes it the delta rule; None: the plain sum. Value head j uses what belongs to head j // (HV / H). ``scale``: K^-1/2.
    ``qk_l2norm``: q and k over their norm, with 1e-6 inside the root.
    ``index`` int [B, S] says which memory slot s uses, -1: none (o = 0); those of one row are distinct. Without it S = E. Memories
    that no slot uses keep their bytes. Computed in at least fp32; the state keeps its dtype. ``donate``: the result may be the
    passed state, overwritten (only where no gradient is recorded). Raises ValueError for shapes that do not fit, TypeError for a
    scale that is not a float.
    """
    scale = check_scan(q, k, v, scale, None, None)
    check_slots(q, state, index)
    if state.shape[2:] != (*v.shape[2:3], *k.shape[3:], *v.shape[3:]):
        raise ValueError(
            f"state must be [B, E, HV, K, V]: {tuple(state.shape)} beside k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    check_like("g", g, (tuple(v.shape[:3]), tuple(k.shape)))
    check_like("beta", beta, (tuple(v.shape[:3]),))
    if torch.is_grad_enabled():
        dispatch.choose("recurrent_step", v.device, None)  # the kernel writes over what a backward would need
        return reference.step(q, k, v, state, g, beta, scale, index, qk_l2norm, False)
    dtypes, width = (v.dtype, state.dtype), k.shape[3]
    if dispatch.choose("recurrent_step", v.device, lambda: _why_not(dtypes, width)) == "reference":
        return reference.step(q, k, v, state, g, beta, scale, index, qk_l2norm, donate)
    written = state if donate and state.is_contiguous() else state.clone(memory_format=torch.contiguous_format)
    run = _traced_step if torch.compiler.is_compiling() else _form().step
    o = run(q, k, v, written, g, beta, scale, index, qk_l2norm)
    return o, state.copy_(written) if donate and written is not state else written


@torch.library.custom_op("loci::recurrent_step", mutates_args=("state",))
def _traced_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float,
    index: Tensor | None,
    qk_l2norm: bool,
) -> Tensor:
    return _form().step(q, k, v, state, g, beta, scale, index, qk_l2norm)


@_traced_step.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float,
    index: Tensor | None,
    qk_l2norm: bool,
) -> Tensor:
    return torch.empty_like(v, memory_format=torch.contiguous_format)


def _why_not(dtypes: tuple[torch.dtype, ...], width: int) -> str | None:
    wide = [str(dtype) for dtype in dtypes if dtype not in (torch.float32, torch.float16, torch.bfloat16)]
    if wide:
        return f"v or the state is {wide[0]}"
    return None if width <= MAX_WIDTH else f"K is {width}, above {MAX_WIDTH}"


def _form() -> Any:
    from kernels.recurrent_step import triton

    return triton
