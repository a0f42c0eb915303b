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
from models.mixers.bmojo_keys import Keys, Places
from models.mixers.bmojo_scores import rank
from models.mixers.bmojo_state import BMojoState, Line, put, take
from models.mixers.rules import wide
from models.types import Ctx


class Decode(Keys):
    """A call with a state."""

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
        """q [B, n W, H, K], k, v [B, n W, Hkv, K] of the line, ``kept`` [B, Hkv, m_e, K] -> (what the op needs of eidetic rows,
        those kept from now on, and the state with their scores and positions)."""
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
        given = {"index": index, "since": since, "pool": pool}
        if self.cfg.archive is not None:
            given, state = self._piece_recalled(q, given, Stored(pool[0], pool[1], positions, all_scores), state, line)
        now = take(index.view(B, cells // W, -1), (line.end - line.base) // W)[:, 0]  # of the next token's chunk
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
        index, since, (B, cells), W = given["index"], given["since"], line.position.shape, self.cfg.window
        archive, found = state.archive.turned_often(
            line.start, line.end, W, line.base, q, index.view(B, cells // W, -1), pool
        )
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
        n = line.position.shape[1] // W
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
        looks = _host_may_look(ctx)
        if self.cfg.archive is not None:
            looks = True
            state = state._replace(archive=state.archive.heard(q if memory_q is None else memory_q, write))
        if (score is not None or self.cfg.fading_mode == "chunk") and (not looks or bool(turn.any())):
            known = None if self.cfg.archive is None else self._could_be_kept(state, t)
            state = self._turned(state, t, turn, donate)
            if known is not None:
                state = state._replace(archive=state.archive.turned(turn, known, state.position))
        return o, state

    def _could_be_kept(self, state: BMojoState, t: Tensor) -> Stored:
        """Rows of the window and those kept so far [B, W + m_e, ...], in memory of their own."""
        k, v = (x[:, :, : self.cfg.window + self.cfg.m_e].transpose(1, 2).clone() for x in (state.k, state.v))
        positions = torch.cat((_ring_positions(t, self.cfg.window), state.position), 1)
        return Stored(k, v, positions, state.score.clone())

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
        if self.cfg.archive is not None:
            found = (state.archive.k, state.archive.v)
            k, v = (torch.cat((x, y.transpose(1, 2).to(x.dtype)), 2) for x, y in zip((k, v), found, strict=True))
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
        """Which rows of the buffers, then of those that the archive found, the token at t [B, 1] sees: bool [B, S]."""
        cfg, W = self.cfg, self.cfg.window

        def of_memory(position: Tensor) -> Tensor:
            return (position >= 0) & ((t - position >= W) | (not cfg.dedup))

        seen = [_ring_positions(t, W) >= 0]
        if cfg.m_e:
            seen.append(of_memory(state.position))
        if cfg.m_f and cfg.fading_mode == "chunk":
            force = torch.arange(2 * cfg.m_f, device=t.device) < cfg.m_f
            seen.append(force & (t >= W))
        elif cfg.m_f:
            position = _ring_positions(t, cfg.fading_rows)
            old = {"point": W, "band": W, "self": 0}[cfg.fading_mode]
            seen.append((position >= 0) & (t - position >= old))
        if cfg.archive is not None:
            seen.append(of_memory(state.archive.position))
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


def _host_may_look(ctx: Ctx) -> bool:
    """Reading a tensor's values waits for nothing on a CPU; a compiled graph must not depend on them."""
    return ctx.positions.device.type == "cpu" and not torch.compiler.is_compiling()


def _ring_positions(t: Tensor, size: int) -> Tensor:
    """t [B, 1], the newest position -> the position in each slot of a ring, negative where it is empty: [B, size]."""
    slot = torch.arange(size, device=t.device)
    return t - (t - slot) % size
