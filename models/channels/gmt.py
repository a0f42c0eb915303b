"""The memory cell of the Graph Memory Transformer: a token is routed over learned centroids joined by directed edges.

Each of F slots is a point of model space. A token finds itself among them by its distance to each (source), takes one hop along the
edges and adds what it asks of each slot (target), and gets the way from one mixture to the other, normalised and gated:

    y = sigmoid(gate) LayerNorm((w_tgt - w_src) C')      C' = LayerNorm(slots)      weights: see `kernels.gmt_cell`

(arXiv:2604.23862.) Slots learn by gradient and by write-back: once per optimizer step, in ``commit``, each moves towards the mean of
the tokens that were nearest to it; slots that nobody uses, or that stand where another stands, start again from a token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.gmt_cell import Hop, gmt_cell
from kernels.gram import gram
from models.channels import gmt_losses, gmt_memory
from models.errors import UserError
from models.parsing import choice
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

NORM_EPS = 1e-5
PAPER = {"edges": "prob", "write_norm": "raw", "displacement": "layernorm", "target_usage_weight": 0.0}
CORRECTED = {"edges": "logprob", "write_norm": "unit", "displacement": "rms", "target_usage_weight": 0.3}
PRESETS = {"paper": PAPER, "corrected": CORRECTED}


@dataclass(frozen=True)
class GMTConfig:
    """``fidelity`` fills in what is None: "paper", the published behaviour, or "corrected", which mends what leaves the published
    graph nearly inert (edges enter as log-probabilities with a learned scale), makes write-back faster than its momentum says (means
    are normalised first) and lets targets collapse (pressure on their usage too), and gives displacements a fixed size.

    The temperature falls with training progress from ``temperature_start`` to ``temperature_end``; ``temperature`` fixes it. Units:
    entropies in nats, ages in optimizer steps (with ``rate: reference`` in micro-batches, like the momenta).
    """

    kind: str = "gmt"
    slots: int = 128  # F
    width: int = 128  # of queries and keys
    fidelity: str = "paper"  # paper | corrected
    edges: str | None = None  # prob | logprob: how the hop enters the target's logits
    displacement: str | None = None  # layernorm | rms (of size 1, no learned map) | none
    write_norm: str | None = None  # raw | unit: whether a mean of tokens is normalised before a slot moves towards it
    write_source: str = "post_residual"  # post_residual | cell_input: which states of tokens slots move to
    momentum_learned: bool = True  # through the tracking loss, which always wants it to be 1
    momentum: float = 0.99  # at the start, of slots in write-back
    rate: str = "per_step"  # per_step | reference: momenta act once per step, or to the power of its micro-batches
    floor: float = 0.01  # of the distance 1 - cos
    temperature: float | None = None
    temperature_start: float = 1.0
    temperature_end: float = 0.1
    usage_momentum: float | None = (
        None  # default: 0.99 per micro-batch, or what 33 of these (the published run) make of it per step
    )
    maintenance_every: int = 110  # steps between looks for dead and double slots; 0: never
    dead_below: float = 1e-3  # usage
    merge_above: float = 0.95  # cosine of two slots
    cooldown: int = 100  # age before a slot may be merged
    edge_entropy_floor: float | None = (
        None  # default: 4 nats at 128 slots, the same share of the largest entropy at others
    )
    usage_target: int | None = None  # effective slots wanted; default F // 4
    tracking_weight: float = 1.0
    orthogonality_weight: float = 0.05
    usage_weight: float = 0.3
    target_usage_weight: float | None = None
    edge_entropy_weight: float = 0.1
    edge_contrast_weight: float = 0.5

    def __post_init__(self) -> None:
        choice("fidelity", self.fidelity, tuple(PRESETS))
        for name, value in PRESETS[self.fidelity].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        choice("edges", self.edges, ("prob", "logprob"))
        choice("displacement", self.displacement, ("layernorm", "rms", "none"))
        choice("write_norm", self.write_norm, ("raw", "unit"))
        choice("write_source", self.write_source, ("post_residual", "cell_input"))
        choice("rate", self.rate, ("per_step", "reference"))
        if self.usage_momentum is None:
            object.__setattr__(self, "usage_momentum", 0.99 if self.rate == "reference" else 0.99**33)
        if self.slots < 2 or self.width < 1:
            raise UserError(f"at least 2 slots and a width of 1 are needed, got slots={self.slots}, width={self.width}")
        for name in ("momentum", "usage_momentum"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"{name} must lie strictly between 0 and 1, got {getattr(self, name)}")
        for name in ("floor", "temperature", "temperature_start", "temperature_end"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise UserError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("maintenance_every", "cooldown", *(f"{loss}_weight" for loss in gmt_losses.LOSSES)):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.edge_entropy_floor is None:
            most = math.log(max(self.slots - 1, 1))
            object.__setattr__(self, "edge_entropy_floor", 4.0 * most / math.log(127))
        if self.usage_target is None:
            object.__setattr__(self, "usage_target", max(self.slots // 4, 1))

    def tiny(self) -> GMTConfig:
        """For a model of width 64."""
        slots = min(self.slots, 16)
        return replace(self, slots=slots, width=min(self.width, 16), usage_target=None, edge_entropy_floor=None)


class Tables(NamedTuple):
    """What the cell is to every token: functions of the parameters alone, in at least fp32."""

    points: Tensor  # C' [F, D]
    products: Tensor  # of the points with each other [F, F]
    directions: Tensor  # [F, D], of length 1
    scores: Tensor  # [F, D]
    edges: Tensor  # [F, F], rows sum to 1, zero diagonal
    values: Tensor  # [F, D]
    gram: Tensor | None  # [F, F]
    bias: Tensor | None  # [D]
    edge_scale: Tensor | None  # 0-d


class GMT(Part):
    """Losses ``tracking``, ``orthogonality``, ``edge_entropy`` and ``edge_contrast``, and per micro-batch and rank ``usage`` and
    ``target_usage`` (`models.channels.gmt_losses`)."""

    Config = GMTConfig
    usage: Tensor
    age: Tensor

    def __init__(self, cfg: GMTConfig, site: Site) -> None:
        super().__init__(cfg, site)
        if site.dropout:
            raise site.refuse(
                "gmt needs dropout=0: its loss and its memory are about what the stream is after the cell"
            )
        if site.branches > 1:
            raise site.refuse("gmt needs branches=1: its slots are points of one residual stream")
        f, d = cfg.slots, site.d_model
        self.slots = nn.Parameter(torch.empty(f, d))
        self.edges = nn.Parameter(torch.empty(f, f))
        self.query = nn.Linear(d, cfg.width, bias=False)
        self.key = nn.Linear(d, cfg.width, bias=False)
        self.gate = nn.Parameter(torch.empty(()))
        self.write_momentum = nn.Parameter(torch.empty(()), requires_grad=cfg.momentum_learned)
        self.norm_slots = nn.LayerNorm(d, eps=NORM_EPS)
        self.norm_move = nn.LayerNorm(d, eps=NORM_EPS) if cfg.displacement == "layernorm" else None
        self.edge_scale = nn.Parameter(torch.empty(())) if cfg.edges == "logprob" else None  # its logarithm
        self.register_buffer("usage", torch.empty(f))
        self.register_buffer("age", torch.empty(f))
        self._kept: tuple[Any, Tables] | None = None

    # -- the cell

    def forward(
        self, x: Tensor, ctx: Ctx, state: State | None = None, donate: bool = False
    ) -> tuple[Tensor, State | None, Aux]:
        h, tables = self.norm(x), self.tables_of_slots()
        hop = self.hop(h.flatten(0, 1), tables, self.temperature(ctx.progress))
        y = hop.y.view_as(x)
        if not torch.is_grad_enabled():
            return y, state, Aux()
        seen = (x + y if self.cfg.write_source == "post_residual" else h).detach().flatten(0, 1)
        after = seen if self.cfg.write_source == "post_residual" else (x + y).detach().flatten(0, 1)
        keep = gmt_losses.shares(hop.source, ctx.valid)
        usage = gmt_losses.usage(hop, keep, ctx.valid)
        losses = gmt_losses.losses(self, hop, usage, tables, after, keep)
        writes = gmt_memory.writes(hop, seen, ctx, self.cfg.slots) if self.training else {}
        return y, state, Aux(losses, self._stats(hop, usage, tables, ctx, keep), writes)

    def hop(self, h: Tensor, tables: Tables, temperature: Tensor) -> Hop:
        """h [N, D], after the norm."""
        kind = h.device.type
        if torch.is_autocast_enabled(kind):
            h = h.to(torch.get_autocast_dtype(kind))
        return gmt_cell(
            h,
            tables.directions,
            tables.scores,
            tables.edges,
            tables.values,
            temperature,
            gram=tables.gram,
            bias=tables.bias,
            edge_scale=tables.edge_scale,
            floor=self.cfg.floor,
            eps=NORM_EPS,
        )

    def temperature(self, progress: Tensor) -> Tensor:
        """start (end / start)^ln(1 + p (e - 1)) at progress p."""
        c = self.cfg
        progress = progress.to(torch.promote_types(progress.dtype, torch.float32))
        if c.temperature is not None:
            return torch.full_like(progress, c.temperature)
        return c.temperature_start * (c.temperature_end / c.temperature_start) ** torch.log1p(progress * (math.e - 1))

    def tables_of_slots(self) -> Tables:
        """Made anew where gradients are recorded, and else only after a parameter has changed."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or any(p.is_inference() for p in self.parameters()):
            return self._make_tables()
        # The parameters themselves are kept, not their addresses alone, which a later tensor might get.
        parameters = [p.detach() for p in self.parameters()]
        versions = [(p._version, p.data_ptr(), p.dtype) for p in parameters]
        if self._kept is None or self._kept[0][0] != versions:
            self._kept = ((versions, parameters), self._make_tables())
        return self._kept[1]

    def _make_tables(self) -> Tables:
        with torch.autocast(self.slots.device.type, enabled=False):
            d = self.slots.shape[1]
            wide = torch.promote_types(self.slots.dtype, torch.float32)
            query, key, gate = (p.to(wide) for p in (self.query.weight, self.key.weight, self.gate.sigmoid()))
            weight, bias = (p.to(wide) for p in (self.norm_slots.weight, self.norm_slots.bias))
            points = F.layer_norm(self.slots.to(wide), (d,), weight, bias, NORM_EPS)
            scores = (points @ key.T / math.sqrt(self.cfg.width)) @ query
            products = gram(points)
            values, square, bias = points * gate, None, None
            if self.norm_move is not None:
                mean = points.mean(1, keepdim=True)
                values = (points - mean) * (self.norm_move.weight.to(wide) * gate)
                square = products - d * (mean @ mean.T)
                bias = self.norm_move.bias.to(wide) * gate
            elif self.cfg.displacement == "rms":
                square = products
            scale = None if self.edge_scale is None else self.edge_scale.to(wide).exp()
            directions = points * gmt_losses.inverse_lengths(products)[:, None]
            return Tables(points, products, directions, scores, self.edge_table(), values, square, bias, scale)

    def edge_table(self) -> Tensor:
        """[F, F]: where a hop from each slot leads; never to itself."""
        logits = self.edges.to(torch.promote_types(self.edges.dtype, torch.float32))
        own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        return logits.masked_fill(own, float("-inf")).softmax(1)

    # -- what it says about itself

    @torch.no_grad()
    def _stats(self, hop: Hop, usage: gmt_losses.Usage, tables: Tables, ctx: Ctx, keep: Tensor) -> dict[str, Stat]:
        found = {
            "source_slots": Stat(gmt_losses.effective(usage.source)),  # exp of the entropy of the mean weight
            "target_slots": Stat(gmt_losses.effective(usage.target)),
            "dead_slots": Stat((self.usage < self.cfg.dead_below).sum().to(keep.dtype)),
            "at_floor": Stat(((hop.distance <= self.cfg.floor * (1 + 1e-5)).to(keep.dtype) * keep).sum()),
            "edge_entropy": Stat(gmt_losses.entropy(tables.edges).mean()),
            "gate": Stat(self.gate.sigmoid().to(keep.dtype)),
            "write_momentum": Stat(self.write_momentum.sigmoid().to(keep.dtype)),
            "temperature": Stat(self.temperature(ctx.progress).to(keep.dtype)),
        }
        if tables.gram is not None:  # the size of displacements before their norm
            variance = (hop.scale.square().reciprocal() - NORM_EPS).clamp(min=0)
            found["displacement"] = Stat(((variance * self.site.d_model).sqrt() * keep).sum())
        return found

    def loss_weights(self) -> dict[str, float]:
        return {name: getattr(self.cfg, f"{name}_weight") for name in gmt_losses.LOSSES}

    # -- model memory

    def commit(self, writes: Mapping[str, Write], info: CommitInfo) -> list[RowReset]:
        return gmt_memory.commit(self, writes, info)

    def reset_parameters(self, generator: torch.Generator, depth: int) -> None:
        normal_(self.slots, 1.0, generator)
        normal_(self.edges, 1.0, generator)
        with torch.no_grad():
            self.slots.copy_(F.normalize(self.slots, dim=1))
            self.gate.fill_(1.0)
            self.write_momentum.fill_(math.log(self.cfg.momentum / (1 - self.cfg.momentum)))
            if self.edge_scale is not None:
                self.edge_scale.zero_()
            self.usage.fill_(1 / self.cfg.slots)
            self.age.zero_()
        for linear in (self.query, self.key):
            normal_(linear.weight, 0.02, generator)
        reset_norm(self.norm)
        reset_norm(self.norm_slots)
        if self.norm_move is not None:
            reset_norm(self.norm_move)

    # -- formulas

    def meta(self) -> dict[str, ParamMeta]:
        """Slots are points, whose length write-back sets: no decay, and no Muon, for them and for edges."""
        points = ParamMeta(role="embedding", decay=False, optimizer="adamw")
        return {**super().meta(), "slots": points, "edges": ParamMeta(optimizer="adamw")}

    def cost(self, seq_len: int, dtype: torch.dtype = torch.float32) -> Cost:
        """Per token; the tables, made once per step, are left out."""
        params, f, d = count_params(self), self.cfg.slots, self.site.d_model
        squares = 1 + (self.cfg.displacement != "none")  # the hop, and the length of the displacement
        return Cost(params, params, 2 * (3 * f * d + squares * f * f), 0)
