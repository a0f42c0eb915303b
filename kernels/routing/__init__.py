"""Tokens to memories and back: from each token's choice of memories to flat rows in which every memory's tokens of one sequence
stand next to each other in time order, and to the weighted sum of what the memories say.

A memory m of sequence r is segment p = m R + r of the flat rows: all rows of one memory are one contiguous range, so a grouped
product serves all memories at once and a scan over ``cu_seqlens`` sees each memory of each sequence as a sequence of its own.
Counts come from the choices, never from weights (a weight may underflow); the sort is stable, because the order of rows within a
segment is time; nothing is read by the host, and no sum depends on the order in which threads arrive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import dispatch
from kernels.library import Op, Tensors
from kernels.routing import reference


class Routes(NamedTuple):
    """B T tokens with S slots each <-> N = B T S flat rows; rows of invalid tokens stand last and belong to no segment."""

    perm: Tensor  # int64 [N], the token * S + slot in each flat row
    inv: Tensor  # int64 [B, T, S], the flat row of each slot
    cu_seqlens: Tensor  # int32 [P+1], the segments
    offsets: Tensor  # int32 [M+1], the rows of each memory

    @property
    def token(self) -> Tensor:
        """int64 [N], the flattened token in each row."""
        return self.perm // self.inv.shape[-1]


def route(
    choice: Tensor,
    memories: int,
    *,
    shared: bool = False,
    sequence: Tensor | None = None,
    sequences: int | None = None,
    valid: Tensor | None = None,
) -> Routes:
    """choice int [B, T, k]: the memories of each token, distinct, each in [0, memories).

    ``shared``: one memory more, number ``memories``, in the last slot of every token (S = k + 1, else k). ``sequence`` int [B, T]
    and ``sequences`` (R) name the sequence of each token where it is not its row of the batch, as with packed documents; tokens
    whose number is R belong to none. ``valid`` bool [B, T]: the others are in no segment either.
    """
    B, T, _ = choice.shape
    if sequence is None:
        sequence, sequences = torch.arange(B, device=choice.device)[:, None].expand(B, T), B
    elif sequences is None:
        raise ValueError("how many sequences are there?")
    else:
        inside = sequence < sequences
        valid = inside if valid is None else valid & inside
    choice = F.pad(choice, (0, 1), value=memories) if shared else choice
    groups = memories + shared
    key = choice * sequences + sequence[..., None]
    if valid is not None:
        key = key.masked_fill(~valid[..., None], groups * sequences)
    order, perm = key.flatten().sort(stable=True)
    rows = torch.arange(len(perm), device=perm.device)
    inv = torch.empty_like(perm).scatter_(0, perm, rows).view_as(key)
    starts = torch.searchsorted(order, torch.arange(groups * sequences + 1, device=order.device), out_int32=True)
    return Routes(perm, inv, starts, starts[::sequences].contiguous())


def spread(x: Tensor, routes: Routes) -> Tensor:
    """x [B, T, ...] -> [N, ...]: each flat row is a copy of its token's."""
    if not x.is_floating_point():
        return x.flatten(0, 1)[routes.token]
    width = x.shape[2:]
    flat = x.reshape(x.shape[0] * x.shape[1], width.numel())
    dtype = x.dtype
    backend = dispatch.choose("spread", x.device, lambda: _why_not(dtype))
    (y,) = _spread(flat, routes.token, routes.inv.flatten(0, 1), backend=backend)
    return y.view(len(routes.perm), *width)


def combine(o: Tensor, weight: Tensor, routes: Routes) -> Tensor:
    """o [N, ...], weight [B, T, S] -> [B, T, ...] in the dtype of o: each token's rows, weighted and added in at least fp32.

    Rows of invalid tokens count like others: give them weight 0 and finite values."""
    dtype = o.dtype
    backend = dispatch.choose("combine", o.device, lambda: _why_not(dtype))
    inv = routes.inv.flatten(0, 1)
    flat = o.reshape(len(o), o.shape[1:].numel())
    (y,) = _combine(flat, weight.flatten(0, 1), routes.perm, inv, backend=backend)
    return y.view(*weight.shape[:2], *o.shape[1:])


def _why_not(dtype: torch.dtype) -> str | None:
    return None if dtype in (torch.float32, torch.float16, torch.bfloat16) else f"the rows are {dtype}"


def _form(backend: str) -> Any:
    if backend == "reference":
        return reference
    from kernels.routing import triton

    return triton


def _fake_spread(tensors: Tensors, options: Sequence[float], backend: str) -> list[Tensor]:
    x, token, _ = tensors
    assert x is not None
    assert token is not None
    return [x.new_empty(len(token), x.shape[1])]


def _fake_combine(tensors: Tensors, options: Sequence[float], backend: str) -> list[Tensor]:
    o, weight, _, _ = tensors
    assert o is not None
    assert weight is not None
    return [o.new_empty(len(weight), o.shape[1])]


_spread = Op(
    "spread",
    lambda *args: _form(args[-1]).spread(*args),
    lambda *args: _form(args[-1]).spread_backward(*args),
    _fake_spread,
    outputs=1,
)
_combine = Op(
    "combine",
    lambda *args: _form(args[-1]).combine(*args),
    lambda *args: _form(args[-1]).combine_backward(*args),
    _fake_combine,
    outputs=1,
)
