"""A table beside the parameters, on the device of the model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.ngram_gather import gather_rows
from kernels.row_update import Hyper, row_update, sinkhorn_update
from models.stores.base import VALUES, StoreConfig, Table


class Resident(Table):
    """Reads are gathers, updates are in place."""

    def __init__(self, cfg: StoreConfig, rows: int, width: int) -> None:
        super().__init__(cfg, rows, width)
        self._arrays = self.allocate(rows)

    def arrays(self) -> dict[str, Tensor]:
        return dict(self._arrays)

    def read(self, rows: Tensor) -> Tensor:
        return gather_rows(self._arrays[VALUES], rows)

    def update(self, rows: Tensor | slice, grad: Tensor, rule: str, hyper: Hyper) -> None:
        values, *moments = self._arrays.values()
        if rule == "sinkhorn":
            sinkhorn_update(values, moments[0], grad, hyper.lr)
        elif isinstance(rows, slice):
            row_update(values[rows], [m[rows] for m in moments], None, grad, rule, hyper)
        else:
            row_update(values, moments, rows, grad, rule, hyper)

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        self._arrays = {name: moved(fn, t, name == VALUES) for name, t in self._arrays.items()}


def moved(fn: Callable[[Tensor], Tensor], t: Tensor, narrow: bool) -> Tensor:
    """``fn(t)``; a tensor that may not be narrowed follows to the device alone where ``fn`` would leave it below fp32."""
    new = fn(t)
    keep = t.is_floating_point() and not narrow and new.dtype.itemsize < torch.float32.itemsize
    return t.to(new.device) if keep else new
