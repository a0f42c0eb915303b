"""Which m rows of the past are kept: before every chunk, the m with the largest key among all rows of the segment before it.

A bounded store that takes every row, and drops the one with the smallest key when it is full (of equals the newest), holds exactly
these rows (the eidetic memory of B'MOJO, arXiv:2407.06324, algorithm 1, looked at where chunks begin). So nothing needs
to be done row after row: the union of two such stores, cut to m, is associative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import dispatch
from kernels.chunks import slots
from kernels.prefix_topm import reference


def prefix_topm(
    key: Tensor,
    size: int,
    m: int,
    *,
    initial_key: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """key [B, T] -> int64 [G, m]: the flat rows kept before the chunk in each slot (`kernels.chunks`), by rising row, then -1.

    Compared in fp32; of equal keys the earlier row wins; -inf: not a candidate. ``cu_seqlens`` [S+1] cuts the B * T rows into
    segments, whose chunks of ``size`` rows start anew. ``initial_key`` [B, M], not with ``cu_seqlens``: M candidates from before
    the rows, in their order; item i of sequence b is B * T + b * M + i in the result, and stands before all rows. No gradient.
    Raises ValueError for arguments that do not fit.
    """
    if key.ndim != 2 or key.numel() == 0 or size < 1 or m < 1:
        raise ValueError(f"expected key [B, T], size and m of at least 1, got {tuple(key.shape)}, {size} and {m}")
    if initial_key is not None and (cu_seqlens is not None or initial_key.ndim != 2 or len(initial_key) != len(key)):
        raise ValueError("initial_key must be [B, M], and excludes cu_seqlens")
    if initial_key is None:
        initial_key = key.new_zeros(len(key), 0)
    backend = dispatch.choose("prefix_topm", key.device, None)
    return _selected(key.detach().float(), initial_key.detach().float(), cu_seqlens, size, m, backend)


@torch.library.custom_op("loci::prefix_topm", mutates_args=())
def _selected(key: Tensor, initial: Tensor, cu_seqlens: Tensor | None, size: int, m: int, backend: str) -> Tensor:
    """One operator of torch, so that activation checkpointing can keep what it chose."""
    return reference.forward(key, initial, cu_seqlens, size, m)


@_selected.register_fake
def _(key: Tensor, initial: Tensor, cu_seqlens: Tensor | None, size: int, m: int, backend: str) -> Tensor:
    B, T = key.shape
    return key.new_empty(slots(B, T, cu_seqlens, size), m, dtype=torch.int64)


OPERATOR = torch.ops.loci.prefix_topm.default  # what a policy of activation checkpointing sees
