"""Cross-entropy of a linear head without the logits of a whole batch: ``-log softmax(h W^T)[target]``."""

from __future__ import annotations

from torch import Tensor

from kernels import dispatch
from kernels.cross_entropy import reference


def linear_cross_entropy(h: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """h [N, K], weight [V, K], targets int64 [N], mask bool [N] -> the sum over unmasked rows, a scalar in at least fp32.

    Gradients flow to h and weight. Runs in the autocast dtype where autocast is on; the softmax is always in at least fp32.
    """
    dispatch.choose("linear_cross_entropy", h.device, None)
    return reference.chunked(h, weight, targets, mask)


def token_nll(h: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """h [N, K], weight [V, K], targets int64 [N] -> (-log p(target) [N], is the target the most likely token [N]); no gradient."""
    return reference.per_token(h, weight, targets)
