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
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kernels.chunks import Chunks, chunks
from kernels.memory_attention import memory_attention
from kernels.prefix_topm import prefix_topm
from kernels.rope import rope_table, rotate
from models.mixers.bmojo_archive import Recall
from models.mixers.bmojo_decode import Decode
from models.mixers.bmojo_keys import Places, Tokens
from models.mixers.bmojo_scores import (
    CONTROLS,
    control,
    innovation,
    past_of,
    predict,
    rank,
    write_error,
    write_error_flops,
)
from models.mixers.bmojo_state import BMojoState, line_of
from models.mixers.pieces import ROWS, Rows, rows_of
from models.mixers.rules import wide
from models.types import (
    Aux,
    CommitInfo,
    Cost,
    Ctx,
    ParamMeta,
    RowReset,
    Stat,
    State,
    Write,
    count_params,
    normal_,
    reset_norm,
)


class BMojo(Decode):
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
            return self.out(self._alone(y)), None if state is None else state._replace(ssm=ssm), aux
        places: Places = ctx.shared[self._places_key]
        h, shift = self._shifted(u, places.rows, state, donate)
        q, k, v = self._heads(h)
        q, k, memory_q = self._in_window(q, k, ctx)
        score, outputs = self._score(y, error, ctx, places.rows, state)
        tokens = Tokens(q, k, v, memory_q, y, score)
        if state is None:
            o, stats = self._whole(tokens, ctx, places)
            aux = aux._replace(stats=aux.stats | stats)
        else:
            state = state._replace(ssm=ssm, shift=shift, outputs=outputs)
            if places.now is not None:
                o, state = self._step(tokens, state, places.now, donate)
            else:
                o, state = self._piece(tokens, ctx, state, places)
        return self.out(o.flatten(2)), state, aux

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
        prediction, outputs = predict(y, ctx.shared[self._past_key], rows, before)
        score = innovation(cfg.score, y, prediction)
        if cfg.score_debias:
            seen = ctx.positions.clamp(0, cfg.score_k)
            score = score * (seen / (seen + 1)).where(seen > 0, 1)
        return self._floored(score), () if outputs is None else outputs

    def _floored(self, score: Tensor) -> Tensor:
        return score.masked_fill(score < self.cfg.score_floor, 0).float()

    # -- whole sequences

    def _whole(self, tokens: Tokens, ctx: Ctx, places: Places) -> tuple[Tensor, dict[str, Stat]]:
        """-> (o [B, T, H, K], what is kept)."""
        cfg, rows, at, stats = self.cfg, places.rows, places.chunks, {}
        q, k, v, memory_q, y, score = tokens
        assert at is not None
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

    # -- what all layers of a window share in one forward

    def shared(self) -> dict[str, Callable[[Ctx, Any], Any]]:
        def unwrapped(fn: Callable[[Ctx, Any], Any]) -> Callable[[Ctx, Any], Any]:
            return lambda ctx, state: fn(ctx, None if state is None else state.ssm)

        found = {key: unwrapped(fn) for key, fn in self.ssm.shared().items()} | {ROWS: rows_of}
        if self.cfg.window:
            found[self._places_key] = self._places
        if self.cfg.window and self.cfg.predicts:
            dtype = wide(self.qkv.weight.dtype)
            found[self._past_key] = lambda ctx, _: past_of(self.cfg.weights, ctx.positions, dtype)
        if self.cfg.pos != "nope":
            found[self._rope_key] = lambda ctx, _: rope_table(ctx.positions, self.cfg.rope_theta, self.head_dim)
        return found

    def _places(self, ctx: Ctx, state: BMojoState | None) -> Places:
        rows, (B, T), W = rows_of(ctx, state), ctx.tokens.shape, self.cfg.window
        if state is not None:
            if T == 1:
                return Places(rows, None, None, self._now(ctx, rows))
            return Places(rows, None, line_of(ctx, W, self.cfg.back), None)
        B, T = (B, T) if rows.order is None else (1, B * T)
        return Places(rows, chunks(B, T, rows.cu_seqlens, W, ctx.tokens.device), None, None)

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
            ()
            if cfg.archive is None
            else Recall.empty(cfg.archive, batch, self.kv_heads, self.head_dim, device, dtype),
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
        if cfg.archive is not None:  # what it found; what it holds lies in host memory
            slots = self.kv_heads * cfg.archive.rows
            state += kv * (slots * dtype.itemsize + max(dtype.itemsize, 4) // 2) + 8 * slots
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
