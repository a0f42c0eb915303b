"""Plain forms of the cell. ``recurrent`` is the definition, ``forward`` and ``backward`` are fast.

With a = w_src, b = w_tgt, e = b - a, r the scale, P = r e, and the gradients dA, dB that reach a and b from elsewhere:

    dV = P^T dy             p = dy V^T,   t = r^2 (p . e) / D,   dG = -1/2 (t P)^T e
    de = r (p - t e G)      dz_tgt = b * (g - b . g) with g = de + dB               dM = dz_tgt^T x
    dh, of h = a S, is dz_tgt, or edge_scale dz_tgt / (h + 1e-6)                   dS = a^T dh
    dz_src = a * (g - a . g) with g = dh S^T - de + dA                             dcos = dz_src temperature z_src^2, 0 at the floor
    dx = (dcos c - (dcos . cos) x / |x|) / |x| + dz_tgt M                          dc = (dcos / |x|)^T x
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.library import Tensors

EDGE_EPS = 1e-6  # inside the logarithm of an edge's probability
NORM_EPS = 1e-12  # a token's norm is at least this
AT_FLOOR = 1e-5  # a distance this close to the floor is at the floor: it is made from its softmax again


def recurrent(
    x: Tensor,
    directions: Tensor,
    scores: Tensor,
    edges: Tensor,
    values: Tensor,
    temperature: Tensor,
    gram: Tensor | None,
    bias: Tensor | None,
    edge_scale: Tensor | None,
    floor: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Token by token. Arguments as of the public function -> (y, w_src, w_tgt)."""
    found = []
    for token in x:
        cos = directions @ (token / token.norm().clamp(min=NORM_EPS))
        source = (1 / (temperature * (1 - cos).clamp(min=floor))).softmax(0)
        hop = source @ edges
        if edge_scale is not None:
            hop = edge_scale * (hop + EDGE_EPS).log()
        target = (hop + scores @ token).softmax(0)
        moved = target - source
        y = moved @ values
        if gram is not None:
            y = y / (moved @ gram @ moved / len(token) + eps).sqrt()
        found.append((y if bias is None else y + bias, source, target))
    y, source, target = (torch.stack(part) for part in zip(*found, strict=True))
    return y, source, target


def forward(tensors: Tensors, options: Sequence[float], backend: str) -> list[Tensor]:
    """(x, directions, scores, edges, values, gram, bias, temperature, edge scale), (floor, eps) ->
    [y, w_src, w_tgt, scale, nearest, distance; 1 / |x|, z_src, w_src S + 1e-6 and its logarithm, (w_tgt - w_src) G].

    The last three are empty where the backward does not need them.
    """
    x, directions, scores, edges, values, gram, bias, temperature, edge_scale = _wide(tensors)
    assert x is not None
    assert directions is not None
    assert scores is not None
    assert edges is not None
    assert values is not None
    assert temperature is not None
    n, f = len(x), len(directions)
    inverse = torch.linalg.vector_norm(x, dim=1).clamp_(min=NORM_EPS).reciprocal_()
    logits = x @ torch.cat([directions, scores]).T
    z = logits[:, :f].mul((inverse * -temperature)[:, None]).add_(temperature)
    z.clamp_(min=options[0] * temperature).reciprocal_()
    top, nearest = z.max(1)
    source = z.softmax(1)
    hop, log_hop, pulled = (x.new_empty(0, f) for _ in range(3))  # no two results of an op may be one tensor
    if edge_scale is None:
        target = torch.addmm(logits[:, f:], source, edges).softmax(1)
    else:
        hop = (source @ edges).add_(EDGE_EPS)
        log_hop = hop.log()
        target = (log_hop * edge_scale).add_(logits[:, f:]).softmax(1)
    moved = target - source
    scale = x.new_ones(n)
    if gram is not None:
        pulled = moved @ gram
        scale = torch.linalg.vecdot(pulled, moved).div_(x.shape[1]).clamp_(min=0).add_(options[1]).rsqrt_()
        moved.mul_(scale[:, None])
    y = moved @ values if bias is None else torch.addmm(bias, moved, values)
    given = tensors[0]
    assert given is not None
    distance = (top * temperature).reciprocal_()
    return [y.to(given.dtype), source, target, scale, nearest.int(), distance, inverse, z, hop, log_hop, pulled]


def backward(
    tensors: Tensors,
    saved: Sequence[Tensor],
    grads: Tensors,
    needs: Sequence[bool],
    options: Sequence[float],
    backend: str,
) -> Tensors:
    """One gradient per tensor of ``forward``, none for the temperature. Those of tables with D columns are made transposed, which is
    the faster product on a CPU."""
    x, directions, scores, edges, values, gram, bias, temperature, edge_scale = _wide(tensors)
    dy, d_source, d_target, *_ = _wide(grads)
    inverse, z, hop, log_hop, pulled, source, target, scale = saved
    assert x is not None
    assert directions is not None
    assert scores is not None
    assert edges is not None
    assert values is not None
    assert temperature is not None
    f, moved = len(directions), target - source
    if dy is None:
        dy = torch.zeros_like(x)
    d_moved, rows = dy @ values.T, scale[:, None]
    scaled = moved * rows
    d_gram = None
    if gram is not None:
        radial = torch.linalg.vecdot(d_moved, scaled).div_(x.shape[1])[:, None].mul_(rows)
        d_moved.addcmul_(pulled, radial, value=-1)
        d_gram = (moved.mul_(radial).T @ scaled).mul_(-0.5)
    d_moved.mul_(rows)

    d_logits = x.new_empty(len(x), 2 * f)
    d_target_logits = d_logits[:, f:]
    _softmax_gradient(d_moved if d_target is None else torch.add(d_moved, d_target, out=moved), target, d_target_logits)
    d_hop, d_edge_scale = d_target_logits, None
    if edge_scale is not None:
        d_edge_scale = torch.linalg.vecdot(d_target_logits, log_hop).sum()
        d_hop = (d_target_logits * edge_scale).div_(hop)
    d_chosen = (d_hop @ edges.T).sub_(d_moved)
    if d_source is not None:
        d_chosen += d_source
    d_z = _softmax_gradient(d_chosen, source, d_chosen)
    free = ((options[0] * temperature).reciprocal() - z).sign_().mul_(z)  # z, and 0 at the floor
    once = d_z.mul_(free).sum(1)
    d_cosine = d_z.mul_(free)
    along = (d_cosine.sum(1).mul_(temperature) - once).mul_(inverse).mul_(inverse)[:, None]
    torch.mul(d_cosine, (inverse * temperature)[:, None], out=d_logits[:, :f])

    dx = (d_logits @ torch.cat([directions, scores])).addcmul_(x, along, value=-1)
    d_tables = (x.T @ d_logits).T
    found = [dx, d_tables[:f], d_tables[f:], source.T @ d_hop, (dy.T @ scaled).T, d_gram, None, None, d_edge_scale]
    if bias is not None:
        found[6] = dy.sum(0)
    return [None if g is None or t is None else g.to(t.dtype) for g, t in zip(found, tensors, strict=True)]


def _softmax_gradient(grad: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    """weights * (grad - weights . grad), into ``out``."""
    return torch.mul(grad - torch.linalg.vecdot(weights, grad)[:, None], weights, out=out)


def _wide(tensors: Tensors) -> Tensors:
    """In at least fp32."""
    return [None if t is None else t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]
