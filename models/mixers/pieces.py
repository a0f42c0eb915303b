"""What linear-time mixers share beside their rule: the rows their ops run over, the short convolution, the readout."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.causal_conv1d import causal_conv1d, causal_conv1d_step
from kernels.gated_rms_norm import gated_rms_norm
from models.mixers.rules import Heads
from models.types import Ctx, ParamMeta, State, uniform_

ROWS = "linear_rows"  # the key of `rows_of` in `Part.shared`


class Rows(NamedTuple):
    """How the tokens [B, T] of one forward lie on the row axis of an op, the same for all layers.

    Without padding a batch stays [B, T, ...]. With it, the valid tokens come first, in order, as flat rows cut into the
    sequences of the batch; the invalid ones follow and belong to no sequence, so they change no state.
    """

    cu_seqlens: Tensor | None = None  # int32 [S+1] over the B*T rows; None: B whole sequences
    order: Tensor | None = None  # int64 [B*T], the token in each row; None: rows are tokens
    place: Tensor | None = None  # int64 [B*T], the row of each token
    index: Tensor | None = None  # int64 [B, 1], for one token that continues a state: 0, or -1 where it is invalid

    def pack(self, x: Tensor) -> Tensor:
        """x [B, T, ...] -> [B, T, ...] or, where tokens move, [1, B*T, ...]."""
        return x if self.order is None else x.flatten(0, 1).index_select(0, self.order)[None]

    def unpack(self, x: Tensor, batch: int) -> Tensor:
        """The inverse: -> [B, T, ...]."""
        return x if self.place is None else x[0].index_select(0, self.place).unflatten(0, (batch, -1))


def rows_of(ctx: Ctx, state: State | None) -> Rows:
    """Of a forward: packed documents as they are; padding moved behind the valid tokens. No value is read by the host, but
    on a CPU, where looking is free, a mask that masks nothing is passed over."""
    if ctx.cu_seqlens is not None:  # invalid tokens stand in segments of their own
        return Rows(ctx.cu_seqlens)
    valid = ctx.valid
    if valid is None or (host_may_look(ctx) and bool(valid.all())):
        return Rows()
    if state is not None and valid.shape[1] == 1:
        return Rows(index=valid.long() - 1)
    counts = valid.sum(dim=1)
    cu_seqlens = F.pad(counts.cumsum(0), (1, 0)).int()
    flat = valid.flatten()
    before = flat.long().cumsum(0)  # valid tokens up to and with this one
    token = torch.arange(len(flat), device=flat.device)
    place = torch.where(flat, before - 1, before[-1] + token - before)
    return Rows(cu_seqlens, torch.empty_like(place).scatter_(0, place, token), place)


def host_may_look(ctx: Ctx) -> bool:
    """Reading a tensor's values waits for nothing on a CPU; a compiled graph must not depend on them."""
    return ctx.positions.device.type == "cpu" and not torch.compiler.is_compiling()


def ring_positions(last: Tensor, size: int) -> Tensor:
    """last [B, 1], the newest position written -> the position in each slot of a ring, negative where empty: [B, size]."""
    slot = torch.arange(size, device=last.device)
    return last - (last - slot) % size


class ShortConv(nn.Module):
    """A causal depthwise convolution over the last W tokens, by default followed by SiLU, of all channels of q|k|v at once
    (arXiv:2405.21060, fig. 6)."""

    def __init__(self, channels: int, size: int, bias: bool, activation: str | None = "silu") -> None:
        super().__init__()
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(channels, size))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def forward(
        self,
        x: Tensor,
        *,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, T, C] -> (y [B, T, C], state): a state is [B or S, W-1, C], the inputs before the next token."""
        return causal_conv1d(
            x,
            self.weight,
            self.bias,
            activation=self.activation,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
        )

    def step(
        self, x: Tensor, state: Tensor, *, index: Tensor | None = None, donate: bool = False
    ) -> tuple[Tensor, Tensor]:
        """x [B, N, C], one token per slot, state [B, E, W-1, C], index as in `Rule.step` -> (y [B, N, C], state)."""
        donate = donate and not torch.is_grad_enabled()
        return causal_conv1d_step(
            x, self.weight, self.bias, state, activation=self.activation, index=index, donate=donate
        )

    def over(self, x: Tensor, rows: Rows, state: Tensor | None, donate: bool) -> tuple[Tensor, Tensor | None]:
        """Of whatever a forward brings, on the tokens as they stand: x [B, T, C] -> (y [B, T, C], state [B, W-1, C] or None)."""
        if state is not None and x.shape[1] == 1:
            y, state = self.step(x, state[:, None], index=rows.index, donate=donate)
            return y, state[:, 0]
        y, state = self(
            rows.pack(x), initial_state=state, output_final_state=state is not None, cu_seqlens=rows.cu_seqlens
        )
        return rows.unpack(y, len(x)), state

    def init_state(
        self, batch: int, device: torch.device | str, dtype: torch.dtype, memories: int | None = None
    ) -> Tensor:
        """Zeros [B, W-1, C], or [B, E, W-1, C]."""
        channels, size = self.weight.shape
        lead = (batch,) if memories is None else (batch, memories)
        return torch.zeros(*lead, size - 1, channels, device=device, dtype=dtype)

    def reset_parameters(self, generator: torch.Generator) -> None:
        """U(-1/sqrt(W), 1/sqrt(W)), the bias too."""
        bound = self.weight.shape[1] ** -0.5
        for p in self.parameters():
            uniform_(p, -bound, bound, generator)

    def meta(self) -> dict[str, ParamMeta]:
        """Filters, one per channel, are not a matrix for Muon."""
        filters = {"weight": ParamMeta(role="vector", optimizer="adamw")}
        bias = {"bias": ParamMeta(role="vector", decay=False, optimizer="adamw")}
        return filters if self.bias is None else filters | bias

    def flops(self) -> float:
        """Per token."""
        return 2 * self.weight.numel()


class Readout(nn.Module):
    """What a memory said [.., HV, V] -> what the output projection reads [.., HV V]: norm and gate.

    ``norm``: "head", RMSNorm of each head with one weight [V], then times silu(gate); "group", as Mamba-2 does it, times
    silu(gate) first, then RMSNorm of each of ``groups`` equal parts of the whole width, with a weight [HV V]; "none".
    """

    def __init__(self, heads: Heads, norm: str, eps: float, groups: int = 1) -> None:
        super().__init__()
        self.heads, self.norm, self.eps, self.groups = heads, norm, eps, groups
        widths = {"head": heads.value, "group": heads.value_heads * heads.value}
        self.weight = nn.Parameter(torch.empty(widths[norm])) if norm != "none" else None

    def forward(self, o: Tensor, gate: Tensor | None) -> Tensor:
        """o [..., HV, V], gate [..., HV V] or None -> [..., HV V]."""
        if self.weight is None:
            o = o.flatten(-2)
            return o if gate is None else o * F.silu(gate)
        if self.norm == "head":
            gate = None if gate is None else gate.unflatten(-1, o.shape[-2:])
            return gated_rms_norm(o, self.weight, gate, self.eps).flatten(-2)
        shape = (self.groups, -1)
        o, gate = o.flatten(-2).unflatten(-1, shape), None if gate is None else gate.unflatten(-1, shape)
        if self.groups == 1:
            return gated_rms_norm(o, self.weight, gate, self.eps, norm_before_gate=False).flatten(-2)
        plain = torch.ones_like(self.weight[: o.shape[-1]])  # the op has one weight for all groups
        o = gated_rms_norm(o, plain, gate, self.eps, norm_before_gate=False)
        return o.flatten(-2) * self.weight.to(o.dtype)

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def meta(self) -> dict[str, ParamMeta]:
        return {} if self.weight is None else {"weight": ParamMeta(role="vector", decay=False, optimizer="adamw")}
