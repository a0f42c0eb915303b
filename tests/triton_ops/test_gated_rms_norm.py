"""`gated_rms_norm` by Triton: value and gradients against the reference in fp64, both orders, strided inputs."""

from __future__ import annotations

import pytest
import torch

from kernels import dispatch
from kernels.gated_rms_norm import gated_rms_norm
from tests.tools import TOLERANCE, rel_err


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", [True, False], ids=["norm first", "gate first"])
@pytest.mark.parametrize("gated", ["silu", "sigmoid", None])
@pytest.mark.parametrize("shape", [(1, 1, 1, 16), (2, 5, 3, 60), (1, 130, 2, 64), (3, 7, 200)], ids=str)
def test_equals_the_reference(
    shape: tuple[int, ...], gated: str | None, order: bool, dtype: torch.dtype, device: torch.device
):
    x = torch.randn(*shape[:-1], 2 * shape[-1], device=device).to(dtype)[..., : shape[-1]]
    gate = torch.randn(shape, device=device).to(dtype)
    weight, dy = torch.rand(shape[-1], device=device) + 0.5, torch.randn(shape, device=device).to(dtype)
    results = []
    for kind, setting in ((dtype, "triton"), (torch.float64, "reference")):
        leaves = [x.to(kind), weight.to(kind if kind == torch.float64 else torch.float32), gate.to(kind)]
        leaves = [t.detach().requires_grad_() for t in (leaves if gated else leaves[:2])]
        with dispatch.use(setting):
            y = gated_rms_norm(
                *leaves[:2], leaves[2] if gated else None, 1e-5, activation=gated or "silu", norm_before_gate=order
            )
            results.append([y, *torch.autograd.grad(y, leaves, dy.to(kind))])
    for i, (got, want) in enumerate(zip(*results, strict=True)):
        limit = 1e-5 if dtype == torch.float32 else TOLERANCE["op" if i == 0 else "op gradient", dtype]
        assert rel_err(got, want) <= limit
    assert dispatch.counts["gated_rms_norm", "triton"] > 0
