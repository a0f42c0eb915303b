"""`gram` and `mixture_error`: what autograd makes of their definitions, values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.gram import gram
from kernels.mixture_error import mixture_error
from kernels.mixture_error.reference import whole
from tests.tools import assert_close

pytestmark = pytest.mark.usefixtures("poison")

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def drawn(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """weights [N, F], points [F, D], targets [N, D], shares [N] of which one is nothing; the first two learn."""
    weights, points = torch.randn(9, 4, dtype=dtype).softmax(1), torch.randn(4, 6, dtype=dtype)
    shares = torch.rand(9, dtype=dtype)
    shares[3] = 0
    return [weights.requires_grad_(), points.requires_grad_(), torch.randn(9, 6, dtype=dtype), shares]


def error(weights: Tensor, points: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
    return mixture_error(weights, points, gram(points), targets, shares)


@DTYPES
def test_mixture_error_is_its_definition(dtype: torch.dtype):
    exact = drawn()
    args = [t.detach().to(dtype).requires_grad_(t.requires_grad) for t in exact]
    got, want = error(*args), whole(*exact)
    assert_close(got, want, "forms", dtype)
    seed = torch.tensor(1.7, dtype=torch.float64)
    found = torch.autograd.grad(got, args[:2], seed.to(dtype))
    assert_close(
        found,
        torch.autograd.grad(want, exact[:2], seed),
        "op gradient" if dtype == torch.float32 else "gradient",
        dtype,
    )


def test_targets_and_shares_get_no_gradient():
    args = [t.detach().requires_grad_() for t in drawn()]
    found = torch.autograd.grad(error(*args), args, allow_unused=True)
    assert [g is None for g in found] == [False, False, True, True]


@DTYPES
def test_gram_is_a_product_with_itself(dtype: torch.dtype):
    """A gradient that is not symmetric too: autograd sees both factors."""
    rows = torch.randn(5, 7, dtype=dtype, requires_grad=True)
    seed = torch.randn(5, 5, dtype=dtype)
    assert_close(gram(rows), rows @ rows.T, "same", dtype)
    (want,) = torch.autograd.grad(rows @ rows.T, rows, seed)
    assert_close(torch.autograd.grad(gram(rows), rows, seed), (want,), "gradient", dtype)


def test_compile_whole():
    args: Any = drawn(torch.float32)
    want = torch.autograd.grad(error(*args), args[:2])
    compiled = torch.compile(error, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*args), error(*args), "same", torch.float32)
    assert_close(torch.autograd.grad(compiled(*args), args[:2]), want, "same", torch.float32)


@pytest.mark.parametrize(("place", "bad"), [(1, (5, 6)), (2, (9, 5)), (3, (8,))])
def test_what_does_not_fit_is_named(place: int, bad: tuple[int, ...]):
    args: Any = drawn()
    products = gram(args[1])
    args[place] = torch.zeros(bad, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"{('weights', 'points', 'targets', 'shares')[place]} must be"):
        mixture_error(args[0], args[1], products, *args[2:])
