"""`grouped_linear`: the forms against the definition, and what happens to rows of no group."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.grouped_linear import grouped_linear, reference
from tests.tools import assert_close, rel_err, same_bytes

pytestmark = pytest.mark.usefixtures("poison")

COUNTS = [[9], [0, 4, 0, 0, 5, 0], [1, 1, 1, 1], [0, 0], [17, 3, 8]]


def _case(counts: list[int], dtype: torch.dtype, slack: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    x = torch.randn(int(offsets[-1]) + slack, 6, dtype=dtype)
    return x, torch.randn(len(counts), 5, 6, dtype=dtype), offsets


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("slack", [0, 3])
def test_forms_equal_the_definition(counts: list[int], slack: int):
    x, weight, offsets = _case(counts, torch.float64, slack)
    if not len(x):
        assert grouped_linear(x, weight, offsets).shape == (0, 5)
        return
    x, weight = x.requires_grad_(), weight.requires_grad_()
    want = reference.recurrent(x, weight, offsets)
    dy = torch.randn_like(want)
    leaves = (x, weight)
    want_grads = torch.autograd.grad(want, leaves, dy) if offsets[-1] else tuple(map(torch.zeros_like, leaves))
    got = grouped_linear(x, weight, offsets)
    assert_close(got, want)
    assert_close(torch.autograd.grad(got, (x, weight), dy), want_grads)
    assert not got[int(offsets[-1]) :].any()
    with torch.no_grad():
        assert_close(reference.product_without_looking(x, weight.mT, offsets), want)
        assert_close(reference.product_without_looking(dy, weight, offsets), want_grads[0])
        assert_close(reference.outer_without_looking(dy, x, weight, offsets), want_grads[1])


def test_gradcheck():
    x, weight, offsets = _case([2, 0, 3], torch.float64)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: grouped_linear(x, w, offsets), (x, weight))
    assert torch.autograd.gradcheck(lambda w: grouped_linear(x.detach(), w, offsets), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype):
    x, weight, offsets = _case([17, 3, 8], dtype)
    limit = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    y = grouped_linear(x, weight, offsets)
    assert y.dtype == dtype
    assert rel_err(y, reference.recurrent(x.double(), weight.double(), offsets)) <= limit


def test_views_and_autocast():
    x, weight, offsets = _case([4, 5], torch.float32)
    wide = torch.cat((x, x), dim=1)
    same = grouped_linear(wide[:, 6:], weight.mT.contiguous().mT, offsets)
    assert_close(same, grouped_linear(x, weight, offsets), "same", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        low = grouped_linear(x, weight, offsets)
    assert low.dtype == torch.bfloat16
    assert same_bytes(low, grouped_linear(x.bfloat16(), weight.bfloat16(), offsets))


def test_a_compiled_graph_is_whole_and_equal():
    x, weight, offsets = _case([4, 0, 5], torch.float64)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    want = torch.autograd.grad(grouped_linear(x, weight, offsets).square().sum(), (x, weight))
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        compiled = torch.compile(grouped_linear, fullgraph=True, backend=backend)
        assert_close(torch.autograd.grad(compiled(x, weight, offsets).square().sum(), (x, weight)), want)


def test_wrong_arguments_are_refused():
    x, weight, offsets = _case([4, 5], torch.float32)
    with pytest.raises(ValueError, match="expected x"):
        grouped_linear(x[:, :5], weight, offsets)
    with pytest.raises(ValueError, match="expected x"):
        grouped_linear(x, weight, offsets[:2])
    with pytest.raises(ValueError, match="integers"):
        grouped_linear(x, weight, offsets.float())
    with pytest.raises(ValueError, match="one dtype"):
        grouped_linear(x, weight.double(), offsets)
