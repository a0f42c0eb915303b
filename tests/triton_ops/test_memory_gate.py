"""The kernels of `memory_gate` against the definition in fp64: gradients, documents, padding, states, columns of a wider product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.memory_gate import memory_gate
from tests.gate_tools import EPS, Arguments, arguments, cast, define, gradients, run
from tests.tools import assert_close, same_bytes

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
WHERE = pytest.mark.parametrize("where", ["plain", "padded", "documents", "padded documents"])


@pytest.fixture(autouse=True)
def groups(monkeypatch: pytest.MonkeyPatch):
    """Two tiles share a partial sum, so that little cases have several sums."""
    triton = pytest.importorskip("kernels.memory_gate.triton")
    monkeypatch.setattr(triton, "GROUP", 64)


def _placed(args: Arguments, device: torch.device) -> Arguments:
    return {name: None if t is None else t.to(device) for name, t in args.items()}


def _check(args: Arguments, dtype: torch.dtype, used: tuple[int, ...] = (0, 1), **how: Any) -> None:
    args = cast(args, dtype)
    exact = cast(args, torch.float64)
    count = dispatch.counts["memory_gate", "triton"]
    got, want = run(args, **how), define(exact, **how)
    assert dispatch.counts["memory_gate", "triton"] == count + 1
    assert [t.dtype for t in got] == [dtype, torch.float32]
    assert_close(got[:1], want[:1], "op", dtype)
    assert_close(got[1:], want[1:], "op", torch.float32)
    above = [torch.randn_like(t) for t in got]
    found = [gradients([out[i] for i in used], [above[i] for i in used], a) for out, a in ((got, args), (want, exact))]
    assert_close(found[0], found[1], "op gradient", dtype)


@WHERE
@pytest.mark.parametrize("size", [(1, 1, 1, 16), (2, 63, 1, 40), (3, 65, 4, 24)], ids=str)
def test_sizes(size: tuple[int, int, int, int], where: str, device: torch.device):
    _check(_placed(arguments(*size, where=where), device), torch.float32)


def test_the_plain_gate(device: torch.device):
    _check(_placed(arguments(2, 9, 2, 16), device), torch.float32, gate="sigmoid")


@pytest.mark.parametrize("size", [(1, 500, 1, 20), (1, 40, 2, 300)], ids=str)
def test_many_tiles_of_rows_and_of_columns(size: tuple[int, int, int, int], device: torch.device):
    _check(_placed(arguments(*size, where="padded documents"), device), torch.float32)


@DTYPES
@WHERE
def test_dtypes(dtype: torch.dtype, where: str, device: torch.device):
    _check(_placed(arguments(2, 37, 4, 72, where=where), device), dtype)


@pytest.mark.parametrize(("width", "dilation"), [(None, 1), (1, 3), (2, 4), (4, 1), (3, 7)], ids=str)
def test_every_width(width: int | None, dilation: int, device: torch.device):
    for where in ("plain", "padded documents"):
        args = _placed(arguments(2, 20, 3, 16, width=width, dilation=dilation, where=where), device)
        _check(args, torch.float32, dilation=dilation)


@pytest.mark.parametrize("only", [0, 1])
def test_each_output_has_its_own_gradient(only: int, device: torch.device):
    _check(_placed(arguments(2, 20, 2, 16, where="padded"), device), torch.float32, used=(only,))


@DTYPES
@pytest.mark.parametrize("where", ["state", "padded state"])
@pytest.mark.parametrize("time", [1, 3, 40])
def test_states(dtype: torch.dtype, where: str, time: int, device: torch.device):
    """Of sequences longer and shorter than the reach of the convolution; one has no valid token."""
    args = cast(_placed(arguments(3, time, 2, 24, where=where), device), dtype)
    exact = cast(args, torch.float64)
    count = dispatch.counts["memory_gate", "triton"]
    with torch.no_grad():
        got, want = run(args), define(exact)
    assert dispatch.counts["memory_gate", "triton"] == count + 1
    assert [t.dtype for t in got] == [dtype, torch.float32, dtype, torch.float32]
    assert_close(got[:1], want[:1], "op", dtype)
    assert same_bytes(got[2].double(), want[2])  # values are copied, never rounded
    assert_close(got[1::2], want[1::2], "op", torch.float32)


def test_a_recorded_state_is_the_reference(device: torch.device):
    args = cast(_placed(arguments(2, 5, 2, 16, where="state"), device), torch.float32)
    with pytest.raises(dispatch.KernelUnavailable, match="gradients are recorded"):
        run(args)


def test_invalid_tokens_leave_no_trace(device: torch.device):
    """Whatever they hold, gradients included."""
    args = cast(_placed(arguments(3, 40, 2, 24, where="padded"), device), torch.float32)
    valid = args["valid"]
    assert valid is not None
    other: Arguments = dict(args)
    for name in ("h", "key", "value"):
        t = args[name]
        assert t is not None
        other[name] = torch.where(valid.view(3, 40, *(1,) * (t.ndim - 2)), t.detach(), 1e3).requires_grad_()
    (y, alpha), again = run(args), run(other)
    assert not y[~valid].any()
    assert not alpha[~valid].any()
    assert same_bytes([y, alpha], again)
    above = [torch.randn_like(y), torch.randn_like(alpha)]
    got, want = gradients(again, above, other), gradients((y, alpha), above, args)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))  # but for the signs of zeros
    assert not any(g[~valid].any() for g in got[:3])


def test_key_and_value_are_columns_of_one_product(device: torch.device):
    """Read where they are."""
    b, t, m, d = 2, 9, 3, 16
    wide = torch.randn(b, t, (m + 1) * d, device=device, requires_grad=True)
    h, gain = torch.randn(b, t, m, d, device=device), torch.ones(m, d, device=device)

    def both(key: Tensor, value: Tensor) -> list[Tensor]:
        y, alpha, _ = memory_gate(h, key, value, gain, eps=EPS)
        return [y, alpha, *torch.autograd.grad(y.square().sum() + alpha.sum(), wide)]

    key, value = wide[..., : m * d].unflatten(-1, (m, d)), wide[..., m * d :]
    assert same_bytes(both(key, value), both(key.contiguous(), value.contiguous()))


def test_repeats_to_the_bit(device: torch.device):
    args = cast(_placed(arguments(2, 70, 3, 80, where="padded documents"), device), torch.float32)
    above = [torch.randn_like(t) for t in run(args)]
    once, again = (gradients(run(args), above, args) for _ in range(2))
    assert same_bytes(once, again)


def test_compiles_whole(device: torch.device):
    args = cast(_placed(arguments(2, 9, 3, 16, where="padded documents"), device), torch.float32)
    want = run(args)
    above = [torch.randn_like(t) for t in want]
    out = torch.compile(run, fullgraph=True, backend="aot_eager")(args)
    assert same_bytes(out, want)
    assert_close(gradients(out, above, args), gradients(want, above, args), "same", torch.float32)
