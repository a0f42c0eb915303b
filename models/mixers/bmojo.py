"""B'MOJO: a state-space mixer, and one attention over the last tokens, what the mixer said, and what it did not expect.

    y = ssm(u),   e_t = innovation of y_t,   M_c = the m_e tokens before chunk c with the largest e
    o_t = W_o softmax(q_t [K_window | K_fading | K_eidetic]^T) [V_window | V_fading | V_eidetic]

(arXiv:2407.06324, section 3.) u is the normed stream; q, k, v come from u behind a short convolution (token shift), fading keys and
values from y. A window of W tokens counts the query itself; chunks are W long and start anew at each document. y reaches the
output through keys and values only. With ``m_e: 0`` this is B'MOJO-F; what else it contains, `tests/test_bmojo_cases.py` shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.chunks import Chunks, chunks
from kernels.memory_attention import FADING, memory_attention
from kernels.prefix_topm import prefix_topm
from kernels.rope import rotate
from models import zoo
from models.errors import UserError
from models.mixers.attention import AttentionConfig, rope_table
from models.mixers.bmojo_scores import (
    CONTROLS,
    INNOVATIONS,
    SCORES,
    control,
    innovation,
    predict,
    rank,
    write_error,
    write_error_flops,
)
from models.mixers.bmojo_state import BMojoState, Line, line_of, put, take
from models.mixers.linear import DeltaConfig
from models.mixers.pieces import ROWS, Rows, ShortConv, rows_of
from models.mixers.rules import wide
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
    build_norm,
    count_params,
    normal_,
    reset_norm,
)

POSITIONS = ("nope", "rope_const", "rope_true")


@dataclass(frozen=True)
class BMojoConfig:
    """``ssm`` is the config of the nested mixer, or its kind alone: any linear-time one. The paper does not give m_f, m_e and k."""

    kind: str = "bmojo"
    ssm: Any = "mamba2"
    heads: int = 8
    kv_heads: int | None = None  # fewer than heads: grouped-query attention
    head_dim: int | None = None  # default d_model / heads
    window: int = 512  # W, and the length of a chunk; 0: no keys of tokens, for fading_mode=self alone
    m_f: int = 1  # fading keys of a chunk; 0: none at all
    m_e: int = 64  # eidetic keys of a chunk; 0: B'MOJO-F
    # Which outputs are fading keys of token t in chunk c: "chunk", m_f of chunk c - 1, the last one and then every W // m_f-th
    # before it, so that no other output of the ssm gets a gradient; "point", y_{t-W}; "band", the W up to y_{t-W}; "self", y_t.
    fading_mode: str = "chunk"
    # innov | innov_l2 | innov_cos: how badly outputs predict the next one; delta: the write error of a nested delta rule, by a
    # second scan; or a control: random | fifo | first | stride.
    score: str = "innov"
    score_k: int = 4  # outputs that predict the next one
    score_weights: tuple[float, ...] = ()  # of the last, the one before, ...; empty: all the same
    score_floor: float = 1e-6  # innovations below are rounding, and count as 0
    score_debias: bool = False  # times k' / (k' + 1), k' the outputs there were: short averages err more
    evict_gamma: float = 1.0  # each kept score fades by it per token, so that late surprises get in
    dedup: bool = True  # a kept token counts only once it has left the window; false: twice, as in the paper's form
    # Order: "nope", none, as in the paper; "rope_const", rotary in the window, and all memory at W tokens' distance, because its
    # age has no bound; "rope_true", rotary, everything where it was.
    pos: str = "nope"
    rope_theta: float = 10000.0
    token_shift: int = 4  # taps of the convolution before q, k and v; 0: none
    fading_norm: bool = True  # RMSNorm of y before its keys and values: tied weights expect a normed input
    tie_fading: bool = True  # fading keys and values by the same weights as those of tokens
    qk_norm: bool = False  # RMSNorm over each head of q and k
    ssm_lr: float = 1.0  # learning rate of the nested mixer, as a multiple

    def __post_init__(self) -> None:
        raw = {"kind": self.ssm} if isinstance(self.ssm, str) else self.ssm
        ssm = zoo.parse("mixer", raw, "ssm")
        if isinstance(ssm, AttentionConfig) and ssm.window is None:
            raise UserError("ssm: attention without a window is no linear-time mixer")
        object.__setattr__(self, "ssm", ssm)
        for name in ("heads", "kv_heads", "head_dim", "score_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        for name in ("window", "m_f", "m_e", "token_shift", "score_floor"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must not be negative, got {getattr(self, name)}")
        choice("fading_mode", self.fading_mode, FADING)
        choice("score", self.score, SCORES)
        if self.score == "delta" and not isinstance(ssm, DeltaConfig):
            raise UserError(f"score=delta: ssm '{ssm.kind}' is no delta rule; delta and gated_delta are")
        choice("pos", self.pos, POSITIONS)
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise UserError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")
        if self.fading_mode != "chunk" and self.m_f > 1:
            raise UserError(
                f"m_f={self.m_f}: fading_mode={self.fading_mode} says itself how many; give 1, or 0 for none"
            )
        if self.window == 0 and (self.fading_mode != "self" or self.m_f == 0 or self.m_e):
            raise UserError(
                "window=0 leaves a token nothing but its own output: it needs fading_mode=self, m_f=1 and m_e=0"
            )
        if self.window and self.fading_mode == "chunk" and self.m_f > self.window:
            raise UserError(f"m_f={self.m_f} is more than the window={self.window} has")
        if self.score_weights and len(self.score_weights) != self.score_k:
            raise UserError(f"score_weights: {len(self.score_weights)} weights for score_k={self.score_k}")
        if any(a < 0 for a in self.score_weights) or (self.score_weights and not self.score_weights[0] > 0):
            raise UserError("score_weights must not be negative, and the first one positive")
        if not 0 < self.evict_gamma <= 1:
            raise UserError(f"evict_gamma must lie in (0, 1], got {self.evict_gamma:g}")
        if not self.ssm_lr > 0:
            raise UserError(f"ssm_lr must be positive, got {self.ssm_lr:g}")

    @property
    def stride(self) -> int:
        """Between the outputs that a chunk offers."""
        return max(1, self.window // max(self.m_f, 1))

    @property
    def back(self) -> int:
        """How many whole chunks before its own a query sees."""
        return 2 if self.fading_mode == "band" and self.m_f else 1

    @property
    def fading_rows(self) -> int:
        """Rows of the state for them."""
        W = self.window
        return {"chunk": 2 * self.m_f, "point": W + 1, "band": 2 * W, "self": 1}[self.fading_mode] if self.m_f else 0

    @property
    def predicts(self) -> bool:
        """Whether outputs are compared with a prediction."""
        return self.m_e > 0 and self.score in INNOVATIONS

    @property
    def weights(self) -> tuple[float, ...]:
        return self.score_weights or (1.0,) * self.score_k

    def tiny(self) -> BMojoConfig:
        """For a model of width 64."""
        window = min(self.window, 16)
        return replace(
            self,
            ssm=self.ssm.tiny() if hasattr(self.ssm, "tiny") else self.ssm,
            heads=4,
            kv_heads=2 if self.kv_heads is not None and self.kv_heads < self.heads else None,
            head_dim=self.head_dim and 16,
            window=window,
            m_f=min(self.m_f, max(window, 1)),
            m_e=min(self.m_e, 8),
        )


class Places(NamedTuple):
    """Where the tokens of one forward stand, the same for all layers of a window."""

    rows: Rows
    chunks: Chunks | None  # of whole sequences
    line: Line | None  # of several tokens that continue a state


class BMojo(Part):
    Config = BMojoConfig

    def __init__(self, cfg: BMojoConfig, site: Site) -> None:
        super().__init__(cfg, site)
        if cfg.head_dim is None and site.d_model % cfg.heads:
            raise site.refuse(f"heads={cfg.heads} does not divide d_model={site.d_model}; give head_dim")
        self.heads, self.kv_heads = cfg.heads, cfg.kv_heads or cfg.heads
        self.head_dim = cfg.head_dim or site.d_model // cfg.heads
        if self.head_dim % 2 and cfg.pos != "nope":
            raise site.refuse(f"head_dim={self.head_dim} must be even for rotary positions")
        self.ssm = zoo.build("mixer", cfg.ssm, replace(site, norm="none"))
        kv = self.kv_heads * self.head_dim
        self.splits = (self.heads * self.head_dim, kv, kv) if cfg.window else (kv,)
        self.qkv = nn.Linear(site.d_model, sum(self.splits), bias=False)
        self.out = nn.Linear(self.heads * self.head_dim, site.d_model, bias=False)
        self.shift = None
        if cfg.token_shift and cfg.window:
            self.shift = ShortConv(site.d_model, cfg.token_shift, bias=False, activation=None)
        self.fading_kv = None
        if cfg.m_f and cfg.window and not cfg.tie_fading:
            self.fading_kv = nn.Linear(site.d_model, 2 * kv, bias=False)
        norms = {"fading_norm": site.d_model if cfg.fading_norm and cfg.m_f else 0}
        if cfg.qk_norm and cfg.window:
            norms |= {"q_norm": self.head_dim, "k_norm": self.head_dim}
            norms["fading_k_norm"] = self.head_dim if self.fading_kv is not None else 0
        self.norms = nn.ModuleDict(
            {n: build_norm("rmsnorm", width, site.norm_eps) for n, width in norms.items() if width}
        )

    def forward(
        self, x: Tensor, ctx: Ctx, state: BMojoState | None = None, donate: bool = False
    ) -> tuple[Tensor, BMojoState | None, Aux]:
        u = self.norm(x)
        error = None
        if self.cfg.m_e and self.cfg.score == "delta":  # before the memory that it is about may be written over
            rows = ctx.shared[self._places_key].rows
            error = write_error(self.ssm, u, ctx, rows, None if state is None else state.ssm)  # pyright: ignore[reportArgumentType]
        y, ssm, aux = self.ssm(u, ctx, None if state is None else state.ssm, donate)
        aux = aux.prefixed("ssm")
        if not self.cfg.window:
            v = F.linear(self._normed("fading_norm", y), self.qkv.weight).unflatten(
                -1, (self.kv_heads, 1, self.head_dim)
            )
            o = v.expand(-1, -1, -1, self.heads // self.kv_heads, -1).flatten(2)
            return self.out(o), None if state is None else state._replace(ssm=ssm), aux
        places: Places = ctx.shared[self._places_key]
        h, shift = self._shifted(u, places.rows, state, donate)
        q, k, v = self._heads(h)
        score, outputs = self._score(y, error, ctx, places.rows, state)
        if state is None:
            o, stats = self._whole(q, k, v, y, score, ctx, places)
            aux = aux._replace(stats=aux.stats | stats)
        else:
            state = state._replace(ssm=ssm, shift=shift, outputs=outputs)
            run = self._piece if x.shape[1] > 1 else self._step
            o, state = run(q, k, v, y, score, ctx, state, places, donate)
        return self.out(o.flatten(2)), state, aux

    # -- queries, keys, values, scores

    def _shifted(self, u: Tensor, rows: Rows, state: BMojoState | None, donate: bool) -> tuple[Tensor, State]:
        """The token shift: u [B, T, D] -> (what q, k and v are made of [B, T, D], its new state)."""
        if self.shift is None:
            return u, ()
        if state is not None and u.shape[1] == 1:
            h, shift = self.shift.step(u, state.shift[:, None], index=rows.index, donate=donate)
            return h, shift[:, 0]
        keep = state is not None
        before = state.shift if keep else None
        h, shift = self.shift(rows.pack(u), initial_state=before, output_final_state=keep, cu_seqlens=rows.cu_seqlens)
        return rows.unpack(h, len(u)), shift

    def _heads(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h [B, T, D] -> q [B, T, H, K], k, v [B, T, Hkv, K], normed, not rotated."""
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in self.qkv(h).split(self.splits, dim=-1))
        return self._normed("q_norm", q), self._normed("k_norm", k), v

    def _normed(self, name: str, x: Tensor) -> Tensor:
        return self.norms[name](x).to(x.dtype) if name in self.norms else x

    def _fading(self, y: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """y [B, n, D] at positions [B, n] -> keys and values [B, n, Hkv, K] as they are kept."""
        weight = self.qkv.weight[self.splits[0] :] if self.fading_kv is None else self.fading_kv.weight
        kv = F.linear(self._normed("fading_norm", y), weight).unflatten(-1, (2, self.kv_heads, self.head_dim))
        k = self._normed("k_norm" if self.fading_kv is None else "fading_k_norm", kv[..., 0, :, :])
        return self._rotated(k, positions) if self.cfg.pos == "rope_true" else k, kv[..., 1, :, :]

    def _rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [B, n, H, K] at positions [B, n]."""
        return rotate(x, *rope_table(positions, self.cfg.rope_theta, self.head_dim))

    def _in_window(self, q: Tensor, k: Tensor, ctx: Ctx) -> tuple[Tensor, Tensor, Tensor | None]:
        """-> (query of the window, keys as the window keeps them, query of the memory where it is another one)."""
        if self.cfg.pos == "nope":
            return q, k, None
        turned = rotate(q, *ctx.shared[self._rope_key])
        if self.cfg.pos == "rope_true":
            return turned, rotate(k, *ctx.shared[self._rope_key]), None
        away = torch.full((1, 1), self.cfg.window, device=q.device)
        return turned, k, self._rotated(q, away)

    @torch.no_grad()
    def _score(
        self, y: Tensor, error: Tensor | None, ctx: Ctx, rows: Rows, state: BMojoState | None
    ) -> tuple[Tensor | None, State]:
        """-> (score of each token, fp32 [B, T]; the last outputs)."""
        cfg = self.cfg
        if not cfg.m_e:
            return None, ()
        if error is not None:
            return self._floored(error), ()
        if cfg.score in CONTROLS:
            return control(cfg.score, ctx, self.site.layer), ()
        y = y.detach().to(wide(y.dtype))
        before = None if state is None else state.outputs
        prediction, outputs = predict(y, cfg.weights, ctx.positions, rows, before)
        score = innovation(cfg.score, y, prediction)
        if cfg.score_debias:
            seen = ctx.positions.clamp(0, cfg.score_k)
            score = score * (seen / (seen + 1)).where(seen > 0, 1)
        return self._floored(score), () if outputs is None else outputs

    def _floored(self, score: Tensor) -> Tensor:
        return torch.where(score < self.cfg.score_floor, 0, score).float()

    # -- whole sequences

    def _whole(
        self, q: Tensor, k: Tensor, v: Tensor, y: Tensor, score: Tensor | None, ctx: Ctx, places: Places
    ) -> tuple[Tensor, dict[str, Stat]]:
        """-> (o [B, T, H, K], what is kept)."""
        cfg, rows, at, stats = self.cfg, places.rows, places.chunks, {}
        assert at is not None
        q, k, memory_q = self._in_window(q, k, ctx)
        window_k = rotate(k, *ctx.shared[self._rope_key]) if memory_q is not None else k
        given: dict[str, Any] = {"window": cfg.window, "cu_seqlens": rows.cu_seqlens, "fading": cfg.fading_mode}
        q, k, v, window_k = (rows.pack(x) for x in (q, k, v, window_k))
        if memory_q is not None:
            given |= {"memory_q": rows.pack(memory_q), "pool": (k.flatten(0, 1), v.flatten(0, 1))}
        if cfg.m_f:
            y, positions = rows.pack(y), rows.pack(ctx.positions)
            if cfg.fading_mode == "chunk":
                last = at.row[:, None] - 1 - torch.arange(cfg.m_f, device=q.device) * cfg.stride
                last = last.clamp(0, at.slot.shape[0] - 1)
                y, positions = y.flatten(0, 1)[last], positions.flatten()[last]
            given["fading_k"], given["fading_v"] = self._fading(y, positions)
        if score is not None:
            key = rank(score, ctx.positions, cfg.evict_gamma)
            index = prefix_topm(rows.pack(key), cfg.window, cfg.m_e, cu_seqlens=rows.cu_seqlens)
            given |= {"index": index, "since": self._since(at.row[:, None] - index)}
            stats = self._kept_stats(index, at)
        return rows.unpack(memory_attention(q, window_k, v, **given), len(ctx.tokens)), stats

    @torch.no_grad()
    def _kept_stats(self, index: Tensor, at: Chunks) -> dict[str, Stat]:
        """Over all rows kept before any chunk: ``kept_age`` as a share of the past before the chunk, and ``kept_new``, the share
        that came in with the last chunk. A set that freezes has old rows and no new ones."""
        there, age = index >= 0, at.row[:, None] - index
        count = there.sum().clamp(min=1)
        share = (age / at.before.clamp(min=1)[:, None]).where(there, 0).sum() / count
        new = (there & (age <= self.cfg.window)).sum() / count
        return {"kept_age": Stat(share), "kept_new": Stat(new)}

    def _since(self, age: Tensor) -> Tensor | None:
        """age at the start of the chunk -> the offset in the chunk at which a token has left the window."""
        return (self.cfg.window - age).clamp(min=0) if self.cfg.dedup else None

    # -- several tokens that continue a state

    def _piece(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        y: Tensor,
        score: Tensor | None,
        ctx: Ctx,
        state: BMojoState,
        places: Places,
        donate: bool,
    ) -> tuple[Tensor, BMojoState]:
        cfg, line, W = self.cfg, places.line, self.cfg.window
        assert line is not None
        q, k, memory_q = self._in_window(q, k, ctx)
        rings = [x.split((W, cfg.m_e, cfg.fading_rows), dim=2) for x in (state.k, state.v)]
        new = [x.transpose(1, 2) for x in (k, v)]
        window = [line.roll(ring[0], x, 2) for ring, x in zip(rings, new, strict=True)]
        k, v = (line.lay(ring[0], x, 2).transpose(1, 2) for ring, x in zip(rings, new, strict=True))
        q_line = line.lay(q[:, :0], q)
        given: dict[str, Any] = {"window": W, "fading": cfg.fading_mode}
        window_k = k
        if memory_q is not None:
            given["memory_q"] = line.lay(q[:, :0], memory_q)
            window_k = self._rotated(k, line.position)
        kept = [ring[1] for ring in rings]
        if score is not None:
            chosen, kept, state = self._piece_kept(k, v, kept, score, state, line)
            given |= chosen
        fading = [ring[2] for ring in rings]
        if cfg.m_f:
            offered, fading = self._piece_fading(y, ctx, fading, line)
            given["fading_k"], given["fading_v"] = offered
        o = memory_attention(q_line, window_k, v, **given)
        state = state._replace(
            k=torch.cat((window[0], kept[0], fading[0]), 2), v=torch.cat((window[1], kept[1], fading[1]), 2)
        )
        cell = (ctx.positions - line.base).clamp(0, o.shape[1] - 1)
        return take(o, cell), state

    def _piece_kept(
        self, k: Tensor, v: Tensor, kept: list[Tensor], score: Tensor, state: BMojoState, line: Line
    ) -> tuple[dict[str, Any], list[Tensor], BMojoState]:
        """k, v [B, n W, Hkv, K] of the line, ``kept`` [B, Hkv, m_e, K] -> (what the op needs of eidetic rows, those kept from now
        on, and the state with their scores and positions)."""
        cfg, W, (B, cells) = self.cfg, self.cfg.window, line.position.shape
        scores = line.lay(state.score[:, :W], score)
        candidate = (line.position >= line.start // W * W) & (line.position < line.end)
        key = rank(scores, line.position, cfg.evict_gamma).masked_fill(~candidate, -float("inf"))
        index = prefix_topm(key, W, cfg.m_e, initial_key=self._kept_key(state))
        positions = torch.cat((line.position.flatten(), state.position.flatten()))
        all_scores = torch.cat((scores.flatten(), state.score[:, W:].flatten()))
        pool = tuple(
            torch.cat((x.flatten(0, 1), old.transpose(1, 2).flatten(0, 1).to(x.dtype)))
            for x, old in zip((k, v), kept, strict=True)
        )
        since = self._since(line.position[:, ::W].reshape(-1, 1) - positions[index.clamp(min=0)])
        now = take(index.view(B, cells // W, -1), (line.end - line.base) // W)[:, 0]  # of the next token's chunk
        there = now >= 0
        rows = [torch.where(there[..., None, None], x[now.clamp(min=0)], 0).transpose(1, 2) for x in pool]
        state = state._replace(
            position=torch.where(there, positions[now.clamp(min=0)], -1),
            score=torch.cat((line.roll(state.score[:, :W], score), torch.where(there, all_scores[now], 0)), 1),
        )
        rows = [row.to(old.dtype) for row, old in zip(rows, kept, strict=True)]
        return {"index": index, "since": since, "pool": pool}, rows, state

    def _kept_key(self, state: BMojoState) -> Tensor:
        """fp32 [B, m_e], -inf for none."""
        score = state.score[:, self.cfg.window :]
        return rank(score, state.position, self.cfg.evict_gamma).masked_fill(state.position < 0, -float("inf"))

    def _piece_fading(self, y: Tensor, ctx: Ctx, rings: list[Tensor], line: Line) -> tuple[list[Tensor], list[Tensor]]:
        """rings [B, Hkv, F, K] -> (keys and values that the op needs, the new rings)."""
        if self.cfg.fading_mode == "chunk":
            return self._piece_fading_by_chunk(y, rings, line)
        new = [x.transpose(1, 2) for x in self._fading(y, ctx.positions)]
        seen = [ring[:, :, :0] if self.cfg.fading_mode == "self" else ring for ring in rings]
        laid = [line.lay(ring, x, 2).transpose(1, 2) for ring, x in zip(seen, new, strict=True)]
        return laid, [line.roll(ring, x, 2) for ring, x in zip(rings, new, strict=True)]

    def _piece_fading_by_chunk(self, y: Tensor, rings: list[Tensor], line: Line) -> tuple[list[Tensor], list[Tensor]]:
        """A ring holds the rows in force, then those of the chunk that runs, each as new as it can be."""
        W, m, B = self.cfg.window, self.cfg.m_f, len(y)
        n = line.position.shape[1] // W
        starts = (
            line.base + torch.arange(n + 1, device=y.device) * W
        )  # the chunk after the last token's may be complete in part
        back = 1 + torch.arange(m, device=y.device) * self.cfg.stride
        position = (starts[:, :, None] - back).flatten(1)  # [B, (n + 1) m]
        token, fresh = line.token(position)
        new = self._fading(take(y, token), position)
        place = torch.arange(position.shape[1], device=y.device)
        old = place % m + torch.where(position // W == line.start // W, m, 0)
        index = torch.where(fresh, 2 * m + place, old)
        now = (line.end - line.base) // W
        complete = (W - back < line.end % W)[:, None, :, None]
        offered, kept = [], []
        for ring, x in zip(rings, new, strict=True):
            rows = torch.cat((ring.to(x.dtype), x.transpose(1, 2)), 2)
            rows = take(rows, index, 2).unflatten(2, (n + 1, m))  # [B, Hkv, n + 1, m, K]
            offered.append(rows[:, :, :n].permute(0, 2, 3, 1, 4).reshape(B * n, m, self.kv_heads, self.head_dim))
            force = take(rows, now, 2)[:, :, 0]
            running = torch.where(complete, take(rows, now + 1, 2)[:, :, 0], force)
            kept.append(torch.cat((force, running), 2).to(ring.dtype))
        return offered, kept

    # -- one token

    def _step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        y: Tensor,
        score: Tensor | None,
        ctx: Ctx,
        state: BMojoState,
        places: Places,
        donate: bool,
    ) -> tuple[Tensor, BMojoState]:
        W, t = self.cfg.window, ctx.positions
        write = torch.ones_like(t, dtype=torch.bool) if ctx.valid is None else ctx.valid
        q, k, memory_q = self._in_window(q, k, ctx)
        rows = [(t % W, write, (k, v))]
        slot, due = self._fading_slot(t)
        due = due & write
        if self.cfg.m_f and (not _host_may_look(ctx) or bool(due.any())):
            rows.append((slot, due, self._fading(y, t)))
        buffers = [state.k, state.v]
        for slot, here, new in rows:
            buffers = [put(b, slot, x.transpose(1, 2), here, 2, donate) for b, x in zip(buffers, new, strict=True)]
        state = state._replace(k=buffers[0], v=buffers[1])
        if score is not None:
            state = state._replace(score=put(state.score, t % W, score, write, 1, donate))
        o = self._read(q, memory_q, state, t, write)
        turn = write & ((t + 1) % W == 0)
        if (score is not None or self.cfg.fading_mode == "chunk") and (not _host_may_look(ctx) or bool(turn.any())):
            state = self._turned(state, t, turn, donate)
        return o, state

    def _fading_slot(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t [B, 1] -> (the row of the buffers for its output, whether it has one)."""
        cfg, first = self.cfg, self.cfg.window + self.cfg.m_e
        if not cfg.m_f:
            return t, torch.zeros_like(t, dtype=torch.bool)
        if cfg.fading_mode != "chunk":
            return first + t % cfg.fading_rows, torch.ones_like(t, dtype=torch.bool)
        left = cfg.window - 1 - t % cfg.window
        i = left // cfg.stride
        return first + cfg.m_f + i.clamp(max=cfg.m_f - 1), (left % cfg.stride == 0) & (i < cfg.m_f)

    def _read(self, q: Tensor, memory_q: Tensor | None, state: BMojoState, t: Tensor, valid: Tensor) -> Tensor:
        """q [B, 1, H, K] over the buffers -> [B, 1, H, K]."""
        W = self.cfg.window
        k, v = state.k.to(q.dtype), state.v.to(q.dtype)
        queries = [x.unflatten(2, (self.kv_heads, -1))[:, 0] for x in (q, q if memory_q is None else memory_q)]
        if memory_q is None:
            scores = queries[0] @ k.mT
        else:
            cos, sin = rope_table(_ring_positions(t, W), self.cfg.rope_theta, self.head_dim)
            window = rotate(k[:, :, :W], cos.transpose(1, 2), sin.transpose(1, 2))
            scores = torch.cat((queries[0] @ window.mT, queries[1] @ k[:, :, W:].mT), -1)
        seen = self._seen(state, t) | ~valid  # an invalid query sees something, so that its softmax stays finite
        scores = (scores.to(wide(q.dtype)) * self.head_dim**-0.5).masked_fill(~seen[:, None, None], -float("inf"))
        return (scores.softmax(-1).to(v.dtype) @ v).flatten(1, 2)[:, None]

    def _seen(self, state: BMojoState, t: Tensor) -> Tensor:
        """Which rows of the buffers the token at t [B, 1] sees: bool [B, S]."""
        cfg, W = self.cfg, self.cfg.window
        seen = [_ring_positions(t, W) >= 0]
        if cfg.m_e:
            seen.append((state.position >= 0) & ((t - state.position >= W) | (not cfg.dedup)))
        if cfg.m_f and cfg.fading_mode == "chunk":
            force = torch.arange(2 * cfg.m_f, device=t.device) < cfg.m_f
            seen.append(force & (t >= W))
        elif cfg.m_f:
            position = _ring_positions(t, cfg.fading_rows)
            old = {"point": W, "band": W, "self": 0}[cfg.fading_mode]
            seen.append((position >= 0) & (t - position >= old))
        return torch.cat(seen, 1)

    def _turned(self, state: BMojoState, t: Tensor, turn: Tensor, donate: bool) -> BMojoState:
        """Where a chunk ends, ``turn`` [B, 1], eidetic rows are chosen anew and fading rows come into force."""
        cfg, W, m, B = self.cfg, self.cfg.window, self.cfg.m_e, len(t)
        source = torch.arange(state.k.shape[2], device=t.device).expand(B, -1)  # the row that each row becomes
        parts = [source[:, :W], source[:, W : W + m], source[:, W + m :]]
        if m:
            key = rank(state.score[:, :W], _ring_positions(t, W), cfg.evict_gamma)
            key = F.pad(key, (0, 1), value=-float("inf"))  # one row more, before whose chunk the whole ring counts
            chosen = prefix_topm(key, W, m, initial_key=self._kept_key(state)).view(B, 2, m)[:, 1]
            sequence = torch.arange(B, device=t.device)[:, None]
            own, old = chosen - sequence * (W + 1), W + chosen - B * (W + 1) - sequence * m
            row = torch.where(chosen < 0, -1, torch.where(chosen < B * (W + 1), own, old))
            parts[1] = torch.where(turn, row, parts[1])
            positions = torch.cat((_ring_positions(t, W), state.position), 1)
            position = torch.where(row >= 0, positions.gather(1, row.clamp(min=0)), -1)
            state = state._replace(
                position=torch.where(turn, position, state.position),
                score=torch.cat((state.score[:, :W], take(state.score, parts[1])), 1),
            )
        if cfg.m_f and cfg.fading_mode == "chunk":
            parts[2] = torch.cat(
                (torch.where(turn, parts[2][:, cfg.m_f :], parts[2][:, : cfg.m_f]), parts[2][:, cfg.m_f :]), 1
            )
        changed = torch.cat(parts[1:], 1)
        buffers = []
        for buffer in (state.k, state.v):
            memory = take(buffer, changed, 2)
            if donate and not torch.is_grad_enabled():
                buffer[:, :, W:] = memory
                buffers.append(buffer)
            else:
                buffers.append(torch.cat((buffer[:, :, :W], memory), 2))
        return state._replace(k=buffers[0], v=buffers[1])

    # -- what all layers of a window share in one forward

    @property
    def _places_key(self) -> str:
        return f"bmojo.{self.cfg.window}.{self.cfg.back}"

    @property
    def _rope_key(self) -> str:
        return f"rope.{self.cfg.rope_theta}.{self.head_dim}"

    def shared(self) -> dict[str, Callable[[Ctx, Any], Any]]:
        def unwrapped(fn: Callable[[Ctx, Any], Any]) -> Callable[[Ctx, Any], Any]:
            return lambda ctx, state: fn(ctx, None if state is None else state.ssm)

        found = {key: unwrapped(fn) for key, fn in self.ssm.shared().items()} | {ROWS: rows_of}
        if self.cfg.window:
            found[self._places_key] = self._places
        if self.cfg.pos != "nope":
            found[self._rope_key] = lambda ctx, _: rope_table(ctx.positions, self.cfg.rope_theta, self.head_dim)
        return found

    def _places(self, ctx: Ctx, state: BMojoState | None) -> Places:
        rows, (B, T), W = rows_of(ctx, state), ctx.tokens.shape, self.cfg.window
        if state is not None:
            return Places(rows, None, line_of(ctx, W, self.cfg.back) if T > 1 else None)
        B, T = (B, T) if rows.order is None else (1, B * T)
        return Places(rows, chunks(B, T, rows.cu_seqlens, W, ctx.tokens.device), None)

    # -- the nested mixer's affairs

    def commit(self, writes: Mapping[str, Write], info: CommitInfo) -> list[RowReset]:
        inner = {key.removeprefix("ssm."): write for key, write in writes.items()}
        return [RowReset(f"ssm.{reset.name}", reset.rows) for reset in self.ssm.commit(inner, info)] if inner else []

    def loss_weights(self) -> dict[str, float]:
        return {f"ssm.{key}": weight for key, weight in self.ssm.loss_weights().items()}

    # -- formulas

    def init_state(self, batch: int, device: torch.device | str, dtype: torch.dtype, max_len: int) -> BMojoState:
        cfg, like = self.cfg, {"device": device, "dtype": dtype}
        ssm = self.ssm.init_state(batch, device, dtype, max_len)
        if not cfg.window:
            return BMojoState(ssm, (), (), (), (), (), ())
        shape = (batch, self.kv_heads, cfg.window + cfg.m_e + cfg.fading_rows, self.head_dim)
        some = cfg.m_e > 0
        return BMojoState(
            ssm,
            () if self.shift is None else self.shift.init_state(batch, device, dtype),
            torch.zeros(batch, cfg.score_k, self.site.d_model, **like) if cfg.predicts else (),
            torch.zeros(shape, **like),
            torch.zeros(shape, **like),
            torch.zeros(batch, cfg.window + cfg.m_e, device=device) if some else (),
            torch.full((batch, cfg.m_e), -1, device=device) if some else (),
        )

    def reset_parameters(self, generator: torch.Generator, depth: int) -> None:
        self.ssm.reset_parameters(generator, depth)
        for linear in (self.qkv, self.fading_kv):
            if linear is not None:
                normal_(linear.weight, self.site.init_std, generator)
        normal_(self.out.weight, self.site.init_std / math.sqrt(2 * depth), generator)
        if self.shift is not None:
            self.shift.reset_parameters(generator)
        for norm in (self.norm, *self.norms.values()):
            reset_norm(norm)

    def meta(self) -> dict[str, ParamMeta]:
        found = {**super().meta(), "qkv.weight": ParamMeta(splits=self.splits)}
        if self.fading_kv is not None:
            found["fading_kv.weight"] = ParamMeta(splits=self.splits[1:])
        if self.shift is not None:
            found |= {f"shift.{key}": meta for key, meta in self.shift.meta().items()}
        rate = self.cfg.ssm_lr
        return found | {
            f"ssm.{key}": replace(meta, lr_mult=meta.lr_mult * rate) for key, meta in self.ssm.meta().items()
        }

    def cost(self, seq_len: int, dtype: torch.dtype = torch.float32) -> Cost:
        cfg, inner = self.cfg, self.ssm.cost(seq_len, dtype)
        params = count_params(self)
        own = params - count_params(self.ssm)
        kv = 2 * self.kv_heads * self.head_dim
        flops = 2.0 * self.out.weight.numel()
        if not cfg.window:
            return inner + Cost(own, own, flops + 2 * self.qkv.weight.numel())
        flops += 2 * self.qkv.weight.numel() + (0 if self.shift is None else self.shift.flops())
        flops += 4 * self.heads * self.head_dim * self._keys(seq_len)
        if cfg.m_e and cfg.score == "delta":
            flops += write_error_flops(self.ssm)
        if cfg.m_f:
            outputs = cfg.m_f * -(-seq_len // cfg.window) / seq_len if cfg.fading_mode == "chunk" else 1
            flops += 2 * kv * self.site.d_model * outputs
        state = kv * (cfg.window + cfg.m_e + cfg.fading_rows) * dtype.itemsize
        if self.shift is not None:
            state += (cfg.token_shift - 1) * self.site.d_model * dtype.itemsize
        if cfg.predicts:
            state += cfg.score_k * self.site.d_model * dtype.itemsize
        if cfg.m_e:
            state += 4 * cfg.window + 12 * cfg.m_e
        return inner + Cost(own, own, flops, state)

    def _keys(self, seq_len: int) -> float:
        """Keys per query, mean over a sequence; those hidden while they are in the window too count."""
        cfg, W, T = self.cfg, self.cfg.window, seq_len
        late = max(T - W, 0)  # queries behind the first chunk

        def band(queries: int) -> float:
            """Keys of a causal band of W over so many queries."""
            return min(queries, W) * (min(queries, W) + 1) / 2 + max(queries - W, 0) * W

        keys = band(T)
        if cfg.m_f:
            keys += {"chunk": cfg.m_f * late, "point": late, "band": band(late), "self": T}[cfg.fading_mode]
        if cfg.m_e:
            growing = min(-(-cfg.m_e // W), -(-T // W))  # chunks before which there are fewer than m_e tokens
            keys += sum(c * W * min(W, T - c * W) for c in range(growing)) + cfg.m_e * max(T - growing * W, 0)
        return keys / T


def _host_may_look(ctx: Ctx) -> bool:
    """Reading a tensor's values waits for nothing on a CPU; a compiled graph must not depend on them."""
    return ctx.positions.device.type == "cpu" and not torch.compiler.is_compiling()


def _ring_positions(t: Tensor, size: int) -> Tensor:
    """t [B, 1], the newest position -> the position in each slot of a ring, negative where it is empty: [B, size]."""
    slot = torch.arange(size, device=t.device)
    return t - (t - slot) % size
