"""A table whose rows are split over the ranks, in ranges of equal length: each rank holds and changes its own. On one rank it
is a resident table.

A lookup asks every owner once for each distinct row: ids go there, values come back. After the backwards of a step each rank
sends the gradients of the rows it looked up, summed over its micro-batches, to their owners, which add those of all ranks in the
order of the ranks and divide by their number, as is done with the gradients of parameters. Ranks meet in both, with tokens or
without, so all look up equally often; `serving` is for the times when they do not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.row_update import sum_rows
from models.errors import UserError
from models.rows import RowStore
from models.stores.base import VALUES, StoreConfig, Table
from models.stores.resident import Resident
from models.tensorfile import ROWS, Blocks

IDLE = -1  # in place of the number of a table: this rank looks nothing up


class Sharded(Table):
    """The ranks are those of the default process group when the table is made."""

    def __init__(self, cfg: StoreConfig, rows: int, width: int) -> None:
        super().__init__(cfg, rows, width)
        self.meta = replace(self.meta, shard="rows")
        together = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        self.each = -(-rows // self.size)
        self.own = self.range(self.rank)
        self.part = Resident(cfg, self.own.stop - self.own.start, width)
        self.number = 0  # among the sharded tables of a model

    def range(self, rank: int) -> slice:
        """The rows of a rank; the last ranks may have fewer, or none."""
        return slice(min(rank * self.each, self.rows), min((rank + 1) * self.each, self.rows))

    # -- lookups

    def read(self, rows: Tensor) -> Tensor:
        if self.size == 1:
            return self.part.read(rows)
        distinct, places = torch.unique(rows, return_inverse=True)
        sent, got, numbers = _announce(self._per_owner(distinct), self.number)
        if set(numbers) - {self.number, IDLE}:
            raise RuntimeError(f"ranks look up different tables at the same time: {numbers}")
        values = self._trade(distinct, sent, got)
        return values.index_select(0, places.flatten()).view(*rows.shape, self.width)

    def serve(self, got: list[int]) -> None:
        """Answer the others' lookup without one of one's own."""
        self._trade(self._nothing()[0], [0] * self.size, got)

    def _trade(self, rows: Tensor, sent: list[int], got: list[int]) -> Tensor:
        """Sorted rows [U] -> their values [U, W]: U = sum(sent), to each owner; ``got`` is how many each rank asks of us."""
        asked = _swap(rows, sent, got)
        return _swap(self.part.read(asked - self.own.start), got, sent)

    def _per_owner(self, rows: Tensor) -> Tensor:
        """How many of the sorted rows each rank owns, int64 [ranks]."""
        borders = torch.arange(self.size + 1, device=rows.device) * self.each
        return torch.searchsorted(rows, borders).diff()

    # -- gradients

    @torch.no_grad()
    def average_grad(self) -> None:
        if self.size == 1:
            return
        taken = self.take_grad()
        rows, grad = taken or self._nothing()
        sent, got, has_any = _announce(self._per_owner(rows), int(taken is not None))
        if any(has_any):
            rows, grad = sum_rows(_swap(rows, sent, got), _swap(grad, sent, got))
            self.set_grad(rows, grad / self.size)

    def grad_to_measure(self) -> Tensor | None:
        """The norm itself, the same bits on every rank; after `average_grad`."""
        taken = self.take_grad()
        if taken is None or self.size == 1:
            return None if taken is None else taken[1]
        here = torch.linalg.vector_norm(taken[1], dtype=torch.float64)
        norms = [torch.empty_like(here) for _ in range(self.size)]
        dist.all_gather(norms, here)
        return torch.linalg.vector_norm(torch.stack(norms)).to(taken[1].dtype)

    def _nothing(self) -> tuple[Tensor, Tensor]:
        """No rows, and their gradients."""
        values = self.arrays()[VALUES]
        wide = torch.promote_types(values.dtype, torch.float32)
        return values.new_empty(0, dtype=torch.int64), values.new_empty(0, self.width, dtype=wide)

    # -- changes, on the owner

    def arrays(self) -> dict[str, Tensor]:
        """Of this rank's rows."""
        return self.part.arrays()

    def step(self, rows: Tensor, grad: Tensor, lr: float, beta1: float, beta2: float, eps: float) -> None:
        self.part.step(rows - self.own.start, grad, lr, beta1, beta2, eps)

    def zero_moments(self, rows: Tensor) -> None:
        mine = (rows >= self.own.start) & (rows < self.own.stop)
        self.part.zero_moments(rows[mine] - self.own.start)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """The rows that one rank would draw, so the whole table is drawn on each, block by block."""
        values, *moments = self.arrays().values()
        for block, drawn in self.draw(generator, values.dtype):
            first, last = max(block.start, self.own.start), min(block.stop, self.own.stop)
            if first < last:
                there = slice(first - self.own.start, last - self.own.start)
                values[there] = drawn[first - block.start : last - block.start].to(values.device)
        for moment in moments:
            moment.zero_()

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        self.part.apply(fn)

    # -- on disk: one whole table, whoever wrote it, so that any number of ranks and any other kind of store can read it

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Arrays of the whole table, of which this rank takes its rows."""
        for name, array in state.items():
            if array.shape[:1] != (self.rows,):
                raise UserError(f"'{name}' has {len(array)} rows, the table {self.rows}")
        self.part.load_state_dict({name: array[self.own] for name, array in state.items()})

    def load_values(self, values: Tensor) -> None:
        self.part.load_values(values[self.own])

    def blocks_to_save(self) -> dict[str, Blocks]:
        """On rank 0 those of all ranks; the others send theirs when they run through them, and see nothing."""
        arrays = self.arrays().items()
        return {name: Blocks(t.dtype, (self.rows, *t.shape[1:]), self._to_first(t)) for name, t in arrays}

    def _to_first(self, array: Tensor) -> Iterator[Tensor]:
        for rank in range(self.size):
            rows = self.range(rank)
            for start in range(0, rows.stop - rows.start, ROWS):
                count = min(ROWS, rows.stop - rows.start - start)
                if rank == self.rank == 0:
                    yield array[start : start + count]
                elif rank == self.rank:
                    dist.send(array[start : start + count], dst=0)
                elif self.rank == 0:
                    block = array.new_empty(count, *array.shape[1:])
                    dist.recv(block, src=rank)
                    yield block


@contextlib.contextmanager
def serving(tables: Mapping[str, RowStore]) -> Iterator[None]:
    """Inside, ranks may run a model with these tables unequally often, or not at all: who is through answers the others until
    all are. Nothing else that ranks do together may happen inside."""
    sharded = [t for t in tables.values() if isinstance(t, Sharded) and t.size > 1]
    for number, table in enumerate(sharded):
        table.number = number
    yield
    while sharded:
        idle = sharded[0].arrays()[VALUES].new_zeros(sharded[0].size, dtype=torch.int64)
        _, got, numbers = _announce(idle, IDLE)
        busy = max(numbers)
        if busy == IDLE:
            return
        sharded[busy].serve(got)


# -- between ranks


def _announce(counts: Tensor, note: int) -> tuple[list[int], list[int], list[int]]:
    """counts int64 [ranks], of what goes to each -> (the same, what comes from each, the note of each), known to the host."""
    ours = torch.stack((counts, torch.full_like(counts, note)), dim=1)
    theirs = torch.empty_like(ours)
    dist.all_to_all_single(theirs, ours)
    sent, got, notes = torch.stack((counts, *theirs.unbind(1))).tolist()
    return sent, got, notes


def _swap(values: Tensor, sent: list[int], got: list[int]) -> Tensor:
    """[sum(sent), ...] in the order of who gets it -> [sum(got), ...] in the order of who sent it."""
    out = values.new_empty(sum(got), *values.shape[1:])
    dist.all_to_all_single(out, values.contiguous(), got, sent)
    return out
