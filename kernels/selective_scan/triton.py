"""Triton form of the selective scan: one launch forward, two backward and three sums; the algebra is that of ``reference``.

Rows are flat: row b * T + t. A chunk of C rows of one segment has a slot (`kernels.triton`). What the launches hand to each other,
in fp32, of R rows and M slots:

    states, dstates [M, D, N]       the state before each chunk, and the gradient of that after it
    db, dc [D / SPAN, R, N]         what each span of channels adds to the gradients of B and C

The scans over chunks are the serial part. Backward it needs no state: exp(A sum of delta) takes each row's share to the start of its
chunk. All else is local to a chunk and in ``gradients``.
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false
# (the checker takes what Triton compiles for Python)

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.compilation import Compilation
from kernels.library import Tensors
from kernels.selective_scan.triton_kernels import gradients, scan, scan_back
from kernels.triton import by_rows, search_width, slots

MAX_WIDTH = 64  # of a state: a tile holds all of it for at least 4 rows and 16 channels


class Config(NamedTuple):
    chunk: int  # rows C
    width: int  # BN, numbers of a state
    channels: int  # BD of a tile
    span: int  # channels of a program of ``gradients``, a multiple of BD
    serial_warps: int
    local_warps: int  # of ``gradients``, which holds more


def config(channels: int, width: int) -> Config:
    """For a state [D, N]. Found by compiling: these spill no registers on sm_90."""
    padded = max(4, 1 << (width - 1).bit_length())
    span = min(128, -(-channels // 16) * 16)
    return Config(max(4, min(16, 256 // padded)), padded, 16, span, 4, 8)


def why_not(dtype: torch.dtype, width: int) -> str | None:
    """Why the kernels cannot take u of this dtype with states of this width."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"u is {dtype}"
    return f"N is {width}, above {MAX_WIDTH}" if width > MAX_WIDTH else None


def kept_states(u: Tensor, A: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Memory for the states before the chunks [slots, D, N]."""
    count = slots(*u.shape[:2], cu_seqlens, config(*A.shape).chunk)
    return u.new_empty(count, *A.shape, dtype=torch.float32)


class _Call:
    """What the launches of one call share."""

    def __init__(self, tensors: Tensors) -> None:
        u, delta, A, B, C, D, _, cu = tensors
        assert u is not None
        assert delta is not None
        assert A is not None
        assert B is not None
        assert C is not None
        self.u, self.delta, self.B, self.C = (_rows(x) for x in (u, delta, B, C))
        self.rates, self.skip = A.contiguous(), None if D is None else D.contiguous()
        self.cu = None if cu is None else cu.contiguous()
        self.batch, self.time, self.channels = u.shape
        self.width = A.shape[1]
        self.segments = self.batch if cu is None else len(cu) - 1
        self.config = config(self.channels, self.width)
        self.sizes = (self.segments, self.batch * self.time, self.time)
        self.serial = (-(-self.channels // self.config.channels), self.segments)

    def constants(self, **strides: Tensor) -> dict[str, Any]:
        found = _constants(self.channels, self.width, self.config, self.cu is not None)
        return found | {f"{name}_stride": x.stride(1) for name, x in strides.items()}

    def state(self) -> Tensor:
        return self.u.new_empty(self.segments, self.channels, self.width, dtype=torch.float32)


def forward(tensors: Tensors, options: Sequence[float], backend: str) -> list[Tensor]:
    """As ``reference.forward``."""
    u, _, A, *_, h0, cu = tensors
    assert u is not None
    assert A is not None
    call = _Call(tensors)
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    states = kept_states(u, A, cu) if options[1] else None
    final = call.state() if options[0] else None
    args: tuple[Any, ...] = (
        call.u,
        call.delta,
        call.rates,
        call.B,
        call.C,
        call.skip,
        call.cu,
        _dense(h0),
        y,
        states,
        final,
    )
    channels, segments = call.serial
    constants = call.constants(u=call.u, delta=call.delta, b=call.B, c=call.C)
    scan[channels, segments + (cu is not None)](*args, *call.sizes, **constants)
    results = [y, u.new_empty(0, dtype=torch.float32) if final is None else final]
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
    u, delta, A, B, C, D, h0, _ = tensors
    assert u is not None
    assert delta is not None
    assert A is not None
    assert B is not None
    assert C is not None
    call = _Call(tensors)
    (states,) = saved
    dy = _rows(torch.zeros_like(u) if grads[0] is None else grads[0])
    dstates, dh0 = torch.empty_like(states), call.state() if needs[6] else None
    args: tuple[Any, ...] = (call.delta, call.rates, call.C, dy, call.cu, _dense(grads[1]), dstates, dh0)
    scan_back[call.serial](*args, *call.sizes, **call.constants(delta=call.delta, c=call.C, dy=dy))
    du, ddelta = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (u, delta))
    parts = -(-call.channels // call.config.span)
    db, dc = (states.new_empty(parts, *B.shape) for _ in range(2))
    dskip = states.new_empty(len(states), call.channels)
    args = (call.u, call.delta, call.rates, call.B, call.C, call.skip, dy, call.cu)
    args = (*args, states, dstates, du, ddelta, db, dc, dskip, *call.sizes)
    constants = call.constants(u=call.u, delta=call.delta, b=call.B, c=call.C, dy=dy)
    gradients[len(states), parts](*args, **constants | _chunkwise(call.config, call.segments))
    return [
        du,
        ddelta,
        dstates.sum(0).to(A.dtype),
        db.sum(0).to(B.dtype),
        dc.sum(0).to(C.dtype),
        None if D is None else dskip.sum(0).to(D.dtype),
        None if dh0 is None or h0 is None else dh0.to(h0.dtype),
        None,
    ]


def _rows(x: Tensor) -> Tensor:
    """x [B, T, K], where row b * T + t starts at that multiple of stride(1)."""
    return by_rows(x.unsqueeze(2)).squeeze(2)


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _constants(channels: int, width: int, c: Config, varlen: bool) -> dict[str, Any]:
    sizes = {"D": channels, "N": width, "C": c.chunk, "BD": c.channels, "BN": c.width, "VARLEN": varlen}
    return sizes | {"num_warps": c.serial_warps, "num_stages": 1}


def _chunkwise(c: Config, segments: int) -> dict[str, Any]:
    return {"SPAN": c.span, "SEARCH": search_width(segments), "num_warps": c.local_warps}


def compilations() -> Iterator[Compilation]:
    """Every tile there is; bf16 at the published width also bare: whole rows, no states, no skip."""
    for width in (4, 8, 16, 32, 64):
        yield from _compilations(width, torch.bfloat16)
    yield from _compilations(16, torch.bfloat16, full=False)
    yield from _compilations(16, torch.float16)
    yield from _compilations(16, torch.float32)
    yield from _compilations(10, torch.float32, channels=100)


def _compilations(width: int, dtype: torch.dtype, channels: int = 1536, full: bool = True) -> Iterator[Compilation]:
    x, fp32, cu = (torch.empty(16, dtype=t, device="meta") for t in (dtype, torch.float32, torch.int32))
    some, state, kept = (cu, fp32, fp32) if full else (None, None, None)
    c, sizes = config(channels, width), (5, 4096, 4096)
    constants = _constants(channels, width, c, full)
    rows = {"u_stride": channels, "delta_stride": channels, "b_stride": 80, "c_stride": 80}
    back = {"delta_stride": channels, "c_stride": 80, "dy_stride": channels}
    local = rows | {"dy_stride": channels} | _chunkwise(c, 5)
    inputs = (x, fp32, fp32, x, x, state)
    launches = (
        ("scan", scan, (*inputs, some, state, x, kept, state), rows),
        ("scan_back", scan_back, (fp32, fp32, x, x, some, state, fp32, state), back),
        ("gradients", gradients, (*inputs, x, some, fp32, fp32, x, fp32, fp32, fp32, fp32), local),
    )
    name = f"{str(dtype).removeprefix('torch.')}-{channels}x{width}" + ("" if full else "-bare")
    for label, kernel, args, more in launches:
        yield Compilation("selective_scan", f"{label}-{name}", kernel, (*args, *sizes), constants | more, wgmma=False)
