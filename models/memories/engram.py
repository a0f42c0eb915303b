"""Engram: what the last tokens say by themselves, looked up by their hash and let in by the context (arXiv:2601.07372).

    e = the rows of all orders and heads, side by side [d_mem],   [k^1 .. k^M, v] = W e
    y^m = alpha^m v + silu(conv(norm(alpha^m v))),   alpha^m = gate(<norm(x^m), norm(k^m)>)        (`kernels.memory_gate`)

The addresses depend on tokens alone (`engram_addressing`), so rows are on their way before the first block runs. With M residual
branches each has a key and a convolution of its own; the value and the table are shared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from kernels.memory_gate import GATES, GateState, empty_state, memory_gate
from models import state as states
from models.errors import UserError
from models.memories.engram_addressing import ALIVE, EngramAddressing, table_primes
from models.parsing import choice
from models.stores import build_store
from models.stores.base import StoreConfig, Table
from models.types import Aux, Cost, Ctx, ParamMeta, Part, Site, Stat, State, count_params, normal_

COMPRESSIONS = ("compat", "tagged", "none")
# What all layers of a model have in common, since their tables are laid out together.
COMMON = ("orders", "heads", "base", "compression", "pad", "seed")


@dataclass(frozen=True)
class EngramConfig:
    """A table has about ``base`` rows per head and order, ``row_width`` numbers each."""

    kind: str = "engram"
    orders: tuple[int, ...] = (2, 3)  # 2 .. N, lengths of the n-grams
    heads: int = 8  # K, hashes of each n-gram
    row_width: int = 32
    base: int | tuple[int, ...] = 20_000  # of all orders, or of each
    # The number that a layer hashes with; None: its position. Give it when layers move, or a trained table is renamed.
    key: int | None = None
    conv: int = 4  # w, taps of the convolution; 0: none
    dilation: int | None = None  # tokens between taps; None: N
    gate: str = "signed_sqrt"  # signed_sqrt | sigmoid, the latter as in the paper's equation
    eps: float = 1e-6  # of all its norms
    zero_value_init: bool = False  # the layer then starts as nothing, and its table learns from the second step on
    per_branch: bool = (
        True  # with residual branches: a gate for each; False: one, on the learned mixture that mixers read
    )
    compression: str = "compat"  # compat | tagged | none: how tokens are folded onto canonical ids
    pad: int = 0  # the token that stands for what is out of reach
    seed: int = 0  # of the hash
    store: StoreConfig = field(default_factory=StoreConfig)

    def __post_init__(self) -> None:
        choice("gate", self.gate, GATES)
        choice("compression", self.compression, COMPRESSIONS)
        if not self.orders or self.orders[0] != 2 or any(b != a + 1 for a, b in pairwise(self.orders)):
            nearest = list(range(2, max(self.orders, default=2) + 1))
            raise UserError(f"orders must run from 2 without a gap, got {list(self.orders)}; nearest: {nearest}")
        if not isinstance(self.base, int) and len(self.base) != len(self.orders):
            raise UserError(f"base: {len(self.base)} sizes for {len(self.orders)} orders; give one, or one for each")
        for name, least in (("heads", 1), ("row_width", 1), ("conv", 0), ("dilation", 1), ("key", 0), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} must be at least {least}, got {value}; nearest: {name}={least}")
        if min(self.bases) < 2:
            raise UserError(f"base must be at least 2, got {min(self.bases)}; nearest: base=2")

    @property
    def bases(self) -> tuple[int, ...]:
        return (self.base,) * len(self.orders) if isinstance(self.base, int) else self.base

    @property
    def width(self) -> int:
        """d_mem."""
        return len(self.orders) * self.heads * self.row_width

    @property
    def reach(self) -> int:
        """Tokens that the convolution looks back."""
        return max(self.conv - 1, 0) * (self.dilation or self.orders[-1])

    def tiny(self) -> EngramConfig:
        base = 61 if isinstance(self.base, int) else tuple(61 for _ in self.base)
        return replace(self, heads=2, row_width=8, base=base)


class Engram(Part):
    """One layer of it. Its table is made with the model's addressing: all layers together decide the sizes."""

    Config = EngramConfig
    table: Table

    def __init__(self, cfg: EngramConfig, site: Site) -> None:
        super().__init__(cfg, replace(site, norm="none"))  # the gate normalises what it compares
        self.sees_branches = cfg.per_branch
        M, D = site.branches if cfg.per_branch else 1, site.d_model
        self.branches, self.key = M, site.layer if cfg.key is None else cfg.key
        self.project = nn.Linear(cfg.width, (M + 1) * D, bias=False)  # keys of the branches, then the value
        self.query_gain, self.key_gain = (nn.Parameter(torch.empty(M, D)) for _ in range(2))
        self.conv_gain = self.conv = None
        if cfg.conv:
            self.conv_gain = nn.Parameter(torch.empty(M, D))
            self.conv = nn.Parameter(torch.empty(M, D, cfg.conv))

    def forward(
        self, x: Tensor, ctx: Ctx, state: State | None = None, donate: bool = False
    ) -> tuple[Tensor, State | None, Aux]:
        """x [B, T, D], or [B, T, M, D] with a gate per branch."""
        streams = x if self.branches > 1 else x.view(*x.shape[:2], 1, x.shape[-1])
        y, alpha, new = self.fuse(streams, self.look_up(ctx), ctx, state)
        return y.view_as(x), new, Aux({}, {"gate": Stat(_mean(alpha.detach(), _alive(ctx)))}, {})

    def look_up(self, ctx: Ctx) -> Tensor:
        """-> the rows of every token, orders ascending, then heads: [B, T, (N-1) K, row_width]."""
        return self.table.wait(ctx.shared[self._shared_name])

    def fuse(self, x: Tensor, rows: Tensor, ctx: Ctx, state: State | None) -> tuple[Tensor, Tensor, State | None]:
        """x [B, T, M, D], rows [B, T, (N-1) K, row_width] -> (y like x, gates [B, T, M] in at least fp32, state)."""
        M, D = x.shape[2:]
        key, value = self.project(rows.flatten(2).to(x.dtype)).split((M * D, D), dim=-1)
        y, alpha, new = memory_gate(
            x,
            key.unflatten(-1, (M, D)),
            value,
            self.query_gain * self.key_gain,
            self.conv_gain,
            self.conv,
            dilation=self.cfg.dilation or self.cfg.orders[-1],
            eps=self.cfg.eps,
            gate=self.cfg.gate,
            valid=_alive(ctx),
            segments=ctx.shared.get("segments"),
            state=state if isinstance(state, GateState) else None,
        )
        return y, alpha, state if new is None else new

    def init_state(self, batch: int, device: torch.device | str, dtype: torch.dtype, max_len: int) -> State:
        """What the convolution looks back on; ``()`` without one."""
        if self.conv is None:
            return ()
        return empty_state(batch, self.cfg.reach, self.branches, self.site.d_model, device, dtype)

    # -- the table

    @property
    def _shared_name(self) -> str:
        return f"engram.{self.site.layer}"

    def shared(self) -> dict[str, Callable[[Ctx, State | None], Any]]:
        """The rows are asked for before the first block, and outside of what activation checkpointing repeats."""
        return {self._shared_name: self._ask}

    def _ask(self, ctx: Ctx, _: State | None) -> Tensor:
        return self.table.prefetch(ctx.rows[str(self.key)])

    def tables(self) -> dict[str, Any]:
        return {"table": self.table}

    @classmethod
    def addressing(cls, parts: list[Any]) -> nn.Module | None:
        """Raises UserError where layers differ in what lays out their tables."""
        first = parts[0]
        for part in parts:
            for name in COMMON:
                one, other = getattr(first.cfg, name), getattr(part.cfg, name)
                if one != other:
                    raise part.site.refuse(f"engram: {name} is {other}, but {one} in layer {first.site.layer}")
        cfg = first.cfg
        keys = [part.key for part in parts]
        found = EngramAddressing(first.site.vocab_size, keys, cfg.bases, cfg.heads, cfg.pad, cfg.seed, cfg.compression)
        for part, primes in zip(parts, table_primes(len(keys), cfg.bases, cfg.heads), strict=True):
            part.table = build_store(part.cfg.store, sum(map(sum, primes)), part.cfg.row_width)
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Engram:
        super()._apply(fn, recurse)
        self.table.apply(fn)
        return self

    # -- what the house must know

    def reset_parameters(self, generator: torch.Generator, depth: int) -> None:
        """The convolution starts as nothing; the paper says no more. Rows: `models.stores`."""
        normal_(self.project.weight, self.site.init_std, generator)
        with torch.no_grad():
            if self.cfg.zero_value_init:
                self.project.weight[-self.site.d_model :] = 0
            for gain in (self.query_gain, self.key_gain, self.conv_gain):
                if gain is not None:
                    gain.fill_(1.0)
            if self.conv is not None:
                self.conv.zero_()

    def meta(self) -> dict[str, ParamMeta]:
        found = {name: ParamMeta(role="vector", decay=False, optimizer="adamw") for name, _ in self.named_parameters()}
        return found | {"project.weight": ParamMeta(splits=(self.site.d_model,) * (self.branches + 1))}

    def cost(self, seq_len: int, dtype: torch.dtype = torch.float32) -> Cost:
        cfg, M, D = self.cfg, self.branches, self.site.d_model
        n = count_params(self)
        flops = 2 * cfg.width * (M + 1) * D + 2 * M * D + 2 * cfg.conv * M * D  # projections, agreement, taps
        held = states.nbytes(self.init_state(1, "meta", dtype, seq_len))
        return Cost(n + self.table.rows * cfg.row_width, n + cfg.width, flops, held)


def _alive(ctx: Ctx) -> Tensor | None:
    """The tokens that get something: valid ones whose ids are tokens; None: all."""
    alive = ctx.rows.get(ALIVE)
    if alive is None or ctx.valid is None:
        return ctx.valid if alive is None else alive
    return alive & ctx.valid


def _mean(alpha: Tensor, valid: Tensor | None) -> Tensor:
    """Over all branches of the tokens that are some."""
    if valid is None:
        return alpha.mean()
    return alpha.sum() / (valid.sum() * alpha.shape[-1]).clamp(min=1)
