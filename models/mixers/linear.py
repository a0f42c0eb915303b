"""Linear-time mixers: a matrix per head instead of a growing cache (rules in `models.mixers.rules`).

    y = out(readout(rule(conv(q|k|v), gate logits), gate)),    q|k|v|gate|logits = project(norm(x))

Defaults are the published parametrisations; each option says where it comes from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from models.errors import UserError
from models.mixers.pieces import ROWS, Readout, Rows, ShortConv, rows_of
from models.mixers.rules import (
    Delta,
    GatedDelta,
    GatedLinear,
    Heads,
    LinearAttention,
    Retention,
    Rule,
    StateSpace,
    at_tokens,
    wide,
)
from models.parsing import choice
from models.types import Aux, Cost, Ctx, Gates, ParamMeta, Part, Site, State, count_params, normal_, reset_norm


@dataclass(frozen=True)
class LinearConfig:
    """Of every linear-time mixer. A config makes the pieces, so that a mixer with many memories can use the same ones."""

    conv: int = 0  # width of the causal depthwise convolution over q|k|v, followed by SiLU; 0: neither
    conv_bias: bool = False
    gate: bool = False  # times silu(W x), one per feature of the output

    def __post_init__(self) -> None:
        if self.conv < 0:
            raise UserError(f"conv must not be negative, got {self.conv}")
        if self.conv_bias and not self.conv:
            raise UserError("conv_bias: there is no convolution; give conv")

    def heads_at(self, site: Site) -> Heads:
        """Raises UserError where the widths do not fit the model's."""
        raise NotImplementedError

    def make_rule(self, site: Site) -> Rule:
        raise NotImplementedError

    def make_readout(self, site: Site) -> Readout:
        raise NotImplementedError

    def make_conv(self, site: Site) -> ShortConv | None:
        return ShortConv(sum(self.heads_at(site).widths), self.conv, self.conv_bias) if self.conv else None

    def gate_width(self, site: Site) -> int:
        """Columns of the output gate, 0 without."""
        heads = self.heads_at(site)
        return heads.value_heads * heads.value if self.gate else 0


@dataclass(frozen=True)
class HeadsConfig(LinearConfig):
    """Widths as attention has them: heads of queries and keys, each with one or more heads of values."""

    key_share: ClassVar[float] = 1.0  # width of all keys together, as a share of d_model

    heads: int = 8
    value_heads: int | None = None  # a multiple of heads: several values, and memories, for one query and key
    head_dim: int | None = None  # of queries and keys; default: that share of d_model / heads
    expand_v: float = 1.0  # width of a value head as a multiple of head_dim
    output_norm: bool = True  # RMSNorm of each value head

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("heads", "value_heads", "head_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if not self.expand_v > 0:
            raise UserError(f"expand_v must be positive, got {self.expand_v}")
        if self.value_heads is not None and self.value_heads % self.heads:
            raise UserError(f"heads={self.heads} does not divide value_heads={self.value_heads}")

    def heads_at(self, site: Site) -> Heads:
        key = self.head_dim or self.key_share * site.d_model / self.heads
        if key != int(key) or key < 1:
            share = "" if self.key_share == 1 else f"{self.key_share:g} "
            width = f"{share}d_model={self.key_share * site.d_model:g}"
            raise site.refuse(f"heads={self.heads} does not divide {width}; give head_dim")
        value = self.expand_v * key
        if abs(value - round(value)) > 1e-6 or round(value) < 1:
            raise site.refuse(f"expand_v={self.expand_v:g} of head_dim={int(key)} is no whole width")
        return Heads(self.heads, self.value_heads or self.heads, int(key), round(value))

    def make_readout(self, site: Site) -> Readout:
        return Readout(self.heads_at(site), "head" if self.output_norm else "none", site.norm_eps)

    def tiny(self) -> Self:
        """For a model of width 64."""
        groups = min((self.value_heads or self.heads) // self.heads, 2)
        value_heads = None if self.value_heads is None else 4 * groups
        return replace(self, heads=4, value_heads=value_heads, head_dim=self.head_dim and 16)


@dataclass(frozen=True)
class LinearAttentionConfig(HeadsConfig):
    """Linear attention (arXiv:2006.16236): no decay, nothing is ever forgotten."""

    kind: str = "linear_attention"
    feature_map: str = "elu"  # of q and k: elu (elu(x) + 1, the paper's), relu, identity
    normalize: bool = False  # divide by the sum of weights, the paper's eq. 12; output_norm makes it redundant

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("feature_map", self.feature_map, ("elu", "relu", "identity"))
        if self.normalize and self.feature_map == "identity":
            raise UserError("normalize: weights of feature_map=identity may sum to zero; take elu or relu")

    def make_rule(self, site: Site) -> Rule:
        return LinearAttention(self.heads_at(site), self.feature_map, self.normalize)


@dataclass(frozen=True)
class RetNetConfig(HeadsConfig):
    """RetNet's retention (arXiv:2307.08621, section 2.1): a constant decay per head, 1 - 2^(-5-h)."""

    kind: str = "retnet"
    expand_v: float = 2.0  # the paper's value width
    gate: bool = True  # eq. 8
    rope_theta: float | None = 10000.0  # rotary positions of q and k, eq. 5; null: none

    def make_rule(self, site: Site) -> Rule:
        heads = self.heads_at(site)
        if self.rope_theta is not None and heads.key % 2:
            raise site.refuse(f"head_dim={heads.key} must be even for rotary positions")
        return Retention(heads, self.rope_theta)


@dataclass(frozen=True)
class GLAConfig(HeadsConfig):
    """Gated linear attention (arXiv:2312.06635, section 4.4): one decay per key feature. K d_model/2 and V d_model in total."""

    key_share: ClassVar[float] = 0.5

    kind: str = "gla"
    heads: int = 4
    expand_v: float = 2.0
    gate: bool = True
    rank: int = 16  # of the map from token to decay logits
    temperature: float = 16.0  # decay = sigmoid(logit)^(1 / temperature)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1 or not self.temperature > 0:
            raise UserError(
                f"rank must be at least 1 and temperature positive, got {self.rank} and {self.temperature:g}"
            )

    def make_rule(self, site: Site) -> Rule:
        return GatedLinear(self.heads_at(site), self.rank, self.temperature)


@dataclass(frozen=True)
class DeltaConfig(HeadsConfig):
    """DeltaNet (arXiv:2406.06484, section 3.4): convolution and SiLU, q and k of length 1, beta from a sigmoid."""

    kind: str = "delta"
    conv: int = 4
    allow_neg_eigval: bool = False  # beta up to 2: a write may turn what a key holds around (arXiv:2411.12537)

    def make_rule(self, site: Site) -> Rule:
        return Delta(self.heads_at(site), self.allow_neg_eigval)


@dataclass(frozen=True)
class GatedDeltaConfig(DeltaConfig):
    """Gated DeltaNet (arXiv:2412.06464, section 3.4): DeltaNet with Mamba-2's decay and an output gate. The released models
    have keys of 3/4 d_model in 6 heads and values twice as wide, so that a layer holds 6 d_model^2 parameters."""

    key_share: ClassVar[float] = 0.75

    kind: str = "gated_delta"
    heads: int = 6
    expand_v: float = 2.0
    gate: bool = True

    def make_rule(self, site: Site) -> Rule:
        return GatedDelta(self.heads_at(site), self.allow_neg_eigval)


@dataclass(frozen=True)
class Mamba2Config(LinearConfig):
    """Mamba-2 (arXiv:2405.21060, section 7): in its words q is C, k is B, v is x."""

    kind: str = "mamba2"
    expand: float = 2.0  # inner width as a multiple of d_model
    head_dim: int = 64  # inner width per head; each head has a decay and a memory of its own
    d_state: int = 128  # width of B and C
    groups: int = 1  # heads of one group share B and C
    conv: int = 4
    conv_bias: bool = True
    gate: bool = True
    output_norm: bool = True  # RMSNorm after the gate, over the inner width of each group

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("head_dim", "d_state", "groups"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.expand > 0:
            raise UserError(f"expand must be positive, got {self.expand}")

    def heads_at(self, site: Site) -> Heads:
        inner = self.expand * site.d_model
        if inner < 1 or inner % (self.groups * self.head_dim):
            raise site.refuse(
                f"groups={self.groups} times head_dim={self.head_dim} does not divide the inner width {inner:g}"
            )
        return Heads(self.groups, int(inner) // self.head_dim, self.d_state, self.head_dim)

    def make_rule(self, site: Site) -> Rule:
        return StateSpace(self.heads_at(site))

    def make_readout(self, site: Site) -> Readout:
        return Readout(self.heads_at(site), "group" if self.output_norm else "none", site.norm_eps, self.groups)

    def tiny(self) -> Mamba2Config:
        """For a model of width 64."""
        return replace(self, expand=2.0, head_dim=16, d_state=16, groups=min(self.groups, 2))


class LinearState(NamedTuple):
    """Of constant size."""

    conv: State  # [B, W-1, C], the last inputs of the convolution; () without one
    memory: Tensor  # [B, HV, K, V'] in at least fp32


class LinearMixer(Part):
    """One memory per value head."""

    def __init__(self, cfg: LinearConfig, site: Site) -> None:
        super().__init__(cfg, site)
        self.heads = cfg.heads_at(site)
        self.rule, self.conv, self.readout = cfg.make_rule(site), cfg.make_conv(site), cfg.make_readout(site)
        self.widths = (sum(self.heads.widths), cfg.gate_width(site), sum(self.rule.logits))
        self.project = nn.Linear(site.d_model, sum(self.widths), bias=False)
        self.out = nn.Linear(self.heads.value_heads * self.heads.value, site.d_model, bias=False)

    def forward(
        self, x: Tensor, ctx: Ctx, state: LinearState | None = None, donate: bool = False
    ) -> tuple[Tensor, LinearState | None, Aux]:
        qkv, gate, logits = self.project(self.norm(x)).split(self.widths, dim=-1)
        rows: Rows = ctx.shared[ROWS]
        if state is not None and x.shape[1] == 1:
            o, state = self._step(qkv, logits, ctx, state, rows, donate)
        else:
            o, state = self._scan(qkv, logits, ctx, state, rows)
        return self.out(self.readout(o, gate if self.cfg.gate else None)), state, Aux()

    def memory_gates(self, x: Tensor, ctx: Ctx) -> Gates:
        *_, logits = self.project(self.norm(x)).split(self.widths, dim=-1)
        gates = self.rule.gates(logits)
        return gates._replace(decay=at_tokens(gates.decay, logits))

    def _scan(
        self, qkv: Tensor, logits: Tensor, ctx: Ctx, state: LinearState | None, rows: Rows
    ) -> tuple[Tensor, LinearState | None]:
        """qkv [B, T, C], logits [B, T, .] -> (o [B, T, HV, V], the state after these tokens)."""
        qkv, logits, positions = (rows.pack(t) for t in (qkv, logits, ctx.positions))
        keep = state is not None
        conv: State = ()
        if self.conv is not None:
            before = state.conv if keep else None
            qkv, conv = self.conv(qkv, initial_state=before, output_final_state=keep, cu_seqlens=rows.cu_seqlens)
        o, memory = self.rule(
            *self.heads.split(qkv),
            logits,
            positions,
            initial_state=state.memory if keep else None,
            output_final_state=keep,
            cu_seqlens=rows.cu_seqlens,
        )
        return rows.unpack(o, len(ctx.tokens)), None if memory is None else LinearState(conv, memory)

    def _step(
        self, qkv: Tensor, logits: Tensor, ctx: Ctx, state: LinearState, rows: Rows, donate: bool
    ) -> tuple[Tensor, LinearState]:
        """One token per sequence: a sequence is a row with one slot and one memory."""
        conv: State = ()
        if self.conv is not None:
            qkv, conv = self.conv.step(qkv, state.conv[:, None], index=rows.index, donate=donate)
            conv = conv[:, 0]
        o, memory = self.rule.step(
            *self.heads.split(qkv), logits, ctx.positions, state.memory[:, None], index=rows.index, donate=donate
        )
        return o, LinearState(conv, memory[:, 0])

    def shared(self) -> dict[str, Callable[[Ctx, Any], Any]]:
        return {ROWS: rows_of}

    def init_state(self, batch: int, device: torch.device | str, dtype: torch.dtype, max_len: int) -> LinearState:
        conv = () if self.conv is None else self.conv.init_state(batch, device, dtype)
        return LinearState(conv, self.rule.init_state(batch, device, dtype))

    def reset_parameters(self, generator: torch.Generator, depth: int) -> None:
        normal_(self.project.weight, self.site.init_std, generator)
        normal_(self.out.weight, self.site.init_std / math.sqrt(2 * depth), generator)
        self.rule.reset_parameters(generator, self.site.init_std)
        if self.conv is not None:
            self.conv.reset_parameters(generator)
        self.readout.reset_parameters()
        reset_norm(self.norm)

    def meta(self) -> dict[str, ParamMeta]:
        gate = (self.widths[1],) if self.cfg.gate else ()
        found = {**super().meta(), "project.weight": ParamMeta(splits=(*self.heads.widths, *gate, *self.rule.logits))}
        for name, piece in (("rule", self.rule), ("conv", self.conv), ("readout", self.readout)):
            if piece is not None:
                found |= {f"{name}.{key}": meta for key, meta in piece.meta().items()}
        return found

    def cost(self, seq_len: int, dtype: torch.dtype = torch.float32) -> Cost:
        params = count_params(self)
        matmul = 2 * (self.project.weight.numel() + self.out.weight.numel())
        h = self.heads
        state = h.value_heads * h.key * self.rule.state_width * wide(dtype).itemsize
        conv = 0 if self.conv is None else self.conv.flops()
        if self.conv is not None:
            state += (self.cfg.conv - 1) * sum(h.widths) * dtype.itemsize
        return Cost(params, params, matmul + conv + self.rule.flops(), state)


class LinearAttentionMixer(LinearMixer):
    Config = LinearAttentionConfig


class RetNetMixer(LinearMixer):
    Config = RetNetConfig


class GLAMixer(LinearMixer):
    Config = GLAConfig


class Mamba2Mixer(LinearMixer):
    Config = Mamba2Config


class DeltaMixer(LinearMixer):
    Config = DeltaConfig


class GatedDeltaMixer(LinearMixer):
    Config = GatedDeltaConfig
