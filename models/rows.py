"""Tables too big to be a parameter: the interface of row stores, and of the integer addressing that feeds them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kernels.row_update import sum_rows
from models.tensorfile import Blocks, MappedFile
from models.types import Ctx, ParamMeta, State


class Addressing(nn.Module):
    """Turns tokens into row addresses, once per forward for all layers. Integer only, no parameters.

    Its lookback (the last tokens of each sequence) is an entry of the model's state.
    """

    def reset_parameters(self) -> None:
        """Fill the buffers (hash multipliers, token maps), which hold garbage after ``to_empty``."""

    def use_tokenizer(self, tokenizer_json: str) -> None:
        """What the ids spell, for an addressing that asks; once, when a model is new. A saved one knows."""

    def after_loading(self) -> None:
        """For a loader that writes buffers itself, and not by ``load_state_dict``: read what they hold now. Raises UserError."""

    def must_agree(self, source: Any) -> None:
        """Raise UserError where a table that ``source`` (of the same class) addressed would have other rows here."""

    def init_state(self, batch: int, device: torch.device | str) -> State:
        return ()

    def forward(self, ctx: Ctx, lookback: State | None) -> tuple[dict[str, Tensor], State | None]:
        """-> ({layer key: int64 [B, T, ...]}, new lookback). Invalid tokens change no lookback; documents do not see each other."""
        raise NotImplementedError


class RowStore:
    """Rows [R, W] outside the parameters. ``fetch`` is differentiable: its backward collects row gradients in the store.

    A subclass implements what holds and changes rows; this base collects gradients and adds those of repeated rows, in the
    order of the forwards and in at least fp32, so that they are the same to the bit from run to run. `models.stores` has
    the stores that follow a config.
    """

    def __init__(self, rows: int, width: int, meta: ParamMeta | None = None) -> None:
        self.rows, self.width = rows, width
        self.meta = meta or ParamMeta(role="table", decay=False, optimizer="adamw")
        self._pending: list[tuple[Tensor, Tensor]] = []  # as the backwards gave them
        self._summed: tuple[Tensor, Tensor] | None = None

    # -- what a store must provide

    def read(self, rows: Tensor) -> Tensor:
        """rows [...] int64 -> values [..., W], on the device of the rows."""
        raise NotImplementedError

    def reset(self, generator: torch.Generator) -> None:
        """Complete initialisation, moments included."""
        raise NotImplementedError

    def step(self, rows: Tensor, grad: Tensor, lr: float, beta1: float, beta2: float, eps: float) -> None:
        """One optimizer update with the gradient [U, W] of the rows [U], which are distinct and sorted."""
        raise NotImplementedError

    def zero_moments(self, rows: Tensor) -> None:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Tensor]:
        """Everything a checkpoint must hold: the rows (``values``) and the optimizer's moments; not copies."""
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        raise NotImplementedError

    def load_values(self, values: Tensor) -> None:
        """The rows [R, W] of another table; the moments start anew."""
        raise NotImplementedError

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Follow the module that owns the store to another device or dtype (its ``_apply``)."""
        raise NotImplementedError

    # -- what a store may do better

    def blocks_to_save(self) -> dict[str, Blocks]:
        """The arrays of the whole table, for a file. Every rank must run through them."""
        return {name: Blocks.of(t) for name, t in self.state_dict().items()}

    def load_file(self, path: Path, name: str) -> None:
        """`load_state_dict` of the arrays ``name/...`` in a file. Raises UserError where they do not fit."""
        self.load_state_dict(MappedFile(path).under(name))

    def average_grad(self) -> None:
        """Of a table that is split over ranks (``meta.shard == "rows"``): from what this rank collected for any row to the mean
        over ranks of the rows it owns. Every rank calls it."""
        raise NotImplementedError

    def grad_to_measure(self) -> Tensor | None:
        """A tensor whose L2 norm is that of the whole table's gradient, over all ranks; None when nothing was fetched."""
        taken = self.take_grad()
        return None if taken is None else taken[1]

    def stats(self) -> dict[str, float]:
        """What the store measured about itself since it was made."""
        return {}

    def begin(self, rows: Tensor) -> Tensor:
        """As `read`, but the values may still be on their way: nobody looks at them before `wait`."""
        return self.read(rows)

    def wait(self, values: Tensor) -> Tensor:
        """What `prefetch` returned, arrived."""
        return values

    # -- shared

    def fetch(self, rows: Tensor) -> Tensor:
        """``read`` that remembers where gradients go."""
        return self.wait(self.prefetch(rows))

    def prefetch(self, rows: Tensor) -> Tensor:
        """``begin`` that remembers where gradients go: for `LM.prepare`; the part that needs the values calls `wait` first."""
        if not torch.is_grad_enabled():
            return self.begin(rows)
        anchor = torch.zeros((), device=rows.device, requires_grad=True)
        return _Fetch.apply(anchor, self, rows)

    def collect(self, rows: Tensor, grad: Tensor) -> None:
        self._pending.append((rows.detach().reshape(-1), grad.detach().reshape(-1, self.width)))

    def take_grad(self) -> tuple[Tensor, Tensor] | None:
        """-> (distinct sorted rows [U], summed gradient [U, W]) since `clear_grad`, not a copy; None when nothing was fetched."""
        if self._pending:
            parts = [*([self._summed] if self._summed else []), *self._pending]
            rows, grad = parts[0] if len(parts) == 1 else (torch.cat(part) for part in zip(*parts, strict=True))
            self.set_grad(*sum_rows(rows, grad))
        return self._summed

    def set_grad(self, rows: Tensor, grad: Tensor) -> None:
        """Replace all gradients; the rows must be distinct and sorted."""
        self._pending, self._summed = [], (rows, grad)

    def clear_grad(self) -> None:
        self._pending, self._summed = [], None


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, store: RowStore, rows: Tensor) -> Tensor:
        ctx.store = store
        ctx.save_for_backward(rows)
        return store.begin(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (rows,) = ctx.saved_tensors
        ctx.store.collect(rows, grad)
        return torch.zeros((), device=rows.device), None, None
