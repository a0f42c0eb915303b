"""Mamba (arXiv:2312.00752): a diagonal state-space model whose step sizes, writes and reads depend on the token.

    u | z = project(norm(x)),   u = silu(conv(u)),   d | B | C = select(u),   delta = softplus(dt(d) + bias)
    h_t = exp(delta_t A) * h_{t-1} + delta_t u_t B_t^T,   y = out((h C + D u) * silu(z))

A state is a vector of N numbers per channel, each with a decay of its own; Mamba-2 (`models.mixers.linear`) has one decay per head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.recurrent_step import recurrent_step
from kernels.selective_scan import selective_scan
from models.errors import UserError
from models.mixers.pieces import ROWS, Rows, ShortConv, rows_of
from models.mixers.rules import reset_step_size, step_size, wide
from models.types import (
    Aux,
    Cost,
    Ctx,
    Gates,
    ParamMeta,
    Part,
    Site,
    State,
    count_params,
    default_meta,
    normal_,
    reset_norm,
    uniform_,
)


@dataclass(frozen=True)
class MambaConfig:
    """The defaults are those of the paper's language models (section 3.4 and appendix E.2)."""

    kind: str = "mamba"
    expand: float = 2.0  # inner width as a multiple of d_model
    d_state: int = 16  # N, numbers of a channel's state
    conv: int = 4  # width of the causal depthwise convolution before the selection
    conv_bias: bool = True
    dt_rank: int | None = None  # of the map from channels to step sizes; default: d_model / 16, rounded up

    def __post_init__(self) -> None:
        for name in ("d_state", "conv", "dt_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if not self.expand > 0:
            raise UserError(f"expand must be positive, got {self.expand}")

    def inner(self, site: Site) -> int:
        """Channels. Raises UserError where that is no whole number."""
        width = self.expand * site.d_model
        if width < 1 or width != int(width):
            raise site.refuse(f"expand={self.expand:g} of d_model={site.d_model} is no whole width")
        return int(width)

    def tiny(self) -> MambaConfig:
        """For a model of width 64."""
        return replace(self, expand=2.0, dt_rank=self.dt_rank and min(self.dt_rank, 4))


class MambaState(NamedTuple):
    """Of constant size."""

    conv: Tensor  # [B, W-1, D], the last inputs of the convolution
    memory: Tensor  # [B, D, N] in at least fp32


class SelectiveStateSpace(nn.Module):
    """h_t = exp(delta_t A) * h_{t-1} + delta_t u_t B_t^T, y_t = h_t C_t + D u_t, with A = -exp(A_log), for D channels."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(channels, width))
        self.D = nn.Parameter(torch.empty(channels))

    def forward(
        self,
        u: Tensor,
        delta: Tensor,
        b: Tensor,
        c: Tensor,
        *,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """u [B, T, D], delta [B, T, D] in at least fp32, b and c [B, T, N] -> (y [B, T, D], state [B or S, D, N] if asked for)."""
        return selective_scan(
            u,
            delta,
            self._rates(),
            b,
            c,
            self.D,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
        )

    def step(
        self,
        u: Tensor,
        delta: Tensor,
        b: Tensor,
        c: Tensor,
        state: Tensor,
        *,
        index: Tensor | None = None,
        donate: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """One token, T = 1: a channel is a head of one value with N key channels that decay each by itself.

        ``index`` int [B, 1]: 0, or -1 for a sequence whose state stays. ``donate``: the state may be written in place (where no
        gradient is recorded).
        """
        keys, queries = (x.unsqueeze(2).expand(-1, -1, u.shape[-1], -1) for x in (b, c))
        y, memory = recurrent_step(
            queries,
            keys,
            (delta * u).unsqueeze(3),
            state[:, None, :, :, None],
            self.decay(delta),
            scale=1.0,
            index=index,
            donate=donate and not torch.is_grad_enabled(),
        )
        return (y.squeeze(3) + self.D * u).to(u.dtype), memory[:, 0, :, :, 0]

    def decay(self, delta: Tensor) -> Tensor:
        """delta [B, T, D] -> its log, delta A [B, T, D, N]."""
        return delta.unsqueeze(3) * self._rates()

    def init_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """Zeros; ``dtype`` is that of the activations."""
        return torch.zeros(batch, *self.A_log.shape, device=device, dtype=wide(dtype))

    def reset_parameters(self) -> None:
        """A = -1, ..., -N in every channel (section 3.6, S4D-Real), D = 1."""
        with torch.no_grad():
            numbers = torch.arange(1, self.A_log.shape[1] + 1, device=self.A_log.device)
            self.A_log.copy_(numbers.log().expand_as(self.A_log))
        nn.init.ones_(self.D)

    def meta(self) -> dict[str, ParamMeta]:
        """Rates of decay, one per number of the state, are no matrix, and none is pulled to one rate."""
        return {"A_log": ParamMeta(role="vector", decay=False, optimizer="adamw"), "D": default_meta(self.D)}

    def flops(self) -> float:
        """Per token: what is written, and what is read."""
        return 4 * self.A_log.numel()

    def _rates(self) -> Tensor:
        return -self.A_log.to(wide(self.A_log.dtype)).exp()


class Mamba(Part):
    Config = MambaConfig

    def __init__(self, cfg: MambaConfig, site: Site) -> None:
        super().__init__(cfg, site)
        self.inner = cfg.inner(site)
        self.selected = (cfg.dt_rank or -(-site.d_model // 16), cfg.d_state, cfg.d_state)  # columns of d, B and C
        self.project = nn.Linear(site.d_model, 2 * self.inner, bias=False)
        self.conv = ShortConv(self.inner, cfg.conv, cfg.conv_bias)
        self.select = nn.Linear(self.inner, sum(self.selected), bias=False)
        self.dt = nn.Linear(self.selected[0], self.inner)
        self.ssm = SelectiveStateSpace(self.inner, cfg.d_state)
        self.out = nn.Linear(self.inner, site.d_model, bias=False)

    def forward(
        self, x: Tensor, ctx: Ctx, state: MambaState | None = None, donate: bool = False
    ) -> tuple[Tensor, MambaState | None, Aux]:
        u, gate = self.project(self.norm(x)).chunk(2, dim=-1)
        rows: Rows = ctx.shared[ROWS]
        if state is not None and x.shape[1] == 1:
            y, state = self._step(u, state, rows, donate)
        else:
            y, state = self._scan(u, ctx, state, rows)
        return self.out(y * F.silu(gate)), state, Aux()

    def memory_gates(self, x: Tensor, ctx: Ctx) -> Gates:
        """Of each channel; the N numbers of its state are its key features."""
        u, _ = self.project(self.norm(x)).chunk(2, dim=-1)
        rows: Rows = ctx.shared[ROWS]
        u, _ = self.conv(rows.pack(u), cu_seqlens=rows.cu_seqlens)
        delta = rows.unpack(self._select(u)[0], len(x))
        return Gates(self.ssm.decay(delta), delta)

    def _scan(self, u: Tensor, ctx: Ctx, state: MambaState | None, rows: Rows) -> tuple[Tensor, MambaState | None]:
        """u [B, T, D] -> (y [B, T, D], the state after these tokens)."""
        keep = state is not None
        u, conv = self.conv(
            rows.pack(u),
            initial_state=state.conv if keep else None,
            output_final_state=keep,
            cu_seqlens=rows.cu_seqlens,
        )
        y, memory = self.ssm(
            u,
            *self._select(u),
            initial_state=state.memory if keep else None,
            output_final_state=keep,
            cu_seqlens=rows.cu_seqlens,
        )
        return rows.unpack(y, len(ctx.tokens)), MambaState(conv, memory) if keep else None

    def _step(self, u: Tensor, state: MambaState, rows: Rows, donate: bool) -> tuple[Tensor, MambaState]:
        """u [B, 1, D]: one token per sequence."""
        u, conv = self.conv.step(u, state.conv[:, None], index=rows.index, donate=donate)
        y, memory = self.ssm.step(u, *self._select(u), state.memory, index=rows.index, donate=donate)
        return y, MambaState(conv[:, 0], memory)

    def _select(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u [B, T, D] -> delta [B, T, D] in at least fp32, B and C [B, T, N]."""
        low, b, c = self.select(u).split(self.selected, dim=-1)
        return step_size(F.linear(low, self.dt.weight), self.dt.bias), b, c

    def shared(self) -> dict[str, Callable[[Ctx, Any], Any]]:
        return {ROWS: rows_of}

    def init_state(self, batch: int, device: torch.device | str, dtype: torch.dtype, max_len: int) -> State:
        return MambaState(self.conv.init_state(batch, device, dtype), self.ssm.init_state(batch, device, dtype))

    def reset_parameters(self, generator: torch.Generator, depth: int) -> None:
        """Of the map to step sizes as published: step sizes of a token lie in DT_RANGE, whatever the first inputs say."""
        normal_(self.project.weight, self.site.init_std, generator)
        normal_(self.select.weight, self.site.init_std, generator)
        normal_(self.out.weight, self.site.init_std / math.sqrt(2 * depth), generator)
        bound = self.selected[0] ** -0.5
        uniform_(self.dt.weight, -bound, bound, generator)
        reset_step_size(self.dt.bias, generator)
        self.conv.reset_parameters(generator)
        self.ssm.reset_parameters()
        reset_norm(self.norm)

    def meta(self) -> dict[str, ParamMeta]:
        fused = {"project.weight": (self.inner, self.inner), "select.weight": self.selected}
        found = {**super().meta(), **{name: ParamMeta(splits=splits) for name, splits in fused.items()}}
        for name, piece in (("conv", self.conv), ("ssm", self.ssm)):
            found |= {f"{name}.{key}": meta for key, meta in piece.meta().items()}
        return found

    def cost(self, seq_len: int, dtype: torch.dtype = torch.float32) -> Cost:
        params = count_params(self)
        matrices = (self.project, self.select, self.dt, self.out)
        flops = 2 * sum(m.weight.numel() for m in matrices) + self.conv.flops() + self.ssm.flops()
        state = self.ssm.A_log.numel() * wide(dtype).itemsize + (self.cfg.conv - 1) * self.inner * dtype.itemsize
        return Cost(params, params, flops, state)
