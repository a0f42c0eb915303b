"""What all stores share: the config, the rule, the initial rows, the checkpoint. Where the arrays live is a subclass's affair."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.row_update import Hyper
from models.errors import UserError
from models.parsing import choice
from models.rows import RowStore
from models.stores.cache import POLICIES
from models.types import ParamMeta

VALUES = "values"
# The arrays of each rule beside the values, in the order in which `kernels.row_update` takes them; "wide" is [R, W], else [R].
MOMENTS = {
    "rowwise": {"v": "", "steps": "count"},
    "lazy_adam": {"m": "wide", "v": "wide", "steps": "count"},
    "adam": {"m": "wide", "v": "wide", "steps": "count"},
    "sinkhorn": {"m": "wide"},
}
BLOCK = 1 << 16  # rows handled at once by what goes over a whole table: a multiple of 16, the stride of the generator


@dataclass(frozen=True)
class StoreConfig:
    """Where a table lives and how it learns.

    ``rowwise``: touched rows only, one second moment per row, no momentum: 8 bytes a row beside the values. ``lazy_adam``: Adam
    on the touched rows only; both count steps per row, and a row without gradient does not move. ``adam``: the paper's, where
    every row moves at every step on its momentum: for small tables, since a step goes over the whole table. ``sinkhorn`` does
    so too, with one moment and steps of one size, balanced over the table (`kernels.row_update.sinkhorn_update`).
    A ``host`` table keeps ``cache_rows`` of its rows on the device.
    """

    kind: str = "resident"  # see models.stores.KINDS
    rule: str = "rowwise"  # rowwise | lazy_adam | adam | sinkhorn
    lr_mult: float = 5.0
    std: float = 0.02  # of the initial rows
    cache_rows: int = 0  # 0: no cache
    cache_policy: str = "lru"  # lru | lfu, whose new rows leave first: on text it hits far less

    def __post_init__(self) -> None:
        from models.stores import KINDS

        choice("store kind", self.kind, tuple(KINDS))
        choice("store rule", self.rule, tuple(MOMENTS))
        choice("cache_policy", self.cache_policy, POLICIES)
        if self.cache_rows and self.kind != "host":
            raise UserError(f"cache_rows: a {self.kind} table has no cache; kind=host has")
        if self.rule == "sinkhorn" and self.kind not in ("resident", "mmap"):
            raise UserError(
                f"rule=sinkhorn balances a whole table in one place, which a {self.kind} one is not; kind=resident is"
            )
        for name in ("lr_mult", "std", "cache_rows"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} must not be negative, got {getattr(self, name)}")


class Table(RowStore):
    """A store with a rule. A subclass keeps the arrays and implements `read`, `update`, `arrays`, `apply` and `write`."""

    def __init__(self, cfg: StoreConfig, rows: int, width: int) -> None:
        super().__init__(rows, width, ParamMeta(role="table", lr_mult=cfg.lr_mult, decay=False, optimizer="adamw"))
        self.cfg = cfg

    # -- what a subclass must provide

    def arrays(self) -> dict[str, Tensor]:
        """Values and moments by name, as `allocate` made them; not copies."""
        raise NotImplementedError

    def update(self, rows: Tensor | slice, grad: Tensor, rule: str, hyper: Hyper) -> None:
        """An op of `kernels.row_update` on these rows and their moments, wherever they are."""
        raise NotImplementedError

    # -- shared

    def allocate(self, rows: int, **where: Any) -> dict[str, Tensor]:
        """Uninitialised arrays for ``rows`` rows. ``where``: what `torch.empty` takes."""
        shapes = {"wide": ((rows, self.width), torch.float32), "": ((rows,), torch.float32)}
        shapes["count"] = (rows,), torch.int32
        kinds = {VALUES: "wide", **MOMENTS[self.cfg.rule]}
        return {name: torch.empty(shapes[kind][0], dtype=shapes[kind][1], **where) for name, kind in kinds.items()}

    def draw(self, generator: torch.Generator, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """The initial rows N(0, std), block by block: the same in every store."""
        wide = torch.promote_types(dtype, torch.float32)
        for block in self.blocks():
            drawn = torch.empty(block.stop - block.start, self.width, dtype=wide, device=generator.device)
            yield block, drawn.normal_(0.0, self.cfg.std, generator=generator).to(dtype)

    def blocks(self) -> Iterator[slice]:
        for start in range(0, self.rows, BLOCK):
            yield slice(start, min(start + BLOCK, self.rows))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        arrays = self.arrays()
        values = arrays.pop(VALUES)
        for block, drawn in self.draw(generator, values.dtype):
            values[block] = drawn.to(values.device)
        for moment in arrays.values():
            moment.zero_()

    def step(self, rows: Tensor, grad: Tensor, lr: float, beta1: float, beta2: float, eps: float) -> None:
        dtype = self.arrays()[VALUES].dtype
        if dtype.itemsize < torch.float32.itemsize:
            raise UserError(
                f"a table in {dtype} cannot learn: steps below half a last bit would be lost; keep it in float32"
            )
        hyper, rule = Hyper(lr, beta1, beta2, eps), self.cfg.rule
        if rule == "adam":
            for block in self.blocks():  # Adam is the lazy rule when every row is touched
                self.update(block, self._dense(block, rows, grad), "lazy_adam", hyper)
        elif rule == "sinkhorn":
            whole = slice(0, self.rows)
            self.update(whole, self._dense(whole, rows, grad), rule, hyper)
        else:
            self.update(rows, grad, rule, hyper)

    def _dense(self, block: slice, rows: Tensor, grad: Tensor) -> Tensor:
        """The gradient of all rows of a block, from that of the sorted rows that have one."""
        first, last = torch.searchsorted(rows, rows.new_tensor([block.start, block.stop])).tolist()
        dense = grad.new_zeros(block.stop - block.start, self.width)
        return dense.index_copy_(0, rows[first:last] - block.start, grad[first:last])

    @torch.no_grad()
    def zero_moments(self, rows: Tensor) -> None:
        for name, array in self.arrays().items():
            if name != VALUES:
                array[rows.to(array.device)] = 0

    @torch.no_grad()
    def load_values(self, values: Tensor) -> None:
        for name, array in self.arrays().items():
            if name == VALUES:
                array.copy_(values)
            else:
                array.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        return self.arrays()

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises UserError for arrays of another rule or size."""
        own, rule = self.arrays(), self.cfg.rule
        for name in own.keys() - state.keys():
            raise UserError(f"the saved table has no '{name}', which rule={rule} needs")
        for name in state.keys() - own.keys():
            raise UserError(f"the saved table has '{name}', which rule={rule} does not know")
        for name, array in own.items():
            if state[name].shape != array.shape:
                raise UserError(f"'{name}' has shape {list(state[name].shape)}, the table {list(array.shape)}")
        for name, array in own.items():
            array.copy_(state[name])
