"""What B'MOJO remembers of a sequence, and where the tokens of one call stand among those before.

All buffers are rings: the row of position p has the slot p mod R. A call with several tokens lays what the rings hold and its own
tokens in one line whose first cell starts a chunk, so that the same op serves it as serves whole sequences; a call with one
token reads the rings as they are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.mixers.pieces import host_may_look
from models.types import Ctx, State


class BMojoState(NamedTuple):
    """Of constant size. ``()`` for what a config does without."""

    ssm: State
    shift: State  # [B, taps - 1, D], the last inputs of the token shift
    outputs: State  # [B, k, D], the last outputs of the state-space mixer, for the prediction of the next
    k: State  # [B, Hkv, W + m_e + F, K]: the window's ring, the eidetic rows in force, and the fading rows
    v: State
    score: State  # fp32 [B, W + m_e], of the window's ring and of the eidetic rows (0 for none)
    position: State  # int64 [B, m_e], of the eidetic rows, -1 for none
    archive: State = ()  # `models.mixers.bmojo_archive.Recall`, what was found in storage for this chunk


class Now(NamedTuple):
    """One token of each sequence, which continues a state. ``F``: rows of the buffers for outputs."""

    position: Tensor  # int64 [B, 1]
    left: Tensor  # int64 [B, 1], W before it: the newest one that has left the window
    slot: Tensor  # int64 [B, 1], of the window's ring
    write: Tensor | None  # bool [B, 1], whether there is a token; None: everywhere
    ring: Tensor  # int64 [B, W], the position in each slot of the window's ring, negative for none
    ring_seen: Tensor  # bool [B, W]
    fading_seen: Tensor  # bool [B, F]
    fading_slot: Tensor  # int64 [B, 1], the row of F for its output
    fading_write: Tensor | None  # bool [B, 1], whether that is kept; None: everywhere
    fades: bool  # whether it is anywhere; true where the host may not look
    turn: Tensor  # bool [B, 1], whether the token ends a chunk
    turns: bool  # whether one does; true where the host may not look


class Line(NamedTuple):
    """The cells of one call: chunks of W, the last one in part, from one that lies far enough back for its first token."""

    start: Tensor  # int64 [B, 1], the position of the first new token
    end: Tensor  # int64 [B, 1], and past the last one
    nth: Tensor  # int64 [B, T], the n-th valid token
    position: Tensor  # int64 [B, N], of each cell; those at ``end`` and after it are empty, one of them at least
    size: int  # W

    @property
    def base(self) -> Tensor:
        """int64 [B, 1], the position of the first cell."""
        return self.position[:, :1]

    @property
    def chunks(self) -> int:
        return -(-self.position.shape[1] // self.size)

    def token(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """position [B, n] -> (which new token that is, clamped to those there are; whether it is one)."""
        i = position - self.start
        new = (i >= 0) & (position < self.end)
        return self.nth.gather(1, i.clamp(0, self.nth.shape[1] - 1)), new

    def lay(self, ring: Tensor, new: Tensor, dim: int = 1) -> Tensor:
        """ring [B, R, ...] (R may be 0) and new [B, T, ...] -> [B, N, ...], zeros for empty cells; rows along ``dim``."""
        R, T = ring.shape[dim], new.shape[dim]
        token, fresh = self.token(self.position)
        old = (self.position < self.start) & (self.position >= (self.start - R).clamp(min=0))
        index = torch.where(fresh, R + token, torch.where(old, self.position % max(R, 1), R + T))
        rows = torch.cat((ring.to(new.dtype), new, torch.zeros_like(new.narrow(dim, 0, 1))), dim)
        return rows.gather(dim, _like(index, rows, dim))

    def roll(self, ring: Tensor, new: Tensor, dim: int = 1) -> Tensor:
        """The ring after these tokens, in its dtype."""
        R = ring.shape[dim]
        slot = torch.arange(R, device=ring.device)
        newest = self.end - 1 - (self.end - 1 - slot) % R
        token, fresh = self.token(newest)
        index = torch.where(fresh, R + token, slot)
        rows = torch.cat((ring, new.to(ring.dtype)), dim)
        return rows.gather(dim, _like(index, rows, dim))


def line_of(ctx: Ctx, size: int, back: int) -> Line:
    """The line of a call that continues a state; ``back``: how many whole chunks a query sees before its own."""
    start, T = _start(ctx), ctx.tokens.shape[1]
    time = torch.arange(T, device=start.device)
    nth = time.expand(len(start), T)
    if ctx.valid is not None:
        place = torch.where(ctx.valid, ctx.positions - start, T)
        nth = torch.zeros_like(F.pad(place, (0, 1))).scatter(1, place, nth)[:, :T]
    base, end = (start // size - back).clamp(min=0) * size, ctx.positions[:, -1:] + 1
    cells = (back + 1) * size + T  # with the cell of the token after the last one
    if host_may_look(ctx):
        cells = int((end - base).max()) + 1
    return Line(start, end, nth, base + torch.arange(cells, device=start.device), size)


def _start(ctx: Ctx) -> Tensor:
    """Tokens seen before this call: [B, 1]."""
    first = ctx.positions[:, :1]
    return first if ctx.valid is None else first + 1 - ctx.valid[:, :1].long()


def _like(index: Tensor, x: Tensor, dim: int) -> Tensor:
    """index [B, n] -> the index of a gather from x along ``dim``."""
    shape = [1] * x.ndim
    shape[0], shape[dim] = index.shape
    sizes = list(x.shape)
    sizes[dim] = -1
    return index.view(shape).expand(sizes)


def take(x: Tensor, index: Tensor, dim: int = 1) -> Tensor:
    """x [B, .. N .., ...], index int [B, n], -1 for none -> [B, .. n .., ...], zeros for none."""
    found = x.gather(dim, _like(index.clamp(min=0), x, dim))
    return torch.where(_like(index >= 0, found, dim), found, 0)


def put(x: Tensor, index: Tensor, row: Tensor, write: Tensor | None, dim: int, donate: bool) -> Tensor:
    """One row per sequence: x with ``row`` [B, .. 1 .., ...] at ``index`` [B, 1] where ``write`` [B, 1], or everywhere; in place if
    donated."""
    at, row = _like(index, x, dim), row.to(x.dtype)
    if write is not None:
        row = torch.where(_like(write, row, dim), row, x.gather(dim, at))
    scatter: Any = torch.Tensor.scatter_ if donate and not torch.is_grad_enabled() else torch.scatter
    return scatter(x, dim, at, row)
