"""Triton form: one launch forward; backward one for queries, one for the keys of each band, one for the kept rows of each kind.

A row may be kept by many chunks. Their shares of its gradient are written apart, [G, m, Hkv, K] in fp32, and added by the program
that owns the row, in the order of a stable sort: no atomics, and the same bits every time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.compilation import Compilation
from kernels.library import Tensors
from kernels.memory_attention import BAND, CHUNK, POINT, SELF
from kernels.memory_attention.triton_kernels import band_gradient, kept_gradient, pool_gradient, query_gradient
from kernels.memory_attention.triton_kernels import forward as attend
from kernels.triton import by_rows, padded, precision, roomy, search_width, slots

POOL_ROWS = 16  # wider tiles of fp32 spill


class _Launch(NamedTuple):
    name: str
    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]

    def __call__(self) -> None:
        self.kernel[self.grid](*self.args, **self.constants)


class _Call(NamedTuple):
    """The op's tensors as the kernels read them. Where a tensor is absent, q stands for it, which nobody reads then."""

    q: Tensor
    k: Tensor
    v: Tensor
    memory_q: Tensor
    table_k: Tensor  # that ``index`` points into: the pool, or k and v
    table_v: Tensor
    fading_k: Tensor
    fading_v: Tensor
    index: Tensor
    since: Tensor
    cu: Tensor
    numbers: tuple[Any, ...]  # rows, rows of a segment, segments, scale
    flags: dict[str, Any]  # KEPT, SINCE, FADING, LAG, REACH, TWO
    shape: dict[str, Any]  # what every kernel wants to know
    slots: int
    pooled: bool

    @property
    def strides(self) -> dict[str, int]:
        names = {"SQ": self.q, "SK": self.k, "SV": self.v, "SM": self.memory_q, "STK": self.table_k}
        names |= {"STV": self.table_v, "SFK": self.fading_k, "SFV": self.fading_v}
        return {name: x.stride(1) for name, x in names.items()}

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """B, T, H, Hkv, K."""
        b, t, h, width = self.q.shape
        return b, t, h, self.k.shape[2], width


def _call(tensors: Tensors, options: Sequence[float]) -> _Call:
    q, k, v, pool_k, pool_v, fading_k, fading_v, memory_q, index, since, cu = tensors
    assert q is not None
    assert k is not None
    assert v is not None
    (b, t, h, width), window, fading = q.shape, int(options[0]), int(options[1])
    q, k, v = by_rows(q), by_rows(k), by_rows(v)
    kept = 0 if index is None else index.shape[1]
    some = fading_k is not None and fading_k.numel() > 0
    flags: dict[str, Any] = {"TWO": memory_q is not None, "KEPT": kept, "SINCE": kept > 0 and since is not None}
    flags["FADING"] = fading_k.shape[1] if fading_k is not None and some and fading == CHUNK else 0
    flags["LAG"] = window if fading in (POINT, BAND) else 0
    flags["REACH"] = {CHUNK: 0, POINT: 1, BAND: window, SELF: 1}[fading] if some else 0
    pooled = kept > 0 and pool_k is not None
    tables = (k, v) if pool_k is None or pool_v is None else (by_rows(pool_k[None]), by_rows(pool_v[None]))
    rows = (q, q) if fading_k is None or fading_v is None or not some else (by_rows(fading_k), by_rows(fading_v))
    segments = b if cu is None else len(cu) - 1
    shape = {"H": h, "GROUP": h // k.shape[2], "K": width, "BK": padded(width), "W": window}
    shape |= {"VARLEN": cu is not None, "SEARCH": search_width(segments), "PRECISION": precision(q.dtype)}
    memory_q = q if memory_q is None else by_rows(memory_q)
    index, since, cu_seqlens = (q if x is None else x.contiguous() for x in (index, since, cu))
    numbers = (b * t, t, segments, options[2])
    places = (slots(b, t, cu, window), pooled)
    return _Call(q, k, v, memory_q, *tables, *rows, index, since, cu_seqlens, numbers, flags, shape, *places)


def forward(tensors: Tensors, options: Sequence[float], backend: str) -> list[Tensor]:
    """As ``reference.forward``."""
    call = _call(tensors, options)
    o = torch.empty_like(call.q, memory_format=torch.contiguous_format)
    lse = o.new_empty(o.shape[:3], dtype=torch.float32)
    _forward(call, o, lse, roomy(o.device))()
    return [o, lse]


def _forward(call: _Call, o: Tensor, lse: Tensor, large: bool) -> _Launch:
    sizes = _sizes(call, large, forward=True)
    grid = (call.slots * _tiles(call.shape["W"], sizes["BM"]), call.shape["H"])
    args = (*call[:11], o, lse, *call.numbers)
    return _Launch("forward", attend, grid, args, call.strides | call.flags | call.shape | sizes)


def backward(
    tensors: Tensors,
    saved: Sequence[Tensor],
    grads: Tensors,
    needs: Sequence[bool],
    options: Sequence[float],
    backend: str,
) -> Tensors:
    """As ``reference.backward``."""
    call, (lse, o), do = _call(tensors, options), saved, grads[0]
    assert do is not None
    found, launches = _backward(call, o, lse, do.contiguous(), roomy(o.device))
    for launch in launches:
        launch()
    return [None if t is None else g for g, t in zip(found, tensors, strict=True)]


def _backward(
    call: _Call, o: Tensor, lse: Tensor, do: Tensor, large: bool
) -> tuple[list[Tensor | None], list[_Launch]]:
    """-> (gradients of the op's tensors, which are there after the launches; the launches in their order)."""
    b, t, h, kv, width = call.sizes
    flags, kept = call.flags, call.flags["KEPT"]
    dq, drops = torch.empty_like(o), torch.empty_like(lse)
    d_memory_q = torch.empty_like(o) if flags["TWO"] else dq
    sizes = _sizes(call, large, forward=False)
    grid = (call.slots * _tiles(call.shape["W"], sizes["BM"]), h)
    args = (*call[:11], o, lse, do, dq, d_memory_q, drops, *call.numbers)
    launches = [_Launch("queries", query_gradient, grid, args, call.strides | flags | call.shape | sizes)]
    above = (lse, do, drops)
    shares: tuple[Tensor, ...] = (call.q,) * 4
    if kept:
        apart = [o.new_empty(call.slots, kept, kv, width, dtype=torch.float32) for _ in range(2)]
        launches.append(_of_kept("eidetic", call, apart, above))
        shares = (*apart, *_uses(call.index, call.table_k.shape[1] if call.pooled else b * t))
    d_window = [o.new_empty(b, t, kv, width) for _ in range(2)]
    window = (0, call.shape["W"])
    added = shares if kept and not call.pooled else None
    launches.append(_of_band("window", call, (call.q, call.k, call.v), window, d_window, above, added))
    d_pool: list[Any] = [None, None]
    if call.pooled:
        rows = call.table_k.shape[1]
        d_pool = [o.new_empty(rows, kv, width) for _ in range(2)]
        constants = {"HKV": kv, "K": width, "BK": padded(width), "B": POOL_ROWS, "num_warps": 4}
        grid = (_tiles(rows, POOL_ROWS), kv)
        launches.append(_Launch("pool", pool_gradient, grid, (*shares, *d_pool, rows), constants))
    d_fading: list[Any] = [None, None]
    if flags["FADING"] or flags["REACH"]:
        d_fading = [o.new_empty(call.fading_k.shape) for _ in range(2)]
    if flags["FADING"]:
        launches.append(_of_kept("fading", call, d_fading, above))
    elif flags["REACH"]:
        rows, band = (call.memory_q, call.fading_k, call.fading_v), (flags["LAG"], flags["REACH"])
        launches.append(_of_band("fading band", call, rows, band, d_fading, above, None))
    found = [dq, *d_window, *d_pool, *d_fading, d_memory_q if flags["TWO"] else None, None, None, None]
    return found, launches


def _of_band(
    name: str, call: _Call, rows: tuple[Tensor, Tensor, Tensor], band: tuple[int, int], found: list[Tensor],
    above: tuple[Tensor, ...], shares: tuple[Tensor, ...] | None,
) -> _Launch:  # fmt: skip
    """Gradients of the keys and values of ``rows`` (query, key, value); ``shares``: with those of the chunks that kept them."""
    sizes = _key_sizes(call, call.shape["W"])
    grid = (call.slots * _tiles(call.shape["W"], sizes["BN"]), call.sizes[3])
    strides = dict(zip(("SQ", "SK", "SV"), (x.stride(1) for x in rows), strict=True))
    constants = {"LAG": band[0], "REACH": band[1], "ADD": shares is not None} | strides | call.shape | sizes
    args = (*rows, call.cu, *above, *(shares or (call.q,) * 4), *found, *call.numbers)
    return _Launch(name, band_gradient, grid, args, constants)


def _of_kept(name: str, call: _Call, found: list[Tensor], above: tuple[Tensor, ...]) -> _Launch:
    """Gradients of the rows of each chunk, eidetic or fading ones."""
    gather = name == "eidetic"
    rows = (call.memory_q, *((call.table_k, call.table_v) if gather else (call.fading_k, call.fading_v)))
    count = call.flags["KEPT" if gather else "FADING"]
    sizes = _key_sizes(call, count)
    grid = (call.slots, call.sizes[3], _tiles(count, sizes["BN"]))
    constants = dict(zip(("SQ", "SK", "SV"), (x.stride(1) for x in rows), strict=True))
    constants |= {"M": count, "GATHER": gather, "SINCE": gather and call.flags["SINCE"]} | call.shape | sizes
    args = (*rows, call.index, call.since, call.cu, *above, *found, *call.numbers)
    return _Launch(name, kept_gradient, grid, args, constants)


def _uses(index: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """index [G, m] of a table of so many rows -> (starts [rows + 1], order): entries starts[r] .. starts[r + 1] - 1 of ``order`` are
    the flat places of index that hold r, in rising order."""
    named, order = torch.where(index < 0, rows, index).flatten().sort(stable=True)
    return torch.searchsorted(named, torch.arange(rows + 1, device=index.device, dtype=named.dtype)), order


# -- sizes of tiles


def _sizes(call: _Call, large: bool, forward: bool) -> dict[str, Any]:
    """Of programs that own queries. A tile of them divides the window if it can."""
    single, wide, window = call.q.dtype == torch.float32, call.shape["BK"] > 64, call.shape["W"]
    bm = min(32 if single else 64, padded(window))
    if forward and large and not single and not wide and window % 128 == 0:
        bm = 128
    bn = min(32 if single else 64, bm)
    sizes = {name: min(bn, padded(call.flags[count])) for name, count in (("BE", "KEPT"), ("BF", "FADING"))}
    warps = 8 if bm > 16 and (bm == 128 or single or wide) else 4
    return sizes | {"BM": bm, "BN": bn, "num_warps": warps, "num_stages": 2}


def _key_sizes(call: _Call, count: int) -> dict[str, Any]:
    """Of programs that own some of ``count`` keys."""
    single, wide = call.q.dtype == torch.float32, call.shape["BK"] > 64
    bm, bn = min(16 if wide else 32, padded(call.shape["W"])), min(32 if single else 64, padded(count))
    warps = 8 if bn > 16 and (single or wide) else 4
    return {"BM": bm, "BN": bn, "num_warps": warps, "num_stages": 1 if single and bn == 16 else 2}


def _tiles(n: int, size: int) -> int:
    return -(-n // size)


# -- compiled ahead of time


def compilations() -> Iterator[Compilation]:
    """Every kind of memory at the paper's window and the usual heads, all that there is at once at other widths, and small
    windows."""
    half, single = torch.bfloat16, torch.float32
    cases = [(half, 64, 512, "chunk"), (half, 64, 512, "band"), (half, 128, 512, "chunk"), (half, 128, 512, "band")]
    cases += [(half, 96, 192, "bare"), (torch.float16, 64, 512, "point"), (half, 16, 16, "band")]
    cases += [(single, 64, 512, "chunk"), (single, 64, 512, "band"), (single, 16, 16, "chunk")]
    for case, targets in itertools.product(cases, (("sm_90", "sm_100"), ("sm_80",), ("gfx942",))):
        yield from _compilations(*case, targets)


def _compilations(
    dtype: torch.dtype, width: int, window: int, kind: str, targets: tuple[str, ...]
) -> Iterator[Compilation]:
    """What a call with such tensors launches, on a device that is not here."""
    b, t, h, kv, kept, large = 2, 2048, 8, 4, min(64, window), "sm_90" in targets

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, cu = empty(b, t, h, width), empty(b, t, kv, width), empty(9, dtype=torch.int32)
    tensors: list[Tensor | None] = [q, k, k, *[None] * 8]
    chunks = slots(b, t, cu, window)
    if kind != "bare":
        fading = empty(chunks, 1, kv, width) if kind == "chunk" else k
        index = empty(chunks, kept, dtype=torch.int64)
        tensors[5:] = [fading, fading, None, index, index, cu]
    if kind == "band":
        tensors[3], tensors[4], tensors[7] = empty(b * t, kv, width), empty(b * t, kv, width), q
    options = (window, {"bare": CHUNK, "chunk": CHUNK, "point": POINT, "band": BAND}[kind], width**-0.5)
    call, lse = _call(tensors, options), empty(b, t, h, dtype=torch.float32)
    launches = [_forward(call, q, lse, large), *_backward(call, q, lse, q, large)[1]]
    name = f"{kind} {str(dtype).removeprefix('torch.')} {width} W{window}"
    for launch in launches:
        constants = dict(launch.constants)
        if "gfx942" in targets and "PRECISION" in constants:
            constants["PRECISION"] = "ieee"
        rows = constants.get("BM" if launch.kernel in (attend, query_gradient) else "BN", 0)
        label = f"{launch.name}, {name}, {targets[0]}"
        wgmma = dtype != torch.float32 and rows >= 64
        yield Compilation("memory_attention", label, launch.kernel, launch.args, constants, wgmma, targets)
