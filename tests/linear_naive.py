"""The linear-time mixers written out from their papers: loops over tokens and heads, none of our ops."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.mixers.linear import LinearMixer
from models.mixers.mamba import Mamba
from models.mixers.pieces import ShortConv


def by_the_paper(part: LinearMixer | Mamba, h: Tensor) -> Tensor:
    """One sequence h [T, D], normed, in fp64 -> what the mixer adds: [T, D]. Loops over tokens and heads, no ops."""
    if isinstance(part, Mamba):
        return mamba_by_the_paper(part, h)
    heads, kind, cfg = part.heads, part.cfg.kind, part.cfg
    rule: Any = part.rule
    z = h @ part.project.weight.T
    qkv, gate, logits = z.split(part.widths, dim=-1)
    if part.conv is not None:
        qkv = convolved(part.conv, qkv)
    q, k, v = heads.split(qkv)
    o = torch.zeros_like(v)
    for j in range(heads.value_heads):
        i = j // (heads.value_heads // heads.heads)
        S, z_sum = h.new_zeros(heads.key, heads.value), h.new_zeros(heads.key)
        for t in range(len(h)):
            a, b, x = q[t, i], k[t, i], v[t, j]
            if kind == "linear_attention":
                phi = {"elu": lambda u: F.elu(u) + 1, "relu": F.relu, "identity": lambda u: u}[cfg.feature_map]
                S, z_sum = S + torch.outer(phi(b), x), z_sum + phi(b)
                o[t, j] = phi(a) @ S / ((phi(a) @ z_sum) if cfg.normalize else math.sqrt(heads.key))
            elif kind == "retnet":
                if cfg.rope_theta is not None:
                    a, b = (turned(u, t, cfg.rope_theta) for u in (a, b))
                S = (1 - 2.0 ** (-5 - j)) * S + torch.outer(b, x)
                o[t, j] = a @ S / math.sqrt(heads.key)
            elif kind == "gla":
                alpha = torch.sigmoid(rule.up.weight @ logits[t] + rule.up.bias) ** (1 / cfg.temperature)
                S = alpha.view(heads.heads, heads.key)[i][:, None] * S + torch.outer(b, x)
                o[t, j] = a @ S / math.sqrt(heads.key)
            elif kind == "mamba2":
                dt = torch.log1p(torch.exp(logits[t, j] + rule.dt_bias[j]))
                S = torch.exp(-dt * torch.exp(rule.A_log[j])) * S + dt * torch.outer(b, x)
                o[t, j] = a @ S + rule.D[j] * x
            else:
                a, b = (u / torch.sqrt(u.square().sum() + 1e-6) for u in (a, b))
                beta = torch.sigmoid(logits[t, j]) * (2 if cfg.allow_neg_eigval else 1)
                if kind == "gated_delta":
                    dt = torch.log1p(torch.exp(logits[t, heads.value_heads + j] + rule.dt_bias[j]))
                    S = torch.exp(-torch.exp(rule.A_log[j]) * dt) * S
                S = S - beta * torch.outer(b, b @ S) + beta * torch.outer(b, x)
                o[t, j] = a @ S / math.sqrt(heads.key)
    return normed(part, o, gate) @ part.out.weight.T


def mamba_by_the_paper(part: Mamba, h: Tensor) -> Tensor:
    """arXiv:2312.00752, algorithm 2 and figure 3: a loop over tokens and channels."""
    u, gate = (h @ w.T for w in part.project.weight.chunk(2))
    u = convolved(part.conv, u)
    rank, N = part.dt.weight.shape[1], part.cfg.d_state
    low, B, C = (u @ w.T for w in part.select.weight.split((rank, N, N)))
    dt = torch.log1p(torch.exp(low @ part.dt.weight.T + part.dt.bias))
    A, y = -torch.exp(part.ssm.A_log), torch.zeros_like(u)
    for d in range(u.shape[1]):
        x = h.new_zeros(N)
        for t in range(len(h)):
            x = torch.exp(dt[t, d] * A[d]) * x + dt[t, d] * B[t] * u[t, d]
            y[t, d] = C[t] @ x + part.ssm.D[d] * u[t, d]
    return (y * gate * torch.sigmoid(gate)) @ part.out.weight.T


def convolved(conv: ShortConv, x: Tensor) -> Tensor:
    """x [T, C]: each channel's own last W inputs, weighted, then SiLU."""
    W = conv.weight.shape[1]
    before = F.pad(x, (0, 0, W - 1, 0))
    y = torch.stack([before[i : i + len(x)] * conv.weight[:, i] for i in range(W)]).sum(0)
    y = y if conv.bias is None else y + conv.bias
    return y * torch.sigmoid(y)


def turned(x: Tensor, position: int, theta: float) -> Tensor:
    """Rotary position in complex numbers."""
    half = len(x) // 2
    angle = position * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    z = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag))


def normed(part: LinearMixer, o: Tensor, gate: Tensor) -> Tensor:
    """o [T, HV, V], gate [T, HV V or 0] -> [T, HV V]."""
    w, eps = part.readout.weight, part.site.norm_eps
    swish = gate * torch.sigmoid(gate) if part.cfg.gate else torch.ones(())
    if w is None:
        return o.flatten(1) * swish
    if part.cfg.kind != "mamba2":
        o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + eps) * w
        return o.flatten(1) * swish
    o = (o.flatten(1) * swish).unflatten(1, (part.cfg.groups, -1))
    return (o * torch.rsqrt(o.square().mean(-1, keepdim=True) + eps)).flatten(1) * w
