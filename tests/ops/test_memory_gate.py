"""`memory_gate`: the fast form against the definition, gradients included, under masks, documents and states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.memory_gate import GATES, GateState, empty_state, memory_gate, reference
from tests.gate_tools import Arguments, arguments, cast, define, gradients, history, run
from tests.tools import assert_close, same_bytes

pytestmark = pytest.mark.usefixtures("poison")

SIZES = [(1, 1, 1, 3), (2, 1, 4, 5), (2, 9, 1, 6), (3, 11, 4, 5)]  # B, T, M, D
WHERE = ["plain", "padded", "documents", "padded documents", "state", "padded state"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_the_definition(size: Any, where: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reference, "BLOCK", 4 * size[0] * size[3])  # four tokens at a time
    for gate in GATES:
        exact = cast(arguments(*size, where=where), torch.float64)
        args = cast(exact, dtype)
        got, want = run(args, gate=gate), define(exact, gate=gate)
        assert_close(got, want, "forms", dtype, gate)
        above = [torch.randn_like(t) for t in want]
        purpose = "op gradient" if dtype == torch.float32 else "gradient"
        assert_close(gradients(got, above, args), gradients(want, above, exact), purpose, dtype, gate)


@pytest.mark.parametrize(("width", "dilation"), [(None, 1), (1, 3), (2, 4), (4, 1), (3, 7)], ids=str)
def test_every_width(width: int | None, dilation: int):
    for where in ("plain", "padded documents", "padded state"):
        if width is None and "state" in where:
            continue
        args = cast(arguments(2, 9, 3, 4, width=width, dilation=dilation, where=where), torch.float64)
        got, want = (form(args, dilation=dilation) for form in (run, define))
        assert_close(got, want, "forms", what=where)
        above = [torch.randn_like(t) for t in want]
        assert_close(gradients(got, above, args), gradients(want, above, args), "gradient", what=where)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("where", WHERE)
def test_gradcheck(where: str, gate: str):
    args = cast(arguments(2, 4, 2, 3, where=where), torch.float64)
    names = [name for name, t in args.items() if t is not None and t.is_floating_point()]

    def outputs(*tensors: Any) -> Any:
        return run(args | dict(zip(names, tensors, strict=True)), gate=gate)

    inputs: Any = [args[name] for name in names]
    assert torch.autograd.gradcheck(outputs, inputs)


@pytest.mark.parametrize("only", range(4))
def test_each_output_has_its_own_gradient(only: int):
    args = cast(arguments(2, 5, 2, 3, where="padded state"), torch.float64)
    above = torch.randn_like(run(args)[only])
    got, want = (gradients([form(args)[only]], [above], args) for form in (run, define))
    assert_close(got, want, "gradient")


def score_of(s: float, gate: str, valid: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """One token of width 1 whose score is s: -> (alpha, dalpha / dh, y). Its norms are one but for eps."""
    h = torch.ones(1, 1, 1, 1, dtype=torch.float64, requires_grad=True)
    gain = torch.full((1, 1), s, dtype=torch.float64, requires_grad=True)
    value = torch.full((1, 1, 1), 3.0, dtype=torch.float64)
    y, alpha, _ = memory_gate(h, h, value, gain, gate=gate, eps=0.0, valid=valid)
    (slope,) = torch.autograd.grad(alpha.sum(), gain)
    return alpha, slope, y


@pytest.mark.parametrize(
    ("s", "alpha"), [(0.0, 0.5), (1e-4, 0.5025), (0.01, 0.524979), (1.0, 0.731059), (25.0, 0.993307)]
)
def test_gate_of_known_scores(s: float, alpha: float):
    for sign in (1, -1):
        got, slope, y = score_of(sign * s, "signed_sqrt")
        want = alpha if sign > 0 else 1 - alpha
        assert got.item() == pytest.approx(want, abs=5e-7)
        assert y.item() == pytest.approx(3 * want, abs=2e-6)
        expected = 0 if s == 0 else got.item() * (1 - got.item()) / (2 * s**0.5)
        assert slope.item() == pytest.approx(expected)


def test_the_root_is_flat_about_zero():
    inside, outside = (score_of(s, "signed_sqrt") for s in (5e-7, 2e-6))
    assert inside[0].item() == pytest.approx(0.5 + 2.5e-4, abs=1e-9)
    assert inside[1].item() == 0
    assert outside[1].item() == pytest.approx(0.25 / (2 * 2e-6**0.5), rel=1e-3)
    plain = score_of(5e-7, "sigmoid")
    assert plain[1].item() == pytest.approx(0.25)


@pytest.mark.parametrize("sizes", [[9], [1] * 9, [4, 5], [1, 7, 1]], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_pieces_are_the_whole(sizes: list[int], padded: bool):
    """Outputs, final state and gradients, through the state too."""
    args = cast(arguments(3, 9, 2, 4, where="padded" if padded else "plain"), torch.float64)
    start = empty_state(3, 6, 2, 4, "cpu", torch.float64)
    whole = run(args | {"values": start.values, "scales": start.scales})
    assert_close(whole[:2], run(args), "forms")
    found, state, at = [], start, 0
    for n in sizes:
        piece = {
            k: t[:, at : at + n] if k in ("h", "key", "value", "valid") and t is not None else t
            for k, t in args.items()
        }
        y, alpha, *newest = run(piece | {"values": state.values, "scales": state.scales})
        found.append((y, alpha))
        state, at = GateState(newest[0], newest[1]), at + n
    y, alpha = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    assert_close([y, alpha, *state], whole, "forms")
    above = [torch.randn_like(t) for t in whole]
    got, want = gradients([y, alpha, *state], above, args), gradients(whole, above, args)
    assert_close(got, want, "gradient")


def test_invalid_tokens_leave_no_trace():
    args = cast(arguments(3, 9, 2, 4, where="padded state"), torch.float64)
    valid, state = args["valid"], history(args)
    assert valid is not None
    assert state is not None
    y, alpha, *newest = run(args)
    assert not y[~valid].any()
    assert not alpha[~valid].any()
    nothing = args | {"valid": torch.zeros_like(valid)}
    assert same_bytes(run(nothing)[2:], list(state))
    other = {k: args[k] for k in args}
    for name in ("h", "key", "value"):
        t = args[name]
        assert t is not None
        other[name] = torch.where(valid.view(*valid.shape, *(1,) * (t.ndim - 2)), t, 1e3)
    again = run(other)
    assert same_bytes([again[0][valid], again[1][valid], again[2:]], [y[valid], alpha[valid], newest])


def test_narrow_inputs_are_computed_as_wide_ones():
    """bf16 in and out; norms, gate and sums are those of fp32, and a state holds values to the bit."""
    args = cast(arguments(2, 11, 4, 24, where="state"), torch.bfloat16)
    exact: Arguments = {
        k: t.detach().double() if t is not None and t.is_floating_point() else t for k, t in args.items()
    }
    got, want = run(args), define(exact)
    assert [t.dtype for t in got] == [torch.bfloat16, torch.float32, torch.bfloat16, torch.float32]
    assert_close(got[:1], want[:1], "op", torch.bfloat16)
    assert_close(got[1:], want[1:], "op", torch.float32)


def test_repeats_to_the_bit():
    args = cast(arguments(2, 9, 3, 4, where="padded documents"), torch.float32)
    above = [torch.randn_like(t) for t in run(args)]
    once, again = (gradients(run(args), above, args) for _ in range(2))
    assert same_bytes(once, again)


@pytest.mark.parametrize("where", ["plain", "padded state"])
def test_compiles_whole(where: str):
    args = cast(arguments(2, 9, 3, 4, where=where), torch.float32)
    want = run(args)
    above = [torch.randn_like(t) for t in want]
    out = torch.compile(run, fullgraph=True, backend="aot_eager")(args)
    assert_close(out, want, "same", torch.float32)
    assert_close(gradients(out, above, args), gradients(want, above, args), "same", torch.float32)


def test_what_does_not_fit_is_named():
    args: Any = arguments(2, 9, 3, 4, where="state")
    h, key, value, gain, conv_gain, conv_weight = (
        args[k] for k in ("h", "key", "value", "gain", "conv_gain", "conv_weight")
    )
    state = history(args)
    whole = {"conv_gain": conv_gain, "conv_weight": conv_weight}
    segments = torch.zeros(2, 9, dtype=torch.int64)
    for message, change in (
        ("key must be", {"key": key[:, :, :2]}),
        ("gain must be", {"gain": gain[0]}),
        ("come together", {"conv_gain": None}),
        ("unknown gate 'tanh'; valid: signed_sqrt, sigmoid", {"gate": "tanh"}),
        ("dilation must be", {"dilation": 0}),
        ("exclude each other", {"segments": segments, "state": state}),
        ("state.values must be", {"state": state, "dilation": 3}),
        ("there is no state", {"state": state, "conv_gain": None, "conv_weight": None}),
        ("not empty", {"h": h[:, :0]}),
    ):
        call: Any = {"h": h, "key": key, "value": value, "gain": gain, **whole, "dilation": 2, **change}
        with pytest.raises(ValueError, match=message):
            memory_gate(**call)
