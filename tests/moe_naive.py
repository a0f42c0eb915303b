"""A mixture of experts by the book: one loop over tokens, one over the experts of a token.

Written from the equations (arXiv:2401.06066, arXiv:2412.19437, arXiv:2408.15664), apart from the code under test: it reads the
weights of a `models.channels.moe.MoE` and nothing else of it. fp64, differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.channels.moe import MoE


class NaiveMoE:
    def __init__(self, part: MoE) -> None:
        self.w = {**dict(part.named_parameters()), **dict(part.named_buffers())}
        self.cfg, self.eps = part.cfg, part.site.norm_eps

    def __call__(self, x: Tensor) -> tuple[Tensor, list[list[int]]]:
        """x [N, D], the residual stream -> (y [N, D], the experts of each token, the best first)."""
        said = [self.token(row) for row in x]
        return torch.stack([y for y, _ in said]), [chosen for _, chosen in said]

    def balance(self, x: Tensor) -> Tensor:
        """E times the sum over experts of the share of choices that it gets and its mean share of a token's scores."""
        scores = torch.stack([self.scores(self.normed(row)) for row in x])
        mean = (scores / scores.sum(1, keepdim=True)).mean(0)
        said = [e for row in x for e in self.token(row)[1]]
        return sum((len(mean) * said.count(e) / len(said) * mean[e] for e in range(len(mean))), torch.zeros(()))

    def token(self, x: Tensor) -> tuple[Tensor, list[int]]:
        h = self.normed(x)
        s = self.scores(h)
        wanted = [float(v) for v in s.detach() + self.w.get("bias", torch.zeros(()))]
        chosen = sorted(range(len(s)), key=lambda e: (-wanted[e], e))[: self.cfg.top_k]
        total = sum(s[e] for e in chosen) if self.cfg.router_norm == "topk" else 1.0
        y = torch.zeros_like(x)
        for e in chosen:
            y = y + self.cfg.scale * s[e] / total * feed_forward(h, self.w["up"][e], self.w["down"][e])
        if self.cfg.shared:
            y = y + feed_forward(h, self.w["common.up.weight"], self.w["common.down.weight"])
        return y, chosen

    def normed(self, x: Tensor) -> Tensor:
        return x / (x.square().mean() + self.eps).sqrt() * self.w["norm.weight"]

    def scores(self, h: Tensor) -> Tensor:
        logits = self.w["router.weight"] @ h
        if self.cfg.score == "sigmoid":
            return 1 / (1 + (-logits).exp())
        return logits.exp() / logits.exp().sum()


def feed_forward(h: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """h [D], up [2 F, D], down [D, F] -> [D]: a SwiGLU, gate first."""
    gate, value = (up @ h).chunk(2)
    return down @ (gate / (1 + (-gate).exp()) * value)
