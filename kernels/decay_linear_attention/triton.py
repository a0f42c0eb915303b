"""Triton kernels of linear attention with a scalar decay; the algebra is that of ``reference``.

Two kernels. ``_scan`` walks through the chunks of a segment with the state in registers and writes outputs as it goes. Run
backwards in time with q and k in each other's place and dO instead of V it is the scan of the backward: it carries dS and writes
dV. ``_pairs_backward`` then makes dQ, dK and dg of each chunk for itself, from the states that the two scans left.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false
# (the checker takes what Triton compiles for Python)

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.compilation import Compilation
from kernels.library import Tensors
from kernels.scan_arguments import wide_dtype
from kernels.triton import (
    by_rows,
    chunk_of_slot,
    offsets,
    padded,
    precision,
    roomy,
    search_width,
    segment_rows,
    slots,
)


@triton.jit
def _decays(g, head, first, c, inside, HV: tl.constexpr, DECAY: tl.constexpr):
    """-> (cumulative decay of rows first + c, its last value). DECAY: 1 constant, 2 of each row."""
    if DECAY == 1:
        value = tl.where(inside, tl.load(g + head).to(tl.float32), 0.0)
    else:
        value = tl.load(g + first * HV + head + c * HV, mask=inside, other=0.0).to(tl.float32)
    # exp(-128) is zero in fp32; without the bound one strong decay would cost all later differences their last digits.
    value = tl.maximum(value, -128.0)
    return tl.cumsum(value, 0), tl.sum(value, 0)


@triton.jit(do_not_specialize=["segments", "rows", "time"])
def _scan(
    x,
    y,
    v,
    g,
    cu,
    initial,
    out,
    states,
    final,
    segments,
    rows,
    time,
    sx: tl.constexpr,
    sy: tl.constexpr,
    sv: tl.constexpr,
    scale,
    K: tl.constexpr,
    V: tl.constexpr,
    H: tl.constexpr,
    HV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    DECAY: tl.constexpr,
    REVERSE: tl.constexpr,
    VARLEN: tl.constexpr,
    INITIAL: tl.constexpr,
    STATES: tl.constexpr,
    FINAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (tile of V, value head, segment). Forward x = q, y = k, v = v; in reverse x = k, y = q, v = dO."""
    head, segment = tl.program_id(1), tl.program_id(2)
    live = segment < segments
    start, end, slot = segment_rows(cu, segment, segments, rows, time, C, VARLEN)
    length = (end - start).to(tl.int32)
    n = tl.cdiv(length, C)
    c, kk, vv = tl.arange(0, C), tl.arange(0, BK), tl.program_id(0) * BV + tl.arange(0, BV)
    in_k, in_v = kk < K, vv < V
    in_state = in_k[:, None] & in_v[None, :]
    at_x, at_y, at_v = offsets(c, kk, sx), offsets(c, kk, sy), offsets(c, vv, sv)
    at_out, at_state = offsets(c, vv, HV * V), offsets(kk, vv, V)
    x += start * sx + head // (HV // H) * K
    y += start * sy + head // (HV // H) * K
    v += start * sv + head * V
    out += (start * HV + head) * V
    seen = c[:, None] <= c[None, :] if REVERSE else c[:, None] >= c[None, :]
    read_scale = 1.0 if REVERSE else scale
    write_scale = scale if REVERSE else 1.0

    state = tl.zeros((BK, BV), tl.float32)
    this = (segment.to(tl.int64) * HV + head) * (K * V)
    if INITIAL:
        state = tl.load(initial + this + at_state, mask=in_state & live, other=0.0).to(tl.float32)
    if FINAL and n == 0:
        tl.store(final + this + at_state, state, mask=in_state & live)
    for i in tl.range(n, disable_licm=True):
        chunk = slot + (n - 1 - i if REVERSE else i)
        row = (chunk - slot) * C
        stored = c < length - (n - 1 - i if REVERSE else i) * C
        inside = stored & live
        x_tile = tl.load(x + row * sx + at_x, mask=inside[:, None] & in_k[None, :], other=0.0)
        y_tile = tl.load(y + row * sy + at_y, mask=inside[:, None] & in_k[None, :], other=0.0)
        v_tile = tl.load(v + row * sv + at_v, mask=inside[:, None] & in_v[None, :], other=0.0)
        if STATES:
            here = states + (chunk * HV + head) * (K * V)
            tl.store(here + at_state, state.to(states.dtype.element_ty), mask=in_state & live)
        pairs = tl.dot(x_tile, tl.trans(y_tile), input_precision=PRECISION) * scale
        if DECAY:
            gamma, total = _decays(g, head, start + row, c, inside, HV, DECAY)
            between = gamma[None, :] - gamma[:, None] if REVERSE else gamma[:, None] - gamma[None, :]
            pairs *= tl.exp(tl.where(seen, between, float("-inf")))
        else:
            pairs = tl.where(seen, pairs, 0.0)
        pairs = pairs.to(v_tile.dtype)
        result = tl.dot(x_tile, state.to(x_tile.dtype), input_precision=PRECISION) * read_scale
        if DECAY:
            result *= tl.exp(total - gamma if REVERSE else gamma)[:, None]
        result = tl.dot(pairs, v_tile, result, input_precision=PRECISION)
        here = out + row * (HV * V)
        tl.store(here + at_out, result.to(out.dtype.element_ty), mask=stored[:, None] & in_v[None, :])
        if DECAY:
            state *= tl.exp(total)
            v_tile = v_tile.to(tl.float32) * (tl.exp(gamma if REVERSE else total - gamma) * write_scale)[:, None]
        elif REVERSE:
            v_tile = v_tile.to(tl.float32) * write_scale
        state = tl.dot(tl.trans(y_tile), v_tile.to(y_tile.dtype), state, input_precision=PRECISION)
        # Inside the loop, so that its addresses take no registers while the loop runs.
        if FINAL and i == n - 1:
            tl.store(final + this + at_state, state, mask=in_state & live)


@triton.jit(do_not_specialize=["segments", "rows", "time"])
def _gradient(
    a,
    b,
    x,
    y,
    g,
    cu,
    states,
    entered,
    dy,
    dg,
    segments,
    rows,
    time,
    sa: tl.constexpr,
    sb: tl.constexpr,
    sx: tl.constexpr,
    sy: tl.constexpr,
    scale,
    K: tl.constexpr,
    V: tl.constexpr,
    H: tl.constexpr,
    HV: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    DECAY: tl.constexpr,
    REVERSE: tl.constexpr,
    VARLEN: tl.constexpr,
    SEARCH: tl.constexpr,
    GRADIENT_OF_DECAY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (slot of a chunk, tile of K, key head): dy of y = q (a = dO, b = V, x = k, ``states`` those that entered) or, in
    reverse, of y = k (a = V, b = dO, x = q, ``states`` the gradients of those that left, ``entered`` those that entered).

    dg [tiles of K, rows, HV] is each tile's share of the sum over K; in reverse it adds to what is there. Products of a row with
    itself join last: they do not depend on the decay, and q dq - k dk would be a small difference of large numbers with them.
    """
    slot, head = tl.program_id(0).to(tl.int64), tl.program_id(2)
    found = chunk_of_slot(cu, slot, segments, rows, time, C, VARLEN, SEARCH)
    segment, first, end = found
    c, kk = tl.arange(0, C), tl.program_id(1) * BK + tl.arange(0, BK)
    in_k = kk < K
    stored = c < (end - first).to(tl.int32)
    inside = stored & (segment < segments)
    used = (segment < segments) & (first < end)
    here = inside[:, None] & in_k[None, :]
    x_tile = tl.load(x + first * sx + head * K + offsets(c, kk, sx), mask=here, other=0.0)
    y_tile = tl.load(y + first * sy + head * K + offsets(c, kk, sy), mask=here, other=0.0)
    other = c[:, None] < c[None, :] if REVERSE else c[:, None] > c[None, :]
    total_gradient = tl.zeros((C, BK), tl.float32)
    same = tl.zeros((C,), tl.float32)
    for j in tl.range(HV // H, disable_licm=True):
        value_head = head * (HV // H) + j
        state_of_head = (slot * HV + value_head) * (K * V)
        pairs = tl.zeros((C, C), tl.float32)
        gradient = tl.zeros((C, BK), tl.float32)
        for tile in tl.range(tl.cdiv(V, BV), disable_licm=True):
            vv = tile * BV + tl.arange(0, BV)
            in_v = inside[:, None] & (vv < V)[None, :]
            a_tile = tl.load(a + first * sa + value_head * V + offsets(c, vv, sa), mask=in_v, other=0.0)
            b_tile = tl.load(b + first * sb + value_head * V + offsets(c, vv, sb), mask=in_v, other=0.0)
            in_state = in_k[:, None] & (vv < V)[None, :] & used
            state = tl.load(states + state_of_head + offsets(kk, vv, V), mask=in_state, other=0.0)
            pairs = tl.dot(a_tile, tl.trans(b_tile), pairs, input_precision=PRECISION)
            gradient = tl.dot(a_tile, tl.trans(state), gradient, input_precision=PRECISION)
        same += tl.sum(tl.where(c[:, None] == c[None, :], pairs, 0.0), 1)
        pairs = tl.where(other, pairs * scale, 0.0)
        if not REVERSE:
            gradient *= scale
        if DECAY:
            gamma, total = _decays(g, value_head, first, c, inside, HV, DECAY)
            gradient *= tl.exp(total - gamma if REVERSE else gamma)[:, None]
            between = gamma[None, :] - gamma[:, None] if REVERSE else gamma[:, None] - gamma[None, :]
            pairs *= tl.exp(tl.where(other, between, 0.0))
        if GRADIENT_OF_DECAY and REVERSE:
            ends = tl.sum(y_tile.to(tl.float32) * gradient)
            for tile in tl.range(tl.cdiv(V, BV), disable_licm=True):
                vv = tile * BV + tl.arange(0, BV)
                at_state = state_of_head + offsets(kk, vv, V)
                in_state = in_k[:, None] & (vv < V)[None, :] & used
                state = tl.load(entered + at_state, mask=in_state, other=0.0).to(tl.float32)
                dstate = tl.load(states + at_state, mask=in_state, other=0.0).to(tl.float32)
                ends += tl.sum(state * dstate) * tl.exp(total)
        gradient = tl.dot(pairs.to(x_tile.dtype), x_tile, gradient, input_precision=PRECISION)
        total_gradient += gradient
        if GRADIENT_OF_DECAY:
            dgamma = tl.sum(y_tile.to(tl.float32) * gradient, 1)
            at = dg + (tl.program_id(1) * rows.to(tl.int64) + first) * HV + value_head + c * HV
            if REVERSE:
                share = tl.load(at, mask=inside, other=0.0) - tl.cumsum(dgamma, 0, reverse=True) + ends
            else:
                share = tl.cumsum(dgamma, 0, reverse=True)
            tl.store(at, share, mask=stored)
    total_gradient += (same * scale)[:, None] * x_tile.to(tl.float32)
    at = dy + (first * H + head) * K + offsets(c, kk, H * K)
    tl.store(at, total_gradient.to(dy.dtype.element_ty), mask=stored[:, None] & in_k[None, :])


class Tiles(NamedTuple):
    """Sizes of tiles and launches of one kernel."""

    k: int  # columns of K (the scan: all)
    v: int  # columns of V
    warps: int
    stages: int


def chunk(dtype: torch.dtype, roomy: bool) -> int:
    """Rows of a chunk."""
    return 16 if dtype == torch.float32 else 64 if roomy else 32


def _scan_tiles(k: int, v: int, dtype: torch.dtype, roomy: bool, carries: bool) -> Tiles:
    """``carries``: a state comes from outside or goes there. Found by compiling: these spill no registers on sm_90."""
    k = padded(k)
    plain = dtype == torch.float32 or not roomy
    crowded = k == 256 and carries
    return Tiles(k, min(32 if plain or crowded else 64, padded(v)), 8 if k == 256 else 4, 1 if plain or crowded else 2)


def _gradient_tiles(k: int, v: int, groups: int, dtype: torch.dtype, roomy: bool) -> Tiles:
    if dtype == torch.float32:
        return Tiles(min(32, padded(k)), min(32, padded(v)), 4, 1)
    wide = roomy and groups == 1 and k > 64
    warps = 8 if wide or groups > 1 else 4
    return Tiles(min(128 if wide else 64, padded(k)), min(64, padded(v)), warps, 2 if roomy else 1)


def why_not(q: Tensor, v: Tensor) -> str | None:
    """Why the kernels cannot take these inputs; they compute in the dtype of v."""
    if v.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"v is {v.dtype}"
    limit = 64 if v.dtype == torch.float32 else 256
    return f"K is {q.shape[3]}, above {limit} for {v.dtype}" if q.shape[3] > limit else None


def fake_states(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The states that the forward keeps for the backward: before each chunk."""
    b, t, heads, width = v.shape
    n = slots(b, t, cu_seqlens, chunk(v.dtype, roomy(v.device)))
    return v.new_empty(n, heads, q.shape[3], width)


def forward(tensors: Tensors, options: Sequence[float], backend: str) -> list[Tensor]:
    """As ``reference.forward``; the third option: whether to keep states for the backward, which are then the third result."""
    call = _Call(tensors, options[0])
    q, _, v, _, h0, cu = tensors
    assert q is not None
    assert v is not None
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    final = call.state() if options[1] else None
    states = fake_states(q, v, cu) if options[2] else None
    call.scan(call.q, call.k, call.v, h0, out, states, final)
    results = [out, v.new_empty(0, dtype=wide_dtype(v)) if final is None else final]
    return results if states is None else [*results, states]


def backward(
    tensors: Tensors,
    saved: Sequence[Tensor],
    grads: Tensors,
    needs: Sequence[bool],
    options: Sequence[float],
    backend: str,
) -> Tensors:
    """As ``reference.backward``."""
    call = _Call(tensors, options[0])
    q, k, v, g, h0, _ = tensors
    assert q is not None
    assert k is not None
    assert v is not None
    (states,) = saved
    do = by_rows(torch.zeros_like(v) if grads[0] is None else grads[0])
    dv, dstates = torch.empty_like(v, memory_format=torch.contiguous_format), torch.empty_like(states)
    dh0 = call.state() if needs[4] else None
    call.scan(call.k, call.q, do, grads[1], dv, dstates, dh0, reverse=True)
    dq, dk, dg = call.gradients(do, states, dstates, needs[3])
    if dg is not None:
        assert g is not None
        dg = (dg.sum((0, 1, 2)) if g.ndim == 1 else dg.sum(0)).to(g.dtype)
    return [
        dq.to(q.dtype),
        dk.to(k.dtype),
        dv,
        dg,
        dh0 if dh0 is None or h0 is None else dh0.to(h0.dtype),
        None,
    ]


class _Call:
    """The launches of one call, with what they share."""

    def __init__(self, tensors: Tensors, scale: float) -> None:
        q, k, v, g, _, self.cu = tensors
        assert q is not None
        assert k is not None
        assert v is not None
        self.q, self.k, self.v = by_rows(q.to(v.dtype)), by_rows(k.to(v.dtype)), by_rows(v)
        self.g = None if g is None else g.contiguous()
        self.scale = scale
        self.b, self.t, self.h, self.key_width = q.shape
        self.heads, self.width = v.shape[2:]
        self.segments = self.b if self.cu is None else len(self.cu) - 1
        self.roomy = roomy(v.device)
        self.sizes: tuple[Any, ...] = (self.segments, self.b * self.t, self.t)
        shape = (self.key_width, self.width, self.h, self.heads)
        self.common = _constants(
            shape, v.dtype, self.roomy, 0 if g is None else 1 if g.ndim == 1 else 2, self.cu is not None
        )

    def state(self) -> Tensor:
        return self.v.new_empty(self.segments, self.heads, self.key_width, self.width, dtype=wide_dtype(self.v))

    def scan(
        self,
        x: Tensor,
        y: Tensor,
        v: Tensor,
        initial: Tensor | None,
        out: Tensor,
        states: Tensor | None,
        final: Tensor | None,
        reverse: bool = False,
    ) -> None:
        carries = initial is not None or final is not None
        tiles = _scan_tiles(self.key_width, self.width, v.dtype, self.roomy, carries)
        grid = (triton.cdiv(self.width, tiles.v), self.heads, self.segments + (self.cu is not None))
        # An argument that the kernel does not use is still an argument: out stands for all of them.
        args: tuple[Any, ...] = (
            x,
            y,
            v,
            _or(self.g, out),
            _or(self.cu, out),
            _or(initial, out),
            out,
            _or(states, out),
            _or(final, out),
        )
        strides = [t.stride(1) for t in (x, y, v)]
        constants = _scan_constants(tiles, reverse, initial is not None, states is not None, final is not None)
        _scan[grid](*args, *self.sizes, *strides, self.scale, **self.common, **constants)

    def gradients(
        self, do: Tensor, states: Tensor, dstates: Tensor, want_decay: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """-> (dq, dk, dg [tiles of K, B, T, HV] or None)."""
        dq, dk = (x.new_empty(x.shape) for x in (self.q, self.k))
        tiles = _gradient_tiles(self.key_width, self.width, self.heads // self.h, self.v.dtype, self.roomy)
        n = -(-self.key_width // tiles.k)
        want = want_decay and self.g is not None
        dg = self.v.new_empty(n, self.b, self.t, self.heads, dtype=torch.float32) if want else None
        grid = (len(states), n, self.h)
        for reverse, a, b, x, y, of, dy in (
            (False, do, self.v, self.k, self.q, states, dq),
            (True, self.v, do, self.q, self.k, dstates, dk),
        ):
            tensors = (a, b, x, y, _or(self.g, dy), _or(self.cu, dy), of, states, dy, _or(dg, dy))
            strides = (t.stride(1) for t in (a, b, x, y))
            args: tuple[Any, ...] = (*tensors, *self.sizes, *strides, self.scale)
            constants = _gradient_constants(tiles, reverse, self.segments, dg is not None)
            _gradient[grid](*args, **self.common, **constants)
        return dq, dk, dg


def _constants(
    shape: tuple[int, int, int, int], dtype: torch.dtype, roomy: bool, decay: int, varlen: bool
) -> dict[str, Any]:
    """Of both kernels; ``shape`` is K, V, H, HV."""
    sizes = dict(zip(("K", "V", "H", "HV"), shape, strict=True))
    return {**sizes, "C": chunk(dtype, roomy), "DECAY": decay, "VARLEN": varlen, "PRECISION": precision(dtype)}


def _scan_constants(tiles: Tiles, reverse: bool, initial: bool, states: bool, final: bool) -> dict[str, Any]:
    modes = {"REVERSE": reverse, "INITIAL": initial, "STATES": states, "FINAL": final}
    return {"BK": tiles.k, "BV": tiles.v, **modes, "num_warps": tiles.warps, "num_stages": tiles.stages}


def _gradient_constants(tiles: Tiles, reverse: bool, segments: int, want_decay: bool) -> dict[str, Any]:
    modes = {"REVERSE": reverse, "SEARCH": search_width(segments), "GRADIENT_OF_DECAY": want_decay}
    return {"BK": tiles.k, "BV": tiles.v, **modes, "num_warps": tiles.warps, "num_stages": tiles.stages}


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    return other if x is None else x


def compilations() -> Iterator[Compilation]:
    """Every table entry in the modes that change its resources; widths are powers of two, to which others are padded."""
    for wide in (True, False):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for k, v in ((16, 16), (32, 32), (64, 64), (128, 64), (128, 128), (256, 64), (256, 256)):
                whole = dtype == torch.bfloat16 and (wide or k == v)
                if (
                    whole
                    or (dtype == torch.float32 and k <= 64 and k == v)
                    or (dtype == torch.float16 and k == v == 128 and wide)
                ):
                    yield from _compilations(k, v, dtype, wide, whole and k >= 64 and (k, v) != (256, 64))


def _compilations(k: int, v: int, dtype: torch.dtype, wide: bool, every: bool) -> Iterator[Compilation]:
    name = f"{str(dtype).removeprefix('torch.')}-{k}x{v}" + ("" if wide else "-small")
    x, y, fp32, cu = (torch.empty(16, dtype=t, device="meta") for t in (dtype, dtype, torch.float32, torch.int32))
    sizes = (5, 4096, 4096)
    for label, reverse, initial, states, final in (
        ("forward", False, False, True, False),
        ("prefill", False, True, False, True),
        ("forward-carrying", False, True, True, True),
        ("reverse", True, False, True, False),
        ("reverse-carrying", True, True, True, True),
    ):
        if every or label in ("forward", "reverse"):
            tiles = _scan_tiles(k, v, dtype, wide, initial or final)
            args = (x, y, x, fp32, cu, fp32, y, y, fp32, *sizes, k, k, v, 0.125)
            constants = _scan_constants(tiles, reverse, initial, states, final)
            yield from _by_target(f"{label}-{name}", _scan, args, (k, v, 1, 1), dtype, wide, 2, constants)
    for label, reverse, groups, decay in (
        ("dq", False, 1, 2),
        ("dk", True, 1, 2),
        ("dq-grouped", False, 4, 2),
        ("dk-grouped", True, 4, 2),
        ("dk-constant", True, 1, 1),
        ("dk-plain", True, 1, 0),
    ):
        if (every and (decay == 2 or k == v == 128)) or label in ("dq", "dk"):
            tiles = _gradient_tiles(k, v, groups, dtype, wide)
            args = (x, x, x, x, fp32, cu, y, y, y, fp32, *sizes, groups * v, groups * v, k, k, 0.125)
            constants = _gradient_constants(tiles, reverse, 5, decay > 0)
            yield from _by_target(f"{label}-{name}", _gradient, args, (k, v, 1, groups), dtype, wide, decay, constants)


def _by_target(
    name: str,
    kernel: Any,
    args: tuple[Any, ...],
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    wide: bool,
    decay: int,
    constants: dict[str, Any],
) -> Iterator[Compilation]:
    """``roomy`` and ``precision`` ask a device, and none is here."""
    common = _constants(shape, dtype, wide, decay, True) | constants
    op = "decay_linear_attention"
    large = common["C"] * min(common["BK"], common["BV"]) >= 64 * 64
    if wide:
        yield Compilation(op, name, kernel, args, common, wgmma=large, targets=("sm_90", "sm_100"))
        return
    yield Compilation(op, name, kernel, args, common, wgmma=large, targets=("sm_80",))
    hip = common | {"PRECISION": "ieee"}
    yield Compilation(op, f"{name}-hip", kernel, args, hip, wgmma=large, targets=("gfx942",))
