"""Triton form of the memory gate: two launches forward, four backward and two sums of partial results.

Forward, one launch reads h and k and keeps four numbers per token and branch, and one reads v and writes y. Backward begins with the
convolution, of which it computes the inside again; the gradient of that goes through memory once, because later tokens' taps need
it. A state is what decoding has: with one nothing is recorded. Nothing is added in an order that threads decide.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from kernels.compilation import Compilation
from kernels.library import Tensors
from kernels.memory_gate.triton_kernels import (
    gate_gradient,
    gates,
    mix,
    mix_gradient,
    token_gradient,
    value_gradient,
)

GROUP = 256  # rows that share a partial sum of the gradients of gain and taps
GRADIENT_ROWS = 16  # of a tile where the convolution is computed again: more would not fit into registers


class _Order(NamedTuple):
    """The valid tokens of each sequence, first; None where there is no mask."""

    order: Tensor | None  # int32 [B, T]
    counts: Tensor | None  # int32 [B]


def forward(tensors: Tensors, options: Sequence[float], backend: str) -> list[Tensor]:
    """As ``reference.forward``, but all that is kept lies where its token does."""
    h, key, value, gain, taps, valid, segments, values, scales = tensors
    assert h is not None
    assert key is not None
    assert value is not None
    assert gain is not None
    step, eps, rooted = int(options[0]), options[1], bool(options[2])
    B, T, M, D = h.shape
    rows = B * T
    x, k, v = _rows(h), _rows(key), _rows(value)
    alpha, score, inv_h, inv_k = (h.new_empty(B, T, M, dtype=torch.float32) for _ in range(4))
    power = h.new_empty(B, T, dtype=torch.float32)
    strides = (x.stride(0), k.stride(0), v.stride(0))
    launch: Any = gates[(_tiles(rows, _GATES["BT"]), M)]
    launch(
        x, k, v, gain.contiguous(), _or(x, _bytes(valid)), alpha, score, inv_h, inv_k, power, rows, eps, *strides, M, D,
        **_gate_constants(rooted, valid),
    )  # fmt: skip
    y = torch.empty_like(h, memory_format=torch.contiguous_format)
    order = _order(valid)
    arrays = (_or(x, t) for t in (*order, segments, values, scales))
    constants = _mix_constants(D, taps, step, valid, segments)
    launch = mix[(_tiles(rows, constants["BT"]), _tiles(D, constants["BD"]))]
    reach = 0 if values is None else values.shape[1]
    launch(
        v, _or(x, taps), alpha, power, *arrays, y, rows, T, reach, eps, v.stride(0), M, D,
        STATE=values is not None, **constants,
    )  # fmt: skip
    newest = _newest(value, alpha, power, order, values, scales, eps)
    return [y, alpha, *newest, score, inv_h, inv_k, power]


def backward(
    tensors: Tensors,
    saved: Sequence[Tensor],
    grads: Tensors,
    needs: Sequence[bool],
    options: Sequence[float],
    backend: str,
) -> Tensors:
    """As ``reference.backward``; there is no state."""
    h, key, value, gain, taps, valid, segments, *_ = tensors
    assert h is not None
    assert key is not None
    assert value is not None
    assert gain is not None
    step, eps, rooted = int(options[0]), options[1], bool(options[2])
    score, inv_h, inv_k, power, alpha = saved
    B, T, M, D = h.shape
    rows = B * T
    x, k, v = _rows(h), _rows(key), _rows(value)
    dy = torch.zeros_like(h, memory_format=torch.contiguous_format) if grads[0] is None else grads[0].contiguous()
    order = [_or(x, t) for t in (*_order(valid), segments)]
    constants = _mix_constants(D, taps, step, valid, segments)
    columns, W = _tiles(D, constants["BD"]), constants["W"]
    d_wide = h.new_empty(B, T, D, dtype=torch.float32)
    d_alphas = h.new_empty(columns, B, T, M, dtype=torch.float32)
    dz, d_scales = (torch.empty_like(dy), torch.empty_like(d_alphas)) if W else (dy, d_alphas)
    groups = _tiles(rows, GROUP)
    d_taps = h.new_empty(groups, M * W, D, dtype=torch.float32)
    common = (v, _or(x, taps), alpha, power, *order)
    launch: Any = mix_gradient[(groups, columns)]
    numbers = (rows, T, eps, v.stride(0), M, D)
    launch(*common, dy, dz, d_alphas, d_wide, d_taps, *numbers, **_gradient_constants(M, constants))
    if W:
        launch = value_gradient[(_tiles(rows, constants["BT"]), columns)]
        launch(*common, dz, d_scales, d_wide, *numbers, **constants)

    across, along_h, along_k = (torch.empty_like(alpha) for _ in range(3))
    d_power = torch.empty_like(power)
    given = None if grads[1] is None else grads[1].contiguous()
    launch = gate_gradient[(_tiles(rows, _SCALARS["BT"]),)]
    launch(
        d_alphas, d_scales, _or(x, given), alpha, score, inv_h, inv_k, power, across, along_h, along_k, d_power,
        rows, columns, eps, M, D, **_scalar_constants(M, rooted, W, given),
    )  # fmt: skip
    dh, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (h, key, value))
    d_gain = h.new_empty(groups, M, D, dtype=torch.float32)
    strides = (x.stride(0), k.stride(0), v.stride(0))
    launch = token_gradient[(groups, _tiles(D, _TOKENS["BD"]), M)]
    launch(
        x, k, v, gain.contiguous(), across, along_h, along_k, d_power, d_wide, dh, dk, dv, d_gain, rows, *strides, M, D,
        CONV=W > 0, TILES=GROUP // _TOKENS["BT"], **_TOKENS,
    )  # fmt: skip
    found: list[Tensor | None] = [dh, dk, dv, d_gain.sum(0).to(gain.dtype), None, None, None, None, None]
    if taps is not None:
        found[4] = d_taps.sum(0).view(M, W, D).flip(1).transpose(1, 2).to(taps.dtype).contiguous()
    return found


def _newest(
    value: Tensor, alpha: Tensor, power: Tensor, order: _Order, values: Tensor | None, scales: Tensor | None, eps: float
) -> list[Tensor]:
    """The last R valid entries of state and tokens."""
    if values is None or scales is None:
        return [value.new_empty(0), alpha.new_empty(0)]
    (B, R), T = values.shape[:2], value.shape[1]
    c = (alpha.square() * power[..., None]).add_(eps).rsqrt_().mul_(alpha)
    at = torch.arange(R, device=value.device).expand(B, R)
    at = at + (T if order.counts is None else order.counts[:, None])
    place = (at - R).clamp(min=0, max=T - 1)
    if order.order is not None:
        place = order.order.gather(1, place).long()
    found = []
    for old, new in ((values, value), (scales, c)):
        index, shape = at[..., None], (B, R, old.shape[2])
        before = old.gather(1, index.clamp(max=R - 1).expand(shape))
        after = new.gather(1, place[..., None].expand(shape)).to(old.dtype)
        found.append(torch.where(index < R, before, after))
    return found


def _order(valid: Tensor | None) -> _Order:
    if valid is None:
        return _Order(None, None)
    return _Order(torch.argsort(~valid, dim=1, stable=True).int(), valid.sum(1, dtype=torch.int32))


def _rows(x: Tensor) -> Tensor:
    """[B, T, ...] -> [B T, columns], a view where rows stand at one distance and their numbers adjoin."""
    rows = x.flatten(2).flatten(0, 1)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _tiles(n: int, size: int) -> int:
    return -(-n // size)


def _bytes(valid: Tensor | None) -> Tensor | None:
    return None if valid is None else valid.contiguous().view(torch.uint8)


def _or(x: Tensor, other: Tensor | None) -> Tensor:
    """A kernel wants a pointer even for what it does not read."""
    return x if other is None else other.contiguous()


_GATES = {"BT": 8, "BD": 256, "num_warps": 4, "num_stages": 1}
_SCALARS = {"BT": 32, "num_warps": 4, "num_stages": 1}
_TOKENS = {"BT": 16, "BD": 128, "num_warps": 4, "num_stages": 1}


def _gate_constants(rooted: bool, valid: object) -> dict[str, Any]:
    return {"ROOTED": rooted, "VALID": valid is not None, **_GATES}


def _mix_constants(width: int, taps: Tensor | None, step: int, valid: object, segments: object) -> dict[str, Any]:
    columns = 64 if width > 32 else 32
    modes = {"ORDER": valid is not None, "SEGMENTS": segments is not None}
    sizes = {"BT": 32, "BD": columns, "num_warps": 4, "num_stages": 1}
    return {"W": 0 if taps is None else taps.shape[-1], "STEP": step, **modes, **sizes}


def _gradient_constants(branches: int, constants: dict[str, Any]) -> dict[str, Any]:
    sums = max(triton.next_power_of_2(branches * constants["W"]), 1)
    return constants | {"SUMS": sums, "BT": GRADIENT_ROWS, "TILES": GROUP // GRADIENT_ROWS}


def _scalar_constants(branches: int, rooted: bool, taps: int, given: object) -> dict[str, Any]:
    modes = {"ROOTED": rooted, "CONV": taps > 0, "GIVEN": given is not None}
    return {"BM": triton.next_power_of_2(branches), **modes, **_SCALARS}


def compilations() -> Iterator[Compilation]:
    """The paper's width with one and with four branches in every dtype, a small one, and every mode in bf16."""
    plain, packed = (False, False, False), (False, True, False)
    modes = [plain, packed, (True, False, False), (True, True, False), (False, False, True), (True, False, True)]
    for dtype, branches, width in [
        *((t, m, 2560) for t in (torch.bfloat16, torch.float16, torch.float32) for m in (1, 4)),
        (torch.bfloat16, 1, 768),
        (torch.bfloat16, 4, 24),
    ]:
        every = dtype == torch.bfloat16 and width == 2560
        for padded, cut, state in modes if every else [packed]:
            yield from _compilations(dtype, branches, width, padded, cut, state)


def _compilations(
    dtype: torch.dtype, branches: int, width: int, padded: bool, cut: bool, state: bool
) -> Iterator[Compilation]:
    x, wide, whole, mask, numbered = (
        torch.empty(64, dtype=t, device="meta") for t in (dtype, torch.float32, torch.int32, torch.uint8, torch.int64)
    )
    M, D, rows, eps = branches, width, 16384, 1e-6
    strides = (M * D, (M + 1) * D, (M + 1) * D)  # key and value are columns of one product
    valid, segments = whole if padded else None, whole if cut else None
    kinds = "".join(f"-{name}" for name, on in (("padded", padded), ("packed", cut), ("state", state)) if on)
    name = f"{str(dtype).removeprefix('torch.')}-{M}x{D}{kinds}"

    def one(label: str, kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> Compilation:
        return Compilation("memory_gate", f"{label}-{name}", kernel, args, constants, wgmma=False)

    if not cut and not state:  # they are none of this kernel's
        args = (x, x, x, wide, mask, wide, wide, wide, wide, wide, rows, eps, *strides, M, D)
        yield one("gates", gates, args, _gate_constants(True, valid))
    for taps in (None, torch.empty(M, D, 4, device="meta")):
        constants = _mix_constants(D, taps, 3, valid, segments)
        kind = "mix" if taps is None else "conv"
        common = (x, wide, wide, wide, whole, whole, numbered)
        if taps is not None or not (cut or state):
            args = (*common, x, wide, x, rows, 2048, 9, eps, (M + 1) * D, M, D)
            yield one(kind, mix, args, {**constants, "STATE": state})
        if state or (taps is None and cut):
            continue
        W = constants["W"]
        args = (*common, x, x, wide, wide, wide, rows, 2048, eps, (M + 1) * D, M, D)
        yield one(f"{kind}-gradient", mix_gradient, args, _gradient_constants(M, constants))
        if taps is not None:
            args = (*common, x, wide, wide, rows, 2048, eps, (M + 1) * D, M, D)
            yield one("value-gradient", value_gradient, args, constants)
        if not (padded or cut):
            args = (wide,) * 12 + (rows, 40, eps, M, D)
            yield one(f"{kind}-scalars", gate_gradient, args, _scalar_constants(M, True, W, wide))
            args = (x, x, x, wide, wide, wide, wide, wide, wide, x, x, x, wide, rows, *strides, M, D)
            tokens = {"CONV": W > 0, "TILES": GROUP // _TOKENS["BT"], **_TOKENS}
            yield one(f"{kind}-tokens", token_gradient, args, tokens)
