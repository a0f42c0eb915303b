"""Gradients of repeated rows, and the rules by which rows learn, against one row after the other in fp64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.row_update import RULES, Hyper, row_update, sinkhorn_update, sum_rows, sum_update
from tests.tools import assert_close, same_bytes

HYPER = Hyper(lr=0.03, beta1=0.9, beta2=0.95, eps=1e-8)


def _problem(
    n: int = 500, table: int = 97, width: int = 5, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Rows with many repeats, some more than others; gradients of very different sizes."""
    generator = torch.Generator().manual_seed(n)
    rows = (torch.rand(n, generator=generator).pow(3) * table).long()
    size = torch.rand(n, 1, generator=generator).mul(8).sub(4).exp()
    return rows, (torch.randn(n, width, generator=generator) * size).to(dtype)


def _moments(rule: str, rows: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    wide = [torch.zeros(rows, width, dtype=dtype) for _ in range(2)]
    steps = torch.zeros(rows, dtype=torch.int32)
    return [*wide, steps] if rule == "lazy_adam" else [torch.zeros(rows, dtype=dtype), steps]


# -- sums


def test_repeated_rows_add_up_as_a_product_with_one_hot_rows():
    """Integers, so that every order of adding gives the same: equal to the bit."""
    rows = _problem(300, 40, 7)[0]
    grad = torch.randint(-1000, 1000, (300, 7)).float()
    unique, sums = sum_rows(rows, grad)
    assert unique.tolist() == sorted(set(rows.tolist()))
    product = torch.nn.functional.one_hot(rows, 40).float().T @ grad
    assert torch.equal(sums, product[unique])


@pytest.mark.parametrize("n", [0, 1, 2, 63, 500, 40_000])
def test_sums_go_in_the_order_of_the_list(n: int):
    rows, grad = _problem(n)
    expected: dict[int, Tensor] = {}
    for row, g in zip(rows.tolist()[:2000], grad[:2000]):
        expected[row] = expected[row] + g if row in expected else g
    unique, sums = sum_rows(rows[:2000], grad[:2000])
    assert unique.tolist() == sorted(expected)
    assert all(torch.equal(s, expected[r]) for r, s in zip(unique.tolist(), sums))
    first = sum_rows(rows, grad)
    assert same_bytes(first, sum_rows(rows.clone(), grad.clone())), "not the same from run to run"
    assert first[1].shape == (len(first[0]), 5)


def test_sums_are_at_least_fp32():
    rows, grad = _problem(400, 3, dtype=torch.bfloat16)
    unique, sums = sum_rows(rows, grad)
    assert sums.dtype == torch.float32
    exact = torch.zeros(3, 5, dtype=torch.float64).index_add(0, rows, grad.double())
    assert_close(sums, exact[unique].float(), "forms", torch.float32)
    assert sum_rows(rows, grad.double())[1].dtype == torch.float64
    distinct = torch.tensor([5, 2, 9])
    found = sum_rows(distinct, grad[:3])
    assert found[0].tolist() == [2, 5, 9]
    assert torch.equal(found[1], grad[:3].float()[[1, 0, 2]])


# -- rules


class NaiveTable:
    """One row and one entry after the other, in Python's floats."""

    def __init__(self, values: Tensor) -> None:
        self.values = values.double().tolist()
        self.m = [[0.0] * len(row) for row in self.values]
        self.v = [[0.0] * len(row) for row in self.values]
        self.steps = [0] * len(self.values)

    def step(self, rows: Tensor, grad: Tensor, rule: str, h: Hyper) -> None:
        for row, g in zip(rows.tolist(), grad.double().tolist()):
            self.steps[row] += 1
            n, beta1 = self.steps[row], h.beta1 if rule == "lazy_adam" else 0.0
            mean = sum(x * x for x in g) / len(g)
            for i, x in enumerate(g):
                square = x * x if rule == "lazy_adam" else mean
                self.m[row][i] = beta1 * self.m[row][i] + (1 - beta1) * x
                self.v[row][i] = h.beta2 * self.v[row][i] + (1 - h.beta2) * square
                m, v = self.m[row][i] / (1 - beta1**n), self.v[row][i] / (1 - h.beta2**n)
                self.values[row][i] -= h.lr * m / (math.sqrt(v) + h.eps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rule", RULES)
def test_rules_row_by_row(rule: str, dtype: torch.dtype):
    """Rows are touched at different steps, some never; those keep their bytes."""
    values = torch.randn(97, 5, dtype=torch.float64).to(dtype)
    moments, naive, before = _moments(rule, 97, 5, dtype), NaiveTable(values), values.clone()
    for step in range(12):
        rows, sums = sum_rows(*_problem(20 + step, 90, 5, dtype))
        row_update(values, moments, rows, sums, rule, HYPER)
        naive.step(rows, sums, rule, HYPER)
    assert_close(values, torch.tensor(naive.values, dtype=torch.float64).to(dtype), "forms", dtype)
    touched = moments[-1] > 0
    assert 0 < touched.sum() < 97
    assert moments[-1].tolist() == naive.steps
    assert same_bytes(values[~touched], before[~touched])
    assert all(not m[~touched].any() for m in moments)


@pytest.mark.parametrize("rule", RULES)
def test_sums_and_update_at_once(rule: str):
    values, moments = torch.randn(97, 5), _moments(rule, 97, 5)
    other, others = values.clone(), [m.clone() for m in moments]
    for step in range(3):
        rows, grad = _problem(200 + step)
        sum_update(values, moments, rows, grad, rule, HYPER)
        row_update(other, others, *sum_rows(rows, grad), rule, HYPER)
    assert same_bytes([values, *moments], [other, *others])
    with pytest.raises(ValueError, match="does not fit its rows"):
        sum_update(values, moments, rows[1:], grad, rule, HYPER)


@pytest.mark.parametrize("beta2", [0.0, 0.95, 0.999])
def test_lazy_adam_on_all_rows_is_adam(beta2: float):
    hyper = HYPER._replace(beta2=beta2)
    weight = torch.nn.Parameter(torch.randn(30, 5))
    values, moments = weight.detach().clone(), _moments("lazy_adam", 30, 5)
    adam = torch.optim.Adam([weight], lr=hyper.lr, betas=(hyper.beta1, beta2), eps=hyper.eps)
    for _ in range(30):
        weight.grad = torch.randn(30, 5)
        row_update(values, moments, None, weight.grad, "lazy_adam", hyper)
        adam.step()
    assert_close(values, weight.detach(), "forms", torch.float32)


@pytest.mark.parametrize("rule", RULES)
def test_bits_do_not_depend_on_the_place(rule: str):
    """The rows of a table in one update = gathered into other arrays, in pieces, and put back."""
    R, W = 5000, 6
    ours, theirs = (torch.randn(R, W, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    mine, other = _moments(rule, R, W), _moments(rule, R, W)
    for step in range(3):
        rows, sums = sum_rows(*_problem(9000 + step, R, W))
        row_update(ours, mine, rows, sums, rule, HYPER)
        for part in torch.arange(len(rows)).split(617):
            held = [t[rows[part]] for t in (theirs, *other)]
            row_update(held[0], held[1:], None, sums[part], rule, HYPER)
            for array, new in zip((theirs, *other), held, strict=True):
                array[rows[part]] = new
    assert same_bytes([ours, *mine], [theirs, *other])


def test_a_step_has_the_size_of_the_rate():
    """Bias correction, per row: the first step of a row has length lr sqrt(W), whenever it comes."""
    values, moments = torch.zeros(2, 4), _moments("rowwise", 2, 4)
    for _ in range(50):
        row_update(values, moments, torch.tensor([0]), torch.randn(1, 4), "rowwise", HYPER)
    row_update(values, moments, torch.tensor([1]), torch.randn(1, 4) * 1e-3, "rowwise", HYPER)
    assert values[1].norm().item() == pytest.approx(HYPER.lr * 2, rel=1e-3)


# -- balanced momentum


def _balanced(u: np.ndarray, rounds: int) -> np.ndarray:
    for i in range(rounds):
        for line in u if i % 2 == 0 else u.T:
            size = math.sqrt(sum(x * x for x in line))
            line /= max(size, 1e-20)
    return u


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sinkhorn_row_by_row(dtype: torch.dtype):
    """Against lines normalised one after the other in fp64; rows without momentum, and with hardly any, keep their bytes."""
    generator = torch.Generator().manual_seed(0)
    values, momentum = torch.randn(12, 4, generator=generator).to(dtype), torch.zeros(12, 4, dtype=dtype)
    start, w, m = values.clone(), values.double().numpy().copy(), np.zeros((12, 4))
    for _ in range(3):
        grad = torch.randn(12, 4, generator=generator).to(dtype)
        grad[3], grad[7] = 0, grad[7] * 1e-6
        sinkhorn_update(values, momentum, grad, 0.1)
        g = grad.double().numpy()
        m = 0.95 * m + 0.05 * g
        u = 0.95 * m + 0.05 * g
        norms = np.sqrt((u * u).sum(1))
        u[norms <= 1e-3 * norms.mean()] = 0
        w -= 0.18 * 0.1 * 2 * _balanced(u, 11)
    assert_close(values, torch.from_numpy(w).to(dtype), "forms", dtype)
    assert_close(momentum, torch.from_numpy(m).to(dtype), "forms", dtype)
    assert same_bytes(values[[3, 7]], start[[3, 7]])


def test_sinkhorn_steps_have_one_size():
    values, momentum = torch.zeros(50, 8), torch.zeros(50, 8)
    sinkhorn_update(values, momentum, torch.randn(50, 8) * torch.rand(50, 1).add(0.1), 0.1)
    size = values.square().mean(dim=1).sqrt()
    assert torch.allclose(size, torch.tensor(0.018), rtol=1e-5)
    sinkhorn_update(values, momentum, torch.zeros(50, 8), 0.1)
    assert (values.square().mean(dim=1).sqrt() > size).all(), "rows move on their momentum"


def test_refusals():
    with pytest.raises(ValueError, match="expected three tables"):
        sinkhorn_update(torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(2, 2), 0.1)
    values, moments, grad = torch.zeros(3, 2), _moments("rowwise", 3, 2), torch.zeros(1, 2)
    one = torch.tensor([1])
    with pytest.raises(ValueError, match="unknown rule 'adagrad'"):
        row_update(values, moments, one, grad, "adagrad", HYPER)
    with pytest.raises(ValueError, match="do not fit values"):
        row_update(values, moments, one, grad, "lazy_adam", HYPER)
    with pytest.raises(ValueError, match="does not fit its rows"):
        row_update(values, moments, None, grad, "rowwise", HYPER)
    with pytest.raises(ValueError, match="would lose small steps"):
        row_update(values.bfloat16(), moments, one, grad, "rowwise", HYPER)
    with pytest.raises(ValueError, match="expected rows"):
        sum_rows(one, torch.zeros(2, 2))
