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
    [y, w_src, w_tgt, scale, nearest, distance; 1 / |x|, the log of the sum of exp(z_src)]."""
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
    z = logits[:, :f].mul(inverse[:, None]).neg_().add_(1).clamp_(min=options[0]).mul_(temperature).reciprocal_()
    top, nearest = z.max(1)
    total = z.logsumexp(1)
    source = z.sub_(total[:, None]).exp_()
    if edge_scale is None:
        target = torch.addmm(logits[:, f:], source, edges).softmax(1)
    else:
        hop = (source @ edges).add_(EDGE_EPS).log_().mul_(edge_scale)
        target = hop.add_(logits[:, f:]).softmax(1)
    moved = target - source
    scale = x.new_ones(n)
    if gram is not None:
        scale = torch.linalg.vecdot(moved @ gram, moved).div_(x.shape[1]).clamp_(min=0).add_(options[1]).rsqrt_()
        moved.mul_(scale[:, None])
    y = moved @ values if bias is None else torch.addmm(bias, moved, values)
    given = tensors[0]
    assert given is not None
    distance = (top * temperature).reciprocal_()
    return [y.to(given.dtype), source, target, scale, nearest.int(), distance, inverse, total]


def backward(
    tensors: Tensors,
    saved: Sequence[Tensor],
    grads: Tensors,
    needs: Sequence[bool],
    options: Sequence[float],
    backend: str,
) -> Tensors:
    """One gradient per tensor of ``forward``, none for the temperature."""
    x, directions, scores, edges, values, gram, bias, temperature, edge_scale = _wide(tensors)
    dy, d_source, d_target, *_ = _wide(grads)
    inverse, total, source, target, scale = saved
    assert x is not None
    assert directions is not None
    assert scores is not None
    assert edges is not None
    assert values is not None
    assert temperature is not None
    f, moved = len(directions), target - source
    if dy is None:
        dy = torch.zeros_like(x)
    d_moved = (dy @ values.T).mul_(scale[:, None])
    scaled = moved * scale[:, None]
    d_gram = None
    if gram is not None:
        radial = torch.linalg.vecdot(d_moved, moved).mul_(scale).div_(x.shape[1])[:, None]
        d_moved.sub_((scaled @ gram).mul_(radial))
        d_gram = (scaled * radial).T @ moved * -0.5

    force = d_moved if d_target is None else d_moved + d_target
    d_logits = x.new_empty(len(x), 2 * f)
    d_target_logits = torch.mul(target, force - torch.linalg.vecdot(target, force)[:, None], out=d_logits[:, f:])
    d_hop, d_edge_scale = d_target_logits, None
    if edge_scale is not None:
        hop = (source @ edges).add_(EDGE_EPS)
        d_edge_scale = torch.linalg.vecdot(d_target_logits, hop.log()).sum()
        d_hop = (d_target_logits * edge_scale).div_(hop)
    force = (d_hop @ edges.T).sub_(d_moved)
    if d_source is not None:
        force += d_source
    force.sub_(torch.linalg.vecdot(source, force)[:, None]).mul_(source)
    z = source.clamp(min=torch.finfo(source.dtype).tiny).log_().add_(total[:, None])
    cosine = (z * temperature).reciprocal_().neg_().add_(1)
    free = cosine < 1 - options[0] * (1 + AT_FLOOR)
    d_cosine = force.mul_(z.square_()).mul_(temperature).mul_(free)
    along = torch.linalg.vecdot(d_cosine, cosine).mul_(inverse).mul_(inverse)[:, None]
    d_logits[:, :f] = d_cosine.mul_(inverse[:, None])

    dx = (d_logits @ torch.cat([directions, scores])).addcmul_(x, along, value=-1)
    d_tables = d_logits.T @ x
    found = [
        dx,
        d_tables[:f].clone(),
        d_tables[f:].clone(),
        source.T @ d_hop,
        scaled.T @ dy,
        d_gram,
        None,
        None,
        d_edge_scale,
    ]
    if bias is not None:
        found[6] = dy.sum(0)
    return [None if g is None or t is None else g.to(t.dtype) for g, t in zip(found, tensors, strict=True)]


def _wide(tensors: Tensors) -> Tensors:
    """In at least fp32."""
    return [None if t is None else t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]
