"""The kernels of `gated_rms_norm` against the definition in fp64: both orders, odd widths, rows that are slices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.gated_rms_norm import ACTIVATIONS, MAX_WIDTH, gated_rms_norm, reference
from tests.tools import assert_close

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EPS = 1e-5


@pytest.fixture(autouse=True)
def tiles(monkeypatch: pytest.MonkeyPatch):
    """Small ones, so that little cases have several."""
    triton = pytest.importorskip("kernels.gated_rms_norm.triton")
    monkeypatch.setattr(triton, "NUMBERS", 64)
    monkeypatch.setattr(triton, "BACK_TILES", 2)


def _check(x: Tensor, weight: Tensor, gate: Tensor | None, dtype: torch.dtype, **kind: Any) -> None:
    """Output and all gradients of leaves that may be views."""
    count = dispatch.counts["gated_rms_norm", "triton"]
    leaves = [t.requires_grad_() for t in (x, weight, gate) if t is not None]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    got = gated_rms_norm(x, weight, gate, EPS, **kind)
    silu, first = kind.get("activation", "silu") == "silu", kind.get("norm_before_gate", True)
    want = reference.whole(exact[0], exact[1], exact[2] if gate is not None else None, EPS, silu, first)
    dy = torch.randn_like(want).to(dtype)
    grads = torch.autograd.grad(got, leaves, dy), torch.autograd.grad(want, exact, dy.double())
    assert dispatch.counts["gated_rms_norm", "triton"] == count + 1
    assert [t.dtype for t in (got, *grads[0])] == [dtype, *(t.dtype for t in leaves)]
    assert_close(got, want, "op", dtype)
    assert_close(*grads, "op gradient", dtype)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(6,), (1, 3), (2, 3, 5, 16), (9, 100)], ids=str)
def test_orders_and_shapes(shape: tuple[int, ...], activation: str, norm_first: bool, device: torch.device):
    x, weight, gate = (torch.randn(s, device=device) for s in (shape, shape[-1:], shape))
    _check(x, weight, gate, torch.float32, activation=activation, norm_before_gate=norm_first)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("weight_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype, weight_dtype: torch.dtype | None, norm_first: bool, device: torch.device):
    x, weight, gate = (torch.randn(s, device=device).to(dtype) for s in ((3, 4, 32), (32,), (3, 4, 32)))
    _check(x, weight.to(weight_dtype or dtype), gate, dtype, norm_before_gate=norm_first)
    _check(x.detach(), weight.detach(), None, dtype)


def test_slices_are_read_where_they_are(device: torch.device):
    """Heads of a wider projection; and rows in an order that two strides cannot say."""
    wide = torch.randn(2, 3, 4 * 40, device=device)
    weight = torch.randn(20, device=device)
    x, gate = (wide[..., a : a + 40].unflatten(-1, (2, 20)) for a in (40, 120))
    _check(x.detach(), weight, gate.detach(), torch.float32)
    x, gate = (torch.randn(2, 2, 3, 20, device=device).permute(1, 2, 0, 3) for _ in range(2))
    _check(x, weight, gate, torch.float32)
    x = torch.randn(20, 3, device=device).T
    _check(x, weight, None, torch.float32)


def test_no_rows(device: torch.device):
    x, weight = torch.randn(0, 3, 8, device=device).requires_grad_(), torch.randn(8, device=device).requires_grad_()
    y = gated_rms_norm(x, weight, x.detach())
    grads = torch.autograd.grad(y.sum(), (x, weight))
    assert y.shape == x.shape
    assert not grads[1].any()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # a saturated sigmoid, interpreted
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize(("scale", "gate"), [(0.0, 0.0), (1e-20, 1.0), (1e15, -1e3), (1.0, 1e4), (1.0, -1e4)], ids=str)
def test_extremes(scale: float, gate: float, norm_first: bool, device: torch.device):
    x, weight = torch.randn(3, 16, device=device) * scale, torch.randn(16, device=device)
    _check(x, weight, torch.full_like(x, gate), torch.float32, norm_before_gate=norm_first)


def test_what_has_no_kernel_is_refused(device: torch.device):
    x = torch.randn(2, 4, device=device)
    with pytest.raises(dispatch.KernelUnavailable, match="float64"):
        gated_rms_norm(x.double(), x[0].double())
    wide = torch.zeros(1, MAX_WIDTH + 1, device=device)
    with pytest.raises(dispatch.KernelUnavailable, match="wider"):
        gated_rms_norm(wide, wide[0])


def test_a_compiled_graph_is_whole_and_equal(device: torch.device):
    leaves = [torch.randn(s, device=device).requires_grad_() for s in ((2, 3, 16), (16,), (2, 3, 16))]
    want = torch.autograd.grad(gated_rms_norm(*leaves).square().sum(), leaves)
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        compiled = torch.compile(gated_rms_norm, fullgraph=True, backend=backend)
        assert_close(torch.autograd.grad(compiled(*leaves).square().sum(), leaves), want, "op gradient", torch.float32)
