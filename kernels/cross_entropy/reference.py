"""Plain forms of the linear cross-entropy. ``whole`` is the definition, ``chunked`` is what runs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_LOGITS = 1 << 21  # logits held at once: 8 MiB in fp32, about what a core's cache can use


def whole(h: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """The definition: logits of every row, log-softmax, sum of -log p(target) over the unmasked rows."""
    nll = F.cross_entropy(_wide(h @ weight.T), targets, reduction="none")
    return (nll if mask is None else torch.where(mask, nll, 0.0)).sum()


def chunked(h: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Equal to ``whole``, one block of rows at a time. The gradient is linear in the incoming scalar, so it is made in the
    forward while a block's logits are at hand, and only scaled in the backward: logits are computed once and never kept."""
    kind = h.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        h, weight = h.to(dtype), weight.to(dtype)
    return _Chunked.apply(h, weight, targets, mask)  # pyright: ignore[reportReturnType]


@torch.no_grad()
def per_token(h: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """-log p(target) [N] and whether the target is the argmax [N], in blocks of rows."""
    nll, greedy = [], []
    rows = _rows(weight)
    for start in range(0, len(h), rows):
        part = slice(start, start + rows)
        logits = _wide(h[part] @ weight.T)
        nll.append(F.cross_entropy(logits, targets[part], reduction="none"))
        greedy.append(logits.argmax(-1) == targets[part])
    if not nll:
        return h.new_zeros(0, dtype=torch.float32), h.new_zeros(0, dtype=torch.bool)
    return torch.cat(nll), torch.cat(greedy)


def _rows(weight: Tensor) -> int:
    return max(16, CHUNK_LOGITS // weight.shape[0])


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
        want = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        wide = torch.float64 if h.dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=wide, device=h.device)
        grad_h = torch.empty_like(h) if want else None
        grad_w = torch.zeros_like(weight, dtype=wide) if want else None
        rows = _rows(weight)
        with torch.autocast(h.device.type, enabled=False):
            for start in range(0, h.shape[0], rows):
                part = slice(start, start + rows)
                log_p = _wide(h[part] @ weight.T).log_softmax(-1)
                target = targets[part, None]
                keep = None if mask is None else mask[part, None].to(wide)
                nll = log_p.gather(1, target)
                total = total - (nll if keep is None else nll * keep).sum()
                if grad_h is not None and grad_w is not None:
                    d = log_p.exp_()
                    d.scatter_add_(1, target, torch.full_like(target, -1, dtype=wide))
                    d = (d if keep is None else d.mul_(keep)).to(h.dtype)
                    torch.mm(d, weight, out=grad_h[part])
                    grad_w = grad_w.addmm_(d.T, h[part]) if d.dtype == wide else grad_w.add_(d.T @ h[part])
        if want:
            ctx.save_for_backward(grad_h, grad_w)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_h, grad_w = ctx.saved_tensors
        scale = grad.to(grad_w.dtype)
        return grad_h * scale.to(grad_h.dtype), (grad_w * scale).to(grad_h.dtype), None, None
