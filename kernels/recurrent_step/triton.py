"""The step as one Triton kernel that writes memories where they stand.

A program has a tile of value columns of one memory head, over all of K: it loads the tile once, and forgets, erases, writes and
reads in registers. The time is that of moving the state, so what matters is that enough programs are in flight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.compilation import Compilation
from kernels.recurrent_step import MAX_WIDTH
from kernels.recurrent_step.reference import NORM_EPS
from kernels.triton import by_rows

TILES = (32, 16, 8)  # columns of V: whole sectors of memory, the widest that still fills a GPU
FULL = 264  # programs that fill one: two for each of Hopper's 132 multiprocessors


@triton.jit
def _unit(x, EPS: tl.constexpr):
    return x * tl.rsqrt(tl.sum(x * x, 0) + EPS)


@triton.jit(do_not_specialize=["slots", "memories"])
def _step(
    q, k, v, g, beta, state, index, o, slots, memories, q_stride, k_stride, v_stride, scale,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, DECAY: tl.constexpr, DELTA: tl.constexpr,
    INDEX: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Program (slot of a row of the batch, value head, tile of V). DECAY: 0 none, 1 per value head, 2 per key channel."""
    slot, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    kk, vv = tl.arange(0, BK), tl.program_id(2) * BV + tl.arange(0, BV)
    in_k, in_v = kk < K, vv < V
    memory = slot % slots
    if INDEX:
        memory = tl.load(index + slot).to(tl.int64)
    live = memory >= 0
    tile = (in_k[:, None] & in_v[None, :]) & live
    place = state + ((slot // slots * memories + memory) * HV + head) * (K * V) + (kk[:, None] * V + vv[None, :])
    s = tl.load(place, mask=tile, other=0.0).to(tl.float32)
    key_head = head // (HV // H)
    q_row = tl.load(q + slot * q_stride + key_head * K + kk, mask=in_k, other=0.0).to(tl.float32)
    k_row = tl.load(k + slot * k_stride + key_head * K + kk, mask=in_k, other=0.0).to(tl.float32)
    u = tl.load(v + slot * v_stride + head * V + vv, mask=in_v, other=0.0).to(tl.float32)
    if NORM:
        q_row, k_row = _unit(q_row, EPS), _unit(k_row, EPS)
    if DECAY == 1:
        s *= tl.exp(tl.load(g + slot * HV + head).to(tl.float32))
    if DECAY == 2:
        s *= tl.exp(tl.load(g + (slot * H + key_head) * K + kk, mask=in_k, other=0.0).to(tl.float32))[:, None]
    if DELTA:
        u = (u - tl.sum(s * k_row[:, None], 0)) * tl.load(beta + slot * HV + head).to(tl.float32)
    s += k_row[:, None] * u[None, :]
    result = tl.where(live, tl.sum(s * (q_row * scale)[:, None], 0), 0.0)
    tl.store(place, s.to(state.dtype.element_ty), mask=tile)
    tl.store(o + (slot * HV + head) * V + vv, result.to(o.dtype.element_ty), mask=in_v)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float,
    index: Tensor | None,
    qk_l2norm: bool,
) -> Tensor:
    """As of the public function, but the state is always overwritten, and has to be contiguous. -> o"""
    b, slots, value_heads, width = v.shape
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    q, k, v = (by_rows(x) for x in (q, k, v))
    g, beta, index = (None if x is None else x.contiguous() for x in (g, beta, index))
    decay = 0 if g is None else g.ndim - 2
    constants = _constants(k.shape, v.shape, decay, beta is not None, index is not None, qk_l2norm)
    grid = (b * slots, value_heads, -(-width // constants["BV"]))
    pointers = (q, k, v, v if g is None else g, v if beta is None else beta, state, v if index is None else index, o)
    launch: Any = _step[grid]
    launch(*pointers, slots, state.shape[1], q.stride(1), k.stride(1), v.stride(1), scale, **constants)
    return o


def _constants(
    k: tuple[int, ...], v: tuple[int, ...], decay: int, delta: bool, index: bool, norm: bool
) -> dict[str, Any]:
    """For k [B, S, H, K] and v [B, S, HV, V]."""
    rows, keys, heads, width = v[0] * v[1], 1 << (k[3] - 1).bit_length(), v[2], v[3]
    tile = next((n for n in TILES if rows * heads * -(-width // n) >= FULL), TILES[-1])
    return _tile(keys, tile) | {
        "H": k[2], "HV": heads, "K": k[3], "V": width, "EPS": NORM_EPS,
        "DECAY": decay, "DELTA": delta, "INDEX": index, "NORM": norm,
    }  # fmt: skip


def _tile(keys: int, columns: int) -> dict[str, Any]:
    """At most 32 numbers of the state in a thread."""
    return {"BK": keys, "BV": columns, "num_warps": min(max(keys * columns // 1024, 1), 8), "num_stages": 1}


def compilations() -> Iterator[Compilation]:
    """Every tile with every rule, each dtype at one tile."""
    rules = {"sum": (0, False), "decay": (1, False), "vector decay": (2, False), "delta": (0, True)}
    rules |= {"gated delta": (1, True)}
    tiles = [(torch.bfloat16, k, bv) for k in (32, 64, 128, MAX_WIDTH) for bv in TILES]
    for dtype, width, columns in [*tiles, (torch.float16, 128, 32), (torch.float32, 100, 32)]:
        x, wide = (torch.empty(64, width, dtype=t, device="meta") for t in (dtype, torch.float32))
        index = torch.empty(64, dtype=torch.int64, device="meta")
        for rule, (decay, delta) in rules.items():
            for state in dict.fromkeys((torch.float32, dtype) if columns == 32 else (torch.float32,)):
                kept = torch.empty(64, dtype=state, device="meta")
                shape = (1, 1, 4, width)
                constants = _constants(shape, shape, decay, delta, delta, delta)
                constants |= _tile(constants["BK"], columns)
                name = f"{rule} {_short(dtype)} K{width} BV{columns} state {_short(state)}"
                args = (x, x, x, wide, wide, kept, index, x, 4, 4, 4 * width, 4 * width, 4 * width, 0.5)
                yield Compilation("recurrent_step", name, _step, args, constants, wgmma=False)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
