"""The kernels of the memory cell; names and algebra are those of ``reference``.

Tables come in the dtype of x, but for the directions: their cosines become logits of up to 100 / temperature, so narrow ones come as
two tables, what fits and the rest. A program has BT tokens and all F slots, BF columns wide.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false
# (the checker takes what Triton compiles for Python)

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gmt_cell.reference import AT_FLOOR, EDGE_EPS, NORM_EPS
from kernels.triton import offsets

_AT_FLOOR = tl.constexpr(AT_FLOOR)
_EDGE_EPS = tl.constexpr(EDGE_EPS)
_NORM_EPS = tl.constexpr(NORM_EPS)


@triton.jit
def _logits(
    x, directions, rest, scores, live,
    D: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, REST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """-> (x c^T, x M^T, 1 / |x|)."""
    r, f, d = tl.arange(0, BT), tl.arange(0, BF), tl.arange(0, BD)
    cosine = tl.zeros((BT, BF), tl.float32)
    score = tl.zeros((BT, BF), tl.float32)
    square = tl.zeros((BT,), tl.float32)
    at = tl.trans(offsets(f, d, D))
    for j in tl.range(0, D, BD, disable_licm=True):
        rows = tl.load(x + j + offsets(r, d, D), mask=live[:, None] & (j + d < D)[None, :], other=0.0)
        wide = rows.to(tl.float32)
        square += tl.sum(wide * wide, 1)
        inside = (f < F)[None, :] & (j + d < D)[:, None]
        tile = tl.load(directions + j + at, mask=inside, other=0.0)
        cosine = tl.dot(rows, tile, cosine, input_precision=PRECISION)
        if REST:
            tile = tl.load(rest + j + at, mask=inside, other=0.0)
            cosine = tl.dot(rows, tile, cosine, input_precision=PRECISION)
        tile = tl.load(scores + j + at, mask=inside, other=0.0)
        score = tl.dot(rows, tile, score, input_precision=PRECISION)
    return cosine, score, 1.0 / tl.maximum(tl.sqrt(square), _NORM_EPS)


@triton.jit(do_not_specialize=["rows"])
def forward(
    x, directions, rest, scores, edges, values, gram, bias, temperature, edge_scale,
    y, w_source, w_target, scales, nearest, distances, inverses, totals,
    rows, floor, eps,
    D: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    REST: tl.constexpr, LOG: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The whole cell of BT tokens."""
    first = tl.program_id(0).to(tl.int64) * BT
    r, f, d = tl.arange(0, BT), tl.arange(0, BF), tl.arange(0, BN)
    live, real = r < rows - first, (f < F)[None, :]
    inside, square = live[:, None] & real, (f < F)[:, None] & real
    found = _logits(x + first * D, directions, rest, scores, live, D, F, BF, BT, BD, REST, PRECISION)
    cosine, score, inverse = found
    tl.store(inverses + first + r, inverse, mask=live)
    z = 1.0 / (tl.maximum(1.0 - cosine * inverse[:, None], floor) * tl.load(temperature))
    z = tl.where(real, z, float("-inf"))
    top = tl.max(z, 1)
    tl.store(nearest + first + r, tl.min(tl.where(z == top[:, None], f[None, :], BF), 1), mask=live)
    tl.store(distances + first + r, 1.0 / (top * tl.load(temperature)), mask=live)
    source = tl.exp(z - top[:, None])
    total = tl.sum(source, 1)
    tl.store(totals + first + r, top + tl.log(total), mask=live)
    source /= total[:, None]
    w_source += first * F + offsets(r, f, F)
    tl.store(w_source, source, mask=inside)
    table = tl.load(edges + offsets(f, f, F), mask=square, other=0.0)
    hop = tl.dot(source.to(edges.dtype.element_ty), table, input_precision=PRECISION)
    if LOG:
        hop = tl.load(edge_scale) * tl.log(hop + _EDGE_EPS)
    z = tl.where(real, hop + score, float("-inf"))
    # Read back, because it would not fit into registers beside the rest; other threads may have written it.
    tl.debug_barrier()
    source = tl.load(w_source, mask=inside, other=0.0)
    target = tl.exp(z - tl.max(z, 1)[:, None])
    target /= tl.sum(target, 1)[:, None]
    tl.store(w_target + first * F + offsets(r, f, F), target, mask=inside)
    moved = (target - source).to(values.dtype.element_ty)
    scale = tl.zeros((BT,), tl.float32) + 1.0
    if NORM:
        table = tl.load(gram + offsets(f, f, F), mask=square, other=0.0)
        spread = tl.dot(moved, table, input_precision=PRECISION)
        variance = tl.sum(spread * moved.to(tl.float32), 1) / D
        scale = 1.0 / tl.sqrt(tl.maximum(variance, 0.0) + eps)
    tl.store(scales + first + r, scale, mask=live)
    y += first * D
    for j in tl.range(0, D, BN, disable_licm=True):
        in_d = j + d < D
        tile = tl.load(values + j + offsets(f, d, D), mask=(f < F)[:, None] & in_d[None, :], other=0.0)
        out = tl.dot(moved, tile, input_precision=PRECISION) * scale[:, None]
        if BIAS:
            out += tl.load(bias + j + d, mask=in_d, other=0.0).to(tl.float32)[None, :]
        tl.store(y + j + offsets(r, d, D), out.to(y.dtype.element_ty), mask=live[:, None] & in_d[None, :])


@triton.jit(do_not_specialize=["rows"])
def target_gradient(
    pull, d_target, edges, gram, edge_scale, w_source, w_target, scales, d_logits, scaled, d_hop, radials, d_edge_scales,
    rows,
    D: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, BT: tl.constexpr,
    LOG: tl.constexpr, NORM: tl.constexpr, GIVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From pull = dy V^T [N, F], overwritten with de, to dz_tgt (the second half of d_logits [N, 2 F]), dh, P and each token's
    share of the gradient of edge_scale."""
    first = tl.program_id(0).to(tl.int64) * BT
    r, f = tl.arange(0, BT), tl.arange(0, BF)
    live, real = r < rows - first, (f < F)[None, :]
    inside, square = live[:, None] & real, (f < F)[:, None] & real
    at = first * F + offsets(r, f, F)
    narrow: tl.constexpr = edges.dtype.element_ty
    moved = tl.load(w_target + at, mask=inside, other=0.0) - tl.load(w_source + at, mask=inside, other=0.0)
    moved = moved.to(narrow)
    scale = tl.load(scales + first + r, mask=live, other=0.0)
    force = tl.load(pull + at, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        radial = tl.sum(force * moved.to(tl.float32), 1) * scale * scale / D
        tl.store(radials + first + r, radial, mask=live)
        table = tl.load(gram + offsets(f, f, F), mask=square, other=0.0)
        force -= radial[:, None] * tl.dot(moved, table, input_precision=PRECISION)
    force *= scale[:, None]
    tl.store(pull + at, force.to(pull.dtype.element_ty), mask=inside)
    tl.store(scaled + at, (moved.to(tl.float32) * scale[:, None]).to(scaled.dtype.element_ty), mask=inside)
    if GIVEN:
        force += tl.load(d_target + at, mask=inside, other=0.0).to(tl.float32)
    target = tl.load(w_target + at, mask=inside, other=0.0)
    force = target * (force - tl.sum(target * force, 1)[:, None])
    at_logits = first * (2 * F) + F + offsets(r, f, 2 * F)
    tl.store(d_logits + at_logits, force.to(d_logits.dtype.element_ty), mask=inside)
    if LOG:
        source = tl.load(w_source + at, mask=inside, other=0.0).to(narrow)
        table = tl.load(edges + offsets(f, f, F), mask=square, other=0.0)
        hop = tl.dot(source, table, input_precision=PRECISION) + _EDGE_EPS
        tl.store(d_edge_scales + first + r, tl.sum(force * tl.log(hop), 1), mask=live)
        force *= tl.load(edge_scale) / hop
    tl.store(d_hop + at, force.to(d_hop.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def source_gradient(
    d_hop, d_moved, d_source, edges, temperature, w_source, totals, inverses, d_logits, along,
    rows, floor,
    F: tl.constexpr, BF: tl.constexpr, BT: tl.constexpr, GIVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dcos / |x| (the first half of d_logits), and dcos . cos / |x|^2 of each token."""
    first = tl.program_id(0).to(tl.int64) * BT
    r, f = tl.arange(0, BT), tl.arange(0, BF)
    live, real = r < rows - first, (f < F)[None, :]
    inside = live[:, None] & real
    at = first * F + offsets(r, f, F)
    table = tl.load(edges + offsets(f, f, F), mask=(f < F)[:, None] & real, other=0.0)
    force = tl.dot(tl.load(d_hop + at, mask=inside, other=0.0), tl.trans(table), input_precision=PRECISION)
    force -= tl.load(d_moved + at, mask=inside, other=0.0).to(tl.float32)
    if GIVEN:
        force += tl.load(d_source + at, mask=inside, other=0.0).to(tl.float32)
    source = tl.load(w_source + at, mask=inside, other=0.0)
    force = source * (force - tl.sum(source * force, 1)[:, None])
    heat = tl.load(temperature)
    # The smallest normal number: where the softmax is zero, so is its gradient.
    z = tl.log(tl.maximum(source, 1.1754944e-38)) + tl.load(totals + first + r, mask=live, other=0.0)[:, None]
    cosine = 1.0 - 1.0 / (tl.where(inside, z, 1.0) * heat)
    force = tl.where(inside & (cosine < 1.0 - floor * (1.0 + _AT_FLOOR)), force * z * z * heat, 0.0)
    inverse = tl.load(inverses + first + r, mask=live, other=0.0)
    tl.store(along + first + r, tl.sum(force * cosine, 1) * inverse * inverse, mask=live)
    at = first * (2 * F) + offsets(r, f, 2 * F)
    tl.store(d_logits + at, (force * inverse[:, None]).to(d_logits.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def token_gradient(
    d_logits, tables, x, along, dx,
    rows,
    D: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx = d_logits [N, W = 2 F] times the directions and the scores [W, D], less what lies along x."""
    first = tl.program_id(1).to(tl.int64) * BT
    r, w, d = tl.arange(0, BT), tl.arange(0, BW), tl.program_id(0) * BD + tl.arange(0, BD)
    live, in_d = r < rows - first, d < D
    d_logits += first * W
    out = tl.zeros((BT, BD), tl.float32)
    for j in tl.range(0, W, BW):
        in_w = j + w < W
        left = tl.load(d_logits + j + offsets(r, w, W), mask=live[:, None] & in_w[None, :], other=0.0)
        right = tl.load(tables + j * D + offsets(w, d, D), mask=in_w[:, None] & in_d[None, :], other=0.0)
        out = tl.dot(left, right, out, input_precision=PRECISION)
    at, inside = first * D + offsets(r, d, D), live[:, None] & in_d[None, :]
    back = tl.load(along + first + r, mask=live, other=0.0)
    out -= tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * back[:, None]
    tl.store(dx + at, out.to(dx.dtype.element_ty), mask=inside)
