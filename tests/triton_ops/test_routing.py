"""Spread and combine by Triton, forward and backward."""

from __future__ import annotations

import pytest
import torch

from kernels import dispatch
from kernels.routing import combine, route, spread
from tests.tools import rel_err

LIMITS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("width", [(1,), (3, 8), (5, 210)], ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_equals_the_reference(width: tuple[int, ...], shared: bool, dtype: torch.dtype, device: torch.device):
    B, T, k = 2, 7 if len(width) > 1 else 37, 2
    choice = torch.rand(B, T, 4, device=device).topk(k).indices
    routes = route(choice, 4, shared=shared, valid=torch.rand(B, T, device=device) < 0.8)
    x, o = (torch.randn(*lead, *width, dtype=dtype, device=device) for lead in ((B, T), (len(routes.perm),)))
    w = torch.rand(B, T, k + shared, device=device)
    dx, do = torch.randn_like(o), torch.randn_like(x)
    results = []
    for cast, setting in ((dtype, "triton"), (torch.float64, "reference")):
        a, b = (t.to(cast).requires_grad_() for t in (x, o))
        c = w.to(torch.promote_types(cast, w.dtype)).requires_grad_()
        with dispatch.use(setting):
            rows, y = spread(a, routes), combine(b, c, routes)
            grads = torch.autograd.grad(rows, a, dx.to(cast)), torch.autograd.grad(y, (b, c), do.to(cast))
        results.append([rows, y, *grads[0], *grads[1]])
    assert torch.equal(results[0][0], results[1][0].to(dtype)), "a copy is exact"
    for got, want in zip(*results, strict=True):
        assert rel_err(got, want) <= LIMITS[dtype]


def test_rows_apart_in_memory(device: torch.device):
    """Slices of wider rows, as projections give them."""
    routes = route(torch.rand(1, 9, 3, device=device).topk(2).indices, 3)
    wide = torch.randn(1, 9, 30, device=device)
    assert torch.equal(spread(wide[..., 10:20], routes), spread(wide[..., 10:20].contiguous(), routes))
    rows, w = torch.randn(18, 30, device=device), torch.rand(1, 9, 2, device=device)
    assert torch.equal(combine(rows[:, 5:25], w, routes), combine(rows[:, 5:25].contiguous(), w, routes))
