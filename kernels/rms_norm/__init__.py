"""RMSNorm (arXiv:1910.07467, eq. 4): ``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import dispatch
from kernels.rms_norm import reference


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D], weight [D] -> [..., D] in the dtype of x; statistics in at least fp32."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)  # fused by the library, or by the compiler
    dispatch.choose("rms_norm", x.device, None)
    return reference.eager(x, weight, eps)
