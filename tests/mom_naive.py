"""A mixture of memories by the book: one loop over tokens, one over the memories of a token, one over heads.

Written from the equations (arXiv:2502.13685 and the papers of the rules), apart from the code under test: it reads the weights of a
`models.mixers.mom.MoM` and nothing else of it. fp64, differentiable, no batch: one sequence at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.mixers.mom import MoM


@dataclass
class Memory:
    """What one memory of one sequence holds."""

    inputs: list[Tensor] = field(default_factory=list)  # of the convolution, [C] each, all tokens so far
    matrices: list[Tensor] = field(default_factory=list)  # [K, V'] per value head


class NaiveMoM:
    def __init__(self, part: MoM) -> None:
        self.w = dict(part.named_parameters())
        self.cfg, self.rule, self.eps = part.cfg, part.cfg.rule, part.site.norm_eps
        h = part.heads
        self.H, self.HV, self.K, self.V = h.heads, h.value_heads, h.key, h.value
        self.M = self.cfg.memories + self.cfg.shared

    def new_state(self) -> list[Memory]:
        wide = self.V + bool(getattr(self.rule, "normalize", False))
        zeros = torch.zeros(self.K, wide, dtype=torch.float64)
        return [Memory([], [zeros] * self.HV) for _ in range(self.M)]

    def __call__(
        self, x: Tensor, state: list[Memory] | None = None, start: int = 0, choice: Tensor | None = None
    ) -> Tensor:
        """x [T, D], the residual stream of one sequence from position ``start`` on -> [T, D]; ``state`` is updated.
        ``choice`` [T, k] replaces the router's."""
        state = self.new_state() if state is None else state
        chosen = [None] * len(x) if choice is None else choice.tolist()
        return torch.stack([self.token(x[t], state, start + t, chosen[t]) for t in range(len(x))])

    def token(self, x: Tensor, state: list[Memory], position: int, choice: list[int] | None) -> Tensor:
        h = x / (x.square().mean() + self.eps).sqrt() * self.w["norm.weight"]
        q = self.w["project.weight"][: self.H * self.K] @ h
        gate = self.w["project.weight"][self.H * self.K :] @ h
        p = (self.w["router.weight"] @ h).softmax(0)
        best = (
            sorted(range(len(p)), key=lambda m: -float(p[m].detach()))[: self.cfg.top_k] if choice is None else choice
        )
        total = p[best].sum() if self.cfg.router_norm == "topk" else 1.0
        visits = [(m, p[m] / total) for m in best] + ([(self.M - 1, torch.tensor(1.0))] if self.cfg.shared else [])
        said = torch.zeros((), dtype=torch.float64)
        for m, weight in visits:
            own = self.w["kv"][0 if self.cfg.shared_kv else m] @ h
            said = said + weight * self.visit(state[m], q, own, position)
        return self.w["out.weight"] @ self.read_out(said, gate)

    def visit(self, memory: Memory, q: Tensor, own: Tensor, position: int) -> Tensor:
        """One token in one memory -> [HV, V]."""
        kv = self.H * self.K + self.HV * self.V
        qkv, logits = torch.cat((q, own[:kv])), own[kv:]
        if self.rule.conv:
            memory.inputs.append(qkv)
            filters = self.w["conv.weight"]
            window = memory.inputs[-self.rule.conv :]
            y = self.w["conv.bias"] if self.rule.conv_bias else torch.zeros_like(qkv)
            for i, z in enumerate(window):
                y = y + filters[:, self.rule.conv - len(window) + i] * z
            qkv = y / (1 + (-y).exp())
        q, k, v = qkv.split((self.H * self.K, self.H * self.K, self.HV * self.V))
        said = []
        for j in range(self.HV):
            head = j // (self.HV // self.H)
            columns = slice(head * self.K, (head + 1) * self.K)
            vj = v[j * self.V : (j + 1) * self.V]
            o, memory.matrices[j] = self.write(memory.matrices[j], q[columns], k[columns], vj, logits, j, position)
            said.append(o)
        return torch.stack(said)

    def write(
        self, S: Tensor, q: Tensor, k: Tensor, v: Tensor, logits: Tensor, j: int, position: int
    ) -> tuple[Tensor, Tensor]:
        """The rule of value head j, one token: S [K, V'] -> (what it says [V], the new S)."""
        kind, head = self.rule.kind, j // (self.HV // self.H)
        if kind == "linear_attention":
            q, k = self.feature(q), self.feature(k)
            if self.rule.normalize:
                S = S + torch.outer(k, torch.cat((v, v.new_ones(1))))
                o = S.T @ q / math.sqrt(self.K)
                return o[:-1] / o[-1].clamp(min=1e-6), S
            S = S + torch.outer(k, v)
        elif kind == "retnet":
            q, k = self.rotated(q, position), self.rotated(k, position)
            S = (1 - 2.0 ** (-5 - j)) * S + torch.outer(k, v)
        elif kind == "gla":
            rows = slice(head * self.K, (head + 1) * self.K)
            a = self.w["rule.up.weight"][rows] @ logits + self.w["rule.up.bias"][rows]
            S = (a.sigmoid() ** (1 / self.rule.temperature))[:, None] * S + torch.outer(k, v)
        elif kind == "mamba2":
            dt = (logits[j] + self.w["rule.dt_bias"][j]).exp().log1p()
            S = (-self.w["rule.A_log"][j].exp() * dt).exp() * S + torch.outer(k, dt * v)
            return S.T @ q + self.w["rule.D"][j] * v, S
        else:
            q, k = (z / (z.square().sum() + 1e-6).sqrt() for z in (q, k))
            beta = logits[j].sigmoid() * (2 if self.rule.allow_neg_eigval else 1)
            if kind == "gated_delta":
                dt = (logits[self.HV + j] + self.w["rule.dt_bias"][j]).exp().log1p()
                S = (-self.w["rule.A_log"][j].exp() * dt).exp() * S
            S = S + torch.outer(k, beta * (v - S.T @ k))
        return S.T @ q / math.sqrt(self.K), S

    def feature(self, z: Tensor) -> Tensor:
        maps = {"elu": lambda z: torch.where(z > 0, z + 1, z.exp()), "relu": lambda z: z.clamp(min=0)}
        return maps[self.rule.feature_map](z) if self.rule.feature_map in maps else z

    def rotated(self, z: Tensor, position: int) -> Tensor:
        """Pairs (i, i + K/2) turned by position * theta^(-2i/K), angles in fp32 as in the rest of the house."""
        if self.rule.rope_theta is None:
            return z
        half = self.K // 2
        exponent = torch.arange(0, self.K, 2, dtype=torch.float32) / self.K
        angle = torch.tensor(float(position)) * self.rule.rope_theta**-exponent
        cos, sin = angle.cos().double(), angle.sin().double()
        return torch.cat((z[:half] * cos - z[half:] * sin, z[half:] * cos + z[:half] * sin))

    def read_out(self, o: Tensor, gate: Tensor) -> Tensor:
        """o [HV, V], the weighted sum over memories -> [HV V]: norm and output gate."""
        opened = gate * gate.sigmoid() if self.rule.gate else torch.ones(self.HV * self.V, dtype=torch.float64)
        if not self.rule.output_norm:
            return o.flatten() * opened
        if self.rule.kind == "mamba2":  # gate, then norm over each group
            z = (o.flatten() * opened).view(self.H, -1)
            return (z / (z.square().mean(1, keepdim=True) + self.eps).sqrt()).flatten() * self.w["readout.weight"]
        normed = o / (o.square().mean(1, keepdim=True) + self.eps).sqrt() * self.w["readout.weight"]
        return normed.flatten() * opened


def matrices(state: list[Memory]) -> Tensor:
    """[M, HV, K, V']."""
    return torch.stack([torch.stack(memory.matrices) for memory in state])


def last_inputs(state: list[Memory], size: int, channels: int) -> Tensor:
    """[M, W-1, C], zeros where nothing was before."""
    blank = [torch.zeros(channels, dtype=torch.float64)] * (size - 1)
    return torch.stack([torch.stack((blank + memory.inputs)[-(size - 1) :]) for memory in state])
