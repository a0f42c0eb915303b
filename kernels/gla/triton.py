"""Triton form of gated linear attention: two launches forward, two backward; the algebra is that of ``reference``.

Rows are flat: row b * T + t. A chunk of C rows of one segment has a slot (`kernels.triton`). What the launches hand to each other,
of H key heads, HV value heads, R rows, N slots, in the dtype of v where no other is named:

    pairs [N, H, C, C]              s P: what each row reads of what each row of its chunk writes
    reads, writes [R, H, K]         s Q * exp(gamma) and K * exp(gamma_C - gamma)
    gamma [N, H, 1 or 2, C, K] fp32 the sum of g inside the chunk; for fp32 inputs as two numbers that add up to it, since after a
                                    strong decay what is left of a small one would be rounding in one
    states, dstates [N, HV, K, V]   the state before each chunk, and the gradient of that after it

With these the scans, the only serial part, hold few exponentials: O = pairs V + reads S, S' = exp(gamma_C) S + writes^T V, and in
reverse dV = pairs^T dO + writes dS', dS = exp(gamma_C) dS' + reads^T dO, one kernel for both. All that a chunk does by itself is
in ``prepare`` and ``gradients``, which halve the chunk as the reference does; each level of halves is one product of whole tiles
and a mask, in a loop: unrolled, the levels hold each other's operands in registers and spill.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false
# (the checker takes what Triton compiles for Python)

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.compilation import Compilation
from kernels.gla.triton_kernels import gradients, prepare, scan
from kernels.library import Tensors
from kernels.scan_arguments import wide_dtype
from kernels.triton import by_rows, padded, precision, roomy, search_width, slots


class Tiles(NamedTuple):
    """Of one launch: columns of q and k, columns of v, warps, stages of the software pipeline."""

    key: int
    value: int
    warps: int
    stages: int


class Config(NamedTuple):
    chunk: int  # rows C
    prepare: Tiles
    scan: Tiles
    gradients: Tiles


def config(key: int, value: int, dtype: torch.dtype, roomy: bool) -> Config:
    """For q and k of width ``key``, v of width ``value``. Found by compiling: these spill no registers on sm_90."""
    kp, vp = padded(key), padded(value)
    if dtype == torch.float32:  # three passes of tensor cores hold three times the operands in registers
        small = Tiles(min(kp, 32), min(vp, 32), 4, 1)
        return Config(16, small, Tiles(kp, min(vp, 32), 4, 1), small)
    tile, wide = min(kp, 64), min(vp, 64)
    if not roomy:
        scans = Tiles(kp, min(vp, 32), 8 if kp == 256 else 4, 1)
        return Config(32, Tiles(tile, wide, 4, 1), scans, Tiles(min(kp, 32), wide, 4, 1))
    return Config(
        64,
        Tiles(tile, wide, 8, 1),
        Tiles(kp, wide, 8 if kp == 256 else 4, 2),
        Tiles(tile, wide, 8, 1),
    )


def why_not(dtype: torch.dtype, key: int) -> str | None:
    """Why the kernels cannot take inputs with v of this dtype, in which they compute, and q and k of this width."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"v is {dtype}"
    limit = 64 if dtype == torch.float32 else 256  # what the registers of a program hold
    return f"K is {key}, above {limit} for {dtype}" if key > limit else None


class _Call:
    """What the launches of one call share."""

    def __init__(self, tensors: Tensors, options: Sequence[float]) -> None:
        q, k, v, g, _, cu = tensors
        assert q is not None
        assert k is not None
        assert v is not None
        assert g is not None
        self.scale, self.final, self.keep = float(options[0]), bool(options[1]), bool(options[2])
        self.q, self.k, self.v, self.g = by_rows(q.to(v.dtype)), by_rows(k.to(v.dtype)), by_rows(v), by_rows(g)
        self.cu = None if cu is None else cu.contiguous()
        self.batch, self.time, self.heads, self.key = q.shape
        self.value_heads, self.value = v.shape[2:]
        self.segments = self.batch if cu is None else len(cu) - 1
        self.config = config(self.key, self.value, v.dtype, roomy(v.device))
        self.slots = slots(self.batch, self.time, cu, self.config.chunk)
        self.sizes = (self.segments, self.batch * self.time, self.time)
        self.shape = (self.heads, self.value_heads // self.heads, self.key, self.value)
        self.strides = {"q_stride": self.q.stride(1), "k_stride": self.k.stride(1)}

    def results(self) -> list[Tensor]:
        """Memory for o and the final state; where a backward follows, also for pairs, reads, writes, gamma and states."""
        final = self.state() if self.final else self.v.new_empty(0, dtype=wide_dtype(self.v))
        outputs = [torch.empty_like(self.v, memory_format=torch.contiguous_format), final]
        return [*outputs, *self.prepared(), self.states()] if self.keep else outputs

    def prepared(self) -> list[Tensor]:
        like, n, c = self.v, self.slots, self.config.chunk
        rows = (self.batch * self.time, self.heads, self.key)
        return [
            like.new_empty(n, self.heads, c, c),
            like.new_empty(rows),
            like.new_empty(rows),
            like.new_empty(n, self.heads, 2 if _two(like.dtype) else 1, c, self.key, dtype=torch.float32),
        ]

    def states(self) -> Tensor:
        return self.v.new_empty(self.slots, self.value_heads, self.key, self.value)

    def state(self) -> Tensor:
        shape = (self.segments, self.value_heads, self.key, self.value)
        return self.v.new_empty(shape, dtype=wide_dtype(self.v))

    def constants(self, tiles: Tiles, **more: Any) -> dict[str, Any]:
        dtype, varlen = self.v.dtype, self.cu is not None
        return _constants(self.shape, self.config, tiles, dtype, precision(dtype), varlen) | more

    def chunkwise(self) -> dict[str, Any]:
        """Constants of kernels that find their segment by themselves."""
        return _chunkwise(self.config, self.segments) | self.strides

    def scan(
        self,
        x: Tensor,
        y: Tensor,
        v: Tensor,
        pairs: Tensor,
        gamma: Tensor,
        initial: Tensor | None,
        out: Tensor,
        states: Tensor | None,
        final: Tensor | None,
        reverse: bool = False,
    ) -> None:
        tiles = self.config.scan
        grid = (-(-self.value // tiles.value) * self.value_heads * self.segments,)
        initial = None if initial is None else initial.contiguous()
        args: tuple[Any, ...] = (x, y, v, self.cu, pairs, gamma, initial, out, states, final, *self.sizes)
        scan[grid](*args, **self.constants(tiles, BV=tiles.value, REVERSE=reverse, v_stride=v.stride(1)))


def fake(tensors: Tensors, options: Sequence[float]) -> list[Tensor]:
    """What ``forward`` returns, computing nothing."""
    return _Call(tensors, options).results()


def forward(tensors: Tensors, options: Sequence[float], backend: str) -> list[Tensor]:
    """As ``reference.forward``; the third option: whether a backward follows, for which more results are kept."""
    call = _Call(tensors, options)
    o, final, *kept = call.results()
    pairs, reads, writes, gamma = kept[:4] if call.keep else call.prepared()
    tiles = call.config.prepare
    args: tuple[Any, ...] = (call.q, call.k, call.g, call.cu, o, pairs, reads, writes, gamma, call.scale)
    constants = call.constants(tiles, **call.chunkwise(), g_stride=call.g.stride(1))
    prepare[(call.slots, call.heads)](*args, *call.sizes, **constants)
    states = kept[4] if call.keep else None
    call.scan(reads, writes, call.v, pairs, gamma, tensors[4], o, states, final if call.final else None)
    return [o, final, *kept]


def backward(
    tensors: Tensors,
    saved: Sequence[Tensor],
    grads: Tensors,
    needs: Sequence[bool],
    options: Sequence[float],
    backend: str,
) -> Tensors:
    """As ``reference.backward``."""
    q, k, _, g, h0, _ = tensors
    assert q is not None
    assert k is not None
    assert g is not None
    call = _Call(tensors, options)
    pairs, reads, writes, gamma, states = saved
    do = by_rows(torch.zeros_like(call.v) if grads[0] is None else grads[0])
    dv, dstates = torch.empty_like(call.v, memory_format=torch.contiguous_format), torch.empty_like(states)
    dh0 = call.state() if needs[4] else None
    call.scan(writes, reads, do, pairs, gamma, grads[1], dv, dstates, dh0, reverse=True)
    dq, dk = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (call.q, call.k))
    dg = torch.empty_like(g, memory_format=torch.contiguous_format) if needs[3] else None
    tiles = call.config.gradients
    args: tuple[Any, ...] = (call.q, call.k, call.v, do, call.cu, gamma, states, dstates)
    args = (*args, torch.empty_like(pairs), dq, dk, dg, dv, call.scale, *call.sizes)
    more = {"BV": tiles.value, "v_stride": call.v.stride(1), "do_stride": do.stride(1)}
    gradients[(call.slots, call.heads)](*args, **call.constants(tiles, **call.chunkwise(), **more))
    dh0 = None if dh0 is None or h0 is None else dh0.to(h0.dtype)
    return [dq.to(q.dtype), dk.to(k.dtype), dv, dg, dh0, None]


def _constants(
    shape: tuple[int, int, int, int],
    config: Config,
    tiles: Tiles,
    dtype: torch.dtype,
    precision: str,
    varlen: bool,
) -> dict[str, Any]:
    """Of every kernel; ``shape`` is H, value heads per key head, K, V."""
    sizes = dict(zip(("H", "GROUP", "K", "V"), shape, strict=True))
    launch = {"C": config.chunk, "BK": tiles.key, "num_warps": tiles.warps, "num_stages": tiles.stages}
    return {**sizes, **launch, "TWO": _two(dtype), "PRECISION": precision, "VARLEN": varlen}


def _two(dtype: torch.dtype) -> bool:
    """Whether gamma is two numbers."""
    return dtype == torch.float32


def _chunkwise(config: Config, segments: int) -> dict[str, Any]:
    return {"LEVELS": config.chunk.bit_length() - 1, "SEARCH": search_width(segments)}


def compilations() -> Iterator[Compilation]:
    """Every width that the tiles are made for; bf16 at one of them also with more value heads than key heads, and bare."""
    for wide in (True, False):
        for k, v in ((16, 16), (32, 32), (64, 64), (128, 64), (128, 128), (256, 64), (256, 256)):
            yield from _compilations(k, v, torch.bfloat16, wide)
        yield from _compilations(128, 128, torch.bfloat16, wide, group=4)
        yield from _compilations(128, 128, torch.bfloat16, wide, full=False)
        yield from _compilations(128, 128, torch.float16, wide)
        for k in (16, 32, 64):
            yield from _compilations(k, k, torch.float32, wide)


def _compilations(
    k: int, v: int, dtype: torch.dtype, wide: bool, group: int = 1, full: bool = True
) -> Iterator[Compilation]:
    """``full``: ragged rows, states that come and go, and the gradient of g. ``roomy`` and ``precision`` ask a device, and none
    is here: ``wide`` stands for the first."""
    x, fp32, cu = (torch.empty(16, dtype=t, device="meta") for t in (dtype, torch.float32, torch.int32))
    some, state, dg = (cu, fp32, fp32) if full else (None, None, None)
    sizes, c = (5, 4096, 4096), config(k, v, dtype, wide)
    name = f"{str(dtype).removeprefix('torch.')}-{k}x{v}" + ("" if group == 1 else f"-group{group}")
    name += ("" if full else "-bare") + ("" if wide else "-small")
    v_strides = {"v_stride": 4 * group * v}
    local = _chunkwise(c, 5) | {"q_stride": 4 * k, "k_stride": 4 * k}
    carried = v_strides | {"BV": c.scan.value}
    scanned = (x, x, x, some, x, fp32, state, x, x if full else None, state)
    back = local | v_strides | {"do_stride": 4 * group * v, "BV": c.gradients.value}
    launches = (
        ("prepare", prepare, c.prepare, (x, x, fp32, some, x, x, x, x, fp32, 0.125), local | {"g_stride": 4 * k}),
        ("scan", scan, c.scan, scanned, carried | {"REVERSE": False}),
        ("scan_back", scan, c.scan, scanned, carried | {"REVERSE": True}),
        ("gradients", gradients, c.gradients, (x, x, x, x, some, fp32, x, x, x, x, x, dg, x, 0.125), back),
    )
    targets = {"": ("sm_90", "sm_100")} if wide else {"": ("sm_80",), "-hip": ("gfx942",)}
    for label, kernel, tiles, args, more in launches:
        for suffix, among in targets.items():
            exact = "tf32x3" if dtype == torch.float32 and not suffix else "ieee"
            constants = _constants((4, group, k, v), c, tiles, dtype, exact, full) | more
            large = c.chunk >= 64 and min(tiles.key, tiles.value) >= 64
            yield Compilation(
                "gla", f"{label}-{name}{suffix}", kernel, (*args, *sizes), constants, wgmma=large, targets=among
            )
