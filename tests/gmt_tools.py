"""Arguments of `gmt_cell` and its definition, for the tests of its forms."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.gmt_cell import Hop, gmt_cell, reference

FLOOR, EPS = 0.05, 1e-5
Cell = dict[str, Tensor | None]


def cell(n: int, d: int, f: int, log: bool = True, norm: bool = True, device: torch.device | str = "cpu") -> Cell:
    """In fp64. The first token stands on a slot, within the floor, and so warm that its weight there is far from 1."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    slots = randn(f, d)
    x, directions = randn(n, d), F.normalize(randn(f, d), dim=1)
    x[:1] = 3 * directions[0]
    centred = slots - slots.mean(1, keepdim=True)
    found = {
        "x": x,
        "directions": directions,
        "scores": randn(f, d) / d**0.5,
        "edges": randn(f, f).fill_diagonal_(float("-inf")).softmax(1),
        "values": centred * randn(d),
        "gram": centred @ centred.T if norm else None,
        "bias": randn(d) if norm else None,
        "edge_scale": torch.tensor(0.7, dtype=torch.float64) if log else None,
        "temperature": torch.tensor(4.0, dtype=torch.float64),
    }
    return {name: None if t is None else t.to(device) for name, t in found.items()}


def cast(args: Cell, dtype: torch.dtype) -> Cell:
    """x in this dtype, tables in fp32 at least, as a model has them; all that learns a leaf."""
    table = torch.promote_types(dtype, torch.float32)
    return {
        name: None
        if t is None
        else t.detach().to(dtype if name == "x" else table).requires_grad_(name != "temperature")
        for name, t in args.items()
    }


def leaves(args: Cell) -> list[Tensor]:
    return [t for t in args.values() if t is not None and t.requires_grad]


def run(args: Cell) -> Hop:
    tensors: Any = args
    return gmt_cell(**tensors, floor=FLOOR, eps=EPS)


def define(args: Cell) -> tuple[Tensor, Tensor, Tensor]:
    """y, w_src and w_tgt, token by token."""
    tensors: Any = args
    return reference.recurrent(**tensors, floor=FLOOR, eps=EPS)


def nearest_distance(args: Cell) -> Tensor:
    x, directions = args["x"], args["directions"]
    assert x is not None
    assert directions is not None
    return (1 - F.normalize(x, dim=1) @ directions.T).amin(1).clamp(min=FLOOR).detach()


def cancelling(dy: list[Tensor], args: Cell) -> Tensor:
    """The norm of what single tokens add to the gradient of ``edge_scale``: these are of both signs, so errors of their sum are
    measured by it."""
    x = args["x"]
    assert x is not None
    terms = []
    for i in range(len(x)):
        one = args | {"x": x[i : i + 1].detach().requires_grad_()}
        terms.append(gradients(define(one), [g[i : i + 1] for g in dy], one)[-1])
    return torch.stack(terms).norm()


def gradients(out: Any, dy: list[Tensor], args: Cell) -> list[Tensor]:
    """Of the sum of products of y, w_src and w_tgt with ``dy``, by every leaf."""
    total = sum((a * b.to(a.dtype)).sum() for a, b in zip(out[:3], dy, strict=True))
    assert isinstance(total, Tensor)
    return list(torch.autograd.grad(total, leaves(args)))
