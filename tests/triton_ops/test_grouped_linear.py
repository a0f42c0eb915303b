"""`grouped_linear` by Triton: forward and both gradients, groups of every size, rows of no group."""

from __future__ import annotations

import pytest
import torch

from kernels import dispatch
from kernels.grouped_linear import grouped_linear, triton
from tests.tools import rel_err

LIMITS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(
    ("counts", "d", "o"),
    [([9], 20, 33), ([0, 70, 0, 0, 130, 1, 0], 72, 130), ([0, 0], 8, 8), ([300, 65, 1], 130, 24)],
    ids=str,
)
def test_equals_the_reference(counts: list[int], d: int, o: int, dtype: torch.dtype, device: torch.device):
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32, device=device)
    n = int(offsets[-1]) + 5
    wide = torch.randn(n, 2 * d, dtype=dtype, device=device)
    leaves = [wide[:, d:], torch.randn(len(counts), o, d, dtype=dtype, device=device)]
    dy = torch.randn(n, o, dtype=dtype, device=device)
    results = []
    for cast, setting in ((dtype, "triton"), (torch.float64, "reference")):
        x, weight = (t.detach().to(cast).requires_grad_() for t in leaves)
        with dispatch.use(setting):
            y = grouped_linear(x, weight, offsets)
            results.append([y, *torch.autograd.grad(y, (x, weight), dy.to(cast))])
    for got, want in zip(*results, strict=True):
        assert got.dtype == dtype
        assert rel_err(got, want) <= LIMITS[dtype]
    assert not results[0][0][int(offsets[-1]) :].any()
    assert not results[0][1][int(offsets[-1]) :].any()


def test_both_tables_of_tiles_are_right(device: torch.device, monkeypatch: pytest.MonkeyPatch):
    """The choice depends on the number of rows; force each for the same rows."""
    offsets = torch.tensor([0, 50, 50, 90], dtype=torch.int32, device=device)
    x, weight = torch.randn(95, 70, device=device), torch.randn(3, 40, 70, device=device)
    found = []
    for few in (0, 10**6):
        monkeypatch.setattr(triton, "FEW", few)
        found.append(grouped_linear(x, weight, offsets))
    assert rel_err(*found) <= LIMITS[torch.float32]
