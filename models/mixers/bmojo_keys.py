"""The weights of B'MOJO (`models.mixers.bmojo`), and the queries, keys and values that they make."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.chunks import Chunks
from kernels.rope import rope_table, rotate
from models import zoo
from models.mixers.bmojo_config import BMojoConfig
from models.mixers.bmojo_state import BMojoState, Line, Now
from models.mixers.pieces import Rows, ShortConv
from models.types import Ctx, Part, Site, State, build_norm


class Places(NamedTuple):
    """Where the tokens of one forward stand, the same for all layers of a window."""

    rows: Rows
    chunks: Chunks | None  # of whole sequences
    line: Line | None  # of several tokens that continue a state
    now: Now | None  # of one


class Tokens(NamedTuple):
    """What the tokens of one forward bring."""

    q: Tensor  # [B, T, H, K], of the window
    k: Tensor  # [B, T, Hkv, K], as the window keeps it
    v: Tensor
    memory_q: Tensor | None  # [B, T, H, K], of everything else, where it is another one
    y: Tensor  # [B, T, D], outputs of the nested mixer
    score: Tensor | None  # fp32 [B, T]


class Keys(Part):
    """Queries and keys of tokens and outputs; what to do with them is the affair of those who inherit."""

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

    def _shifted(self, u: Tensor, rows: Rows, state: BMojoState | None, donate: bool) -> tuple[Tensor, State]:
        """The token shift: u [B, T, D] -> (what q, k and v are made of [B, T, D], its new state)."""
        if self.shift is None:
            return u, ()
        h, shift = self.shift.over(u, rows, None if state is None else state.shift, donate)  # pyright: ignore[reportArgumentType]
        return h, () if shift is None else shift

    def _heads(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h [B, T, D] -> q [B, T, H, K], k, v [B, T, Hkv, K], normed, not rotated."""
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in self.qkv(h).split(self.splits, dim=-1))
        return self._normed("q_norm", q), self._normed("k_norm", k), v

    def _alone(self, y: Tensor) -> Tensor:
        """Where a token sees its own output only, softmax over one key is 1: y [B, T, D] -> o [B, T, H K], the values of y."""
        v = self.qkv(self._normed("fading_norm", y)).unflatten(-1, (self.kv_heads, 1, self.head_dim))
        return v.expand(-1, -1, -1, self.heads // self.kv_heads, -1).flatten(2)

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

    def _since(self, age: Tensor) -> Tensor | None:
        """age at the start of the chunk -> the offset in the chunk at which a token has left the window."""
        return (self.cfg.window - age).clamp(min=0) if self.cfg.dedup else None

    # -- the names of what all layers of a window share in one forward

    @property
    def _places_key(self) -> str:
        return f"bmojo.{self.cfg.window}.{self.cfg.fading_mode}.{self.cfg.m_f}"

    @property
    def _past_key(self) -> str:
        return f"bmojo.past.{self.cfg.weights}"

    @property
    def _rope_key(self) -> str:
        return f"rope.{self.cfg.rope_theta}.{self.head_dim}"
