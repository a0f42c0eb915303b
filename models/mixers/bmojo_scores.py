"""What a token is worth to B'MOJO's eidetic memory: its innovation, or what takes its place in a control.

The innovation of a token is how badly the state-space output at it is predicted by the last k outputs (arXiv:2407.06324, section
3.3). The predictor is fixed, and nothing here has a gradient. The paper leaves error, k and weights open: the default error is
relative, because top-m compares positions across a sequence, and a raw norm would rank by the length of y.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.causal_conv1d import causal_conv1d
from models.mixers.linear import LinearMixer, LinearState
from models.mixers.pieces import Rows
from models.mixers.rules import Delta, wide
from models.types import Ctx

INNOVATIONS = ("innov", "innov_l2", "innov_cos")
CONTROLS = ("random", "fifo", "first", "stride")
SCORES = (*INNOVATIONS, "delta", *CONTROLS)
L2_EPS = 1e-6  # of the delta rule's unit keys
_EPS = 1e-9


class Past(NamedTuple):
    """What each of the last k outputs counts in the prediction of the next, the same for all layers."""

    weights: Tensor  # [k], of the oldest first
    mass: Tensor  # [B, T, 1], the sum over those that there are; above zero


def past_of(weights: Sequence[float], positions: Tensor, dtype: torch.dtype) -> Past:
    """``weights`` of the last output, the one before, ...; positions [B, T]."""
    # no copy from the host
    a = torch.stack([torch.full((), w, device=positions.device, dtype=dtype) for w in (0.0, *weights)])
    mass = a.cumsum(0)[positions.clamp(0, len(weights))]
    return Past(a[1:].flip(0), mass.clamp(min=_EPS)[..., None])


@torch.no_grad()
def predict(y: Tensor, past: Past, rows: Rows, tail: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """y [B, T, D], tail [B, k, D] of outputs before (None: whole sequences) -> (the prediction of each from those before it,
    sum_i a_i y_{t-i} / sum_i a_i over the i there are, zero at a first token; the new tail)."""
    if tail is not None and y.shape[1] == 1:
        said = (tail.to(y.dtype) * past.weights[:, None]).sum(1, keepdim=True)
        after = torch.cat((tail[:, 1:], y.to(tail.dtype)), 1)
        return said / past.mass, after if rows.index is None else after.where((rows.index >= 0)[..., None], tail)
    one = torch.ones_like(past.weights[:1])
    before = (None, None) if tail is None else (tail[:, -1:], tail[:, :-1])
    late, last = _convolved(y, torch.cat((one, one - 1)), before[0], rows)
    said, earlier = _convolved(late, past.weights, before[1], rows)
    return said / past.mass, None if last is None or earlier is None else torch.cat((earlier, last), 1)


def _convolved(x: Tensor, taps: Tensor, tail: Tensor | None, rows: Rows) -> tuple[Tensor, Tensor | None]:
    """x [B, T, D] with the same taps [W] for all channels, tail [B, W-1, D] -> (sum_i taps_i x_{t-W+1+i}, the new tail)."""
    weight = taps.expand(x.shape[-1], -1)
    keep, cu = tail is not None, rows.cu_seqlens
    y, tail = causal_conv1d(rows.pack(x), weight, initial_state=tail, output_final_state=keep, cu_seqlens=cu)
    return rows.unpack(y, len(x)), tail


@torch.no_grad()
def innovation(kind: str, y: Tensor, prediction: Tensor) -> Tensor:
    """y, prediction [B, T, D] -> [B, T], at least 0.

    ``innov``: |y - p|^2 / (|y|^2 + |p|^2), in [0, 2], 1 where there is no prediction. ``innov_l2``: |y - p|. ``innov_cos``: 1 - cos.
    """
    error = torch.linalg.vector_norm(y - prediction, dim=-1)
    if kind == "innov_l2":
        return error
    sizes = [torch.linalg.vector_norm(x, dim=-1) for x in (y, prediction)]
    if kind == "innov":
        return error.square() / (sizes[0].square() + sizes[1].square() + _EPS)
    agreement = torch.linalg.vecdot(y, prediction) / (sizes[0] * sizes[1] + _EPS)
    return (1 - agreement).clamp(min=0)


@torch.no_grad()
def write_error(part: LinearMixer, u: Tensor, ctx: Ctx, rows: Rows, state: LinearState | None) -> Tensor:
    """Of a nested delta rule that reads u [B, T, D]: |v_t - decay(S_{t-1})^T k_t| over all heads [B, T], what the memory did not
    expect.

    S_{t-1} is read by a second scan, whose query at t - 1 is the key at t; before the first token of a call, from the state.
    """
    rule = part.rule
    assert isinstance(rule, Delta)
    qkv, _, logits = part.project(part.norm(u)).split(part.widths, dim=-1)
    if state is not None and u.shape[1] == 1:
        if part.conv is not None:
            qkv, _ = part.conv.step(qkv, state.conv[:, None], index=rows.index)
        x = rule.inputs(*part.heads.split(qkv), logits, ctx.positions)
        k, v, g = x.k.to(wide(x.k.dtype)), x.v.to(wide(x.v.dtype)), x.g
        read = torch.zeros_like(v)
    else:
        before = LinearState(None, None) if state is None else state  # pyright: ignore[reportArgumentType]
        qkv, logits, positions = (rows.pack(x) for x in (qkv, logits, ctx.positions))
        if part.conv is not None:
            qkv, _ = part.conv(qkv, initial_state=before.conv, cu_seqlens=rows.cu_seqlens)
        q, k, v = part.heads.split(qkv)
        x = rule.inputs(q, k, v, logits, positions)
        ahead = k.roll(-1, 1)
        o, _ = rule(ahead, k, v, logits, positions, initial_state=before.memory, cu_seqlens=rows.cu_seqlens)
        k, v, read = (rows.unpack(y.to(wide(y.dtype)), len(u)) for y in (x.k, x.v, o.roll(1, 1) / rule.scale))
        g = None if x.g is None else rows.unpack(x.g, len(u))
    known = torch.zeros_like(read)
    if state is not None:
        unit = k * (k.square().sum(-1, keepdim=True) + L2_EPS).rsqrt()
        unit = unit.repeat_interleave(part.heads.value_heads // part.heads.heads, dim=2)
        known = torch.einsum("bthk,bhkv->bthv", unit, state.memory.to(unit.dtype))
    read = torch.where(_first(ctx, state is not None)[..., None, None], known, read)
    error = v - (read if g is None else g.exp()[..., None] * read)
    return torch.linalg.vector_norm(error.flatten(2), dim=-1)


def write_error_flops(part: Any) -> float:
    """Per token: what the nested mixer does up to its rule, once more."""
    conv = 0 if part.conv is None else part.conv.flops()
    return 2 * part.project.weight.numel() + conv + part.rule.flops()


def _first(ctx: Ctx, continued: bool) -> Tensor:
    """Which tokens are the first of their sequence, or of the call that continues it: bool [B, T]."""
    if not continued:
        return ctx.positions == 0
    before = ctx.positions[:, :1] - 1 if ctx.valid is None else ctx.positions[:, :1] - ctx.valid[:, :1].long()
    return ctx.positions == before + 1


@torch.no_grad()
def control(kind: str, ctx: Ctx, salt: int) -> Tensor:
    """[B, T] in fp32, of what a token is and where it stands alone: a split or a neighbour changes nothing.

    ``random``: a hash of token, position and ``salt``. ``fifo``: the newest win. ``first``: the oldest. ``stride``: multiples of the
    largest powers of two, so that the kept ones are evenly spaced.
    """
    position = ctx.positions.clamp(min=0)
    if kind == "first":
        return torch.ones_like(position, dtype=torch.float32)
    if kind == "fifo":
        return position.float() + 1
    if kind == "stride":
        return torch.where(position == 0, 1 << 30, position & -position).float()
    x = ctx.tokens * 0x2545F4914F6CDD1D + position * 0x1B873593CC9E2D51 + (salt + 1) * 0x165667B19E3779F9
    for _ in range(2):
        x = (x ^ ((x >> 31) & 0x1FFFFFFFF)) * 0x369DEA0F31A53F85
    return ((x >> 36) & 0xFFFFFF).float() * 2.0**-24


@torch.no_grad()
def rank(score: Tensor, positions: Tensor, gamma: float) -> Tensor:
    """Scores -> fp32 keys in whose order tokens are kept. With gamma < 1 every score fades by it at each step: the same order as
    that of log score - position log gamma, once and for all."""
    if gamma == 1:
        return score.float()
    faded = score.double().log() - positions * torch.tensor(gamma, dtype=torch.float64).log().item()
    return torch.where(score > 0, faded, torch.finfo(torch.float32).min).float()
