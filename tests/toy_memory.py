"""A small memory: rows of a table, addressed by a hash of the current and the previous token, gated by the stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.rows import Addressing, RowStore
from models.types import Aux, Cost, Ctx, ParamMeta, Part, Site, Stat, State, count_params, normal_, reset_norm
from tests.toys import masked_mean, newest, previous


class ToyTable(RowStore):
    """Rows resident beside the parameters; Adam with a step count per row, so untouched rows do not move."""

    NAMES = ("values", "m", "v", "steps")

    def __init__(self, rows: int, width: int) -> None:
        super().__init__(rows, width, ParamMeta(role="table", lr_mult=5.0, decay=False, optimizer="adamw"))
        self.values, self.m, self.v = (torch.empty(rows, width) for _ in range(3))
        self.steps = torch.empty(rows, dtype=torch.int64)

    def read(self, rows: Tensor) -> Tensor:
        return self.values[rows]

    def reset(self, generator: torch.Generator) -> None:
        normal_(self.values, 0.02, generator)
        for t in (self.m, self.v, self.steps):
            t.zero_()

    @torch.no_grad()
    def step(self, rows: Tensor, grad: Tensor, lr: float, beta1: float, beta2: float, eps: float) -> None:
        grad = grad.to(self.values.dtype)
        self.steps[rows] += 1
        n = self.steps[rows][:, None].to(grad.dtype)
        self.m[rows] = beta1 * self.m[rows] + (1 - beta1) * grad
        self.v[rows] = beta2 * self.v[rows] + (1 - beta2) * grad.square()
        m, v = self.m[rows] / (1 - beta1**n), self.v[rows] / (1 - beta2**n)
        self.values[rows] -= lr * m / (v.sqrt() + eps)

    def zero_moments(self, rows: Tensor) -> None:
        for t in (self.m, self.v, self.steps):
            t[rows] = 0

    def state_dict(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.NAMES}

    def load_values(self, values: Tensor) -> None:
        self.values.copy_(values)
        self.zero_moments(torch.arange(self.rows))

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name in self.NAMES:
            getattr(self, name).copy_(state[name])

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move with the module that owns the table."""
        for name in self.NAMES:
            setattr(self, name, fn(getattr(self, name)))


class ToyAddressing(Addressing):
    """row = (current * a ^ previous * b) + c, mod rows; a, b, c by layer; no previous token counts as zero."""

    numbers: Tensor

    def __init__(self, layers: list[int], rows: list[int]) -> None:
        super().__init__()
        self.at, self.rows = layers, rows
        self.register_buffer("numbers", torch.empty(len(layers), 3, dtype=torch.int64))

    def reset_parameters(self) -> None:
        layers = torch.tensor(self.at, device=self.numbers.device)[:, None]
        self.numbers.copy_(2 * layers * torch.tensor([7919, 104729, 17], device=self.numbers.device) + 2654435761)

    def init_state(self, batch: int, device: torch.device | str) -> State:
        return torch.zeros(batch, 1, dtype=torch.int64, device=device)  # the last token plus one

    def forward(self, ctx: Ctx, lookback: State | None) -> tuple[dict[str, Tensor], State | None]:
        tokens = ctx.tokens[..., None] + 1
        before = previous(tokens, lookback, ctx)
        found = {}
        for i, (layer, rows) in enumerate(zip(self.at, self.rows, strict=True)):
            a, b, c = self.numbers[i].unbind()
            found[str(layer)] = ((tokens * a ^ before * b) + c).squeeze(-1) % rows
        return found, None if lookback is None else newest(tokens, lookback, ctx)


@dataclass(frozen=True)
class ToyHashConfig:
    kind: str = "tests.toy_memory:ToyHash"
    rows: int = 31
    width: int = 4


class ToyHash(Part):
    """y = sigmoid(norm(x) . key(e)) value(e), e the row of this token; invalid tokens get nothing."""

    Config = ToyHashConfig

    def __init__(self, cfg: ToyHashConfig, site: Site) -> None:
        super().__init__(cfg, site)
        self.key = nn.Linear(cfg.width, site.d_model, bias=False)
        self.value = nn.Linear(cfg.width, site.d_model, bias=False)
        self.table = ToyTable(cfg.rows, cfg.width)

    def forward(
        self, x: Tensor, ctx: Ctx, state: State | None = None, donate: bool = False
    ) -> tuple[Tensor, State | None, Aux]:
        e = self.table.wait(ctx.shared[self._rows_key]).to(x.dtype)
        key, value = self.key(e), self.value(e)
        if x.ndim == 4:  # residual branches
            key, value = key[:, :, None], value[:, :, None]
        gate = torch.sigmoid((self.norm(x) * key).sum(dim=-1, keepdim=True))
        y = gate * value
        if ctx.valid is not None:
            y = torch.where(ctx.valid.view(*ctx.valid.shape, *(1,) * (x.ndim - 2)), y, 0.0)
        return y, state, Aux({}, {"gate": Stat(masked_mean(gate.detach(), ctx.valid).mean())}, {})

    @property
    def _rows_key(self) -> str:
        return f"toy_rows.{self.site.layer}"

    def shared(self) -> dict[str, Callable[[Ctx, State | None], Any]]:
        return {self._rows_key: lambda ctx, _: self.table.prefetch(ctx.rows[str(self.site.layer)])}

    def tables(self) -> dict[str, Any]:
        return {"table": self.table}

    @classmethod
    def addressing(cls, parts: list[Any]) -> nn.Module | None:
        return ToyAddressing([p.site.layer for p in parts], [p.cfg.rows for p in parts])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ToyHash:
        super()._apply(fn, recurse)
        self.table.apply(fn)
        return self

    def reset_parameters(self, generator: torch.Generator, depth: int) -> None:
        for linear in (self.key, self.value):
            normal_(linear.weight, self.site.init_std, generator)
        reset_norm(self.norm)

    def cost(self, seq_len: int, dtype: torch.dtype = torch.float32) -> Cost:
        n, D, W = count_params(self), self.site.d_model, self.cfg.width
        streams = self.site.branches if self.sees_branches else 1
        return Cost(n + self.cfg.rows * W, n + W, 4 * W * D + 2 * D * streams)


class ToyHashBranches(ToyHash):
    """The same for every residual branch at once, each with a gate of its own."""

    sees_branches = True
