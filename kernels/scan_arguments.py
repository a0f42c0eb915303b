"""What the scans over time agree on: the checks of their arguments and the shape of their states."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(v: Tensor) -> torch.dtype:
    """Of states and accumulators: fp32, fp64 for fp64 inputs."""
    return torch.promote_types(v.dtype, torch.float32)


def check_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> float:
    """q, k [B, T, H, K], v [B, T, HV, V] -> the scale, K^-1/2 where none is given.

    Raises ValueError for shapes that do not fit, TypeError for a scale that is not a float: a compiler of kernels takes the
    integer 1 for a constant and builds other code.
    """
    if scale is not None and not isinstance(scale, float):
        raise TypeError(f"scale must be a float, not {type(scale).__name__}")
    if q.ndim != 4 or q.shape != k.shape:
        raise ValueError(f"q and k must have one shape [B, T, H, K]: {tuple(q.shape)}, {tuple(k.shape)}")
    b, t, heads, width = q.shape
    if v.ndim != 4 or v.shape[:2] != q.shape[:2] or v.shape[2] % heads:
        raise ValueError(
            f"v must be [B, T, HV, V] with HV a multiple of {heads}: {tuple(v.shape)} beside {tuple(q.shape)}"
        )
    if t == 0:
        raise ValueError("no rows: T must be at least 1")
    if cu_seqlens is not None and (cu_seqlens.ndim != 1 or cu_seqlens.is_floating_point() or len(cu_seqlens) < 2):
        raise ValueError("cu_seqlens must be integers [S + 1]")
    segments = b if cu_seqlens is None else len(cu_seqlens) - 1
    wanted = (segments, v.shape[2], width, v.shape[3])
    if initial_state is not None and initial_state.shape != wanted:
        raise ValueError(f"initial_state must be {wanted}: {tuple(initial_state.shape)}")
    return width**-0.5 if scale is None else scale


def check_like(name: str, x: Tensor | None, shapes: tuple[tuple[int, ...], ...]) -> None:
    """Raise ValueError unless x has one of the shapes."""
    if x is not None and tuple(x.shape) not in shapes:
        raise ValueError(f"{name} must be {' or '.join(map(str, shapes))}: {tuple(x.shape)}")
