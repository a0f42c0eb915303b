"""`gated_rms_norm`: the blocked form against the definition, in both orders of norm and gate."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.gated_rms_norm import ACTIVATIONS, gated_rms_norm, reference
from tests.tools import assert_close, rel_err

pytestmark = pytest.mark.usefixtures("poison")

ORDERS = [True, False]
EPS = 1e-5


@pytest.fixture(autouse=True, params=[1, 1 << 17], ids=["row by row", "one block"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reference, "BLOCK", request.param)


def _leaves(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """-> x, weight, gate."""
    x, weight, gate = (torch.randn(s, dtype=dtype).requires_grad_() for s in (shape, shape[-1:], shape))
    return x, weight, gate


@pytest.mark.parametrize("norm_first", ORDERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(6,), (1, 1), (2, 3, 5, 8), (0, 4)], ids=str)
def test_equals_the_definition(shape: tuple[int, ...], activation: str, norm_first: bool):
    x, weight, gate = _leaves(*shape)
    for z in (gate, None):
        leaves = [t for t in (x, weight, z) if t is not None]
        want = reference.whole(x, weight, z, EPS, activation == "silu", norm_first)
        got = gated_rms_norm(x, weight, z, EPS, activation=activation, norm_before_gate=norm_first)
        assert_close(got, want)
        dy = torch.randn_like(want)
        assert_close(torch.autograd.grad(got, leaves, dy), torch.autograd.grad(want, leaves, dy), "gradient")


def test_equals_the_library():
    x, weight, gate = _leaves(3, 7)
    want = F.rms_norm(x, (7,), weight, EPS)
    assert_close(gated_rms_norm(x, weight, eps=EPS), want)
    assert_close(gated_rms_norm(x, weight, gate, EPS), want * F.silu(gate))
    gated = F.rms_norm(x * F.silu(gate), (7,), weight, EPS)
    assert_close(gated_rms_norm(x, weight, gate, EPS, norm_before_gate=False), gated)


@pytest.mark.parametrize("norm_first", ORDERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation: str, norm_first: bool):
    def run(x: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
        return gated_rms_norm(x, weight, gate, EPS, activation=activation, norm_before_gate=norm_first)

    assert torch.autograd.gradcheck(run, _leaves(2, 3, 4))
    x, weight, gate = _leaves(2, 4)
    assert torch.autograd.gradcheck(lambda gate: run(x.detach(), weight.detach(), gate), gate)


@pytest.mark.parametrize("norm_first", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(dtype: torch.dtype, norm_first: bool):
    leaves = _leaves(4, 9, 16, dtype=dtype)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    got = gated_rms_norm(*leaves, EPS, norm_before_gate=norm_first)
    want = reference.whole(*exact, EPS, True, norm_first)
    dy = torch.randn_like(got)
    grads = torch.autograd.grad(got, leaves, dy), torch.autograd.grad(want, exact, dy.double())
    assert {t.dtype for t in (got, *grads[0])} == {dtype}
    assert_close(got, want, "op", dtype)
    assert_close(*grads, "op gradient", dtype)


def test_mixed_dtypes_and_views():
    """Low-precision rows with fp32 weights; a gate that is a slice of a wider projection."""
    x, weight, gate = _leaves(4, 3, 8, dtype=torch.float32)
    wide = torch.cat((gate, x), -1)
    got = gated_rms_norm(x.bfloat16(), weight, wide[..., :8], EPS)
    assert got.dtype == torch.bfloat16
    want = reference.whole(x.bfloat16().double(), weight.double(), gate.double(), EPS, True, True)
    assert rel_err(got, want) < 4e-3
    grads = torch.autograd.grad(got.float().sum(), (x, weight, gate))
    assert [g.dtype for g in grads] == [torch.float32] * 3


@pytest.mark.parametrize("norm_first", ORDERS)
@pytest.mark.parametrize(("scale", "gate"), [(0.0, 0.0), (1e-20, 1.0), (1e15, -1e3), (1.0, 1e4), (1.0, -1e4)], ids=str)
def test_extremes(scale: float, gate: float, norm_first: bool):
    """Zero rows, large rows and saturated gates stay finite, and equal to fp64."""
    x, weight, z = _leaves(3, 16, dtype=torch.float32)
    x, z = (x * scale).detach().requires_grad_(), torch.full_like(z, gate).requires_grad_()
    got = gated_rms_norm(x, weight, z, EPS, norm_before_gate=norm_first)
    exact = [t.detach().double().requires_grad_() for t in (x, weight, z)]
    want = reference.whole(*exact, EPS, True, norm_first)
    assert rel_err(got, want) < 1e-5
    for a, b in zip(torch.autograd.grad(got.sum(), (x, weight, z)), torch.autograd.grad(want.sum(), exact)):
        assert torch.isfinite(a).all()
        assert rel_err(a, b) < 1e-4


def test_a_compiled_graph_is_whole_and_equal():
    leaves = _leaves(2, 3, 4)
    want = torch.autograd.grad(gated_rms_norm(*leaves).square().sum(), leaves)
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        compiled = torch.compile(gated_rms_norm, fullgraph=True, backend=backend)
        assert_close(torch.autograd.grad(compiled(*leaves).square().sum(), leaves), want)


def test_wrong_arguments_are_refused():
    x, weight, gate = _leaves(2, 4)
    with pytest.raises(ValueError, match="activation"):
        gated_rms_norm(x, weight, gate, activation="relu")
    with pytest.raises(ValueError, match="expected x"):
        gated_rms_norm(x, weight[:2], gate)
    with pytest.raises(ValueError, match="expected x"):
        gated_rms_norm(x, weight, gate[:1])
