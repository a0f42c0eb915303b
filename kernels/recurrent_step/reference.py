"""The step in plain PyTorch, differentiable; in place where nobody needs what was there."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.memory_slots import put, take

NORM_EPS = 1e-6


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float,
    index: Tensor | None,
    qk_l2norm: bool,
    donate: bool,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as of the public function. Inside, memories are [B, S, H, G, K, V] with the G value heads of a head."""
    wide = torch.promote_types(v.dtype, torch.float32)
    heads = k.shape[2]
    memory = (state if index is None else take(state, index)).to(wide)
    free = not torch.is_grad_enabled() and (donate or memory is not state)
    memory = memory.unflatten(2, (heads, -1))
    q, k = (_unit(x.to(wide)) if qk_l2norm else x.to(wide) for x in (q, k))
    q, k = q[:, :, :, None, None] * scale, k[:, :, :, None, None]
    u = v.to(wide).unflatten(2, (heads, -1))[..., None, :]
    if g is not None:
        decay = g.to(wide).exp()
        decay = decay.unflatten(2, (heads, -1))[..., None, None] if g.ndim == 3 else decay[:, :, :, None, :, None]
        memory = memory.mul_(decay) if free else memory * decay
        free = not torch.is_grad_enabled()
    if beta is not None:
        u = beta.to(wide).unflatten(2, (heads, -1))[..., None, None] * (u - k @ memory)
    memory = memory.addcmul_(k.mT, u) if free else torch.addcmul(memory, k.mT, u)
    o = (q @ memory).squeeze(-2).flatten(2, 3).to(v.dtype)
    memory = memory.flatten(2, 3).to(state.dtype)
    if index is not None:
        return torch.where((index >= 0)[..., None, None], o, 0), put(state, index, memory, donate)
    if donate:
        return o, state if memory.data_ptr() == state.data_ptr() else state.copy_(memory)
    return o, memory


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS)
