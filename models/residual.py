"""Residual branches: how a part reads from M parallel residual streams and writes back to them.

Manifold-constrained hyper-connections (arXiv:2512.24880): with x = RMSNorm(vec X),
pre = sigmoid(a1 x P1 + b1) [M], post = 2 sigmoid(a2 x P2 + b2) [M], mix = Sinkhorn(exp(a3 x P3 + b3)) [M, M] doubly
stochastic, and X <- mix X + post^T part(pre X).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.types import ParamMeta, count_params, normal_

SINKHORN_STEPS = 20
GATE_INIT = 0.01  # a1, a2, a3: the maps start almost independent of the token


class Branches(nn.Module):
    """The read, mix and write maps of one part."""

    def __init__(self, branches: int, d_model: int, eps: float, init_std: float) -> None:
        super().__init__()
        self.branches, self.width, self.eps, self.init_std = branches, branches * d_model, eps, init_std
        self.map = nn.Linear(self.width, 2 * branches + branches * branches, bias=True)
        self.gates = nn.Parameter(torch.empty(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, M, D] -> (what the part reads [B, T, D], post [B, T, M], mix [B, T, M, M]); maps in at least fp32."""
        M = self.branches
        flat = F.rms_norm(rearrange(x, "b t m d -> b t (m d)"), (self.width,), eps=self.eps)
        raw = F.linear(flat, self.map.weight)
        wide = torch.float64 if raw.dtype == torch.float64 else torch.float32
        a = torch.cat([g.expand(n) for g, n in zip(self.gates.to(wide).unbind(), (M, M, M * M), strict=True)])
        pre, post, mix = (raw.to(wide) * a + self.map.bias.to(wide)).split((M, M, M * M), dim=-1)
        mix = sinkhorn(mix.unflatten(-1, (M, M)))
        read = torch.einsum("btm,btmd->btd", pre.sigmoid().to(x.dtype), x)
        return read, 2 * post.sigmoid(), mix

    def write(self, x: Tensor, y: Tensor, post: Tensor, mix: Tensor) -> Tensor:
        """x [B, T, M, D], y [B, T, D] -> the new branches [B, T, M, D]."""
        return torch.einsum("btij,btjd->btid", mix.to(x.dtype), x) + post.to(x.dtype)[..., None] * y[..., None, :]

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Starts as: read the mean of the branches, write to all of them alike, hardly mix."""
        M = self.branches
        normal_(self.map.weight, self.init_std, generator)
        with torch.no_grad():
            self.gates.fill_(GATE_INIT)
            self.map.bias[:M] = -math.log(M - 1) if M > 1 else 10.0
            self.map.bias[M : 2 * M] = 0.0
            self.map.bias[2 * M :] = (8.0 * (torch.eye(M, device=self.map.bias.device) - 1)).flatten()

    def meta(self) -> dict[str, ParamMeta]:
        plain = ParamMeta(role="vector", decay=False, optimizer="adamw")
        return {"map.weight": ParamMeta(optimizer="adamw"), "map.bias": plain, "gates": plain}

    def params(self) -> int:
        return count_params(self)

    def flops_per_token(self) -> float:
        M, D = self.branches, self.width // self.branches
        return 2 * self.map.weight.numel() + 2 * M * D + 2 * M * M * D + 2 * M * D


def sinkhorn(logits: Tensor) -> Tensor:
    """[..., M, M] -> a doubly stochastic matrix: rows and columns of exp(logits) normalised in turn."""
    m = logits
    for _ in range(SINKHORN_STEPS):
        m = m - m.logsumexp(-1, keepdim=True)
        m = m - m.logsumexp(-2, keepdim=True)
    return m.exp()
