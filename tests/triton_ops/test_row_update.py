"""The kernels of `row_update` against the plain form, sums and moments to the bit where that fixes the order of every sum."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.row_update import RULES, Hyper, row_update, sum_rows, sum_update
from tests.tools import assert_close, same_bytes

HYPER = Hyper(lr=0.03, beta1=0.9, beta2=0.95, eps=1e-8)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
WIDTHS = pytest.mark.parametrize("width", [1, 16, 40, 150])


@pytest.fixture(autouse=True)
def tiles(monkeypatch: pytest.MonkeyPatch):
    """Narrow ones, so that rows of 150 have several."""
    monkeypatch.setattr(pytest.importorskip("kernels.row_update.triton"), "COLUMNS", 64)


def _list(n: int, width: int, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Rows below 90, most of them often, and gradients of very different sizes."""
    rows = (torch.rand(n).pow(3) * 90).long()
    return rows.to(device), (torch.randn(n, width) * torch.rand(n, 1).mul(8).sub(4).exp()).to(device, dtype)


def _table(rule: str, width: int, device: torch.device) -> list[Tensor]:
    """Values [97, W] and moments; rows have taken 0 to 9 steps."""
    wide, steps = (97, width), torch.arange(97, dtype=torch.int32, device=device) % 10
    moments = [torch.randn(wide), torch.rand(wide)] if rule == "lazy_adam" else [torch.rand(97)]
    return [torch.randn(wide).to(device), *(m.to(device) for m in moments), steps]


def _both(rule: str, arrays: list[Tensor], run: Callable[[Tensor, list[Tensor]], None]) -> list[Tensor]:
    """The arrays after ``run`` by Triton, equal to those of the plain form."""
    found, want = ([t.clone() for t in arrays] for _ in range(2))
    count = dispatch.counts["row_update", "triton"]
    run(found[0], found[1:])
    assert dispatch.counts["row_update", "triton"] == count + 1
    with dispatch.use("reference"):
        run(want[0], want[1:])
    assert_close(found, want, "op", torch.float32)  # a library's roots may be off by a last bit
    assert same_bytes(found[-1], want[-1])
    assert rule == "rowwise" or same_bytes(found[1:], want[1:])  # a mean over a row is added in another order
    return found


@DTYPES
@WIDTHS
@pytest.mark.parametrize("n", [1, 65, 200])
def test_sums(n: int, width: int, dtype: torch.dtype, device: torch.device):
    rows, grad = _list(n, width, device, dtype)
    count = dispatch.counts["sum_rows", "triton"]
    found = sum_rows(rows, grad)
    assert dispatch.counts["sum_rows", "triton"] == count + 1
    with dispatch.use("reference"):
        unique, want = sum_rows(rows, grad)
    assert found[1].dtype == torch.float32
    assert torch.equal(found[0], unique)
    assert torch.equal(found[1], want)  # but for the signs of zeros


def test_no_rows(device: torch.device):
    rows, grad = _list(0, 3, device)
    unique, sums = sum_rows(rows, grad)
    assert (unique.shape, sums.shape) == ((0,), (0, 3))
    arrays = _table("rowwise", 3, device)
    before = [t.clone() for t in arrays]
    sum_update(arrays[0], arrays[1:], rows, grad, "rowwise", HYPER)
    row_update(arrays[0], arrays[1:], unique, sums, "rowwise", HYPER)
    assert same_bytes(arrays, before)


@WIDTHS
@pytest.mark.parametrize("rule", RULES)
def test_touched_rows(rule: str, width: int, device: torch.device):
    """And no others."""
    rows, sums = sum_rows(*_list(120, width, device))
    arrays = _table(rule, width, device)
    found = _both(rule, arrays, lambda values, moments: row_update(values, moments, rows, sums, rule, HYPER))
    others = torch.ones(97, dtype=torch.bool, device=device).index_fill(0, rows, False)
    assert others.any()
    assert all(same_bytes(a[others], b[others]) for a, b in zip(found, arrays, strict=True))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("hyper", [HYPER, Hyper(1e-3, 0.0, 0.0, 1e-20), Hyper(1.0, 0.5, 0.999, 1e-3)], ids=str)
def test_all_rows(rule: str, hyper: Hyper, device: torch.device):
    grad = torch.randn(97, 20, device=device)
    _both(rule, _table(rule, 20, device), lambda values, moments: row_update(values, moments, None, grad, rule, hyper))


@DTYPES
@WIDTHS
@pytest.mark.parametrize("rule", RULES)
def test_sums_and_update_at_once(rule: str, width: int, dtype: torch.dtype, device: torch.device):
    rows, grad = _list(200, width, device, dtype)
    _both(
        rule,
        _table(rule, width, device),
        lambda values, moments: sum_update(values, moments, rows, grad, rule, HYPER),
    )


@pytest.mark.parametrize("rule", RULES)
def test_where_a_row_stands_does_not_matter(rule: str, device: torch.device):
    """Gathered and updated apart, and in place: the same bits, so that a table may be anywhere."""
    rows, sums = sum_rows(*_list(150, 80, device))
    arrays = _table(rule, 80, device)
    apart = [t[rows] for t in arrays]
    row_update(apart[0], apart[1:], None, sums, rule, HYPER)
    row_update(arrays[0], arrays[1:], rows, sums, rule, HYPER)
    assert same_bytes([t[rows] for t in arrays], apart)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: only there is a table elsewhere")
@pytest.mark.parametrize("rule", RULES)
def test_a_table_in_pinned_host_memory(rule: str, device: torch.device):
    rows, grad = _list(200, 80, device)
    there = _table(rule, 80, device)
    here = [t.cpu().pin_memory() for t in there]
    for arrays in (there, here):
        sum_update(arrays[0], arrays[1:], rows, grad, rule, HYPER)
        row_update(arrays[0], arrays[1:], *sum_rows(rows, grad), rule, HYPER)
    torch.cuda.synchronize()
    assert same_bytes(here, there)
    with pytest.raises(dispatch.KernelUnavailable, match="not pinned"):
        sum_update(here[0].clone(), here[1:], rows, grad, rule, HYPER)


def test_what_it_cannot_take_is_said(device: torch.device):
    values, *moments = _table("rowwise", 4, device)
    with pytest.raises(dispatch.KernelUnavailable, match="gaps"):
        row_update(values[:, ::2], moments, None, torch.zeros(97, 2, device=device), "rowwise", HYPER)
    with pytest.raises(dispatch.KernelUnavailable, match=r"torch\.float64"):
        sum_rows(torch.tensor([1], device=device), torch.zeros(1, 2, dtype=torch.float64, device=device))
