"""How tokens continue the state of B'MOJO (`models.mixers.bmojo`): several, laid in one line with what the rings hold, and one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.memory_attention import memory_attention
from kernels.prefix_topm import prefix_topm
from kernels.rope import rope_table, rotate
from models.mixers.bmojo_archive import Rows as Stored
from models.mixers.bmojo_keys import Keys, Places, Tokens
from models.mixers.bmojo_scores import rank
from models.mixers.bmojo_state import BMojoState, Line, Now, put, take
from models.mixers.pieces import Rows, host_may_look, ring_positions
from models.types import Ctx


class Decode(Keys):
    """A call with a state."""

    # -- several tokens that continue a state

    def _piece(self, tokens: Tokens, ctx: Ctx, state: BMojoState, places: Places) -> tuple[Tensor, BMojoState]:
        """-> (o [B, T, H, K], the state after these tokens)."""
        cfg, line, W = self.cfg, places.line, self.cfg.window
        q, k, v, memory_q, y, score = tokens
        assert line is not None
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
            memory_q = q_line if memory_q is None else given["memory_q"]
            chosen, kept, state = self._piece_kept(memory_q, k, v, kept, score, state, line)
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
        self, q: Tensor, k: Tensor, v: Tensor, kept: list[Tensor], score: Tensor, state: BMojoState, line: Line
    ) -> tuple[dict[str, Any], list[Tensor], BMojoState]:
        """q [B, N, H, K], k, v [B, N, Hkv, K] of the line, ``kept`` [B, Hkv, m_e, K] -> (what the op needs of eidetic rows,
        those kept from now on, and the state with their scores and positions)."""
        cfg, W, B = self.cfg, self.cfg.window, len(line.position)
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
        given = {"index": index, "since": since, "pool": pool}
        if self.cfg.archive is not None:
            given, state = self._piece_recalled(q, given, Stored(pool[0], pool[1], positions, all_scores), state, line)
        now = take(index.view(B, line.chunks, -1), (line.end - line.base) // W)[:, 0]  # of the next token's chunk
        there = now >= 0
        rows = [torch.where(there[..., None, None], x[now.clamp(min=0)], 0).transpose(1, 2) for x in pool]
        state = state._replace(
            position=torch.where(there, positions[now.clamp(min=0)], -1),
            score=torch.cat((line.roll(state.score[:, :W], score), torch.where(there, all_scores[now], 0)), 1),
        )
        rows = [row.to(old.dtype) for row, old in zip(rows, kept, strict=True)]
        return given, rows, state

    def _piece_recalled(
        self, q: Tensor, given: dict[str, Any], pool: Stored, state: BMojoState, line: Line
    ) -> tuple[dict[str, Any], BMojoState]:
        """What the op needs of eidetic rows -> the same with those that the archive found."""
        index, since, W = given["index"], given["since"], self.cfg.window
        kept = index.view(len(q), line.chunks, -1)
        archive, found = state.archive.turned_often(line.start, line.end, W, line.base, q, kept, pool)
        position = found.position.flatten(0, 1)  # [B n, S]
        places = pool.count + torch.arange(position.numel(), device=q.device).view_as(position)
        index = torch.cat((index, torch.where(position < 0, -1, places)), 1)
        own = self._since(line.position[:, ::W].reshape(-1, 1) - position)
        since = None if own is None else torch.cat((since, own), 1)
        tables = tuple(torch.cat((x, y.flatten(0, 2))) for x, y in ((pool.k, found.k), (pool.v, found.v)))
        return {"index": index, "since": since, "pool": tables}, state._replace(archive=archive)

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
        n = line.chunks
        starts = line.base + torch.arange(n + 1, device=y.device) * W  # the next chunk's rows may be there in part
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

    def _step(self, tokens: Tokens, state: BMojoState, now: Now, donate: bool) -> tuple[Tensor, BMojoState]:
        """-> (o [B, 1, H, K], the state after the token)."""
        cfg = self.cfg
        q, k, v, memory_q, y, score = tokens
        rows = [(now.slot, now.write, (k, v))]
        if now.fades:
            rows.append((cfg.window + cfg.m_e + now.fading_slot, now.fading_write, self._fading(y, now.position)))
        buffers = [state.k, state.v]
        for slot, here, new in rows:
            buffers = [put(b, slot, x.transpose(1, 2), here, 2, donate) for b, x in zip(buffers, new, strict=True)]
        state = state._replace(k=buffers[0], v=buffers[1])
        if score is not None:
            state = state._replace(score=put(state.score, now.slot, score, now.write, 1, donate))
        o = self._read(q, memory_q, state, now)
        turns = now.turns
        if cfg.archive is not None:
            turns = bool(now.turn.any())
            state = state._replace(archive=state.archive.heard(q if memory_q is None else memory_q, now.write))
        if turns and (score is not None or cfg.fading_mode == "chunk"):
            known = None if cfg.archive is None else self._could_be_kept(state, now)
            state = self._turned(state, now, donate)
            if known is not None:
                state = state._replace(archive=state.archive.turned(now.turn, known, state.position))
        return o, state

    def _now(self, ctx: Ctx, rows: Rows) -> Now:
        cfg, t, W, looks = self.cfg, ctx.positions, self.cfg.window, host_may_look(ctx)
        write = None if rows.index is None else rows.index >= 0
        ring, place = ring_positions(t, W), t % W
        turn = place == W - 1 if write is None else (place == W - 1) & write
        slot, seen, due = self._fading_now(t)
        due = write if due is None else due if write is None else due & write
        fades = cfg.m_f > 0 and (due is None or not looks or bool(due.any()))
        turns = not looks or bool(turn.any())
        return Now(t, t - W, place, write, ring, ring >= 0, seen, slot, due, fades, turn, turns)

    def _fading_now(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """t [B, 1] -> (the row for its output, which rows it sees [B, F], whether its output is kept [B, 1]; None: it is)."""
        cfg, W, m = self.cfg, self.cfg.window, self.cfg.m_f
        if not m:
            return t, torch.zeros_like(t, dtype=torch.bool)[:, :0], None
        if cfg.fading_mode == "chunk":  # rows in force, then those of the chunk that runs
            left = W - 1 - t % W
            i = left // cfg.stride
            force = torch.arange(2 * m, device=t.device) < m
            return m + i.clamp(max=m - 1), force & (t >= W), (left % cfg.stride == 0) & (i < m)
        position = ring_positions(t, cfg.fading_rows)
        old = 0 if cfg.fading_mode == "self" else W
        return t % cfg.fading_rows, (position >= 0) & (position <= t - old), None

    def _could_be_kept(self, state: BMojoState, now: Now) -> Stored:
        """Rows of the window and those kept so far [B, W + m_e, ...], in memory of their own."""
        k, v = (x[:, :, : self.cfg.window + self.cfg.m_e].transpose(1, 2).clone() for x in (state.k, state.v))
        positions = torch.cat((now.ring, state.position), 1)
        return Stored(k, v, positions, state.score.clone())

    def _read(self, q: Tensor, memory_q: Tensor | None, state: BMojoState, now: Now) -> Tensor:
        """q [B, 1, H, K] over the buffers -> [B, 1, H, K]."""
        W, K = self.cfg.window, self.head_dim
        k, v = state.k.to(q.dtype), state.v.to(q.dtype)
        if self.cfg.archive is not None:
            found = (state.archive.k, state.archive.v)
            k, v = (torch.cat((x, y.transpose(1, 2).to(x.dtype)), 2) for x, y in zip((k, v), found, strict=True))
        if memory_q is not None:  # a query of its own has columns of its own
            cos, sin = rope_table(now.ring, self.cfg.rope_theta, K)
            window = rotate(k[:, :, :W], cos.transpose(1, 2), sin.transpose(1, 2))
            k = torch.cat((F.pad(window, (0, K)), F.pad(k[:, :, W:], (K, 0))), 2)
            q = torch.cat((q, memory_q), -1)
        q = q.unflatten(2, (self.kv_heads, -1))[:, 0]  # the heads that read one key are rows of one product
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=self._seen(state, now)[:, None, None], scale=K**-0.5)
        return o.flatten(1, 2)[:, None]

    def _seen(self, state: BMojoState, now: Now) -> Tensor:
        """Which rows of the buffers, then of those that the archive found, the token sees: bool [B, S]."""
        cfg, newest = self.cfg, now.left if self.cfg.dedup else now.position

        def of_memory(position: Tensor) -> Tensor:
            return (position >= 0) & (position <= newest)

        seen = [now.ring_seen]
        if cfg.m_e:
            seen.append(of_memory(state.position))
        seen.append(now.fading_seen)
        if cfg.archive is not None:
            seen.append(of_memory(state.archive.position))
        rows = torch.cat(seen, 1)
        if now.write is None:
            return rows
        return rows | ~now.write  # what is no token sees something, or its softmax is no number

    def _turned(self, state: BMojoState, now: Now, donate: bool) -> BMojoState:
        """Where a chunk ends, eidetic rows are chosen anew and fading rows come into force."""
        cfg, W, m, B, turn = self.cfg, self.cfg.window, self.cfg.m_e, len(state.k), now.turn
        source = torch.arange(state.k.shape[2], device=turn.device).expand(B, -1)  # the row that each row becomes
        parts = [source[:, :W], source[:, W : W + m], source[:, W + m :]]
        if m:
            key = rank(state.score[:, :W], now.ring, cfg.evict_gamma)
            key = F.pad(key, (0, 1), value=-float("inf"))  # one row more, before whose chunk the whole ring counts
            chosen = prefix_topm(key, W, m, initial_key=self._kept_key(state)).view(B, 2, m)[:, 1]
            sequence = torch.arange(B, device=turn.device)[:, None]
            own, old = chosen - sequence * (W + 1), W + chosen - B * (W + 1) - sequence * m
            row = torch.where(chosen < 0, -1, torch.where(chosen < B * (W + 1), own, old))
            parts[1] = torch.where(turn, row, parts[1])
            positions = torch.cat((now.ring, state.position), 1)
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
