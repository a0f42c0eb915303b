"""Attention with one softmax over a window and a few rows of memory per chunk: what a layer of B'MOJO reads (arXiv:2407.06324).

Rows are cut into chunks of W, the window's length (`kernels.chunks`). The query at offset i of chunk c sees

    window    rows t - W + 1 .. t                         of k, v
    eidetic   the chunk's m rows, those with since <= i     gathered from k, v, or from a pool
    fading    "chunk": the chunk's n rows, unless c = 0     of fading_k, fading_v, which are
              "point": row t - W                            rows of their own
              "band":  rows t - 2 W + 1 .. t - W
              "self":  row t

    o = softmax(scale q [K_window | K_eidetic | K_fading]^T) [V_window | V_eidetic | V_fading]

all within its segment. Every query does the same work whatever the length, and no memory row is copied into the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import dispatch
from kernels.chunks import slots
from kernels.library import Op, Tensors
from kernels.memory_attention import reference

FADING = ("chunk", "point", "band", "self")
CHUNK, POINT, BAND, SELF = range(4)
MAX_WIDTH, MAX_WIDTH_FP32 = 128, 64  # of the Triton form, whose programs hold whole rows in registers


def memory_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    index: Tensor | None = None,
    since: Tensor | None = None,
    pool: tuple[Tensor, Tensor] | None = None,
    fading: str = "chunk",
    fading_k: Tensor | None = None,
    fading_v: Tensor | None = None,
    memory_q: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """q [B, T, H, K], k, v [B, T, Hkv, K] with H a multiple of Hkv -> o [B, T, H, K]; all gradients but those of integers.

    ``index`` int [G, m]: rows of each slot, -1 for none, in the B * T flat rows of k and v, or in those of ``pool``: two
    [N, Hkv, K]. ``since`` int [G, m]: the first offset in the chunk that sees the row (W: none does; default 0).
    ``fading_k``, ``fading_v``: [G, n, Hkv, K] by slot for ``fading="chunk"``, else [B, T, Hkv, K]. ``memory_q`` like q: the
    query of eidetic and fading rows where it is another one. ``cu_seqlens`` int [S+1] cuts the B * T rows into segments; rows past
    the last give zeros. Scores and sums in at least fp32. Raises ValueError for what does not fit.
    """
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"expected q [B, T, H, K] and k, v [B, T, Hkv, K]: {[tuple(x.shape) for x in (q, k, v)]}")
    b, t, heads, width = q.shape
    kv_heads = k.shape[2]
    if not b * t or heads % kv_heads or window < 1:
        raise ValueError(f"{heads} query heads on {kv_heads}, window {window}, rows {b} x {t}")
    if fading not in FADING or (fading_k is None) != (fading_v is None) or (index is None and since is not None):
        raise ValueError(f"unknown fading '{fading}', or half of a pair")
    total, rows = slots(b, t, cu_seqlens, window), (kv_heads, width)
    if index is not None and (index.ndim != 2 or len(index) != total):
        raise ValueError(f"index must be [{total}, m]: {tuple(index.shape)}")
    if index is not None and since is not None and since.shape != index.shape:
        raise ValueError(f"since must be {tuple(index.shape)}: {tuple(since.shape)}")
    lead = (total,) if fading == "chunk" else (b, t)
    for x in (fading_k, fading_v):
        if x is not None and (x.shape[-2:] != rows or x.shape[: len(lead)] != lead or x.ndim != 4):
            raise ValueError(f"fading_k and fading_v must be {lead} + [.., {kv_heads}, {width}]: {tuple(x.shape)}")
    for x in pool or ():
        if x.ndim != 3 or x.shape[1:] != rows:
            raise ValueError(f"a pool must be [N, {kv_heads}, {width}]: {tuple(x.shape)}")
    if memory_q is not None and memory_q.shape != q.shape:
        raise ValueError(f"memory_q must be {tuple(q.shape)}: {tuple(memory_q.shape)}")
    options = (window, FADING.index(fading), width**-0.5 if scale is None else scale)
    floats = (q, k, v, *(pool or (None, None)), fading_k, fading_v, memory_q)
    dtypes = {x.dtype for x in floats if x is not None}
    backend = dispatch.choose("memory_attention", q.device, lambda: _why_not(dtypes, width))
    return _op(*floats, index, since, cu_seqlens, options=options, backend=backend)[0]


def _why_not(dtypes: set[torch.dtype], width: int) -> str | None:
    if len(dtypes) > 1 or dtypes - {torch.float32, torch.float16, torch.bfloat16}:
        return f"there is {', '.join(sorted(map(str, dtypes)))}"
    most = MAX_WIDTH_FP32 if torch.float32 in dtypes else MAX_WIDTH
    return None if width <= most else f"heads of {width}, wider than {most}"


def _form(backend: str) -> Any:
    if backend == "reference":
        return reference
    from kernels.memory_attention import triton

    return triton


def _fake(tensors: Tensors, options: Sequence[float], backend: str) -> list[Tensor]:
    q: Any = tensors[0]
    wide = torch.promote_types(q.dtype, torch.float32)
    return [torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:3], dtype=wide)]


_op = Op(
    "memory_attention",
    lambda *args: _form(args[-1]).forward(*args),
    lambda *args: _form(args[-1]).backward(*args),
    _fake,
    outputs=1,
    also=(0,),
)
