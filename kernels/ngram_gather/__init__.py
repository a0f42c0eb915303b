"""Rows of hashed n-grams (Engram, arXiv:2601.07372): where the last 2..N tokens stand in a table, and what stands there.

    mix_2 = (v_0 m_0) ^ (v_1 m_1),   mix_{n+1} = mix_n ^ (v_n m_n),   row_{n,k} = mix_n mod p_{n,k} + offset_{n,k}

for orders n = 2..N and heads k = 1..K, with v_i the canonical id i tokens back, or PAD where that is out of reach: before the
sequence, in another document, or behind something that is no token. int64 throughout: with ids below ``classes`` and multipliers
below (2^63 - 1) / classes no product overflows, and a remainder is never negative even if one did.

Nothing here has a backward: rows are returned, and the gradients of values belong to whoever keeps the table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import dispatch
from kernels.ngram_gather import reference
from kernels.ngram_gather.reference import DEAD

__all__ = ["DEAD", "gather_rows", "ngram_gather", "ngram_rows"]


def ngram_rows(
    ids: Tensor,
    history: Tensor,
    multipliers: Tensor,
    primes: Tensor,
    offsets: Tensor,
    *,
    classes: int,
    pad: int,
    segments: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The addresses of L layers at once: -> (rows [L, B, T, (N-1) K], orders ascending; new history [B, N-1]).

    ids int64 [B, T], canonical; what is not in [0, classes) is DEAD. history [B, N-1], what stood before them, oldest first.
    multipliers [L, N], primes and offsets [L, N-1, K]. ``segments`` int [B, T]: lookbacks stay in their document, and the history
    belongs to none. ``valid`` bool [B, T]: the others are passed over, and get the rows of PAD alone. Raises ValueError for shapes
    that do not fit.
    """
    _check(ids, history, multipliers, primes, offsets, segments, valid)
    line, newest = reference.align(ids, history, segments, valid)
    if dispatch.choose("ngram_gather", ids.device, lambda: None) == "reference":
        return reference.rows(line, multipliers, primes, offsets, classes, pad), newest
    run = _traced_rows if torch.compiler.is_compiling() else _triton().rows
    return run(*line, multipliers, primes, offsets, classes, pad), newest


def ngram_gather(
    table: Tensor,
    ids: Tensor,
    history: Tensor,
    multipliers: Tensor,
    primes: Tensor,
    offsets: Tensor,
    *,
    classes: int,
    pad: int,
    segments: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Hash and look up, for one layer: -> (values [B, T, (N-1) K W], rows [B, T, (N-1) K], new history [B, N-1]).

    table [R, W], on the device of the ids or in pinned host memory; multipliers [N], primes and offsets [N-1, K]; the rest as of
    `ngram_rows`.
    """
    multipliers, primes, offsets = multipliers[None], primes[None], offsets[None]
    _check(ids, history, multipliers, primes, offsets, segments, valid)
    line, newest = reference.align(ids, history, segments, valid)
    if _choose(table, ids.device) == "reference":
        rows = reference.rows(line, multipliers, primes, offsets, classes, pad)[0]
        return reference.gather(table, rows).flatten(2), rows, newest
    run = _traced_both if torch.compiler.is_compiling() else _triton().both
    values, rows = run(table, *line, multipliers[0], primes[0], offsets[0], classes, pad)
    return values, rows, newest


def gather_rows(table: Tensor, rows: Tensor) -> Tensor:
    """table [R, W], on the device of the rows or in pinned host memory; rows int64 [...] -> values [..., W] where the rows are."""
    if _choose(table, rows.device) == "reference":
        return reference.gather(table, rows)
    return (_traced_gather if torch.compiler.is_compiling() else _triton().gather)(table, rows)


def _choose(table: Tensor, device: torch.device) -> str:
    if table.requires_grad and torch.is_grad_enabled():
        raise ValueError("the table gets no gradient here: detach it, and collect those of its rows")
    dtype, hosted = table.dtype, table.device != device
    # The compiler cannot ask whether memory is pinned; where it is not, the launch says so.
    pinned = hosted and (torch.compiler.is_compiling() or table.is_pinned())
    return dispatch.choose("ngram_gather", device, lambda: _why_not(dtype, hosted, pinned))


def _why_not(dtype: torch.dtype, hosted: bool, pinned: bool) -> str | None:
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the table is {dtype}"
    return "the table is in host memory that is not pinned" if hosted and not pinned else None


def _check(
    ids: Tensor, history: Tensor, multipliers: Tensor, primes: Tensor, offsets: Tensor, segments: Any, valid: Any
) -> None:
    layers, order = multipliers.shape
    if order < 2 or primes.shape[:-1] != (layers, order - 1) or offsets.shape != primes.shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (multipliers, primes, offsets))
        raise ValueError(f"expected multipliers [N] of N >= 2, primes and offsets [N-1, K], per layer: {shapes}")
    if ids.ndim != 2 or ids.numel() == 0 or history.shape != (len(ids), order - 1):
        raise ValueError(f"expected ids [B, T], not empty, and history [B, {order - 1}]: {_shapes(ids, history)}")
    for name, t in (("segments", segments), ("valid", valid)):
        if t is not None and t.shape != ids.shape:
            raise ValueError(f"{name} must be {list(ids.shape)}, got {list(t.shape)}")


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(t.shape)) for t in tensors)


def _triton() -> Any:
    from kernels.ngram_gather import triton

    return triton


@torch.library.custom_op("loci::ngram_rows", mutates_args=())
def _traced_rows(
    ids: Tensor, segments: Tensor | None, place: Tensor | None,
    multipliers: Tensor, primes: Tensor, offsets: Tensor, classes: int, pad: int,
) -> Tensor:  # fmt: skip
    return _triton().rows(ids, segments, place, multipliers, primes, offsets, classes, pad)


@_traced_rows.register_fake
def _(
    ids: Tensor, segments: Tensor | None, place: Tensor | None,
    multipliers: Tensor, primes: Tensor, offsets: Tensor, classes: int, pad: int,
) -> Tensor:  # fmt: skip
    layers, back, heads = primes.shape
    return ids.new_empty(layers, len(ids), ids.shape[1] - back, back * heads)


@torch.library.custom_op("loci::ngram_gather", mutates_args=())
def _traced_both(
    table: Tensor, ids: Tensor, segments: Tensor | None, place: Tensor | None,
    multipliers: Tensor, primes: Tensor, offsets: Tensor, classes: int, pad: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _triton().both(table, ids, segments, place, multipliers, primes, offsets, classes, pad)


@_traced_both.register_fake
def _(
    table: Tensor, ids: Tensor, segments: Tensor | None, place: Tensor | None,
    multipliers: Tensor, primes: Tensor, offsets: Tensor, classes: int, pad: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    back, heads = primes.shape
    shape = (len(ids), ids.shape[1] - back, back * heads)
    values = table.new_empty((*shape[:2], shape[2] * table.shape[1]), device=ids.device)
    return values, ids.new_empty(shape)


@torch.library.custom_op("loci::gather_rows", mutates_args=())
def _traced_gather(table: Tensor, rows: Tensor) -> Tensor:
    return _triton().gather(table, rows)


@_traced_gather.register_fake
def _(table: Tensor, rows: Tensor) -> Tensor:
    return table.new_empty((*rows.shape, table.shape[1]), device=rows.device)
