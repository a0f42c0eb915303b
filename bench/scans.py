"""The scans of linear-time mixers: inputs, our op, the token-by-token definition, and the peer that flash-linear-attention has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.floors import Floor, gated_delta_floor, gla_floor, scalar_decay_floor, selective_floor
from bench.kernels import Case
from kernels.causal_conv1d import causal_conv1d
from kernels.decay_linear_attention import decay_linear_attention
from kernels.decay_linear_attention import reference as decay_reference
from kernels.gated_delta_rule import gated_delta_rule
from kernels.gated_delta_rule import reference as delta_reference
from kernels.gated_rms_norm import gated_rms_norm
from kernels.gated_rms_norm import reference as gated_norm_reference
from kernels.gla import gla
from kernels.gla import reference as gla_reference
from kernels.selective_scan import selective_scan

RECURRENT_PAIRS = 3  # the definition takes seconds, and its ratio is far from 1
STATE = 16  # numbers of a channel's state in Mamba


@dataclass(frozen=True)
class Shape:
    batch: int
    length: int
    heads: int
    width: int  # K and V

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}x{self.heads}, K=V={self.width}"

    @property
    def units(self) -> int:
        """Tokens times heads: what nanoseconds are divided by."""
        return self.batch * self.length * self.heads


@dataclass(frozen=True)
class Scan:
    """Functions of (q, k, v, g[, beta]), all [B, T, H, .] -> o [B, T, H, V]."""

    op: str
    gates: Callable[[Shape, torch.device], tuple[Tensor, ...]]
    ours: Callable[..., Tensor]
    recurrent: Callable[..., Tensor]
    peer: tuple[str, str] | None  # module and name in fla
    floor: Callable[[int, int, int], tuple[Floor, Floor]]  # (K, V, rows of a chunk) -> forward, backward
    widths: tuple[int, ...] = (64, 128, 256)  # of heads, to be measured on an accelerator

    def title(self, shape: Shape) -> str:
        return str(shape)

    def inputs(self, shape: Shape, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
        """Leaves; gates in fp32."""
        where = torch.device(device)
        size = (shape.batch, shape.length, shape.heads, shape.width)
        qkv = [torch.randn(size, device=where, dtype=dtype) for _ in range(3)]
        return tuple(x.requires_grad_() for x in (*qkv, *self.gates(shape, where)))


class Selective(Scan):
    """Functions of (C, B [B, T, 1, N], u [B, T, H, V], delta, A [H V, N], D): a head is no more than V channels."""

    def title(self, shape: Shape) -> str:
        return f"{shape.batch}x{shape.length}x{shape.heads * shape.width}, N={STATE}"

    def inputs(self, shape: Shape, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
        rows, channels = (shape.batch, shape.length), (shape.heads, shape.width)
        sizes = ((*rows, 1, STATE), (*rows, 1, STATE), (*rows, *channels))
        found = [torch.randn(size, device=device, dtype=dtype) for size in sizes]
        return tuple(x.requires_grad_() for x in (*found, *self.gates(shape, torch.device(device))))


def _steps_and_rates(shape: Shape, device: torch.device) -> tuple[Tensor, ...]:
    """As at initialisation: step sizes of 1e-3 to 1e-1, rates 1 to N, a skip of 1."""
    steps = torch.exp(
        -4.6 + 2.3 * torch.randn(shape.batch, shape.length, shape.heads, shape.width, device=device).tanh()
    )
    channels = shape.heads * shape.width
    rates = -torch.arange(1.0, STATE + 1, device=device).repeat(channels, 1)
    return steps, rates, torch.ones(channels, device=device)


def _selective(c: Tensor, b: Tensor, u: Tensor, delta: Tensor, rates: Tensor, skip: Tensor) -> Tensor:
    y, _ = selective_scan(u.flatten(2), delta.flatten(2), rates, b.squeeze(2), c.squeeze(2), skip)
    return y.view_as(u)


def _selective_by_tokens(c: Tensor, b: Tensor, u: Tensor, delta: Tensor, rates: Tensor, skip: Tensor) -> Tensor:
    """Every token of all sequences in plain PyTorch, as one would write it down."""
    flat, steps, outs = u.flatten(2), delta.flatten(2), []
    state = steps.new_zeros(len(u), *rates.shape)
    for t in range(u.shape[1]):
        decay = torch.exp(steps[:, t, :, None] * rates)
        state = decay * state + (steps[:, t] * flat[:, t])[:, :, None] * b[:, t]
        outs.append((state @ c[:, t].mT).squeeze(2) + skip * flat[:, t])
    return torch.stack(outs, 1).view(u.shape)


def _log_decay(shape: Shape, device: torch.device, *more: int) -> Tensor:
    logits = torch.randn(shape.batch, shape.length, shape.heads, *more, device=device)
    return F.logsigmoid(logits + 3)


SCANS = (
    Scan(
        "gated_delta_rule",
        lambda s, d: (_log_decay(s, d), torch.randn(s.batch, s.length, s.heads, device=d).sigmoid()),
        lambda q, k, v, g, beta: gated_delta_rule(q, k, v, g, beta, qk_l2norm=True)[0],
        lambda q, k, v, g, beta: delta_reference.recurrent(q, k, v, g, beta, k.shape[-1] ** -0.5, None, None, True)[0],
        ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
        gated_delta_floor,
    ),
    Scan(
        "decay_linear_attention",
        lambda s, d: (_log_decay(s, d),),
        lambda q, k, v, g: decay_linear_attention(q, k, v, g)[0],
        lambda q, k, v, g: decay_reference.recurrent(q, k, v, g, k.shape[-1] ** -0.5, None, None)[0],
        ("fla.ops.simple_gla", "chunk_simple_gla"),
        scalar_decay_floor,
    ),
    Scan(
        "gla",
        lambda s, d: (_log_decay(s, d, s.width),),
        lambda q, k, v, g: gla(q, k, v, g)[0],
        lambda q, k, v, g: gla_reference.recurrent(q, k, v, g, k.shape[-1] ** -0.5, None, None)[0],
        ("fla.ops.gla", "chunk_gla"),
        gla_floor,
    ),
    Selective("selective_scan", _steps_and_rates, _selective, _selective_by_tokens, None, selective_floor, (64,)),
)


def cases(device: str, tiny: bool = False) -> list[Case]:
    """The fast form of every scan against its definition at T = 2048, and what stands around a scan against plain PyTorch."""
    shape = Shape(1, 128 if tiny else 2048, 2 if tiny else 4, 16 if tiny else 64)
    found = [
        Case(
            scan.op,
            scan.title(shape),
            scan.ours,
            scan.recurrent,
            scan.inputs(shape, torch.float32, device),
            peer_name="token by token",
            most_pairs=RECURRENT_PAIRS,
        )
        for scan in SCANS
    ]
    rows, channels = (256, 48) if tiny else (2048, 768)

    def leaf(*size: int) -> Tensor:
        return torch.randn(*size, device=device).requires_grad_()

    found.append(
        Case(
            "causal_conv1d + silu",
            f"2x{rows}x{channels}, W=4",
            lambda x, w: causal_conv1d(x, w, activation="silu")[0],
            plain_conv,
            (leaf(2, rows, channels), leaf(channels, 4)),
        )
    )
    found.append(
        Case(
            "gated_rms_norm",
            f"2x{rows}x{channels // 48}x48",
            lambda x, w, gate: gated_rms_norm(x, w, gate),
            lambda x, w, gate: gated_norm_reference.whole(x, w, gate, 1e-5, True, True),
            (leaf(2, rows, channels // 48, 48), leaf(48), leaf(2, rows, channels // 48, 48)),
        )
    )
    return found


def plain_conv(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, T, C], weight [C, W]: what one would write without this op."""
    padded = F.pad(x.mT, (weight.shape[1] - 1, 0))
    return F.silu(F.conv1d(padded, weight[:, None], groups=len(weight))).mT


def fla_form(scan: Scan) -> Callable[..., Tensor] | None:
    """The peer's function with the arguments of ours; None where fla is not installed, or has none."""
    import importlib

    if scan.peer is None:
        return None
    module, name = scan.peer
    try:
        function: Any = getattr(importlib.import_module(module), name)
    except Exception:  # it probes devices and compilers while it is imported
        return None
    if scan.op == "gated_delta_rule":
        return lambda q, k, v, g, beta: function(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)[0]
    return lambda q, k, v, g: function(q, k, v, g=g)[0]
