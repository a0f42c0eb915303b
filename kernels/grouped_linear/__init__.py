"""One linear map per group of rows: rows ``offsets[e] : offsets[e+1]`` of x times weight[e] transposed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import dispatch
from kernels.grouped_linear import reference
from kernels.library import Op, Tensors


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """x [N, D], weight [E, O, D], offsets int [E+1] -> [N, O] in the dtype of x, added in at least fp32.

    ``offsets`` rise from 0; groups may be empty; rows from ``offsets[E]`` on become zero and get no gradient. Runs in the
    autocast dtype where autocast is on. Raises ValueError for shapes that do not fit.
    """
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[2] or offsets.shape != (len(weight) + 1,):
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, weight, offsets))
        raise ValueError(f"expected x [N, D], weight [E, O, D] and offsets [E + 1], got {shapes}")
    if offsets.is_floating_point():
        raise ValueError("offsets must be integers")
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x, weight = (t.to(torch.get_autocast_dtype(kind)) for t in (x, weight))
    if x.dtype != weight.dtype:
        raise ValueError(f"x and weight must have one dtype: {x.dtype} and {weight.dtype}")
    dtype = x.dtype
    backend = dispatch.choose("grouped_linear", x.device, lambda: _why_not(dtype))
    (y,) = _op(x, weight, offsets, backend=backend)
    return y


def _why_not(dtype: torch.dtype) -> str | None:
    return None if dtype in (torch.float32, torch.float16, torch.bfloat16) else f"x is {dtype}"


def _form(backend: str) -> Any:
    if backend == "reference":
        return reference
    from kernels.grouped_linear import triton

    return triton


def _fake(tensors: Tensors, options: Sequence[float], backend: str) -> list[Tensor]:
    x, weight, _ = tensors
    assert x is not None
    assert weight is not None
    return [x.new_empty(len(x), weight.shape[1])]


_op = Op(
    "grouped_linear",
    lambda *args: _form(args[-1]).forward(*args),
    lambda *args: _form(args[-1]).backward(*args),
    _fake,
    outputs=1,
)
