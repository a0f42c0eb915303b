"""What all routers of tokens share, to memories or to experts: products in at least fp32, and how even the load is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.types import Aux, Stat


def router_logits(h: Tensor, weight: Tensor) -> Tensor:
    """h [..., D], weight [E, D] -> [..., E] in at least fp32, autocast or not: a choice between two that are close is rounding."""
    with torch.autocast(h.device.type, enabled=False):
        dtype = torch.promote_types(h.dtype, torch.float32)
        return F.linear(h.to(dtype), weight.to(dtype))


def balance(probability: Tensor, counts: Tensor, valid: Tensor | None) -> Aux:
    """probability [B, T, E], counts [E] of choices, valid [B, T] -> loss ``balance`` and stats of one layer and batch.

    E sum_e f_e p_e, f the share of choices and p the mean probability over valid tokens; 1 where choices are balanced, however many
    a token makes (arXiv:2101.03961, eq. 4). Not linear in the batch.
    """
    counts = counts.to(probability.dtype)
    share = counts / counts.sum().clamp(min=1)
    keep = torch.ones_like(probability[..., 0]) if valid is None else valid.to(probability.dtype)
    keep = keep / keep.sum().clamp(min=1)
    loss = len(counts) * (share * (probability * keep[..., None]).sum(dim=(0, 1))).sum()
    with torch.no_grad():
        entropy = (torch.special.entr(probability).sum(dim=-1) * keep).sum()
        stats = {
            "load": Stat(share),
            "max_share": Stat(share.amax(), "max"),
            "dead": Stat((counts == 0).sum().to(probability.dtype)),  # those that no token of the batch went to
            "router_entropy": Stat(entropy),  # nats
        }
    return Aux({"balance": loss}, stats)
