"""The memory cell of the Graph Memory Transformer: where a token stands among F slots, where it goes, and the way between.

    z_src = 1 / (temperature max(1 - cos(x, c), floor)),   w_src = softmax(z_src)
    z_tgt = w_src S + x M^T   or   edge_scale log(w_src S + 1e-6) + x M^T,   w_tgt = softmax(z_tgt)
    y = r (w_tgt - w_src) V + bias,   r = ((w_tgt - w_src) G (w_tgt - w_src)^T / D + eps)^-1/2, or 1 without G

(arXiv:2604.23862.) All tables have F rows and are made once per step by the caller: c the unit directions of the slots, S the
row-stochastic edges, M queries times keys merged, M = K Q / sqrt(v), V the slots times the weight of the last norm. With V centred
and G = C C^T of the centred slots C, r is the rstd of a LayerNorm over D; of the slots themselves, of an RMSNorm. So a token costs
what attention to 2 F shared keys and F shared values costs, and nothing of size T x D but x and y is ever in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import dispatch
from kernels.gmt_cell import reference
from kernels.library import Op, Tensors

MAX_SLOTS, MAX_SLOTS_FP32 = 128, 64  # of the Triton form, whose programs hold whole rows of F in registers


class Hop(NamedTuple):
    """Of N tokens; everything but y is in at least fp32."""

    y: Tensor  # [N, D] in the dtype of x
    source: Tensor  # w_src [N, F]
    target: Tensor  # w_tgt [N, F]
    scale: Tensor  # r [N], without gradient
    nearest: Tensor  # int32 [N], the slot with the largest w_src
    distance: Tensor  # [N], max(1 - cos, floor) to that slot, without gradient


def gmt_cell(
    x: Tensor,
    directions: Tensor,
    scores: Tensor,
    edges: Tensor,
    values: Tensor,
    temperature: Tensor,
    *,
    gram: Tensor | None = None,
    bias: Tensor | None = None,
    edge_scale: Tensor | None = None,
    floor: float = 0.01,
    eps: float = 1e-5,
) -> Hop:
    """x [N, D], directions, scores, values [F, D], edges [F, F], temperature 0-d -> Hop.

    ``gram`` [F, F], symmetric: the displacement gets a fixed size; None: it keeps its own. ``bias`` [D]. ``edge_scale`` 0-d: edges
    enter as scaled log-probabilities; None: as probabilities. Gradients of all of these but the temperature. Similarities are
    computed as if tables were in fp32, whatever x is in. Raises ValueError for shapes that do not fit.
    """
    f, d = directions.shape
    shapes = {"x": (x, (len(x), d)), "scores": (scores, (f, d)), "values": (values, (f, d)), "edges": (edges, (f, f))}
    shapes |= {"gram": (gram, (f, f)), "bias": (bias, (d,)), "temperature": (temperature, ())}
    for name, (t, shape) in (shapes | {"edge_scale": (edge_scale, ())}).items():
        if t is not None and tuple(t.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)} beside directions {[f, d]}, got {list(t.shape)}")
    dtype = x.dtype
    backend = dispatch.choose("gmt_cell", x.device, lambda: _why_not(dtype, f))
    tables = (directions, scores, edges, values, gram, bias, temperature, edge_scale)
    y, source, target, scale, nearest, distance = _op(x, *tables, options=(floor, eps), backend=backend)
    return Hop(y, source, target, scale.detach(), nearest, distance.detach())


def _why_not(dtype: torch.dtype, slots: int) -> str | None:
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"x is {dtype}"
    most = MAX_SLOTS_FP32 if dtype == torch.float32 else MAX_SLOTS
    return None if slots <= most else f"more than {most} slots in {dtype}"


def _form(backend: str) -> Any:
    if backend == "reference":
        return reference
    from kernels.gmt_cell import triton

    return triton


def _fake(tensors: Tensors, options: Sequence[float], backend: str) -> list[Tensor]:
    x, directions = tensors[:2]
    assert x is not None
    assert directions is not None
    n, f = len(x), len(directions)
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = [x.new_empty(n, dtype=wide) for _ in range(4)]
    weights = [x.new_empty(n, f, dtype=wide) for _ in range(2)]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    outputs = [y, *weights, rows[0], x.new_empty(n, dtype=torch.int32), *rows[1:3]]
    if backend == "triton":
        return [*outputs, rows[3]]
    edges, lengths = (0 if t is None else n for t in (tensors[8], tensors[5]))
    kept = (n, edges, edges, lengths)
    return [*outputs, *(x.new_empty(count, f, dtype=wide) for count in kept)]


_op = Op(
    "gmt_cell",
    lambda *args: _form(args[-1]).forward(*args),
    lambda *args: _form(args[-1]).backward(*args),
    _fake,
    outputs=6,
    also=(1, 2, 3),
)
