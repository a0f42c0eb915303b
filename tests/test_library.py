"""`kernels.library.Op`: one forward and one backward, the same in eager code and in a compiled graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

from kernels.library import Op, Tensors


def _forward(tensors: Tensors, options: Sequence[float], backend: str) -> list[Tensor]:
    x, w, h = tensors
    assert x is not None
    assert w is not None
    product = x * w
    y = product * options[0] + (0 if h is None else h)
    return [y, y.sum(0), product]


def _backward(
    tensors: Tensors,
    saved: Sequence[Tensor],
    grads: Tensors,
    needs: Sequence[bool],
    options: Sequence[float],
    backend: str,
) -> Tensors:
    x, w, h = tensors
    assert x is not None
    assert w is not None
    assert torch.equal(saved[0], x * w)
    total = sum((g.expand_as(x) for g in grads if g is not None), torch.zeros_like(x))
    return [total * w * options[0], total * x * options[0] if needs[1] else None, None if h is None else total]


def _fake(tensors: Tensors, options: Sequence[float], backend: str) -> list[Tensor]:
    x = tensors[0]
    assert x is not None
    return [torch.empty_like(x), x.new_empty(x.shape[1:]), torch.empty_like(x)]


toy = Op("toy", _forward, _backward, _fake, outputs=2)


def _leaves() -> list[Tensor]:
    return [torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def _twice(x: Tensor, w: Tensor, h: Tensor) -> Tensor:
    a, b = toy(x, w, h, options=(2,))
    c, _ = toy(a, w, None, options=(3,))
    return (c * c).sum() + b.sum()


def test_the_gradient_is_that_of_the_backward():
    x, w, h = _leaves()
    assert torch.autograd.gradcheck(lambda x, w, h: toy(x, w, h, options=(2,)), (x, w, h))
    assert torch.autograd.gradcheck(lambda x, h: toy(x, w.detach(), h, options=(2,)), (x, h))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_compiled_graph_is_whole_and_equal(frozen: bool):
    x, w, h = _leaves()
    if frozen:
        w = w.detach()
    leaves = [t for t in (x, w, h) if t.requires_grad]
    want = torch.autograd.grad(_twice(x, w, h), leaves)
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        got = torch.autograd.grad(torch.compile(_twice, fullgraph=True, backend=backend)(x, w, h), leaves)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_compiled_gradient_has_the_promised_strides():
    """The compiler plans memory for a gradient laid out as its tensor; a backward may return another layout."""

    def backward(tensors: Any, saved: Any, grads: Any, *rest: Any) -> list[Tensor]:
        return [(2 * grads[0]).T.contiguous().T]

    def doubled(tensors: Any, *rest: Any) -> list[Tensor]:
        return [2 * tensors[0]]

    op = Op("turned", doubled, backward, doubled, outputs=1)
    x = torch.randn(3, 4)
    (found,) = op._traced_backward([x], [True], [], [torch.ones(3, 4)], [True], [True], [], "reference")
    assert found.stride() == x.stride()
    assert torch.equal(found, torch.full((3, 4), 2.0))


def test_the_gradient_of_an_output_nobody_asked_for_is_none():
    """An op may return an empty tensor for what was not wanted; in a compiled graph its gradient arrives, empty too."""
    given = []

    def forward(tensors: Any, *rest: Any) -> list[Tensor]:
        return [2 * tensors[0], tensors[0].new_empty(0)]

    def backward(tensors: Any, saved: Any, grads: Any, *rest: Any) -> list[Tensor]:
        given.append([g is not None for g in grads])
        return [2 * grads[0]]

    op = Op("with_empty", forward, backward, forward, outputs=2)
    x = torch.randn(3, requires_grad=True)
    for run in (op, torch.compile(lambda x: op(x), fullgraph=True, backend="aot_eager")):
        run(x)[0].sum().backward()
    assert given == [[True, False]] * 2


def test_a_backward_looks_at_saved_tensors_once():
    """Under activation checkpointing a second look fails."""
    x, w, h = _leaves()
    want = torch.autograd.grad(_twice(x, w, h), [x, w, h])
    got = torch.autograd.grad(torch.utils.checkpoint.checkpoint(_twice, x, w, h, use_reentrant=False), [x, w, h])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_neither_autocast_nor_a_graph_reaches_inside():
    seen = []

    def forward(tensors: Tensors, options: Sequence[float], backend: str) -> list[Tensor]:
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return [t.clone() for t in tensors if t is not None]

    op = Op(
        "toy_plain",
        forward,
        lambda t, s, g, n, o, b: g,
        lambda t, o, b: [torch.empty_like(x) for x in t if x is not None],
        1,
    )
    with torch.autocast("cpu", torch.bfloat16):
        (y,) = op(torch.ones(2, requires_grad=True))
    assert y.requires_grad
    assert seen == [(False, False)]
