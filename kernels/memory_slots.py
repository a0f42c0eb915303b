"""Which of E memories a slot uses: S slots per row of a batch, each naming one memory or none."""

from __future__ import annotations

import torch
from torch import Tensor


def check_slots(x: Tensor, state: Tensor, index: Tensor | None) -> None:
    """Raise ValueError unless x [B, S, ...], state [B, E, ...] and index [B, S] fit."""
    if state.shape[0] != x.shape[0] or (index is None and state.shape[1] != x.shape[1]):
        raise ValueError(f"states {tuple(state.shape[:2])} for slots {tuple(x.shape[:2])}")
    if index is not None and (index.shape != x.shape[:2] or index.is_floating_point()):
        raise ValueError(f"index must be integers {tuple(x.shape[:2])}: {index.dtype} {tuple(index.shape)}")


def take(state: Tensor, index: Tensor) -> Tensor:
    """state [B, E, ...], index [B, S] in [-1, E) -> [B, S, ...]; anything for -1."""
    rows = torch.arange(len(index), device=index.device)[:, None]
    return state[rows, index.clamp(min=0)]


def put(state: Tensor, index: Tensor, new: Tensor, donate: bool) -> Tensor:
    """The reverse: state with new [B, S, ...] in the places of ``index``; nothing for -1. ``donate``: written where it stands."""
    if state.device.type == "cpu" and not torch.compiler.is_compiling():
        b, s = (index >= 0).nonzero(as_tuple=True)
        place, values = (b, index[b, s]), new[b, s]
        return state.index_put_(place, values) if donate else state.index_put(place, values)
    # Without a look at how many there are: every state asks which slot is for it.
    asked = index[:, :, None] == torch.arange(state.shape[1], device=index.device)
    found = take(new, asked.int().argmax(1))
    hit = asked.any(1).view(*state.shape[:2], *(1,) * (state.ndim - 2))
    result = torch.where(hit, found, state)
    return state.copy_(result) if donate else result
