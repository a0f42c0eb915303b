"""`gmt_cell`: the form in products against the definition, gradients included, at the floor too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.gmt_cell import gmt_cell
from tests.gmt_tools import Cell, cast, cell, define, gradients, leaves, nearest_distance, run
from tests.tools import assert_close, rel_err

pytestmark = pytest.mark.usefixtures("poison")

MODES = pytest.mark.parametrize(("log", "norm"), [(False, False), (False, True), (True, False), (True, True)])


@MODES
@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        ((1, 4, 2), torch.float64),
        ((2, 5, 3), torch.float64),
        ((37, 24, 12), torch.float64),
        ((37, 24, 12), torch.float32),
    ],
    ids=str,
)
def test_equals_the_definition(size: tuple[int, int, int], dtype: torch.dtype, log: bool, norm: bool):
    exact = cast(cell(*size, log=log, norm=norm), torch.float64)
    args = cast(exact, dtype)
    got, want = run(args), define(exact)
    assert_close(got[:3], want, "forms", dtype)
    dy = [torch.randn_like(t) for t in want]
    assert_close(
        gradients(got, dy, args),
        gradients(want, dy, exact),
        "op gradient" if dtype == torch.float32 else "gradient",
        dtype,
    )
    assert torch.equal(got.nearest, got.source.argmax(1).int())
    assert_close(got.distance, nearest_distance(exact), "forms", dtype)
    if norm:
        values, bias = args["values"], args["bias"]
        assert values is not None
        assert bias is not None
        assert_close(got.scale[:, None] * ((got.target - got.source) @ values) + bias, got.y, "forms", dtype)


@MODES
def test_gradcheck(log: bool, norm: bool):
    args = cell(4, 5, 3, log, norm)
    x = args["x"]
    assert x is not None
    x[:1] = torch.randn(1, 5, dtype=torch.float64)  # at the floor there is no two-sided difference
    args["edges"] = torch.rand(3, 3, dtype=torch.float64)  # near log 0 differences say little
    args = cast(args, torch.float64)
    names = [name for name, t in args.items() if t is not None and t.requires_grad and name != "gram"]
    inputs: Any = [args[name] for name in names]

    def outputs(*tensors: Any) -> Any:
        return run(args | dict(zip(names, tensors, strict=True)))[:3]

    assert torch.autograd.gradcheck(outputs, inputs)


def test_the_gradient_of_the_gram_matrix_is_symmetric():
    """The quadratic form sees its symmetric part alone, and so does whoever made it from slots."""
    args = cast(cell(9, 6, 4), torch.float64)
    gram = args["gram"]
    assert gram is not None
    (grad,) = torch.autograd.grad(run(args).y.square().sum(), gram)
    assert_close([grad], [grad.T])
    (want,) = torch.autograd.grad(define(args)[0].square().sum(), gram)
    assert_close([grad], [(want + want.T) / 2], "gradient")


def test_only_the_weights_are_used():
    """No gradient reaches y: that of the weights alone."""
    args = cast(cell(9, 6, 4), torch.float64)
    names = ("x", "directions", "scores", "edges", "edge_scale")
    wanted: Any = [args[name] for name in names]
    dw = torch.randn(9, 4, dtype=torch.float64)
    for pick in (1, 2):
        got = torch.autograd.grad((run(args)[pick] * dw).sum(), wanted, allow_unused=True, materialize_grads=True)
        want = torch.autograd.grad((define(args)[pick] * dw).sum(), wanted, allow_unused=True, materialize_grads=True)
        assert_close(got, want, "gradient")


def test_at_the_floor_nothing_pulls():
    """A token on its slot gets no gradient through the distance to it, and one a little off does."""
    args = cell(2, 6, 4, norm=False)
    x, scores, edges = args["x"], args["scores"], args["edges"]
    assert x is not None
    assert scores is not None
    assert edges is not None
    scores.zero_()
    edges.fill_(0.25)
    args = cast(args, torch.float64)
    hop = run(args)
    (grad,) = torch.autograd.grad(hop.source[0, 0], leaves(args)[:1])
    others = define(args)[1][0, 0]
    (want,) = torch.autograd.grad(others, leaves(args)[:1])
    assert rel_err(grad, want) < 1e-10
    assert not grad[1:].any()


def test_narrow_inputs_route_as_exact_ones_do():
    """Similarities of bf16 tokens are those of fp32 tables: at a low temperature a rounded table would send tokens elsewhere."""
    args = cell(64, 48, 16)
    args["temperature"] = torch.tensor(0.25, dtype=torch.float64)
    narrow = cast(args, torch.bfloat16)
    exact: Cell = {name: None if t is None else t.detach().double() for name, t in narrow.items()}
    hop, (y, source, target) = run(narrow), define(exact)
    assert hop.y.dtype == torch.bfloat16
    assert hop.source.dtype == torch.float32
    assert_close(hop[1:3], (source, target), "op", torch.float32)
    assert_close([hop.y], [y], "op", torch.bfloat16)


@MODES
def test_compiles_whole(log: bool, norm: bool):
    args = cast(cell(9, 6, 4, log, norm), torch.float32)
    dy = [torch.randn_like(t) for t in run(args)[:3]]
    want = gradients(run(args), dy, args)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    out = compiled(args)
    assert_close(out, run(args), "same")
    assert_close(gradients(out, dy, args), want, "same")


def test_what_does_not_fit_is_named():
    args: Any = cell(9, 6, 4)
    for name, bad in (("x", torch.randn(9, 5)), ("edges", torch.randn(4, 3)), ("bias", torch.randn(5))):
        with pytest.raises(ValueError, match=f"{name} must be"):
            gmt_cell(**(args | {name: bad}))
