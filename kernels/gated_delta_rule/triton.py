"""Triton form of the gated delta rule: two launches forward, three backward; the algebra is that of
``reference``.

Rows are flat: row b * T + t. A chunk of C rows of one segment has a slot (`kernels.triton`). What the launches hand to each other,
of HV heads, R rows, N slots, in the dtype of v where no other is named:

    inverse, reads [N, HV, C, C]    (I + A)^-1 and s Q K^T * Gamma diag(beta)
    factors [N, HV, 8, C] fp32      of rows: FROM_Q = s |q|^-1 exp(gamma), FROM_K = |k|^-1 exp(gamma),
                                    TO_K = beta |k|^-1 exp(gamma_C - gamma), Q_NORM = |q|^-1, K_NORM = |k|^-1, BETA, and gamma,
                                    the sum of g inside the chunk, as HIGH + LOW; q and k themselves are never normalised, and
                                    where nobody wants it, norms are 1
    errors [R, HV, V]               v minus what its key reads before it writes
    states, dstates [N, HV, K, V]   the state before each chunk, and the gradient of that after it
"""

# pyright: reportGeneralTypeIssues=false, reportCallIssue=false
# (the checker takes what Triton compiles for Python)

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.compilation import TARGETS, Compilation
from kernels.gated_delta_rule.reference import NORM_EPS
from kernels.gated_delta_rule.triton_backward import key_gradients, query_gradients, scan_back
from kernels.gated_delta_rule.triton_forward import PLANES, prepare, scan
from kernels.library import Tensors
from kernels.scan_arguments import wide_dtype
from kernels.triton import by_rows, precision, slots


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
    scan_back: Tiles
    query_gradients: Tiles
    key_gradients: Tiles


def config(key: int, value: int, dtype: torch.dtype) -> Config:
    """For q and k of width ``key``, v of width ``value``."""
    kp, vp = _power_of_two(key), _power_of_two(value)
    if dtype == torch.float32:  # three passes of tensor cores hold three times the operands in registers
        scans = Tiles(kp, 16, 8 if kp > 64 else 4, 1)
        return Config(
            32, Tiles(min(kp, 32), 32, 4, 2), scans, scans, Tiles(min(kp, 32), min(vp, 32), 4, 1), Tiles(16, 16, 4, 1)
        )
    wide = min(vp, 64)
    scans = Tiles(kp, min(wide, 32) if kp > 128 else wide, 4, 2)
    gradients = Tiles(min(kp, 64), wide, 4, 1)
    return Config(64, Tiles(min(kp, 128), wide, 4, 2), scans, scans, gradients, gradients)


def why_not(dtypes: Sequence[torch.dtype], key: int) -> str | None:
    """Why these are not for the kernels: dtypes of q, k and v, width of q and k. None: they are."""
    if len(set(dtypes)) > 1:
        return "q, k and v differ in dtype: " + ", ".join(map(str, dtypes))
    if dtypes[0] not in (torch.float32, torch.bfloat16, torch.float16):
        return f"q is {dtypes[0]}"
    most = 64 if dtypes[0] == torch.float32 else 256  # what the registers of a program hold
    return f"q and k are {key} wide, at most {most} fit for {dtypes[0]}" if key > most else None


class _Call:
    """What the launches of one call share."""

    def __init__(self, tensors: Tensors, options: Sequence[float]) -> None:
        q, k, v, _, _, _, cu = tensors
        assert q is not None
        assert k is not None
        assert v is not None
        self.scale, self.final, self.norm = float(options[0]), bool(options[1]), bool(options[2])
        self.q, self.k, self.v = by_rows(q), by_rows(k), by_rows(v)
        self.cu = None if cu is None else cu.contiguous()
        self.batch, self.time, self.heads, self.value = v.shape
        self.total = self.batch * self.time
        self.key, self.group = q.shape[3], self.heads // q.shape[2]
        self.segments = self.batch if cu is None else len(cu) - 1
        self.config = config(self.key, self.value, v.dtype)
        self.slots = slots(self.batch, self.time, cu, self.config.chunk)
        self.sizes = (self.segments, self.total, self.time)
        self.strides = {"q_stride": self.q.stride(1), "k_stride": self.k.stride(1)}

    def results(self) -> list[Tensor]:
        """Memory for o, the final state, inverse, reads, factors, errors and states."""
        like, (n, c, hv) = self.v, (self.slots, self.config.chunk, self.heads)
        final = (self.segments, hv, self.key, self.value) if self.final else (0,)
        return [
            torch.empty_like(like, memory_format=torch.contiguous_format),
            like.new_empty(final, dtype=wide_dtype(like)),
            like.new_empty(n, hv, c, c),
            like.new_empty(n, hv, c, c),
            like.new_empty(n, hv, PLANES.value, c, dtype=torch.float32),
            like.new_empty(self.total, hv, self.value),
            like.new_empty(n, hv, self.key, self.value),
        ]

    def constants(self, tiles: Tiles, chunkwise: bool, **more: Any) -> dict[str, Any]:
        if chunkwise:  # programs find their segment by themselves
            more |= {"NORM": self.norm, "SEARCH": _power_of_two(self.segments + 1)}
        return {
            "HV": self.heads,
            "GROUP": self.group,
            "K": self.key,
            "V": self.value,
            "C": self.config.chunk,
            "BK": tiles.key,
            "BV": tiles.value,
            "PRECISION": precision(self.v.dtype),
            "VARLEN": self.cu is not None,
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
            **self.strides,
            **more,
        }

    def by_segment(self, tiles: Tiles) -> tuple[int]:
        return (self.segments * self.heads * -(-self.value // tiles.value),)


def fake(tensors: Tensors, options: Sequence[float]) -> list[Tensor]:
    """What ``forward`` returns, computing nothing."""
    return _Call(tensors, options).results()


def forward(tensors: Tensors, options: Sequence[float]) -> list[Tensor]:
    """As of the reference; also returns what ``backward`` reads."""
    g, beta, initial = (None if x is None else x.contiguous() for x in tensors[3:6])
    call = _Call(tensors, options)
    o, final, *saved = call.results()
    inverse, reads, factors, errors, states = saved
    args: tuple[Any, ...] = (call.q, call.k, g, beta, call.cu, o, inverse, reads, factors, call.scale)
    constants = call.constants(call.config.prepare, True, EPS=NORM_EPS, SOLVE=precision(torch.float32))
    prepare[(call.slots, call.heads)](*args, *call.sizes, **constants)
    args = (call.q, call.k, call.v, call.cu, inverse, reads, factors, initial, o, errors, states)
    args = (*args, final if call.final else None, *call.sizes)
    constants = call.constants(call.config.scan, False, v_stride=call.v.stride(1))
    scan[call.by_segment(call.config.scan)](*args, **constants)
    return [o, final, *saved]


def backward(tensors: Tensors, saved: Sequence[Tensor], grads: Tensors, options: Sequence[float]) -> Tensors:
    """As of the reference."""
    g, beta, initial = tensors[3:6]
    call = _Call(tensors, options)
    inverse, reads, factors, errors, states = saved
    do = torch.zeros_like(call.v) if grads[0] is None else by_rows(grads[0])
    dfinal = None if grads[1] is None else grads[1].contiguous()
    dv, dg, dbeta, dinitial = (_empty(x) for x in (call.v, g, beta, initial))
    dstates = torch.empty_like(states)
    args: tuple[Any, ...] = (
        call.q,
        call.k,
        do,
        call.cu,
        inverse,
        reads,
        factors,
        dfinal,
        dv,
        dstates,
        dinitial,
    )
    constants = call.constants(call.config.scan_back, False, do_stride=do.stride(1))
    scan_back[call.by_segment(call.config.scan_back)](*args, *call.sizes, **constants)
    pairs, sums = inverse.new_empty(2, *inverse.shape), factors.new_empty(*factors.shape[:2], 3, factors.shape[3])
    shape = (call.batch, call.time, call.heads, call.key)
    dtype = call.v.dtype if call.group == 1 else torch.float32
    dq, dk = (call.v.new_empty(shape, dtype=dtype) for _ in range(2))
    args = (call.q, call.k, do, errors, states, dv, factors, call.cu, pairs, sums, dq, call.scale, *call.sizes)
    constants = call.constants(call.config.query_gradients, True, do_stride=do.stride(1))
    query_gradients[(call.slots, call.heads)](*args, **constants)
    args = (call.q, call.k, errors, states, dstates, factors, call.cu, pairs, sums, dk, dv, dg, dbeta, *call.sizes)
    key_gradients[(call.slots, call.heads)](*args, **call.constants(call.config.key_gradients, True))
    if call.group > 1:  # the value heads of one key head; dividing by norms is linear in gradients, so they add up
        dq, dk = (x.unflatten(2, (-1, call.group)).sum(3).to(call.v.dtype) for x in (dq, dk))
    return [dq, dk, dv, dg, dbeta, dinitial, None]


def _empty(x: Tensor | None) -> Tensor | None:
    return None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)


def _power_of_two(n: int) -> int:
    """The next one from 16 on, the least side of a product."""
    return max(16, 1 << (n - 1).bit_length())


def compilations() -> Iterator[Compilation]:
    """Every width that the tiles are made for, with everything on; bf16 at one width without gates and norms as well."""
    cases = [
        (torch.bfloat16, k, v) for k, v in ((16, 16), (32, 32), (64, 64), (128, 64), (128, 128), (128, 256), (256, 256))
    ]
    cases += [(torch.float16, 128, 128), *((torch.float32, k, k) for k in (16, 32, 64))]
    for dtype, key, value in cases:
        yield from _compilations(dtype, key, value, True)
    yield from _compilations(torch.bfloat16, 128, 128, False)


def _compilations(dtype: torch.dtype, key: int, value: int, full: bool) -> Iterator[Compilation]:
    x, fp32, cu = (torch.empty(16, dtype=t, device="meta") for t in (dtype, torch.float32, torch.int32))
    gate, state, some = fp32 if full else None, fp32 if full else None, cu if full else None
    sizes, c = (5, 4096, 4096), config(key, value, dtype)
    common = {
        "HV": 4,
        "GROUP": 1,
        "K": key,
        "V": value,
        "C": c.chunk,
        "VARLEN": full,
        "q_stride": 4 * key,
        "k_stride": 4 * key,
    }
    chunkwise, do = {"NORM": full, "SEARCH": 16}, {"do_stride": 4 * value}
    launches = (
        ("prepare", prepare, c.prepare, (x, x, gate, gate, some, x, x, x, fp32, 0.125), {**chunkwise, "EPS": NORM_EPS}),
        ("scan", scan, c.scan, (x, x, x, some, x, x, fp32, state, x, x, x, state), {"v_stride": 4 * value}),
        ("scan_back", scan_back, c.scan_back, (x, x, x, some, x, x, fp32, state, x, x, state), do),
        (
            "query_gradients",
            query_gradients,
            c.query_gradients,
            (x, x, x, x, x, x, fp32, some, x, fp32, x, 0.125),
            {**chunkwise, **do},
        ),
        (
            "key_gradients",
            key_gradients,
            c.key_gradients,
            (x, x, x, x, x, fp32, some, x, fp32, x, x, gate, gate),
            chunkwise,
        ),
    )
    name = f"{str(dtype).removeprefix('torch.')}-{key}x{value}" + ("" if full else "-bare")
    for label, kernel, tiles, args, more in launches:
        settings = {"num_warps": tiles.warps, "num_stages": tiles.stages, "BK": tiles.key, "BV": tiles.value}
        for backend in ("cuda", "hip"):  # precision() asks the device's maker, who is not here
            exact = "tf32x3" if backend == "cuda" else "ieee"
            solve = {"SOLVE": exact} if label == "prepare" else {}
            rounding = {"PRECISION": exact if dtype == torch.float32 else "ieee", **solve}
            yield Compilation(
                "gated_delta_rule",
                f"{label}-{name}" + ("" if backend == "cuda" else "-hip"),
                kernel,
                (*args, *sizes),
                {**common, **settings, **more, **rounding},
                wgmma=min(tiles.key, tiles.value) >= 64,
                targets=tuple(t for t, about in TARGETS.items() if about.backend == backend),
            )
