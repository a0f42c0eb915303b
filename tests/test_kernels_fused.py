"""The hand-written CPU forms of norm, gate and rotation are their definitions, gradients included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import dispatch
from kernels.rms_norm import reference as norm_reference
from kernels.rms_norm import rms_norm
from kernels.rope import reference as rope_reference
from kernels.rope import split_rotate
from kernels.swiglu import reference as swiglu_reference
from kernels.swiglu import swiglu
from tests.tools import rel_err


def _angles(batch: int, time: int, half: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angle = torch.rand(batch, time, 1, half, dtype=dtype) * 6
    return angle.cos(), angle.sin()


def _cases(dtype: torch.dtype, rows: int) -> dict[str, tuple[Callable[..., Any], Callable[..., Any], list[Tensor]]]:
    cos, sin = _angles(1, rows, 2, dtype)
    return {
        "rms_norm": (
            lambda x, w: norm_reference.eager(x, w, 1e-5),
            lambda x, w: norm_reference.whole(x, w, 1e-5),
            [torch.randn(2, rows, 6, dtype=dtype), torch.rand(6, dtype=dtype) + 0.5],
        ),
        "swiglu": (swiglu_reference.eager, swiglu_reference.whole, [torch.randn(2, rows, 8, dtype=dtype) * 3]),
        "split_rotate": (
            lambda x: rope_reference.eager(x, cos, sin, 3, 1),
            lambda x: rope_reference.whole(x, cos, sin, 3, 1),
            [torch.randn(1, rows, 5, 4, dtype=dtype)],
        ),
    }


OPS = ("rms_norm", "swiglu", "split_rotate")


def _outputs_and_gradients(fn: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = fn(*leaves)
    outs = list(out) if isinstance(out, tuple) else [out]
    seeds = [torch.cos(torch.arange(o.numel(), dtype=o.dtype)).view_as(o) for o in outs]
    return [*outs, *torch.autograd.grad(outs, leaves, seeds)]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("rows", [1, 7])
def test_eager_is_whole(op: str, dtype: torch.dtype, limit: float, rows: int) -> None:
    eager, whole, inputs = _cases(dtype, rows)[op]
    wide = [x.double() for x in inputs]
    exact = _outputs_and_gradients(_cases(torch.float64, rows)[op][1] if op != "split_rotate" else whole, wide)
    for mine, theirs in zip(_outputs_and_gradients(eager, inputs), exact, strict=True):
        assert mine.dtype == dtype
        assert rel_err(mine, theirs) < limit


@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op: str) -> None:
    eager, _, inputs = _cases(torch.float64, 3)[op]
    assert torch.autograd.gradcheck(eager, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("scale", [1e-20, 1e15])
def test_rms_norm_extremes(scale: float) -> None:
    """eps decides near zero; large activations neither overflow nor lose direction."""
    x, w = torch.randn(3, 16) * scale, torch.ones(16)
    mine, exact = norm_reference.eager(x, w, 1e-5), norm_reference.whole(x.double(), w.double(), 1e-5)
    assert torch.isfinite(mine).all()
    assert rel_err(mine, exact) < 1e-5


def test_rms_norm_equals_the_library() -> None:
    x, w = torch.randn(4, 16), torch.rand(16)
    assert rel_err(rms_norm(x, w, 1e-6), F.rms_norm(x, (16,), w, 1e-6)) < 1e-6


def test_public_functions_count_and_compile() -> None:
    x, w = torch.randn(2, 5, 8), torch.ones(8)
    qkv, (cos, sin) = torch.randn(1, 5, 5, 4), _angles(1, 5, 2, torch.float32)
    before = dict(dispatch.counts)
    eager = [rms_norm(x, w, 1e-5), swiglu(x), *split_rotate(qkv, cos, sin, 3, 1)]
    for op in OPS:
        assert dispatch.counts[op, "reference"] == before.get((op, "reference"), 0) + 1
    whole = [norm_reference.whole(x, w, 1e-5), swiglu_reference.whole(x), *rope_reference.whole(qkv, cos, sin, 3, 1)]
    for mine, theirs in zip(eager, whole, strict=True):
        assert rel_err(mine, theirs) < 1e-6


def test_frozen_weight_and_input() -> None:
    """Only what asks for a gradient gets one."""
    x, w = torch.randn(2, 8), torch.ones(8, requires_grad=True)
    (grad,) = torch.autograd.grad(norm_reference.eager(x, w, 1e-5).sum(), w)
    assert rel_err(grad, F.rms_norm(x, (8,), None, 1e-5).sum(0)) < 1e-6
    x.requires_grad_()
    (grad,) = torch.autograd.grad(norm_reference.eager(x, w.detach(), 1e-5).square().sum(), x)
    assert torch.isfinite(grad).all()
