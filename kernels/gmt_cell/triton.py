"""Triton form of the memory cell: one launch forward, three and plain products backward.

Forward is the whole cell. Backward, what has D columns is left to plain matrix products (dy V^T before, the gradients of the tables
after), but for dx, whose product ends with a pass over x; between them two kernels see nothing wider than F. One kernel for all of
it would need more registers than a GPU has. Nothing is added in an order that threads decide.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.compilation import Compilation
from kernels.gmt_cell import MAX_SLOTS, MAX_SLOTS_FP32
from kernels.gmt_cell.triton_kernels import forward as cell
from kernels.gmt_cell.triton_kernels import source_gradient, target_gradient, token_gradient
from kernels.library import Tensors
from kernels.triton import padded, precision, roomy


def forward(tensors: Tensors, options: Sequence[float], backend: str) -> list[Tensor]:
    """As ``reference.forward``."""
    x, directions, scores, edges, values, gram, bias, temperature, edge_scale = tensors
    assert x is not None
    assert directions is not None
    assert scores is not None
    assert edges is not None
    assert values is not None
    x = x.contiguous()
    near, rest = _split(directions, x.dtype)
    scores, edges, values, gram = (_narrow(t, x.dtype) for t in (scores, edges, values, gram))
    n, f = len(x), len(directions)
    y = torch.empty_like(x)
    source, target = (x.new_empty(n, f, dtype=torch.float32) for _ in range(2))
    scale, distance, inverse, total = (x.new_empty(n, dtype=torch.float32) for _ in range(4))
    nearest = x.new_empty(n, dtype=torch.int32)
    modes = (edge_scale is not None, gram is not None)
    constants = _forward_constants(x.shape[1], f, x.dtype, *modes, bias is not None)
    # An argument that the kernel does not use is still an argument: x stands for all of them.
    tables = (x if t is None else t for t in (near, rest, scores, edges, values, gram, bias, temperature, edge_scale))
    results = (y, source, target, scale, nearest, distance, inverse, total)
    if n:
        grid = (triton.cdiv(n, constants["BT"]),)
        launch: Any = cell[grid]
        launch(x, *tables, *results, n, *options, **constants)
    return list(results)


def backward(
    tensors: Tensors,
    saved: Sequence[Tensor],
    grads: Tensors,
    needs: Sequence[bool],
    options: Sequence[float],
    backend: str,
) -> Tensors:
    """As ``reference.backward``."""
    x, directions, scores, edges, values, gram, bias, temperature, edge_scale = tensors
    dy, d_source, d_target, *_ = (None if g is None else g.contiguous() for g in grads)
    inverse, total, source, target, scale = saved
    assert x is not None
    assert directions is not None
    assert scores is not None
    assert edges is not None
    assert values is not None
    x = x.contiguous()
    n, d, f = len(x), x.shape[1], len(directions)
    if dy is None:
        dy = torch.zeros_like(x)
    table, narrow_edges, narrow_values, narrow_gram = (
        _narrow(t, x.dtype) for t in (torch.cat([directions, scores]), edges, values, gram)
    )
    assert table is not None
    assert narrow_values is not None
    d_moved = dy @ narrow_values.T
    d_logits, dx = x.new_empty(n, 2 * f), torch.empty_like(x)
    scaled, d_hop = (x.new_empty(n, f) for _ in range(2))
    radial, d_edge_scale, along = (x.new_empty(n, dtype=torch.float32) for _ in range(3))
    if n:
        modes = (edge_scale is not None, gram is not None, d_target is not None)
        constants = _target_constants(d, f, x.dtype, roomy(x.device), *modes)
        grid = (triton.cdiv(n, constants["BT"]),)
        inputs = (d_moved, d_target, narrow_edges, narrow_gram, edge_scale, source, target, scale)
        outputs = (d_logits, scaled, d_hop, radial, d_edge_scale)
        given = (x if t is None else t for t in (*inputs, *outputs))
        launch: Any = target_gradient[grid]
        launch(*given, n, **constants)
        inputs = (d_hop, d_moved, d_source, narrow_edges, temperature, source, total, inverse)
        given = (x if t is None else t for t in (*inputs, d_logits, along))
        launch = source_gradient[grid]
        launch(*given, n, options[0], **_source_constants(f, x.dtype, d_source is not None))
        constants = _token_constants(d, f, x.dtype, roomy(x.device))
        grid = (triton.cdiv(d, constants["BD"]), triton.cdiv(n, constants["BT"]))
        launch = token_gradient[grid]
        launch(d_logits, table, x, along, dx, n, **constants)
    d_tables, d_gram = d_logits.T @ x, None
    if gram is not None:
        d_gram = ((scaled * radial[:, None]).T @ (target - source)) * -0.5
    d_edges = source.to(d_hop.dtype).T @ d_hop
    d_values = scaled.T @ dy
    found = [dx, d_tables[:f].clone(), d_tables[f:].clone(), d_edges, d_values, d_gram, None, None, None]
    if bias is not None:
        found[6] = dy.sum(0, dtype=torch.float32)
    if edge_scale is not None:
        found[8] = d_edge_scale.sum()
    return [None if g is None or t is None else g.to(t.dtype) for g, t in zip(found, tensors, strict=True)]


def _narrow(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype).contiguous()


def _split(t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """-> (t in this dtype, what that leaves out, in this dtype too; None for fp32)."""
    near = t.to(dtype).contiguous()
    return near, None if dtype == torch.float32 else (t.float() - near.float()).to(dtype).contiguous()


def _forward_constants(width: int, slots: int, dtype: torch.dtype, log: bool, norm: bool, bias: bool) -> dict[str, Any]:
    modes = {"REST": dtype != torch.float32, "LOG": log, "NORM": norm, "BIAS": bias}
    return {"D": width, "BD": 32, "BN": 64, "num_warps": 8, "num_stages": 2} | modes | _sizes(slots, dtype)


def _target_constants(
    width: int, slots: int, dtype: torch.dtype, roomy: bool, log: bool, norm: bool, given: bool
) -> dict[str, Any]:
    modes = {"D": width, "LOG": log, "NORM": norm, "GIVEN": given}
    # Before Hopper, products keep their left sides in registers.
    sizes = _sizes(slots, dtype) if roomy else _sizes(slots, dtype) | {"BT": 32}
    return {"num_warps": 8, "num_stages": 1} | modes | sizes


def _source_constants(slots: int, dtype: torch.dtype, given: bool) -> dict[str, Any]:
    return {"GIVEN": given, "num_warps": 8, "num_stages": 1} | _sizes(slots, dtype)


def _token_constants(width: int, slots: int, dtype: torch.dtype, roomy: bool) -> dict[str, Any]:
    large = dtype != torch.float32 and roomy
    sizes = {"BT": 128, "BD": 128, "BW": 32} if large else {"BT": 64, "BD": 64, "BW": 32}
    stages = {"num_warps": 8, "num_stages": 3} if large else {"num_warps": 4, "num_stages": 2}
    return {"D": width, "W": 2 * slots, "PRECISION": precision(dtype)} | sizes | stages


def _sizes(slots: int, dtype: torch.dtype) -> dict[str, Any]:
    """Tiles of tokens and slots, of which a few fit into the registers of eight warps."""
    tokens = 64 if dtype != torch.float32 else 32
    return {"F": slots, "BF": padded(slots), "BT": tokens, "PRECISION": precision(dtype)}


def compilations() -> Iterator[Compilation]:
    """Every mode at the paper's size in bf16 and fp16, all modes at once at smaller ones."""
    cases = [(torch.bfloat16, 128), (torch.bfloat16, 64), (torch.bfloat16, 16), (torch.float16, 128)]
    for dtype, slots in [*cases, (torch.float32, MAX_SLOTS_FP32), (torch.float32, 16)]:
        for targets in (("sm_90", "sm_100"), ("sm_80",), ("gfx942",)):
            yield from _compilations(dtype, slots, targets)


def _compilations(dtype: torch.dtype, slots: int, targets: tuple[str, ...]) -> Iterator[Compilation]:
    """``roomy`` and ``precision`` ask a device, and none is here."""
    x, wide, whole = (torch.empty(64, dtype=t, device="meta") for t in (dtype, torch.float32, torch.int32))
    large, hip = "sm_90" in targets, "gfx942" in targets
    name = f"{str(dtype).removeprefix('torch.')}-{slots}" + ("" if large else "-hip" if hip else "-small")
    rows = 4096

    def one(label: str, kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], dots: bool = True):
        if hip:
            constants = constants | {"PRECISION": "ieee"}
        wgmma = dots and slots >= 64 and dtype != torch.float32
        return Compilation("gmt_cell", f"{label}-{name}", kernel, args, constants, wgmma=wgmma, targets=targets)

    for log, norm in itertools.product((False, True), (False, True)) if slots == MAX_SLOTS else [(True, True)]:
        label = f"{'log' if log else 'plain'}-{'norm' if norm else 'free'}"
        args = (x, x, x, x, x, x, x, wide, wide, wide, x, wide, wide, wide, whole, wide, wide, wide, rows, 0.01, 1e-5)
        yield one(f"forward-{label}", cell, args, _forward_constants(768, slots, dtype, log, norm, norm))
        args = (x, wide, x, x, wide, wide, wide, wide, x, x, x, wide, wide, rows)
        constants = _target_constants(768, slots, dtype, large, log, norm, True)
        yield one(f"target-{label}", target_gradient, args, constants, dots=log or norm)
    args = (x, x, wide, x, wide, wide, wide, wide, x, wide, rows, 0.01)
    yield one("source", source_gradient, args, _source_constants(slots, dtype, True))
    yield one("token", token_gradient, (x, x, x, wide, x, rows), _token_constants(768, slots, dtype, large))
