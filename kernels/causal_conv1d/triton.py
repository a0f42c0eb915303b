"""Triton kernels of the short convolution. One launch forward, one backward (and a sum of its partial results), one a step.

A program has a tile of flat rows and of channels. Each row looks for its segment on the device, so tiles may cross segments and no
segment is too short to be efficient. States are taken for the W - 1 rows before a segment: the programs behind those of the tiles
have one segment each, and write its final state or the gradient of its initial one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.compilation import Compilation
from kernels.library import Tensors
from kernels.triton import offsets

ROWS, CHANNELS = 32, 64  # of a tile; a thread of four warps holds 16 numbers
BACK_ROWS = 8  # of a tile backward: a thread of eight warps holds 2 numbers of each of the 2 W - 1 rows that it needs
BACK = 256  # rows that share a partial sum of the weight's gradient


@triton.jit
def _segments(cu, r, segments, rows, time, steps, VARLEN: tl.constexpr):
    """Rows r -> (segment, its first row, the row past its last, whether there is one). steps: bits of S."""
    if VARLEN:
        low = tl.zeros_like(r)
        high = low + segments
        for _ in range(steps):  # the last s with cu[s] <= r: empty segments before it are passed over
            middle = (low + high + 1) // 2
            reached = tl.load(cu + middle).to(tl.int32) <= r
            low = tl.where(reached, middle, low)
            high = tl.where(reached, high, middle - 1)
        live = (low < segments) & (r < rows)
        segment = tl.minimum(low, segments - 1)
        return segment, tl.load(cu + segment).to(tl.int32), tl.load(cu + segment + 1).to(tl.int32), live
    else:
        segment = tl.minimum(r, rows - 1) // time
        return segment, segment * time, segment * time + time, r < rows


@triton.jit
def _inputs(
    x, initial, base, r, shift, segment, start, live, ch,
    stride: tl.constexpr, C: tl.constexpr, W: tl.constexpr, INITIAL: tl.constexpr,
):  # fmt: skip
    """What stands ``shift`` rows after each row r: a row of its segment, or of the state before it. x points to row base."""
    at = r + shift
    mask = (live & (at >= start))[:, None] & (ch < C)[None, :]
    found = tl.load(x + offsets(at - base, ch, stride), mask=mask, other=0.0).to(tl.float32)
    if INITIAL:
        before = W - 1 + at - start
        mask = (live & (at < start) & (before >= 0))[:, None] & (ch < C)[None, :]
        place = (segment.to(tl.int64) * (W - 1) + before) * C
        found += tl.load(initial + (place[:, None] + ch[None, :]), mask=mask, other=0.0).to(tl.float32)
    return found


@triton.jit
def _ends(cu, segment, time, VARLEN: tl.constexpr):
    """-> (first row of a segment, the row past its last)."""
    if VARLEN:
        return tl.load(cu + segment).to(tl.int32), tl.load(cu + segment + 1).to(tl.int32)
    else:
        return segment * time, segment * time + time


@triton.jit
def _final_state(
    x, initial, cu, final, which, time, ch,
    stride: tl.constexpr, C: tl.constexpr, W: tl.constexpr, INITIAL: tl.constexpr, VARLEN: tl.constexpr,
    STATE: tl.constexpr,
):  # fmt: skip
    """The last W - 1 inputs of segment ``which``, the state before it included."""
    start, end = _ends(cu, which, time, VARLEN)  # pyright: ignore
    j, first = tl.arange(0, STATE), end - W + 1
    kept = j < W - 1
    x += first.to(tl.int64) * stride
    last = _inputs(x, initial, first, first + j, 0, j * 0 + which, start, kept, ch, stride, C, W, INITIAL)
    at = which.to(tl.int64) * (W - 1) * C + (j[:, None] * C + ch[None, :])
    tl.store(final + at, last.to(final.dtype.element_ty), mask=kept[:, None] & (ch < C)[None, :])


@triton.jit(do_not_specialize=["rows", "time", "segments", "steps"])
def _forward(
    x, weight, bias, initial, cu, y, final, rows, time, segments, steps,
    stride: tl.constexpr, C: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr,
    INITIAL: tl.constexpr, FINAL: tl.constexpr,
    VARLEN: tl.constexpr, STATE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows or, behind those, a segment; tile of channels). STATE: a power of two, at least W - 1."""
    tiles = tl.cdiv(rows, ROWS)
    ch = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    if tl.program_id(0) < tiles:
        base = tl.program_id(0) * ROWS
        r = base + tl.arange(0, ROWS)
        segment, start, _, live = _segments(cu, r, segments, rows, time, steps, VARLEN)  # pyright: ignore
        x += base.to(tl.int64) * stride
        u = tl.zeros((ROWS, CHANNELS), tl.float32)
        for i in tl.static_range(W):
            tap = tl.load(weight + ch * W + i, mask=ch < C, other=0.0).to(tl.float32)
            u += _inputs(x, initial, base, r, i - W + 1, segment, start, live, ch, stride, C, W, INITIAL) * tap[None, :]
        if BIAS:
            u += tl.load(bias + ch, mask=ch < C, other=0.0).to(tl.float32)[None, :]
        if SILU:
            u *= tl.sigmoid(u)
        u = tl.where(live[:, None], u, 0.0)
        at = tl.arange(0, ROWS)[:, None] * C + ch[None, :]
        tl.store(y + base.to(tl.int64) * C + at, u.to(y.dtype.element_ty), mask=(r < rows)[:, None] & (ch < C)[None, :])
    elif FINAL:
        _final_state(
            x, initial, cu, final, tl.program_id(0) - tiles, time, ch, stride, C, W, INITIAL, VARLEN, STATE
        )  # fmt: skip


@triton.jit
def _gradient_before_activation(
    x, weight, bias, initial, dy, base, r, shift, segment, start, end, live, ch,
    stride: tl.constexpr, stride_dy: tl.constexpr, C: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr,
    BIAS: tl.constexpr, INITIAL: tl.constexpr,
):  # fmt: skip
    """du of the rows ``shift`` after r, zero where that is not in the segment of r."""
    at = r + shift
    inside = live & (at >= start) & (at < end)
    mask = inside[:, None] & (ch < C)[None, :]
    du = tl.load(dy + offsets(at - base, ch, stride_dy), mask=mask, other=0.0).to(tl.float32)
    if SILU:
        u = tl.zeros_like(du)
        for i in tl.static_range(W):
            tap = tl.load(weight + ch * W + i, mask=ch < C, other=0.0).to(tl.float32)
            shifted = shift + i - W + 1
            u += _inputs(x, initial, base, r, shifted, segment, start, inside, ch, stride, C, W, INITIAL) * tap[None, :]
        if BIAS:
            u += tl.load(bias + ch, mask=ch < C, other=0.0).to(tl.float32)[None, :]
        s = tl.sigmoid(u)
        du *= s + u * s * (1 - s)
    return du


@triton.jit
def _initial_gradient(
    x, weight, bias, initial, cu, dy, dfinal, dinitial, which, time, ch,
    stride: tl.constexpr, stride_dy: tl.constexpr, C: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr,
    BIAS: tl.constexpr, INITIAL: tl.constexpr, OUT: tl.constexpr,
    FINAL: tl.constexpr, VARLEN: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """The gradient of the W - 1 rows before segment ``which``, as if they were rows of it that have no output."""
    start, end = _ends(cu, which, time, VARLEN)  # pyright: ignore
    j, base = tl.arange(0, STATE), start - W + 1
    kept, segment = j < W - 1, j * 0 + which
    x += base.to(tl.int64) * stride
    dy += base.to(tl.int64) * stride_dy
    result = tl.zeros((STATE, ch.shape[0]), tl.float32)
    if OUT:
        for d in tl.static_range(1, W):
            du = _gradient_before_activation(
                x, weight, bias, initial, dy, base, base + j, d, segment, start, end, kept, ch, stride, stride_dy,
                C, W, SILU, BIAS, INITIAL,
            )  # fmt: skip
            tap = tl.load(weight + ch * W + (W - 1 - d), mask=ch < C, other=0.0).to(tl.float32)
            result += du * tap[None, :]
    if FINAL:  # of a segment shorter than the state
        later = base + j - end + W - 1
        mask = (kept & (later >= 0))[:, None] & (ch < C)[None, :]
        at = (segment.to(tl.int64) * (W - 1) + later)[:, None] * C + ch[None, :]
        result += tl.load(dfinal + at, mask=mask, other=0.0).to(tl.float32)
    at = which.to(tl.int64) * (W - 1) * C + (j[:, None] * C + ch[None, :])
    tl.store(dinitial + at, result.to(dinitial.dtype.element_ty), mask=kept[:, None] & (ch < C)[None, :])


@triton.jit(do_not_specialize=["rows", "time", "segments", "steps"])
def _backward(
    x, weight, bias, initial, cu, dy, dfinal, dx, dinitial, partial, rows, time, segments, steps,
    stride: tl.constexpr, stride_dy: tl.constexpr, C: tl.constexpr,
    W: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr, INITIAL: tl.constexpr, OUT: tl.constexpr,
    FINAL: tl.constexpr, VARLEN: tl.constexpr, STATE: tl.constexpr, SUMS: tl.constexpr, ROWS: tl.constexpr,
    TILES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Program (TILES tiles of rows or, behind those, a segment; tile of channels). OUT, FINAL: whether there is a gradient of the
    output, of the final state. partial [programs, W + 1, C]: the sums over each program's rows of du x, and of du. SUMS: a power
    of two above W."""
    blocks = tl.cdiv(rows, ROWS * TILES)
    ch = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    if tl.program_id(0) < blocks:
        sums = tl.arange(0, SUMS)
        total = tl.zeros((SUMS, CHANNELS), tl.float32)
        for tile in range(TILES):
            base = (tl.program_id(0) * TILES + tile) * ROWS
            r = base + tl.arange(0, ROWS)
            segment, start, end, live = _segments(cu, r, segments, rows, time, steps, VARLEN)  # pyright: ignore
            here, dy_here = x + base.to(tl.int64) * stride, dy + base.to(tl.int64) * stride_dy
            result = tl.zeros((ROWS, CHANNELS), tl.float32)
            if OUT:
                for d in tl.static_range(W):
                    du = _gradient_before_activation(
                        here, weight, bias, initial, dy_here, base, r, d, segment, start, end, live, ch, stride,
                        stride_dy, C, W, SILU, BIAS, INITIAL,
                    )  # fmt: skip
                    tap = tl.load(weight + ch * W + (W - 1 - d), mask=ch < C, other=0.0).to(tl.float32)
                    result += du * tap[None, :]
                    if d == 0:
                        total += tl.where((sums == W)[:, None], tl.sum(du, 0)[None, :], 0.0)
                        for i in tl.static_range(W):
                            seen = _inputs(
                                here, initial, base, r, i - W + 1, segment, start, live, ch, stride, C, W, INITIAL
                            )
                            total += tl.where((sums == i)[:, None], tl.sum(du * seen, 0)[None, :], 0.0)
            if FINAL:
                j = r - end + W - 1
                mask = (live & (j >= 0))[:, None] & (ch < C)[None, :]
                place = (segment.to(tl.int64) * (W - 1) + j)[:, None] * C + ch[None, :]
                result += tl.load(dfinal + place, mask=mask, other=0.0).to(tl.float32)
            at = tl.arange(0, ROWS)[:, None] * C + ch[None, :]
            mask = (r < rows)[:, None] & (ch < C)[None, :]
            tl.store(dx + base.to(tl.int64) * C + at, result.to(dx.dtype.element_ty), mask=mask)
        if OUT:
            place = tl.program_id(0).to(tl.int64) * (W + 1) * C + (sums[:, None] * C + ch[None, :])
            tl.store(partial + place, total, mask=(sums <= W)[:, None] & (ch < C)[None, :])
    elif INITIAL:
        _initial_gradient(
            x, weight, bias, initial, cu, dy, dfinal, dinitial, tl.program_id(0) - blocks, time, ch, stride, stride_dy,
            C, W, SILU, BIAS, INITIAL, OUT, FINAL, VARLEN, STATE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["slots", "memories"])
def _step(
    x, weight, bias, state, index, y, slots, memories, C,
    W: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr, INDEX: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Program (slot of a row of the batch, tile of channels): the output, and the state moved on where it stands."""
    slot = tl.program_id(0)
    ch = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    memory = slot % slots
    if INDEX:
        memory = tl.load(index + slot).to(tl.int32)
    mask = (ch < C) & (memory >= 0)
    state += ((slot // slots).to(tl.int64) * memories + memory) * ((W - 1) * C)
    u = tl.zeros((CHANNELS,), tl.float32)
    if BIAS:
        u += tl.load(bias + ch, mask=mask, other=0.0).to(tl.float32)
    now = tl.load(x + slot.to(tl.int64) * C + ch, mask=mask, other=0.0)
    for i in tl.static_range(W - 1):
        before = tl.load(state + i * C + ch, mask=mask, other=0.0)
        u += before.to(tl.float32) * tl.load(weight + ch * W + i, mask=mask, other=0.0).to(tl.float32)
        if i > 0:
            tl.store(state + (i - 1) * C + ch, before, mask=mask)
    if W > 1:
        tl.store(state + (W - 2) * C + ch, now.to(state.dtype.element_ty), mask=mask)
    u += now.to(tl.float32) * tl.load(weight + ch * W + W - 1, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        u *= tl.sigmoid(u)
    u = tl.where(memory >= 0, u, 0.0)
    tl.store(y + slot.to(tl.int64) * C + ch, u.to(y.dtype.element_ty), mask=ch < C)


def forward(tensors: Tensors, options: Sequence[float], backend: str) -> list[Tensor]:
    """As of `reference.forward`."""
    x, weight, bias, initial, cu = tensors
    assert x is not None
    assert weight is not None
    b, t, channels = x.shape
    silu, final = bool(options[0]), bool(options[1])
    width, segments, flat = weight.shape[1], b if cu is None else len(cu) - 1, _flat(x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    kept = x if initial is None else initial
    state = kept.new_empty((segments, width - 1, channels) if final else (0,))
    weight, bias, initial, cu = (None if s is None else s.contiguous() for s in (weight, bias, initial, cu))
    writes = final and width > 1
    grid = (_tiles(b * t, ROWS) + segments * writes, _tiles(channels, CHANNELS))
    pointers = (_or(x, v) for v in (weight, bias, initial, cu))
    numbers = (b * t, t, segments, segments.bit_length(), flat.stride(0), channels)
    launch: Any = _forward[grid]
    launch(flat, *pointers, y, state, *numbers, **_constants(width, silu, bias, initial, writes, cu, False))
    return [y, state]


def backward(
    tensors: Tensors,
    saved: Sequence[Tensor],
    grads: Tensors,
    needs: Sequence[bool],
    options: Sequence[float],
    backend: str,
) -> Tensors:
    """As of `reference.backward`."""
    x, weight, bias, initial, cu = tensors
    assert x is not None
    assert weight is not None
    b, t, channels = x.shape
    width, segments, flat = weight.shape[1], b if cu is None else len(cu) - 1, _flat(x)
    dy = None if grads[0] is None else _flat(grads[0])
    dfinal = grads[1] if width > 1 else None
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dinitial = None if initial is None else torch.empty_like(initial, memory_format=torch.contiguous_format)
    blocks = _tiles(b * t, BACK)
    partial = x.new_empty((blocks, width + 1, channels) if dy is not None else (0,), dtype=torch.float32)
    taps, shift, state, ends, dlast = (
        None if s is None else s.contiguous() for s in (weight, bias, initial, cu, dfinal)
    )
    constants = _constants(width, bool(options[0]), shift, state if width > 1 else None, dlast is not None, ends, True)
    grid = (blocks + segments * constants["INITIAL"], _tiles(channels, CHANNELS))
    pointers = (_or(x, v) for v in (taps, shift, state, ends, dy, dlast, dx, dinitial))
    strides = (flat.stride(0), 0 if dy is None else dy.stride(0), channels)
    numbers = (b * t, t, segments, segments.bit_length(), *strides)
    launch: Any = _backward[grid]
    launch(flat, *pointers, partial, *numbers, OUT=dy is not None, **constants)
    sums = partial.sum(0) if dy is not None else partial.new_zeros(width + 1, channels)
    return [
        dx,
        sums[:width].t().to(weight.dtype, copy=True),
        None if bias is None else sums[width].to(bias.dtype, copy=True),
        dinitial,
        None,
    ]


def step(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, silu: bool, index: Tensor | None) -> Tensor:
    """As of the public function, but the state is always overwritten, and has to be contiguous. -> y"""
    b, slots, channels = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    x, weight = x.contiguous(), weight.contiguous()
    constants = {"W": weight.shape[1], "SILU": silu, "BIAS": bias is not None, "INDEX": index is not None}
    pointers = (_or(x, None if v is None else v.contiguous()) for v in (bias, state, index))
    grid = (b * slots, _tiles(channels, STEP_CHANNELS))
    launch: Any = _step[grid]
    launch(x, weight, *pointers, y, slots, state.shape[1], channels, **constants, **_STEP)
    return y


STEP_CHANNELS = 256
_STEP = {"CHANNELS": STEP_CHANNELS, "num_warps": 2}


def _constants(width: int, silu: bool, bias: Any, initial: Any, final: bool, cu: Any, backward: bool) -> dict[str, Any]:
    flags = {"SILU": silu, "BIAS": bias is not None, "INITIAL": initial is not None, "FINAL": final}
    found = {"W": width, **flags, "VARLEN": cu is not None, "STATE": _power_of_two(width - 1)}
    if not backward:
        return {**found, "ROWS": ROWS, "CHANNELS": CHANNELS, "num_warps": 4, "num_stages": 1}
    found |= {"SUMS": _power_of_two(width + 1), "ROWS": BACK_ROWS, "TILES": BACK // BACK_ROWS}
    return {**found, "CHANNELS": CHANNELS, "num_warps": 8, "num_stages": 1}


def _flat(x: Tensor) -> Tensor:
    """[B, T, C] -> [B * T, C] with adjoining channels, a view where that is possible."""
    flat = x.flatten(0, 1)
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _tiles(n: int, size: int) -> int:
    return -(-n // size)


def _power_of_two(n: int) -> int:
    """The smallest that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def _or(x: Tensor, other: Tensor | None) -> Tensor:
    """A kernel wants a pointer even for what it does not read."""
    return x if other is None else other


def compilations() -> Iterator[Compilation]:
    """Nothing on, what training has, and everything on; each width in one dtype, each dtype at one width."""
    cases = [(torch.bfloat16, width) for width in (2, 3, 4)] + [(torch.float16, 4), (torch.float32, 4)]
    for dtype, width in cases:
        for kind in ("bare", "training", "full"):
            name = f"{str(dtype).removeprefix('torch.')} W{width} {kind}"
            x, cu = torch.empty(64, 1024, dtype=dtype, device="meta"), torch.empty(5, dtype=torch.int32, device="meta")
            weight, state = torch.empty(1024, width, device="meta"), torch.empty(4, dtype=dtype, device="meta")
            silu, full = kind != "bare", kind == "full"
            known, states = x if silu else None, x if full else None
            common, numbers = (x, weight, weight, state, cu), (4096, 1024, 4, 3, 1024)
            make = partial(_constants, width, silu, known, states, full, known)
            ahead = partial(Compilation, "causal_conv1d", wgmma=False)
            yield ahead(f"forward {name}", _forward, (*common, x, state, *numbers, 1024), make(False))
            args = (*common, x, state, x, state, weight, *numbers, 1024, 1024)
            yield ahead(f"backward {name}", _backward, args, {**make(True), "OUT": True})
            flags = {"W": width, "SILU": silu, "BIAS": silu, "INDEX": full}
            yield ahead(f"step {name}", _step, (x, weight, weight, state, cu, x, 4, 4, 1024), {**flags, **_STEP})
