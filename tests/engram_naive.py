"""Engram by the book: one document, one token after another, one row of the table at a time.

Written from the equations (arXiv:2601.07372, sections 2.2 to 2.4), apart from the code under test: it reads the weights of a
`models.memories.engram.Engram` and the numbers of its addressing, and nothing else of them. fp64, differentiable.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from models.memories.engram import Engram
from models.memories.engram_addressing import EngramAddressing


class NaiveEngram:
    """``table`` [R, row_width] stands in for the rows of the part's store."""

    def __init__(self, part: Engram, addressing: EngramAddressing, table: Tensor) -> None:
        self.w, self.cfg, self.table = dict(part.named_parameters()), part.cfg, table
        layer = addressing.keys.index(part.key)
        self.canonical = addressing.canonical.tolist()
        self.multipliers = addressing.multipliers[layer].tolist()
        self.primes = addressing.primes[layer].tolist()
        self.pad = self.canonical[part.cfg.pad]

    def __call__(self, x: Tensor, tokens: list[int]) -> tuple[Tensor, Tensor]:
        """x [T, M, D], the residual streams of a whole document -> (what is added to them, the gates [T, M])."""
        T, M, D = x.shape
        added, gates = [], []
        gated: list[list[Tensor]] = []  # of the tokens so far, by branch
        for t in range(T):
            e = torch.cat([self.table[row] for row in self.rows(tokens[: t + 1])])
            value = self.w["project.weight"][M * D :] @ e
            gated.append([])
            for m in range(M):
                key = self.w["project.weight"][m * D : (m + 1) * D] @ e
                alpha = self.gate(x[t, m], key, m)
                gated[-1].append(alpha * value)
                added.append(gated[-1][m] + self.convolved(gated, m))
                gates.append(alpha)
        return torch.stack(added).view(T, M, D), torch.stack(gates).view(T, M)

    def rows(self, tokens: list[int]) -> list[int]:
        """Of the last of these tokens, in the table of the layer."""
        back = [self.canonical[token] for token in reversed(tokens)]
        found, start = [], 0
        for order, heads in zip(self.cfg.orders, self.primes, strict=True):
            mix = 0
            for i in range(order):
                mix ^= (back[i] if i < len(back) else self.pad) * self.multipliers[i]
            for prime in heads:
                found.append(start + mix % prime)
                start += prime
        return found

    def gate(self, h: Tensor, key: Tensor, m: int) -> Tensor:
        query, key = (self.normed(x) * self.w[f"{name}_gain"][m] for name, x in (("query", h), ("key", key)))
        score = query @ key / math.sqrt(len(h))
        if self.cfg.gate == "signed_sqrt":
            score = torch.copysign(score.abs().clamp(min=1e-6).sqrt(), score)
        return 1 / (1 + (-score).exp())

    def convolved(self, gated: list[list[Tensor]], m: int) -> Tensor:
        """The filter over the normalised gated values of branch m, up to the last token."""
        z = torch.zeros_like(gated[-1][m])
        for tap in range(self.cfg.conv):
            t = len(gated) - 1 - tap * (self.cfg.dilation or self.cfg.orders[-1])
            if t >= 0:
                z = (
                    z
                    + self.w["conv"][m, :, self.cfg.conv - 1 - tap] * self.normed(gated[t][m]) * self.w["conv_gain"][m]
                )
        return z / (1 + (-z).exp())

    def normed(self, x: Tensor) -> Tensor:
        return x / (x.square().mean() + self.cfg.eps).sqrt()
