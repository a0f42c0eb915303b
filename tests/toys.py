"""Small parts that use what a part may use: state, losses, stats, writes, resets, nesting (tables: `toy_memory`).

They are named by ``kind: "tests.toys:ToyEMA"`` and sign the same contracts as the zoo.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import zoo
from models.types import (
    Aux,
    CommitInfo,
    Cost,
    Ctx,
    ParamMeta,
    Part,
    RowReset,
    Site,
    Stat,
    State,
    Write,
    count_params,
    normal_,
    reset_norm,
)


def starts(ctx: Ctx) -> Tensor:
    """[B, T], True at the first token of a document (packed) or of nothing (otherwise)."""
    if ctx.cu_seqlens is None:
        return torch.zeros_like(ctx.tokens, dtype=torch.bool)
    segment = ctx.shared["segments"]
    return F.pad(segment[:, 1:] != segment[:, :-1], (1, 0), value=True)


def _valid_index(ctx: Ctx) -> Tensor:
    """[B, T], 1 + the index of each valid token, 0 for invalid ones."""
    index = torch.arange(1, ctx.tokens.shape[1] + 1, device=ctx.tokens.device).expand_as(ctx.tokens)
    return index if ctx.valid is None else torch.where(ctx.valid, index, 0)


def previous(values: Tensor, old: Tensor | None, ctx: Ctx) -> Tensor:
    """values [B, T, D] -> the value of the last valid token before each one: ``old [B, D]`` where that lies before this
    call, zero at the first token of a document."""
    index = _valid_index(ctx)
    before = F.pad(index[:, :-1], (1, 0)).cummax(dim=1).values
    first = torch.where(starts(ctx), torch.arange(index.shape[1], device=index.device), 0).cummax(dim=1).values
    old = torch.zeros_like(values[:, 0]) if old is None else old.to(values.dtype)
    found = torch.cat((old[:, None], values), dim=1).gather(1, before[..., None].expand_as(values))
    return torch.where((before > first)[..., None] | (first == 0)[..., None], found, 0)


def newest(values: Tensor, old: Tensor, ctx: Ctx) -> Tensor:
    """values [B, T, D] -> that of the last valid token, or ``old [B, D]``: [B, D] in the dtype of ``old``."""
    last = _valid_index(ctx).amax(dim=1)[:, None, None].expand(-1, 1, values.shape[-1])
    return torch.cat((old[:, None], values.to(old.dtype)), dim=1).gather(1, last)[:, 0]


def masked_mean(x: Tensor, valid: Tensor | None) -> Tensor:
    """x [B, T, ...] -> mean over valid tokens [...]."""
    if valid is None:
        return x.mean(dim=(0, 1))
    keep = valid.to(x.dtype).view(*valid.shape, *(1,) * (x.ndim - 2))
    return (x * keep).sum(dim=(0, 1)) / keep.sum().clamp(min=1)


# -- a mixer with a state


@dataclass(frozen=True)
class ToyEMAConfig:
    kind: str = "tests.toys:ToyEMA"
    width: int = 6
    rate_weight: float = 0.01
    spread_weight: float = 0.02


class EMAState(NamedTuple):
    s: Tensor  # [B, W]


class ToyEMA(Part):
    """s_t = a_t s_{t-1} + (1 - a_t) v_t with a_t = sigmoid((1 + progress) gate_t + bias); y = out(s)."""

    Config = ToyEMAConfig

    def __init__(self, cfg: ToyEMAConfig, site: Site) -> None:
        super().__init__(cfg, site)
        self.gate = nn.Linear(site.d_model, cfg.width, bias=False)
        self.value = nn.Linear(site.d_model, cfg.width, bias=False)
        self.rate = nn.Parameter(torch.empty(cfg.width))
        self.out = nn.Linear(cfg.width, site.d_model, bias=False)

    def forward(
        self, x: Tensor, ctx: Ctx, state: EMAState | None = None, donate: bool = False
    ) -> tuple[Tensor, EMAState | None, Aux]:
        h = self.norm(x)
        a = torch.sigmoid(self.gate(h) * (1 + ctx.progress) + self.rate)  # [B, T, W]
        keep, add = a, (1 - a) * self.value(h)
        keep = torch.where(starts(ctx)[..., None], 0.0, keep)
        if ctx.valid is not None:
            keep, add = torch.where(ctx.valid[..., None], keep, 1.0), torch.where(ctx.valid[..., None], add, 0.0)
        if state is not None:
            add = torch.cat((add[:, :1] + keep[:, :1] * state.s[:, None].to(add.dtype), add[:, 1:]), dim=1)
        s = _scan(keep, add)
        if state is not None:
            last = s[:, -1].to(state.s.dtype)
            can_reuse = donate and not torch.is_grad_enabled()
            state = EMAState(state.s.copy_(last) if can_reuse else last.clone())
        rate = masked_mean(a, ctx.valid)
        losses = {"rate": rate.mean(), "spread": rate.var(correction=0)}
        return self.out(s), state, Aux(losses, {"rate": Stat(rate.detach())}, {})

    def init_state(self, batch: int, device: torch.device | str, dtype: torch.dtype, max_len: int) -> EMAState:
        return EMAState(torch.zeros(batch, self.cfg.width, device=device, dtype=dtype))

    def reset_parameters(self, generator: torch.Generator, depth: int) -> None:
        for linear in (self.gate, self.value):
            normal_(linear.weight, self.site.init_std, generator)
        normal_(self.out.weight, self.site.init_std / math.sqrt(2 * depth), generator)
        nn.init.constant_(self.rate, 1.0)
        reset_norm(self.norm)

    def meta(self) -> dict[str, ParamMeta]:
        return {**super().meta(), "rate": ParamMeta(role="vector", lr_mult=0.5, decay=False, optimizer="adamw")}

    def cost(self, seq_len: int, dtype: torch.dtype = torch.float32) -> Cost:
        n, W, D = count_params(self), self.cfg.width, self.site.d_model
        return Cost(n, n, 6 * D * W + 4 * W, W * dtype.itemsize)

    def loss_weights(self) -> dict[str, float]:
        return {"rate": self.cfg.rate_weight, "spread": self.cfg.spread_weight}


def _scan(keep: Tensor, add: Tensor) -> Tensor:
    """s_t = keep_t s_{t-1} + add_t along dim 1 from zero, in log2(T) steps (Hillis and Steele)."""
    shift, T = 1, add.shape[1]
    while shift < T:
        before = F.pad(add[:, :-shift], (0, 0, shift, 0))
        factor = F.pad(keep[:, :-shift], (0, 0, shift, 0), value=1.0)
        keep, add, shift = keep * factor, add + keep * before, 2 * shift
    return add


# -- a channel with model memory


@dataclass(frozen=True)
class ToySlotsConfig:
    kind: str = "tests.toys:ToySlots"
    slots: int = 5
    momentum: float = 0.9
    dead: float = 0.05  # slots used less than this are replaced
    balance_weight: float = 0.01


class ToySlots(Part):
    """y = scale * softmax(norm(x) C^T) C. The slots C learn by gradient and are pulled towards the tokens that use
    them; rarely used ones are replaced by tokens from a reservoir."""

    Config = ToySlotsConfig
    usage: Tensor
    age: Tensor

    def __init__(self, cfg: ToySlotsConfig, site: Site) -> None:
        super().__init__(cfg, site)
        self.slots = nn.Parameter(torch.empty(cfg.slots, site.d_model))
        self.scale = nn.Parameter(torch.empty(()))
        self.register_buffer("usage", torch.empty(cfg.slots))
        self.register_buffer("age", torch.empty(cfg.slots, dtype=torch.int64))

    def forward(
        self, x: Tensor, ctx: Ctx, state: State | None = None, donate: bool = False
    ) -> tuple[Tensor, State | None, Aux]:
        w = F.softmax(self.norm(x) @ self.slots.T, dim=-1)  # [B, T, N]
        y = self.scale * (w @ self.slots)
        share = masked_mean(w, ctx.valid)
        losses = {"balance": len(share) * share.square().sum()}
        writes = self._writes(w.detach(), (x + y).detach(), ctx) if self.training else {}
        return y, state, Aux(losses, {"share": Stat(share.detach())}, writes)

    def _writes(self, w: Tensor, h: Tensor, ctx: Ctx) -> dict[str, Write]:
        """w [B, T, N], h [B, T, D]: weighted sums per slot, and as many candidate tokens as there are slots."""
        wide = torch.promote_types(w.dtype, torch.float32)
        valid = torch.ones_like(ctx.tokens, dtype=torch.bool) if ctx.valid is None else ctx.valid
        w = w.to(wide) * valid[..., None]
        flat = h.to(wide).flatten(0, 1)
        key = torch.where(valid, _token_key(ctx), -1).flatten()
        lack = max(0, self.cfg.slots - len(key))
        key, flat_padded = F.pad(key, (0, lack), value=-1), F.pad(flat, (0, 0, 0, lack))
        best = torch.sort(key, descending=True, stable=True).indices[: self.cfg.slots]
        return {
            "sum": Write(w.flatten(0, 1).T @ flat),
            "count": Write(w.sum(dim=(0, 1))),
            "candidates": Write(flat_padded[best], "topk_by_key", key[best]),
        }

    def commit(self, writes: Mapping[str, Write], info: CommitInfo) -> list[RowReset]:
        count, candidates = writes["count"].value, writes["candidates"]
        m = self.cfg.momentum
        mean = writes["sum"].value / count.clamp(min=1e-6)[:, None]
        used = (count > 1e-6)[:, None]
        self.slots.copy_(torch.where(used, m * self.slots + (1 - m) * mean.to(self.slots.dtype), self.slots))
        self.usage.mul_(m).add_(count / count.sum().clamp(min=1e-6), alpha=1 - m)
        self.age.add_(1)
        assert candidates.key is not None
        good = candidates.value[candidates.key >= 0]
        dead = torch.nonzero(self.usage < self.cfg.dead).flatten()
        if not len(dead) or not len(good):
            return []
        generator = torch.Generator().manual_seed(hash((info.seed, info.step, self.site.layer)))
        pick = torch.randint(len(good), (len(dead),), generator=generator).to(good.device)
        self.slots[dead] = F.normalize(good[pick], dim=-1).to(self.slots.dtype)
        self.usage[dead] = 1 / self.cfg.slots
        self.age[dead] = 0
        return [RowReset("slots", dead)]

    def reset_parameters(self, generator: torch.Generator, depth: int) -> None:
        normal_(self.slots, self.site.d_model**-0.5, generator)
        nn.init.ones_(self.scale)
        nn.init.constant_(self.usage, 1 / self.cfg.slots)
        nn.init.zeros_(self.age)
        reset_norm(self.norm)

    def meta(self) -> dict[str, ParamMeta]:
        return {**super().meta(), "slots": ParamMeta(role="embedding", decay=False, optimizer="adamw")}

    def cost(self, seq_len: int, dtype: torch.dtype = torch.float32) -> Cost:
        n = count_params(self)
        return Cost(n, n, 4 * self.slots.numel())

    def loss_weights(self) -> dict[str, float]:
        return {"balance": self.cfg.balance_weight}


def _token_key(ctx: Ctx) -> Tensor:
    """A number in [0, 2^20) per token that depends on nothing but the token and its position."""
    mixed = (ctx.tokens * 2654435761 + ctx.positions * 40503 + 12345) * 2246822519
    return (mixed >> 12) & 0xFFFFF


# -- a mixer that contains a mixer


@dataclass(frozen=True)
class ToyNestConfig:
    kind: str = "tests.toys:ToyNest"
    inner: Any = field(default=None, metadata={"slot": "mixer"})


class NestState(NamedTuple):
    last: Tensor  # [B, D], the normed input of the newest token
    inner: State


class ToyNest(Part):
    """y = scale * inner(h_t + mix * h_{t-1}), h = norm(x): a token shift in front of any other mixer."""

    Config = ToyNestConfig

    def __init__(self, cfg: ToyNestConfig, site: Site) -> None:
        super().__init__(cfg, site)
        if cfg.inner is None:
            raise site.refuse("inner: a mixer is needed")
        self.inner = zoo.build("mixer", cfg.inner, Site(**{**vars(site), "norm": "none"}))
        self.mix = nn.Parameter(torch.empty(site.d_model))
        self.scale = nn.Parameter(torch.empty(site.d_model))

    def forward(
        self, x: Tensor, ctx: Ctx, state: NestState | None = None, donate: bool = False
    ) -> tuple[Tensor, NestState | None, Aux]:
        h = self.norm(x)
        shifted = previous(h, None if state is None else state.last, ctx)
        y, inner, aux = self.inner(h + self.mix * shifted, ctx, None if state is None else state.inner, donate)
        if state is not None:
            state = NestState(newest(h, state.last, ctx), inner)
        return self.scale * y, state, aux.prefixed("inner")

    def init_state(self, batch: int, device: torch.device | str, dtype: torch.dtype, max_len: int) -> NestState:
        last = torch.zeros(batch, self.site.d_model, device=device, dtype=dtype)
        return NestState(last, self.inner.init_state(batch, device, dtype, max_len))

    def commit(self, writes: Mapping[str, Write], info: CommitInfo) -> list[RowReset]:
        inner = {k.removeprefix("inner."): w for k, w in writes.items() if k.startswith("inner.")}
        return [RowReset(f"inner.{r.name}", r.rows) for r in self.inner.commit(inner, info)] if inner else []

    def reset_parameters(self, generator: torch.Generator, depth: int) -> None:
        self.inner.reset_parameters(generator, depth)
        nn.init.constant_(self.mix, 0.5)
        nn.init.ones_(self.scale)
        reset_norm(self.norm)

    def meta(self) -> dict[str, ParamMeta]:
        return {**super().meta(), **{f"inner.{k}": m for k, m in self.inner.meta().items()}}

    def cost(self, seq_len: int, dtype: torch.dtype = torch.float32) -> Cost:
        own = sum(p.numel() for p in (self.mix, self.scale, *self.norm.parameters()))
        return Cost(own, own, 0, self.site.d_model * dtype.itemsize) + self.inner.cost(seq_len, dtype)

    def loss_weights(self) -> dict[str, float]:
        return {f"inner.{k}": v for k, v in self.inner.loss_weights().items()}

    def shared(self) -> dict[str, Callable[[Ctx, State | None], Any]]:
        def unwrapped(fn: Callable[[Ctx, Any], Any]) -> Callable[[Ctx, Any], Any]:
            return lambda ctx, state: fn(ctx, None if state is None else state.inner)

        return {key: unwrapped(fn) for key, fn in self.inner.shared().items()}
