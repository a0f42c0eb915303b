"""Mixture of memories: every token goes to k of E memories, each a linear-time mixer's memory of its own tokens alone.

    w, m = top-k of softmax(W_r h),    y = out(readout(sum_i w_i read(M_{m_i}) + read(M_shared), gate))

(arXiv:2502.13685, eq. 3 to 8.) A memory has its own projections to keys, values and gate logits; queries, the convolution's
filters, the rule's own parameters, output gate, norm and output projection are common. A memory that a token does not go to
neither decays nor is written: it sees a shorter sequence. So the tokens are sorted into flat rows, memory by memory and sequence by
sequence, and the same convolution and rule as in `models.mixers.linear` run over them once, with the boundaries of all segments.
Sum after reading, not memories before it: the convolution over a memory's own sequence makes the query depend on the memory.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.grouped_linear import grouped_linear
from kernels.routing import Routes, combine, route, spread
from models import zoo
from models.errors import UserError
from models.mixers.linear import LinearConfig
from models.mixers.rules import at_tokens, wide
from models.parsing import choice
from models.routers import balance, router_logits
from models.types import Aux, Cost, Ctx, Gates, ParamMeta, Part, Site, State, count_params, normal_, reset_norm


@dataclass(frozen=True)
class MoMConfig:
    """``rule`` is the config of a linear-time mixer, or its kind alone; its convolution, gate and norm are used too.

    The defaults are those of the paper's main results: four memories, two active, one more that every token uses, and a weight
    of 1e-3 for the balance loss (the released configs say 1e-2; the paper's loss is k where the load is balanced, this one is 1, so
    a run that repeats the paper takes k times its weight). There is no capacity: no token is ever dropped.
    """

    kind: str = "mom"
    rule: Any = "gated_delta"
    memories: int = 4  # E, those to choose from
    top_k: int = 2  # k, active ones per token
    shared: bool = True  # one more memory, with weight 1, for every token
    shared_kv: bool = False  # one projection to keys, values and gate logits for all memories
    # Weights of the chosen: "topk", probabilities divided by their sum, or "none", the probabilities themselves. With k = 1 the
    # former is the constant 1, so the language-model loss gives the router no gradient: a warning says so.
    router_norm: str = "topk"
    balance_weight: float = 1e-3

    def __post_init__(self) -> None:
        raw = {"kind": self.rule} if isinstance(self.rule, str) else self.rule
        rule = zoo.parse("mixer", raw, "rule")
        if not isinstance(rule, LinearConfig):
            raise UserError(f"rule: '{rule.kind}' is no linear-time mixer")
        object.__setattr__(self, "rule", rule)
        if self.memories < 1 or not 1 <= self.top_k <= self.memories:
            raise UserError(f"1 <= top_k <= memories does not hold: top_k={self.top_k}, memories={self.memories}")
        choice("router_norm", self.router_norm, ("topk", "none"))
        if self.balance_weight < 0:
            raise UserError(f"balance_weight must not be negative, got {self.balance_weight:g}")
        if self.top_k == 1 < self.memories and self.router_norm == "topk":
            warnings.warn(
                "mom: with top_k=1 and router_norm=topk every weight is 1: the router learns from the balance loss alone; "
                "router_norm=none gives it a gradient",
                stacklevel=2,
            )

    def tiny(self) -> MoMConfig:
        """For a model of width 64."""
        memories = min(self.memories, 4)
        rule = self.rule.tiny() if hasattr(self.rule, "tiny") else self.rule
        return replace(self, rule=rule, memories=memories, top_k=min(self.top_k, memories))


class MoMState(NamedTuple):
    """Of constant size; the shared memory stands last."""

    conv: State  # [B, M, W-1, C], the last inputs of each memory's convolution; () without one
    memory: Tensor  # [B, M, HV, K, V'] in at least fp32


class Choice(NamedTuple):
    """What the router says, in at least fp32."""

    probability: Tensor  # [B, T, E]
    index: Tensor  # int64 [B, T, k], distinct in a token
    weight: Tensor  # [B, T, S], of the chosen and, last, of the shared memory; 0 for invalid tokens


class MoM(Part):
    """M memories (E and the shared one), S = k (+ 1) slots per token."""

    Config = MoMConfig

    def __init__(self, cfg: MoMConfig, site: Site) -> None:
        super().__init__(cfg, site)
        inner: LinearConfig = cfg.rule
        self.heads = inner.heads_at(site)
        self.rule, self.conv, self.readout = inner.make_rule(site), inner.make_conv(site), inner.make_readout(site)
        self.memories, self.slots = cfg.memories + cfg.shared, cfg.top_k + cfg.shared
        query, *key_value = self.heads.widths
        self.common = (query, inner.gate_width(site))  # columns of q and the output gate
        self.own = (*key_value, *self.rule.logits)  # columns of a memory's k, v and gate logits
        self.project = nn.Linear(site.d_model, sum(self.common), bias=False)
        self.router = nn.Linear(site.d_model, cfg.memories, bias=False)
        self.kv = nn.Parameter(torch.empty(1 if cfg.shared_kv else self.memories, sum(self.own), site.d_model))
        self.out = nn.Linear(self.heads.value_heads * self.heads.value, site.d_model, bias=False)

    def forward(
        self, x: Tensor, ctx: Ctx, state: MoMState | None = None, donate: bool = False
    ) -> tuple[Tensor, MoMState | None, Aux]:
        h = self.norm(x)
        q, gate = self.project(h).split(self.common, dim=-1)
        chosen = self._choose(h, ctx)
        routes = self._route(chosen, ctx)
        h = h.to(q.dtype)
        if state is not None and x.shape[1] == 1:
            o, state = self._step(h, q, chosen, routes, ctx, state, donate)
            aux = self._aux(chosen, routes, ctx) if torch.is_grad_enabled() else Aux()
        else:
            o, state = self._scan(h, q, chosen, routes, ctx, state)
            aux = self._aux(chosen, routes, ctx)
        return self.out(self.readout(o, gate if self.common[1] else None)), state, aux

    def memory_gates(self, x: Tensor, ctx: Ctx) -> Gates:
        """Of all heads of every memory, the shared one last; NaN at tokens that do not go to it."""
        h = self.norm(x)
        q, _ = self.project(h).split(self.common, dim=-1)
        chosen = self._choose(h, ctx)
        routes = self._route(chosen, ctx)
        _, logits = self._rows(h.to(q.dtype), q, routes)
        decay, write, _ = self.rule.gates(logits)
        decay, write = (
            None if gate is None else self._at_memories(gate[0], chosen, routes, ctx)
            for gate in (at_tokens(decay, logits), write)
        )
        return Gates(decay, write, self.memories)

    def _at_memories(self, gate: Tensor, chosen: Choice, routes: Routes, ctx: Ctx) -> Tensor:
        """gate [N, H, ...] of flat rows -> [B, T, M H, ...]."""
        slots = gate[routes.inv]  # [B, T, S, H, ...]
        if ctx.valid is not None:
            slots = torch.where(ctx.valid.view(*ctx.valid.shape, *[1] * (slots.ndim - 2)), slots, torch.nan)
        index = self._with_shared(chosen.index)
        index = index.view(*index.shape, *[1] * (slots.ndim - 3)).expand_as(slots)
        found = slots.new_full((*slots.shape[:2], self.memories, *slots.shape[3:]), torch.nan)
        return found.scatter_(2, index, slots).flatten(2, 3)

    # -- which memories a token goes to

    def _choose(self, h: Tensor, ctx: Ctx) -> Choice:
        """h [B, T, D] -> the choice; products and softmax in at least fp32. The largest logits are chosen, not the largest
        probabilities, which may have underflowed to equal zeros."""
        logits = router_logits(h, self.router.weight)
        probability = logits.softmax(dim=-1)
        largest, index = logits.topk(self.cfg.top_k, dim=-1)
        weight = largest.softmax(dim=-1) if self.cfg.router_norm == "topk" else probability.gather(-1, index)
        if self.cfg.shared:
            weight = F.pad(weight, (0, 1), value=1.0)
        if ctx.valid is not None:
            weight = weight.masked_fill(~ctx.valid[..., None], 0.0)
        return Choice(probability, index, weight)

    def _route(self, chosen: Choice, ctx: Ctx) -> Routes:
        packed = ctx.cu_seqlens is not None
        return route(
            chosen.index,
            self.cfg.memories,
            shared=self.cfg.shared,
            sequence=ctx.shared["segments"] if packed else None,
            sequences=len(ctx.cu_seqlens) - 1 if packed else None,  # pyright: ignore[reportArgumentType]
            valid=ctx.valid,
        )

    def _with_shared(self, index: Tensor) -> Tensor:
        """index [B, T, k] of the chosen -> [B, T, S] with the shared memory."""
        return F.pad(index, (0, 1), value=self.cfg.memories) if self.cfg.shared else index

    # -- reading and writing

    def _scan(
        self, h: Tensor, q: Tensor, chosen: Choice, routes: Routes, ctx: Ctx, state: MoMState | None
    ) -> tuple[Tensor, MoMState | None]:
        """h [B, T, D], q [B, T, HK] -> (o [B, T, HV, V], the state after these tokens)."""
        qkv, logits = self._rows(h, q, routes)
        keep = state is not None
        conv: State = ()
        if self.conv is not None:
            before = _by_memory(state.conv) if keep else None
            qkv, conv = self.conv(qkv, initial_state=before, output_final_state=keep, cu_seqlens=routes.cu_seqlens)
        o, memory = self.rule(
            *self.heads.split(qkv),
            logits,
            spread(ctx.positions, routes)[None],
            initial_state=_by_memory(state.memory) if keep else None,
            output_final_state=keep,
            cu_seqlens=routes.cu_seqlens,
        )
        if memory is not None:
            conv = conv if self.conv is None else self._by_sequence(conv)
            state = MoMState(conv, self._by_sequence(memory))
        return combine(o[0], chosen.weight, routes), state

    def _rows(self, h: Tensor, q: Tensor, routes: Routes) -> tuple[Tensor, Tensor]:
        """h [B, T, D], q [B, T, HK] -> of the flat rows, q, k and v [1, N, C] and gate logits [1, N, .]."""
        if self.cfg.shared_kv:
            rows = spread(torch.cat((q, F.linear(h, self.kv[0])), dim=-1), routes)
        else:
            rows = torch.cat((spread(q, routes), grouped_linear(spread(h, routes), self.kv, routes.offsets)), dim=-1)
        qkv, logits = rows[None].split((sum(self.heads.widths), sum(self.rule.logits)), dim=-1)
        return qkv, logits

    def _step(
        self, h: Tensor, q: Tensor, chosen: Choice, routes: Routes, ctx: Ctx, state: MoMState, donate: bool
    ) -> tuple[Tensor, MoMState]:
        """One token per sequence: its memories are the slots of the row, and only they are touched."""
        if self.cfg.shared_kv:
            own = F.linear(h, self.kv[0]).expand(-1, self.slots, -1)
        else:
            own = grouped_linear(spread(h, routes), self.kv, routes.offsets)
            own = own.index_select(0, routes.inv.flatten()).unflatten(0, (-1, self.slots))
        qkv = torch.cat((q.expand(-1, self.slots, -1), own), dim=-1)  # [B, S, C + logits]
        qkv, logits = qkv.split((sum(self.heads.widths), sum(self.rule.logits)), dim=-1)
        index = self._with_shared(chosen.index)[:, 0]
        if ctx.valid is not None:
            index = index.masked_fill(~ctx.valid, -1)
        conv: State = ()
        if self.conv is not None:
            qkv, conv = self.conv.step(qkv, state.conv, index=index, donate=donate)
        positions = ctx.positions.expand(-1, self.slots)
        o, memory = self.rule.step(*self.heads.split(qkv), logits, positions, state.memory, index=index, donate=donate)
        o = (o * chosen.weight.transpose(1, 2)[..., None]).sum(dim=1, keepdim=True).to(o.dtype)
        return o, MoMState(conv, memory)

    def _by_sequence(self, states: Tensor) -> Tensor:
        """States of segments [M B, ...] -> [B, M, ...]."""
        return states.unflatten(0, (self.memories, -1)).transpose(0, 1).contiguous()

    # -- what it says about itself

    def _aux(self, chosen: Choice, routes: Routes, ctx: Ctx) -> Aux:
        """Loss ``balance`` and stats of the memories to choose from (`models.routers.balance`)."""
        return balance(chosen.probability, routes.offsets.diff()[: self.cfg.memories], ctx.valid)

    def loss_weights(self) -> dict[str, float]:
        return {"balance": self.cfg.balance_weight}

    # -- formulas

    def init_state(self, batch: int, device: torch.device | str, dtype: torch.dtype, max_len: int) -> MoMState:
        conv = () if self.conv is None else self.conv.init_state(batch, device, dtype, self.memories)
        return MoMState(conv, self.rule.init_state(batch, device, dtype, self.memories))

    def reset_parameters(self, generator: torch.Generator, depth: int) -> None:
        for weight in (self.project.weight, self.router.weight, self.kv):
            normal_(weight, self.site.init_std, generator)
        normal_(self.out.weight, self.site.init_std / math.sqrt(2 * depth), generator)
        self.rule.reset_parameters(generator, self.site.init_std)
        if self.conv is not None:
            self.conv.reset_parameters(generator)
        self.readout.reset_parameters()
        reset_norm(self.norm)

    def meta(self) -> dict[str, ParamMeta]:
        found = {
            **super().meta(),
            "project.weight": ParamMeta(splits=tuple(n for n in self.common if n)),
            "router.weight": ParamMeta(optimizer="adamw"),
            "kv": ParamMeta(splits=self.own),
        }
        for name, piece in (("rule", self.rule), ("conv", self.conv), ("readout", self.readout)):
            if piece is not None:
                found |= {f"{name}.{key}": meta for key, meta in piece.meta().items()}
        return found

    def cost(self, seq_len: int, dtype: torch.dtype = torch.float32) -> Cost:
        h, params, own = self.heads, count_params(self), self.kv[0].numel()
        idle = 0 if self.cfg.shared_kv else (self.cfg.memories - self.cfg.top_k) * own
        products = sum(w.numel() for w in (self.project.weight, self.router.weight, self.out.weight))
        products += own if self.cfg.shared_kv else self.slots * own
        visit = self.rule.flops() + (0 if self.conv is None else self.conv.flops())
        state = h.value_heads * h.key * self.rule.state_width * wide(dtype).itemsize
        if self.conv is not None:
            state += (self.conv.weight.shape[1] - 1) * sum(h.widths) * dtype.itemsize
        return Cost(params, params - idle, 2 * products + self.slots * visit, self.memories * state)


def _by_memory(states: Tensor) -> Tensor:
    """States [B, M, ...] -> of segments [M B, ...]."""
    return states.transpose(0, 1).flatten(0, 1)
