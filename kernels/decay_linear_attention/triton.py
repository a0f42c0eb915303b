"""Triton form of linear attention with a scalar decay: its launches, their sizes, and what they save.

Forward, one launch: ``scan`` walks through the chunks of a segment with the state in registers and writes outputs as it goes,
and for the backward the state before each chunk. Backward, three: ``scan`` backwards in time, with q and k in each other's place
and dO instead of V, carries dS and writes dV; ``gradient`` makes dQ, and then dK and dg, of each chunk from the states of the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from kernels.compilation import Compilation
from kernels.decay_linear_attention.triton_kernels import gradient, scan
from kernels.library import Tensors
from kernels.scan_arguments import wide_dtype
from kernels.triton import by_rows, padded, precision, roomy, search_width, slots


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


def why_not(dtype: torch.dtype, key: int) -> str | None:
    """Why the kernels cannot take inputs with v of this dtype, in which they compute, and q and k of this width."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"v is {dtype}"
    limit = 64 if dtype == torch.float32 else 256
    return f"K is {key}, above {limit} for {dtype}" if key > limit else None


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
        q, k, v, g, _, cu = tensors
        assert q is not None
        assert k is not None
        assert v is not None
        self.q, self.k, self.v = by_rows(q.to(v.dtype)), by_rows(k.to(v.dtype)), by_rows(v)
        self.g, self.cu = (None if x is None else x.contiguous() for x in (g, cu))
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
        initial = None if initial is None else initial.contiguous()
        tiles = _scan_tiles(self.key_width, self.width, v.dtype, self.roomy, carries)
        grid = (triton.cdiv(self.width, tiles.v), self.heads, self.segments + (self.cu is not None))
        # An argument that the kernel does not use is still an argument: out stands for all of them.
        or_out = [out if t is None else t for t in (self.g, self.cu, initial, out, states, final)]
        strides = (t.stride(1) for t in (x, y, v))
        args: tuple[Any, ...] = (x, y, v, *or_out, *self.sizes, *strides, self.scale)
        constants = _scan_constants(tiles, reverse, initial is not None, states is not None, final is not None)
        scan[grid](*args, **self.common, **constants)

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
            or_dy = [dy if t is None else t for t in (self.g, self.cu, of, states, dy, dg)]
            strides = (t.stride(1) for t in (a, b, x, y))
            args: tuple[Any, ...] = (a, b, x, y, *or_dy, *self.sizes, *strides, self.scale)
            constants = _gradient_constants(tiles, reverse, self.segments, dg is not None)
            gradient[grid](*args, **self.common, **constants)
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
            yield from _by_target(f"{label}-{name}", scan, args, (k, v, 1, 1), dtype, wide, 2, constants)
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
            yield from _by_target(f"{label}-{name}", gradient, args, (k, v, 1, groups), dtype, wide, decay, constants)


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
