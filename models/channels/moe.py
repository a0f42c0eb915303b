"""Mixture of experts: every token goes to k of E small feed-forward networks, and to the shared ones.

    y = sum_{e in top-k(s + b)} c w_e E_e(h) + E_shared(h),    s = score(W_r h),    w = s / sum of the chosen s

Each E_e is a SwiGLU; the score is a softmax over experts (arXiv:2401.06066, eq. 9 to 11) or a sigmoid of each (arXiv:2412.19437,
eq. 12 to 16). There is no capacity: tokens are sorted by expert and all experts run as one grouped product, so none is dropped.

Balance without a loss: b only takes part in the choice, never in the weights, and has no gradient. Once per optimizer step, in
``commit``, it moves by a fixed rate, up for experts with less than the mean load and down for those with more (arXiv:2408.15664,
algorithm 1); the load is that of the whole step, over all micro-batches and ranks.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.grouped_linear import grouped_linear
from kernels.routing import Routes, combine, route, spread
from kernels.swiglu import swiglu
from models.channels.mlp import SwiGLU, SwiGLUConfig
from models.errors import UserError
from models.parsing import choice
from models.routers import balance, router_logits
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

BALANCES = ("loss_free", "loss", "none")


@dataclass(frozen=True)
class MoEConfig:
    """Width of an expert by default such that all that one token uses are as wide as a dense SwiGLU of the ratio, rounded up."""

    kind: str = "moe"
    experts: int = 8  # E, those to choose from
    top_k: int = 2  # k, active ones per token
    shared: int = 1  # experts that every token uses, with weight 1
    hidden: int | None = None  # F, of each expert, shared ones too
    ratio: float = 4.0
    multiple_of: int = 32
    score: str = "sigmoid"  # softmax | sigmoid
    # Weights of the chosen: "topk", scores divided by their sum, or "none", the scores themselves. With k = 1 the former is the
    # constant 1, so the language-model loss gives the router no gradient: a warning says so.
    router_norm: str = "topk"
    scale: float = 1.0  # c, of the routed experts' sum
    balance: str = "loss_free"  # loss_free | loss | none
    bias_rate: float = 1e-3  # by which a bias moves per optimizer step, with loss_free
    balance_weight: float = 1e-2  # with loss; the loss is 1 where the load is even

    def __post_init__(self) -> None:
        choice("score", self.score, ("softmax", "sigmoid"))
        choice("router_norm", self.router_norm, ("topk", "none"))
        choice("balance", self.balance, BALANCES)
        for name, least in (("experts", 1), ("top_k", 1), ("shared", 0), ("hidden", 1), ("multiple_of", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} must be at least {least}, got {value}; nearest: {name}={least}")
        if self.top_k > self.experts:
            raise UserError(f"top_k={self.top_k} is more than experts={self.experts}; nearest: top_k={self.experts}")
        for name in ("ratio", "scale", "bias_rate"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be positive, got {getattr(self, name):g}")
        if not self.balance_weight >= 0:
            raise UserError(f"balance_weight must not be negative, got {self.balance_weight:g}; nearest: 0")
        if self.top_k == 1 < self.experts and self.router_norm == "topk":
            warnings.warn(
                "moe: with top_k=1 and router_norm=topk every weight is 1: the language-model loss gives the router no gradient; "
                "router_norm=none gives it one",
                stacklevel=2,
            )

    def tiny(self) -> MoEConfig:
        """For a model of width 64."""
        experts = min(self.experts, 8)
        return replace(self, experts=experts, top_k=min(self.top_k, experts), hidden=32)


class Choice(NamedTuple):
    """What the router says; floats in at least fp32."""

    probability: Tensor  # [B, T, E], scores divided by their sum over all experts
    index: Tensor  # int64 [B, T, k], distinct in a token
    weight: Tensor  # [B, T, k]


class MoE(Part):
    Config = MoEConfig
    bias: Tensor | None

    def __init__(self, cfg: MoEConfig, site: Site) -> None:
        super().__init__(cfg, site)
        self.hidden = cfg.hidden or default_hidden(cfg, site)
        e, f, d = cfg.experts, self.hidden, site.d_model
        self.router = nn.Linear(d, e, bias=False)
        self.up = nn.Parameter(torch.empty(e, 2 * f, d))  # gate first
        self.down = nn.Parameter(torch.empty(e, d, f))
        inner = SwiGLUConfig(hidden=cfg.shared * f or None)
        self.common = SwiGLU(inner, replace(site, norm="none")) if cfg.shared else None  # the shared ones as one
        self.register_buffer("bias", torch.empty(e) if cfg.balance == "loss_free" else None)

    def forward(
        self, x: Tensor, ctx: Ctx, state: State | None = None, donate: bool = False
    ) -> tuple[Tensor, State | None, Aux]:
        h = self.norm(x)
        chosen = self._choose(h)
        routes = self._route(chosen, ctx)
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            h = h.to(torch.get_autocast_dtype(kind))
        y = self._experts(h, chosen.weight, routes)
        if self.common is not None:
            y = y + self.common(h, ctx)[0]
        decodes = state is not None and x.shape[1] == 1 and not torch.is_grad_enabled()
        return y, state, Aux() if decodes else self._aux(chosen, routes, ctx)

    # -- which experts a token goes to, and what they say

    def _choose(self, h: Tensor) -> Choice:
        """h [B, T, D] -> the choice. Of equal scores the expert with the lower number is taken. Without a bias the largest logits
        are chosen, since scores of different logits may have rounded to the same number; weights come from logarithms of scores,
        which do not underflow."""
        logits = router_logits(h, self.router.weight)
        log_score = logits.log_softmax(dim=-1) if self.cfg.score == "softmax" else F.logsigmoid(logits)
        wanted = logits.detach() if self.bias is None else log_score.detach().exp() + self.bias
        index = wanted.sort(dim=-1, descending=True, stable=True).indices[..., : self.cfg.top_k]
        weight = log_score.gather(-1, index)
        weight = self.cfg.scale * (weight.softmax(dim=-1) if self.cfg.router_norm == "topk" else weight.exp())
        return Choice(log_score.softmax(dim=-1), index, weight)

    def _route(self, chosen: Choice, ctx: Ctx) -> Routes:
        """Which sequence a token is of does not matter to an expert: all are one."""
        valid = None if ctx.valid is None else ctx.valid.reshape(1, -1)
        return route(chosen.index.flatten(0, 1)[None], self.cfg.experts, valid=valid)

    def _experts(self, h: Tensor, weight: Tensor, routes: Routes) -> Tensor:
        """h [B, T, D], weight [B, T, k] -> [B, T, D]; invalid tokens, whose rows belong to no expert, get zeros."""
        rows = spread(h.flatten(0, 1)[None], routes)
        rows = swiglu(grouped_linear(rows, self.up, routes.offsets))
        rows = grouped_linear(rows, self.down, routes.offsets)
        return combine(rows, weight.flatten(0, 1)[None], routes).view_as(h)

    # -- what it says about itself

    def _aux(self, chosen: Choice, routes: Routes, ctx: Ctx) -> Aux:
        """Loss ``balance`` (`models.routers.balance`) where it has a weight; the counts of this step's choices for ``commit``."""
        counts = routes.offsets.diff()
        said = balance(chosen.probability, counts, ctx.valid)
        losses = said.losses if self.cfg.balance == "loss" else {}
        if self.bias is None:
            return Aux(losses, said.stats)
        spread_of_bias = Stat((self.bias.amax() - self.bias.amin()).to(chosen.probability.dtype))
        writes = {"counts": Write(counts.long())} if self.training else {}
        return Aux(losses, {**said.stats, "bias_range": spread_of_bias}, writes)

    def loss_weights(self) -> dict[str, float]:
        return {"balance": self.cfg.balance_weight} if self.cfg.balance == "loss" else {}

    # -- model memory

    def commit(self, writes: Mapping[str, Write], info: CommitInfo) -> list[RowReset]:
        """b_e += rate sign(mean load - load_e), in integers, so that ranks and splits into micro-batches agree to the bit."""
        if self.bias is not None and "counts" in writes:
            counts = writes["counts"].value
            self.bias.add_((counts.sum() - len(counts) * counts).sign(), alpha=self.cfg.bias_rate)
        return []

    def reset_parameters(self, generator: torch.Generator, depth: int) -> None:
        for weight in (self.router.weight, self.up):
            normal_(weight, self.site.init_std, generator)
        normal_(self.down, self.site.init_std / math.sqrt(2 * depth), generator)
        if self.common is not None:
            self.common.reset_parameters(generator, depth)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        reset_norm(self.norm)

    # -- formulas

    def meta(self) -> dict[str, ParamMeta]:
        found = {
            **super().meta(),
            "router.weight": ParamMeta(optimizer="adamw"),
            "up": ParamMeta(splits=(self.hidden, self.hidden)),
        }
        if self.common is not None:
            found |= {f"common.{name}": meta for name, meta in self.common.meta().items()}
        return found

    def cost(self, seq_len: int, dtype: torch.dtype = torch.float32) -> Cost:
        c, params = self.cfg, count_params(self)
        expert = 3 * self.site.d_model * self.hidden
        products = self.router.weight.numel() + (c.top_k + c.shared) * expert
        return Cost(params, params - (c.experts - c.top_k) * expert, 2 * products, 0)


def default_hidden(cfg: MoEConfig, site: Site) -> int:
    """ceil(2 ratio D / 3 / active / multiple_of) multiple_of."""
    active = cfg.top_k + cfg.shared
    return math.ceil(2 * cfg.ratio * site.d_model / 3 / active / cfg.multiple_of) * cfg.multiple_of
