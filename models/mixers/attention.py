"""Causal softmax attention: grouped queries, rotary or no positions, sliding window, q/k-norm, token shift, packed documents."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.rope import rope_table, rotate, split_rotate
from models.errors import UserError
from models.mixers.pieces import ROWS, ShortConv, host_may_look, ring_positions, rows_of
from models.types import Aux, Cost, Ctx, ParamMeta, Part, Site, State, build_norm, count_params, normal_, reset_norm


@dataclass(frozen=True)
class AttentionConfig:
    kind: str = "attention"
    heads: int = 8
    kv_heads: int | None = None  # fewer than heads: grouped-query attention (arXiv:2305.13245)
    head_dim: int | None = None  # default d_model / heads
    window: int | None = None  # each token sees itself and the window - 1 tokens before it
    rope_theta: float | None = 10000.0  # rotary positions (arXiv:2104.09864); null: none here
    qk_norm: bool = False  # RMSNorm over each head of q and k (arXiv:2302.05442)
    bias: bool = False
    # Taps of a causal convolution before q, k and v, one filter per channel, as linear-time mixers have it: a key then knows the
    # token before it, which recall takes two layers to learn without. 0: none.
    token_shift: int = 0
    dropout: float = 0.0  # on attention probabilities, in training

    def __post_init__(self) -> None:
        for name in ("heads", "kv_heads", "head_dim", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if self.token_shift < 0:
            raise UserError(f"token_shift must not be negative, got {self.token_shift}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must lie in [0, 1), got {self.dropout}")
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise UserError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")
        if self.head_dim is not None and self.head_dim % 2 and self.rope_theta is not None:
            raise UserError(f"head_dim={self.head_dim} must be even for rotary positions")

    def tiny(self) -> AttentionConfig:
        """For a model of width 64."""
        grouped = self.kv_heads is not None and self.kv_heads < self.heads
        window = None if self.window is None else min(self.window, 16)
        return replace(self, heads=4, kv_heads=2 if grouped else None, head_dim=self.head_dim and 16, window=window)


class AttentionState(NamedTuple):
    """Keys and values by absolute position (full attention) or by position modulo the window (a ring)."""

    k: Tensor  # [B, Hkv, S, K]
    v: Tensor  # [B, Hkv, S, K]
    shift: State = ()  # [B, taps - 1, D], the last inputs of the token shift where there is one


class View(NamedTuple):
    """Which keys the queries of one forward look at, for all attention layers of one window."""

    mask: (
        Tensor | None
    )  # bool [B or 1, 1, T, S], every row has a True; None: every key, or every one up to the query's own
    causal: bool
    extent: int  # keys S


class Attention(Part):
    Config = AttentionConfig

    def __init__(self, cfg: AttentionConfig, site: Site) -> None:
        super().__init__(cfg, site)
        if cfg.head_dim is None and site.d_model % cfg.heads:
            raise site.refuse(f"heads={cfg.heads} does not divide d_model={site.d_model}; give head_dim")
        self.heads, self.kv_heads = cfg.heads, cfg.kv_heads or cfg.heads
        self.head_dim = cfg.head_dim or site.d_model // cfg.heads
        if self.head_dim % 2 and cfg.rope_theta is not None:
            raise site.refuse(f"head_dim={self.head_dim} must be even for rotary positions")
        self.splits = (self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim)
        self.qkv = nn.Linear(site.d_model, sum(self.splits), bias=cfg.bias)
        self.out = nn.Linear(self.splits[0], site.d_model, bias=cfg.bias)
        self.shift = ShortConv(site.d_model, cfg.token_shift, False, activation=None) if cfg.token_shift else None
        if cfg.qk_norm:
            self.q_norm = build_norm("rmsnorm", self.head_dim, site.norm_eps)
            self.k_norm = build_norm("rmsnorm", self.head_dim, site.norm_eps)

    def forward(
        self, x: Tensor, ctx: Ctx, state: AttentionState | None = None, donate: bool = False
    ) -> tuple[Tensor, AttentionState | None, Aux]:
        h = self.norm(x)
        if self.shift is not None:
            h, shift = self.shift.over(h, ctx.shared[ROWS], None if state is None else state.shift, donate)
            state = None if state is None else state._replace(shift=shift)
        q, k, v = self._heads(h, ctx)
        view: View = ctx.shared[self._view_key]
        if state is not None:
            state, k, v = self._remember(state, k, v, ctx, donate, view.extent)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=view.mask,
            is_causal=view.causal,
            dropout_p=self.cfg.dropout if self.training else 0.0,
            enable_gqa=self.kv_heads != self.heads,
        )
        return self.out(y.transpose(1, 2).flatten(2)), state, Aux()

    def _heads(self, h: Tensor, ctx: Ctx) -> tuple[Tensor, Tensor, Tensor]:
        """h [B, T, D] -> q [B, H, T, K], k and v [B, Hkv, T, K], normalised and rotated."""
        qkv = self.qkv(h).unflatten(-1, (-1, self.head_dim))  # [B, T, H + 2 Hkv, K]
        table = None if self.cfg.rope_theta is None else ctx.shared[self._rope_key]
        if table is not None and not self.cfg.qk_norm:
            q, k, v = split_rotate(qkv, table[0], table[1], self.heads, self.kv_heads)
        else:
            q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
            if self.cfg.qk_norm:
                q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
            if table is not None:
                q, k = (rotate(x, table[0], table[1]) for x in (q, k))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    # -- what all attention layers of a kind share in one forward

    @property
    def _rope_key(self) -> str:
        return f"rope.{self.cfg.rope_theta}.{self.head_dim}"

    @property
    def _view_key(self) -> str:
        return f"attention_view.{self.cfg.window}"

    def shared(self) -> dict[str, Callable[[Ctx, Any], Any]]:
        found: dict[str, Callable[[Ctx, Any], Any]] = {self._view_key: self._view}
        if self.cfg.rope_theta is not None:
            found[self._rope_key] = lambda ctx, _: rope_table(ctx.positions, self.cfg.rope_theta, self.head_dim)
        if self.shift is not None:
            found[ROWS] = rows_of
        return found

    def _view(self, ctx: Ctx, state: AttentionState | None) -> View:
        if state is not None:
            return self._view_of_state(ctx, state)
        window, T = self.cfg.window, ctx.tokens.shape[1]
        if ctx.cu_seqlens is None and ctx.valid is None and (window is None or window >= T):
            return View(None, True, T)
        index = torch.arange(T, device=ctx.tokens.device)
        age = index[:, None] - index[None, :]
        mask = (age >= 0)[None]
        if window is not None:  # padding does not count, so the distance is one of positions
            mask = mask & (ctx.positions[:, :, None] - ctx.positions[:, None, :] < window)
        if ctx.valid is not None:
            mask = mask & (ctx.valid[:, None, :] | (age == 0))
        if ctx.cu_seqlens is not None:
            segment = ctx.shared["segments"]
            mask = mask & (segment[:, :, None] == segment[:, None, :])
        return View(mask[:, None], False, T)

    def _view_of_state(self, ctx: Ctx, state: AttentionState) -> View:
        extent, T = self._extent(state, ctx), ctx.tokens.shape[1]
        if ctx.valid is None and not self._is_ring(ctx) and host_may_look(ctx):
            last = ctx.positions[:, -1]
            if bool((last == last[0]).all()):  # all rows are equally long: no mask where it would say nothing
                if T == 1:
                    return View(None, False, extent)
                if int(last[0]) == T - 1:
                    return View(None, True, extent)
        slots = self._slot_positions(state, ctx, extent)[:, None, :]
        age = ctx.positions[:, :, None] - slots
        mask = (age >= 0) & (slots >= 0)
        if self.cfg.window is not None:
            mask = mask & (age < self.cfg.window)
        if ctx.valid is not None:  # an invalid query sees something, so that its softmax stays finite
            mask = mask | ~ctx.valid[:, :, None]
        return View(mask[:, None], False, mask.shape[-1])

    # -- decode state

    def _capacity(self, max_len: int) -> int:
        return max_len if self.cfg.window is None else min(self.cfg.window, max_len)

    def init_state(self, batch: int, device: torch.device | str, dtype: torch.dtype, max_len: int) -> AttentionState:
        shape = (batch, self.kv_heads, self._capacity(max_len), self.head_dim)
        k, v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        return AttentionState(k, v, () if self.shift is None else self.shift.init_state(batch, device, dtype))

    def _extent(self, state: AttentionState, ctx: Ctx) -> int:
        """How many slots can be occupied. The host may only look where looking is free."""
        capacity = state.k.shape[2]
        if not host_may_look(ctx):
            return capacity
        needed = max(int(ctx.positions.max()) + 1, 1)
        if needed > capacity and capacity != self.cfg.window:
            raise UserError(f"context of {needed} tokens does not fit a state made for {capacity}")
        return min(capacity, needed)

    def _is_ring(self, ctx: Ctx) -> bool:
        """A ring overwrites what left the window: several tokens at once must see the old slots beside the new tokens."""
        return self.cfg.window is not None and ctx.tokens.shape[1] > 1

    def _slot_positions(self, state: AttentionState, ctx: Ctx, extent: int) -> Tensor:
        """Absolute position of each key that `_remember` returns, negative where there is none: [B, S]."""
        size = state.k.shape[2]
        if not self._is_ring(ctx):
            return ring_positions(_last(ctx), size)[:, :extent]
        new = ctx.positions if ctx.valid is None else ctx.positions.masked_fill(~ctx.valid, -1)
        return torch.cat((ring_positions(_before(ctx), size), new), dim=1)

    def _remember(
        self, state: AttentionState, k: Tensor, v: Tensor, ctx: Ctx, donate: bool, extent: int
    ) -> tuple[AttentionState, Tensor, Tensor]:
        """-> (state with these tokens, keys, values to attend to: ``extent`` of them, as many as the mask has)."""
        slot = ctx.positions % state.k.shape[2]
        old = state
        ring = self._is_ring(ctx)
        if ctx.valid is None and not ring:
            index = slot[:, None, :, None].expand_as(k)
            write = torch.Tensor.scatter_ if donate and not torch.is_grad_enabled() else torch.scatter
            new = (write(b, 2, index, n.to(b.dtype)) for b, n in ((old.k, k), (old.v, v)))
        else:
            new = _write_latest(old, (k, v), slot, ctx.valid)
        state = AttentionState(*new, shift=old.shift)
        if ring:
            return state, torch.cat((old.k.to(k.dtype), k), dim=2), torch.cat((old.v.to(v.dtype), v), dim=2)
        return state, state.k[:, :, :extent].to(k.dtype), state.v[:, :, :extent].to(v.dtype)

    # -- formulas

    def reset_parameters(self, generator: torch.Generator, depth: int) -> None:
        normal_(self.qkv.weight, self.site.init_std, generator)
        normal_(self.out.weight, self.site.init_std / math.sqrt(2 * depth), generator)
        for linear in (self.qkv, self.out):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        for norm in (self.norm, *((self.q_norm, self.k_norm) if self.cfg.qk_norm else ())):
            reset_norm(norm)
        if self.shift is not None:
            self.shift.reset_parameters(generator)

    def meta(self) -> dict[str, ParamMeta]:
        found = {**super().meta(), "qkv.weight": ParamMeta(splits=self.splits)}
        if self.shift is not None:
            found |= {f"shift.{key}": meta for key, meta in self.shift.meta().items()}
        return found

    def cost(self, seq_len: int, dtype: torch.dtype = torch.float32) -> Cost:
        window = min(self.cfg.window or seq_len, seq_len)
        # keys seen per query, averaged over a causal sequence: the first `window` queries see 1..window, the others window
        keys = (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len
        params = count_params(self)
        matmul = 2 * (self.qkv.weight.numel() + self.out.weight.numel())
        scores = 4 * self.heads * self.head_dim * keys
        state = 2 * self.kv_heads * self.head_dim * self._capacity(seq_len) * dtype.itemsize
        if self.shift is not None:
            matmul += self.shift.flops()
            state += (self.cfg.token_shift - 1) * self.site.d_model * dtype.itemsize
        return Cost(params, params, matmul + scores, state)


def _before(ctx: Ctx) -> Tensor:
    """The newest position before this call, -1 for none: [B, 1]."""
    first = ctx.positions[:, :1]
    return first - 1 if ctx.valid is None else first - ctx.valid[:, :1].long()


def _last(ctx: Ctx) -> Tensor:
    """The newest position after this call: [B, 1]."""
    return ctx.positions[:, -1:]


def _write_latest(
    buffers: AttentionState, new: tuple[Tensor, Tensor], slot: Tensor, valid: Tensor | None
) -> tuple[Tensor, ...]:
    """Write token t into its slot [B, T]; of several tokens for one slot the latest wins, invalid ones write nothing."""
    B, T = slot.shape
    size = buffers.k.shape[2]
    time = torch.arange(T, device=slot.device).expand(B, T)
    if valid is not None:
        slot = torch.where(valid, slot, size)  # one slot more than there are, cut off below
    source = torch.full((B, size + 1), -1, device=slot.device).scatter_reduce(1, slot, time, "amax")[
        :, None, :size, None
    ]
    index = source.clamp(min=0).expand(-1, new[0].shape[1], -1, new[0].shape[3])
    return tuple(
        torch.where(source >= 0, n.gather(2, index).to(b.dtype), b) for b, n in zip(buffers[:2], new, strict=True)
    )
