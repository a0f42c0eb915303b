"""Plain forms of attention over a window and memory. ``dense`` is the definition: one mask over all keys. ``forward`` and
``backward`` go tile by tile: a tile of queries lies in one chunk, so that its keys are a few slices, and no tensor is T x T.

Each kind of keys is a branch with scores of its own; they meet in the log of the sum of their exponentials. Because the backward
computes P = exp(S - LSE) with that common LSE, and D = rowsum(dO * O) with the common O, each branch's gradients are exact alone:

    dV = P^T dO,    dS = scale P * (dO V^T - D),    dQ = dS K,    dK = dS^T Q
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.chunks import chunks
from kernels.library import Tensors
from kernels.memory_attention.branches import Branch, Grid, Kept, Own, Window, grid


def dense(tensors: Tensors, options: Sequence[float]) -> Tensor:
    """Tensors and options as of ``forward`` -> o [B, T, H, K], differentiable."""
    q, k, v, pool_k, pool_v, fading_k, fading_v, memory_q, index, since, cu = tensors
    assert q is not None
    assert k is not None
    assert v is not None
    (B, T, H, K), window, fading, scale = q.shape, int(options[0]), int(options[1]), options[2]
    at, N = chunks(B, T, cu, window, q.device), B * T
    position = at.before[at.slot] + at.offset
    start = torch.arange(N, device=q.device) - position  # the first row of the segment
    same = start[:, None] == start
    age = position[:, None] - position
    keys, values = [k.flatten(0, 1)], [v.flatten(0, 1)]
    masks, mine = [same & (age >= 0) & (age < window)], [q]
    memory_q = q if memory_q is None else memory_q
    if index is not None:
        rows_k, rows_v = (keys[0], values[0]) if pool_k is None or pool_v is None else (pool_k, pool_v)
        keys.append(rows_k[index.clamp(min=0).flatten()])
        values.append(rows_v[index.clamp(min=0).flatten()])
        slot = torch.arange(len(index), device=q.device)[:, None].expand_as(index).flatten()
        open_ = (index >= 0).flatten() & (at.slot[:, None] == slot)
        masks.append(open_ if since is None else open_ & (since.flatten() <= at.offset[:, None]))
        mine.append(memory_q)
    if fading_k is not None and fading_v is not None:
        keys.append(fading_k.flatten(0, 1))
        values.append(fading_v.flatten(0, 1))
        slot = torch.arange(len(fading_k), device=q.device).repeat_interleave(fading_k.shape[1])
        masks.append(
            [
                (at.slot[:, None] == slot) & (position >= window)[:, None] if fading == 0 else masks[0],
                same & (age == window),
                same & (age >= window) & (age < 2 * window),
                same & (age == 0),
            ][fading]
        )
        mine.append(memory_q)
    scores = [
        torch.einsum("nhgk,mhk->hgnm", x.flatten(0, 1).unflatten(1, (k.shape[2], -1)), y)
        for x, y in zip(mine, keys, strict=True)
    ]
    scores = (torch.cat(scores, -1) * scale).masked_fill(~torch.cat(masks, 1), -float("inf"))
    o = torch.einsum("hgnm,mhk->nhgk", scores.softmax(-1), torch.cat(values)).reshape(B, T, H, K)
    inside = torch.ones(N, 1, device=q.device) if cu is None else (torch.arange(N, device=q.device) < cu[-1])[:, None]
    return o * inside.view(B, T, 1, 1)


def forward(tensors: Tensors, options: Sequence[float], backend: str) -> list[Tensor]:
    """(q, k, v, pool k, pool v, fading k, fading v, memory q, index, since, cu_seqlens), (window, kind of fading, scale) ->
    [o [B, T, H, K], LSE [B, T, H]]."""
    at, branches, rows = _laid_out(tensors, options)
    o, total = torch.empty_like(rows[0]), torch.empty_like(rows[0][..., :1])
    for tile in at.tiles:
        mine = [_of_tile(x, tile) for x in rows]
        scores = [branch.scores(mine[branch.query], tile) for branch in branches]
        peak = torch.stack([s.amax(-1, keepdim=True) for s in scores]).amax(0)
        weights = [s.sub_(peak).exp_() for s in scores]
        mass = torch.stack([w.sum(-1, keepdim=True) for w in weights]).sum(0)
        said = torch.stack([branch.read(w, tile) for branch, w in zip(branches, weights, strict=True)]).sum(0)
        _put(o, tile, said.div_(mass))
        _put(total, tile, peak + mass.log_())
    given: Any = tensors[0]
    return [at.rows(o).to(given.dtype), at.rows(total)[..., 0].contiguous()]


def backward(
    tensors: Tensors,
    saved: Sequence[Tensor],
    grads: Tensors,
    needs: Sequence[bool],
    options: Sequence[float],
    backend: str,
) -> Tensors:
    """One gradient per tensor, None for integers."""
    at, branches, rows = _laid_out(tensors, options)
    (total, o), do = saved, grads[0]
    assert do is not None
    drop = torch.linalg.vecdot(do.to(total.dtype), o.to(total.dtype))
    up, drop, total = (at.queries(x) for x in (do, drop[..., None], total[..., None]))
    found = [torch.zeros_like(x) for x in rows]
    for tile in at.tiles:
        mine = [_of_tile(x, tile) for x in rows]
        do_tile, drop_tile, total_tile = (_of_tile(x, tile) for x in (up, drop, total))
        for branch in branches:
            p = branch.scores(mine[branch.query], tile).sub_(total_tile).exp_()
            ds = branch.agreement(do_tile, tile).sub_(drop_tile).mul_(p)
            branch.push(ds, mine[branch.query], p, do_tile, tile)
            dq = found[branch.query][:, :, tile]
            dq += branch.pull(ds, tile).view(dq.shape)
    gradients: list[Tensor | None] = [None] * len(tensors)
    for place, x in zip((0, 7), found, strict=False):
        gradients[place] = at.rows(x * options[2])
    for place, x in [pair for branch in branches for pair in branch.gradients()]:
        given, old = tensors[place], gradients[place]
        assert given is not None
        gradients[place] = x.view(given.shape) if old is None else old + x.view(given.shape)
    return [None if g is None or t is None else g.to(t.dtype) for g, t in zip(gradients, tensors, strict=True)]


def _laid_out(tensors: Tensors, options: Sequence[float]) -> tuple[Grid, list[Branch], list[Tensor]]:
    """-> (the chunks, the kinds of keys there are, the scaled query and the one of the memory if it has its own [Z, g, C, K])."""
    q, k, v, pool_k, pool_v, fading_k, fading_v, memory_q, index, since, cu = tensors
    assert q is not None
    assert k is not None
    assert v is not None
    window, fading, scale = int(options[0]), int(options[1]), options[2]
    at = grid(q, k, cu, window)
    query, slot = int(memory_q is not None), slice(None) if at.slot is None else at.slot
    found: list[Branch] = [Window(at, k, v, (1, 2), 0, 0)]
    if fading_k is not None and fading_v is not None:
        if fading == 0:
            n = fading_k.shape[1]
            rows = torch.arange(len(fading_k) * n, device=q.device).view(-1, n)[slot]
            from_ = torch.where(at.number > 0, 0, window)[:, None].expand(-1, n)
            found.append(Kept(at, fading_k.flatten(0, 1), fading_v.flatten(0, 1), rows, from_, (5, 6), query))
        elif fading == 2:
            found.append(Window(at, fading_k, fading_v, (5, 6), 1, query))
        else:
            found.append(Own(at, fading_k, fading_v, (5, 6), int(fading == 1), query))
    if index is not None:
        from_ = torch.where(index < 0, window, 0 if since is None else since)[slot]
        tables, places = (k.flatten(0, 1), v.flatten(0, 1)), (1, 2)
        if pool_k is not None and pool_v is not None:
            tables, places = (pool_k, pool_v), (3, 4)
        found.append(Kept(at, *tables, index.clamp(min=0)[slot], from_, places, query))
    return at, found, [at.queries(x).mul_(scale) for x in (q, memory_q) if x is not None]


def _of_tile(x: Tensor, tile: slice) -> Tensor:
    """x [Z, g, C, K] -> [Z, g R, K]."""
    return x[:, :, tile].flatten(1, 2)


def _put(x: Tensor, tile: slice, part: Tensor) -> None:
    """The reverse: into x."""
    at = x[:, :, tile]
    at.copy_(part.view(at.shape))
