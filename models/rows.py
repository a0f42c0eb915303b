"""Tables too big to be a parameter: the interface of row stores, and of the integer addressing that feeds them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.types import Ctx, ParamMeta, State


class Addressing(nn.Module):
    """Turns tokens into row addresses, once per forward for all layers. Integer only, no parameters.

    Its lookback (the last tokens of each sequence) is an entry of the model's state.
    """

    def reset_parameters(self) -> None:
        """Fill the buffers (hash multipliers, token maps), which hold garbage after ``to_empty``."""

    def init_state(self, batch: int, device: torch.device | str) -> State:
        return ()

    def forward(self, ctx: Ctx, lookback: State | None) -> tuple[dict[str, Tensor], State | None]:
        """-> ({layer key: int64 [B, T, ...]}, new lookback). Invalid tokens change no lookback; documents do not see each other."""
        raise NotImplementedError


class RowStore:
    """Rows [R, W] outside the parameters. ``fetch`` is differentiable: its backward collects row gradients in the store.

    A subclass implements ``read`` and ``step``; this base collects, de-duplicates and scales gradients. Sums over repeated
    rows are deterministic: addresses are sorted stably and added in the order of the forward.
    """

    def __init__(self, rows: int, width: int, meta: ParamMeta | None = None) -> None:
        self.rows, self.width = rows, width
        self.meta = meta or ParamMeta(role="table", decay=False, optimizer="adamw")
        self._pending: list[tuple[Tensor, Tensor]] = []

    # -- what a store must provide

    def read(self, rows: Tensor) -> Tensor:
        """rows [...] int64 -> values [..., W]."""
        raise NotImplementedError

    def reset(self, generator: torch.Generator) -> None:
        raise NotImplementedError

    def step(self, rows: Tensor, grad: Tensor, lr: float, beta1: float, beta2: float, eps: float, step: int) -> None:
        """One optimizer update of the touched rows [U] (unique, sorted) with their gradient [U, W] in fp32."""
        raise NotImplementedError

    def zero_moments(self, rows: Tensor) -> None:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Tensor]:
        """Everything a checkpoint must hold: the rows and the optimizer's moments."""
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        raise NotImplementedError

    # -- shared

    def fetch(self, rows: Tensor) -> Tensor:
        """``read`` that remembers where gradients go."""
        if not torch.is_grad_enabled():
            return self.read(rows)
        anchor = torch.zeros((), device=rows.device, requires_grad=True)
        return _Fetch.apply(anchor, self, rows)

    def collect(self, rows: Tensor, grad: Tensor) -> None:
        self._pending.append((rows.detach().reshape(-1), grad.detach().reshape(-1, self.width).float()))

    def take_grad(self) -> tuple[Tensor, Tensor] | None:
        """-> (unique rows [U], summed gradient [U, W]) since the last call to ``clear_grad``; None when nothing was fetched."""
        if not self._pending:
            return None
        rows = torch.cat([r for r, _ in self._pending])
        grad = torch.cat([g for _, g in self._pending])
        self._pending = [sum_rows(rows, grad)]
        return self._pending[0]

    def set_grad(self, rows: Tensor, grad: Tensor) -> None:
        self._pending = [(rows, grad)]

    def clear_grad(self) -> None:
        self._pending = []


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, store: RowStore, rows: Tensor) -> Tensor:
        ctx.store = store
        ctx.save_for_backward(rows)
        return store.read(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (rows,) = ctx.saved_tensors
        ctx.store.collect(rows, grad)
        return torch.zeros((), device=rows.device), None, None


def sum_rows(rows: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """rows [R], grad [R, W] -> (unique sorted rows [U], sums [U, W]); duplicates are added in a fixed order, in fp32."""
    order = torch.argsort(rows, stable=True)
    unique, counts = torch.unique_consecutive(rows[order], return_counts=True)
    return unique, torch.segment_reduce(grad[order].float(), "sum", lengths=counts, axis=0)
