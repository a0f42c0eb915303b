"""Feed-forward channels: SwiGLU, GELU and squared ReLU."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.swiglu import swiglu
from models.errors import UserError
from models.parsing import choice
from models.types import Aux, Cost, Ctx, ParamMeta, Part, Site, State, count_params, normal_, reset_norm


@dataclass(frozen=True)
class MLPConfig:
    hidden: int | None = None  # default: from the ratio
    ratio: float = 4.0
    bias: bool = False

    def __post_init__(self) -> None:
        if self.hidden is not None and self.hidden < 1:
            raise UserError(f"hidden must be at least 1, got {self.hidden}")
        if self.ratio <= 0:
            raise UserError(f"ratio must be positive, got {self.ratio}")

    def tiny(self) -> Self:
        """For a model of width 64."""
        return replace(self, hidden=128)


@dataclass(frozen=True)
class SwiGLUConfig(MLPConfig):
    """Width by default ceil(2 * ratio * d_model / 3 / multiple_of) * multiple_of."""

    kind: str = "swiglu"
    multiple_of: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.multiple_of < 1:
            raise UserError(f"multiple_of must be at least 1, got {self.multiple_of}")


@dataclass(frozen=True)
class GeluConfig(MLPConfig):
    """Width by default ratio * d_model."""

    kind: str = "gelu"
    approximate: str = "none"  # none | tanh

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("approximate", self.approximate, ("none", "tanh"))


@dataclass(frozen=True)
class Relu2Config(MLPConfig):
    """Width by default ratio * d_model."""

    kind: str = "relu2"


class MLP(Part):
    """norm -> up -> activation -> down; a subclass gives the width of `up` and the activation."""

    gates = 1  # rows of `up` per hidden feature

    def __init__(self, cfg: MLPConfig, site: Site) -> None:
        super().__init__(cfg, site)
        self.hidden = cfg.hidden or self.default_hidden()
        self.up = nn.Linear(site.d_model, self.gates * self.hidden, bias=cfg.bias)
        self.down = nn.Linear(self.hidden, site.d_model, bias=cfg.bias)

    def default_hidden(self) -> int:
        return round(self.cfg.ratio * self.site.d_model)

    def activate(self, h: Tensor) -> Tensor:
        """[B, T, gates * F] -> [B, T, F]."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, ctx: Ctx, state: State | None = None, donate: bool = False
    ) -> tuple[Tensor, State | None, Aux]:
        return self.down(self.activate(self.up(self.norm(x)))), state, Aux()

    def reset_parameters(self, generator: torch.Generator, depth: int) -> None:
        normal_(self.up.weight, self.site.init_std, generator)
        normal_(self.down.weight, self.site.init_std / math.sqrt(2 * depth), generator)
        for linear in (self.up, self.down):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        reset_norm(self.norm)

    def meta(self) -> dict[str, ParamMeta]:
        return {**super().meta(), "up.weight": ParamMeta(splits=(self.hidden,) * self.gates)}

    def cost(self, seq_len: int, dtype: torch.dtype = torch.float32) -> Cost:
        params = count_params(self)
        return Cost(params, params, 2 * (self.up.weight.numel() + self.down.weight.numel()), 0)


class SwiGLU(MLP):
    """down(silu(gate(x)) * up(x)) (arXiv:2002.05202, eq. 5); gate and up are one matrix, gate first."""

    Config = SwiGLUConfig
    gates = 2

    def default_hidden(self) -> int:
        unit = self.cfg.multiple_of
        return math.ceil(2 * self.cfg.ratio * self.site.d_model / 3 / unit) * unit

    def activate(self, h: Tensor) -> Tensor:
        return swiglu(h)


class Gelu(MLP):
    """down(gelu(up(x))) (arXiv:1606.08415)."""

    Config = GeluConfig

    def activate(self, h: Tensor) -> Tensor:
        return F.gelu(h, approximate=self.cfg.approximate)


class Relu2(MLP):
    """down(relu(up(x))^2) (arXiv:2109.08668)."""

    Config = Relu2Config

    def activate(self, h: Tensor) -> Tensor:
        return F.relu(h).square()
