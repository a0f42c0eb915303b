"""Depth: how far a layer's residual stream is from the prediction, and to which layers of another model it is alike.

LogitLens: p_l = softmax(head(norm(H_l))) of the stream H_l behind layer l, the mean of its branches where it has some, and
KL(p_last || p_l): what p_l costs in nats where the truth is p_last.

CKA (arXiv:1905.00414) with linear kernels and the unbiased HSIC_1 (arXiv:2010.15327): of n tokens with kernels K and L, diagonals
set to zero,

    HSIC_1 = (tr(K L) + 1'K1 1'L1 / ((n-1)(n-2)) - 2 1'KL1 / (n-2)) / (n(n-3)),

summed over minibatches before CKA = HSIC_1(K, L) / sqrt(HSIC_1(K, K) HSIC_1(L, L)) is formed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from eval.inspection.text import Text, read
from models import LM

MINIBATCH = 256  # tokens of one HSIC_1
LEAST = 4  # below which it is not defined
TOP = 5  # layers that a soft alignment is made of
CHUNK = 1 << 24  # numbers in the logits that are held at once


@torch.no_grad()
def streams(model: LM, text: Text) -> Iterator[list[Tensor]]:
    """Of each forward: the stream behind every layer, [n, D] of its n tokens."""
    behind: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        return lambda _, __, output: behind.update({layer: output[0]})

    with contextlib.ExitStack() as stack:
        for i, block in enumerate(model.layers):
            stack.callback(block.register_forward_hook(keep(i)).remove)
        for _, valid in read(model, text):
            collapsed = [x.mean(2) if x.ndim == 4 else x for _, x in sorted(behind.items())]
            yield [x[valid] for x in collapsed]


@torch.no_grad()
def lens(model: LM, text: Text) -> Tensor:
    """Mean of KL(p_last || p_l) over the tokens, in nats [L]."""
    sums, tokens = torch.zeros(len(model.layers), dtype=torch.float64), 0
    size = max(1, CHUNK // model.cfg.vocab_size)
    for layers in streams(model, text):
        tokens += len(layers[0])
        for parts in zip(*(x.split(size) for x in layers), strict=True):
            last = _log_probabilities(model, parts[-1])
            sums += torch.stack([_divergence(last, _log_probabilities(model, x)) for x in parts]).cpu()
    return sums / tokens


def _log_probabilities(model: LM, x: Tensor) -> Tensor:
    logits: Any = model.logits(model.norm(x))
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """Sum of KL(p || q) over rows of log-probabilities."""
    return (p.exp() * (p - q)).sum().double()


# -- CKA


@torch.no_grad()
def cka(model: LM, other: LM, text: Text) -> Tensor:
    """[L, L'] between the layers of two models that read the same text, over all its tokens. NaN where there are too few."""
    own, theirs = len(model.layers), len(other.layers)
    cross, first, second = torch.zeros(own, theirs), torch.zeros(own), torch.zeros(theirs)
    cross, first, second = (t.double() for t in (cross, first, second))
    for ours, others in zip(streams(model, text), streams(other, text), strict=True):
        for a, b in zip(_minibatches(ours), _minibatches(others), strict=True):
            if a.shape[1] < LEAST:
                continue
            cross += hsic(a, b)
            first += hsic(a, a).diagonal()
            second += hsic(b, b).diagonal()
    return cross / (first[:, None] * second).sqrt()


def _minibatches(layers: list[Tensor]) -> Iterator[Tensor]:
    """Streams [n, D] of all layers -> kernels of all layers [L, m, m]."""
    for parts in zip(*(x.split(MINIBATCH) for x in layers), strict=True):
        x = torch.stack([p.double().cpu() for p in parts])
        yield x @ x.mT


def hsic(a: Tensor, b: Tensor) -> Tensor:
    """Kernels [L, n, n] and [L', n, n] -> HSIC_1 of each with each [L, L']."""
    n = a.shape[1]
    apart = 1 - torch.eye(n, dtype=a.dtype, device=a.device)
    a, b = a * apart, b * apart
    trace = a.flatten(1) @ b.flatten(1).T
    sums = a.sum((1, 2))[:, None] * b.sum((1, 2))
    rows = a.sum(2) @ b.sum(2).T
    return (trace + sums / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows) / (n * (n - 3))


def soft_alignment(similarity: Tensor) -> Tensor:
    """[L, L'] -> of each layer, the mean of the layers of the other model that it is most alike, weighted by likeness [L]."""
    best = similarity.clamp(min=0).topk(min(TOP, similarity.shape[1]), dim=1)
    return (best.values * best.indices).sum(1) / best.values.sum(1)
