"""`causal_conv1d`: the forms against the definition and `F.conv1d`; segments, states, and decoding one input at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.causal_conv1d import causal_conv1d, causal_conv1d_step, reference
from tests.tools import assert_close, same_bytes

pytestmark = pytest.mark.usefixtures("poison")

CHANNELS = 5
ALL = {"allow_unused": True, "materialize_grads": True}  # zeros where a gradient does not reach
LENGTHS = [[9], [0, 4, 0, 1, 5, 0], [1, 2, 3, 4], [0, 0, 1], [17, 3, 40]]


def _case(
    rows: int, segments: int, width: int, dtype: torch.dtype = torch.float64, bias: bool = True
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """-> x [1, rows, C], weight, bias, initial state, all leaves."""
    shapes = (1, rows, CHANNELS), (CHANNELS, width), (CHANNELS,), (segments, width - 1, CHANNELS)
    x, weight, b, state = (torch.randn(s, dtype=dtype).requires_grad_() for s in shapes)
    return x, weight, b if bias else None, state


def _ends(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


@pytest.fixture(autouse=True, params=[1, 1 << 17], ids=["row by row", "one block"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Blocks of one row cross every border there is."""
    monkeypatch.setattr(reference, "BLOCK", request.param)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("activation", "bias", "initial"), [("silu", True, True), (None, False, False)])
def test_forms_equal_the_definition(lengths: list[int], width: int, activation: str | None, bias: bool, initial: bool):
    """Values, final state and all gradients; three rows of no segment at the end."""
    cu = _ends(lengths)
    x, weight, b, state = _case(int(cu[-1]) + 3, len(lengths), width, bias=bias)
    leaves = [t for t in (x, weight, b, state if initial else None) if t is not None]
    before = state if initial else None
    want = reference.recurrent(x, weight, b, activation == "silu", before, cu)
    got = causal_conv1d(
        x, weight, b, activation=activation, initial_state=before, output_final_state=True, cu_seqlens=cu
    )
    assert_close(got, want)
    assert not got[0][0, int(cu[-1]) :].any()
    seeds = [torch.randn_like(t) for t in want]
    for used in ([0, 1], [0], [1]):
        grads = [
            torch.autograd.grad([out[i] for i in used], leaves, [seeds[i] for i in used], retain_graph=True, **ALL)
            for out in (want, got)
        ]
        assert_close(grads[1], grads[0])


@pytest.mark.parametrize("width", [1, 2, 4])
def test_equals_the_library(width: int):
    x, weight, bias, _ = _case(2 * 11, 2, width)
    x = x.view(2, 11, CHANNELS)
    want = F.conv1d(x.mT, weight[:, None], bias, padding=width - 1, groups=CHANNELS)[..., :11].mT
    assert_close(causal_conv1d(x, weight, bias)[0], want)
    assert_close(causal_conv1d(x, weight, bias, activation="silu")[0], F.silu(want))


@pytest.mark.parametrize("width", [1, 3, 4])
def test_any_split_is_the_whole(width: int):
    x, weight, bias, _ = _case(2 * 12, 2, width)
    x = x.view(2, 12, CHANNELS)
    want = causal_conv1d(x, weight, bias, activation="silu", output_final_state=True)
    for sizes in ([12], [1] * 12, [2, 7, 3], [11, 1]):
        state, outs = None, []
        for piece in x.split(sizes, dim=1):
            y, state = causal_conv1d(
                piece, weight, bias, activation="silu", initial_state=state, output_final_state=True
            )
            outs.append(y)
        got = (torch.cat(outs, 1), state)
        assert_close(got, want)
        grads = [torch.autograd.grad(y.square().sum(), x, retain_graph=True) for y in (got[0], want[0])]
        assert_close(grads[0], grads[1])


@pytest.mark.parametrize("width", [1, 2, 4])
def test_steps_are_the_whole(width: int):
    x, weight, bias, state = _case(3 * 5, 3, width)
    x = x.detach().view(3, 5, CHANNELS).requires_grad_()
    want = causal_conv1d(x, weight, bias, activation="silu", initial_state=state, output_final_state=True)
    now, outs = state[:, None], []
    for t in range(5):
        y, now = causal_conv1d_step(x[:, t : t + 1], weight, bias, now, activation="silu")
        outs.append(y)
    got = (torch.cat(outs, 1), now[:, 0])
    assert_close(got, want)
    leaves = (x, weight, bias, state)
    grads = [torch.autograd.grad(o[0].sum() + o[1].square().sum(), leaves, **ALL) for o in (got, want)]
    assert_close(grads[0], grads[1])


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("compiling", [False, True])
def test_step_by_index(donate: bool, compiling: bool, monkeypatch: pytest.MonkeyPatch):
    """Slots find their states, -1 finds none, and what no slot continues keeps its bytes."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)  # the form that does not look at values
    x, weight, bias = torch.randn(2, 3, CHANNELS), torch.randn(CHANNELS, 4), torch.randn(CHANNELS)
    state, index = torch.randn(2, 4, 3, CHANNELS), torch.tensor([[2, -1, 0], [-1, -1, 3]])
    before = state.clone()
    with torch.no_grad():
        y, after = causal_conv1d_step(x, weight, bias, state, activation="silu", index=index, donate=donate)
    assert (after.data_ptr() == state.data_ptr()) == donate
    assert donate or same_bytes(state, before)
    used = {(b, int(e)): s for b in range(2) for s, e in enumerate(index[b]) if e >= 0}
    for b in range(2):
        for e in range(4):
            if (b, e) not in used:
                assert same_bytes(after[b, e], before[b, e])
                continue
            s = used[b, e]
            want = causal_conv1d_step(x[b, s][None, None], weight, bias, before[b, e][None, None], activation="silu")
            assert same_bytes((y[b, s], after[b, e]), (want[0][0, 0], want[1][0, 0]))
    assert not y[index < 0].any()


def test_a_recorded_step_does_not_write_what_it_was_given():
    x, weight, bias, state = _case(2, 2, 3)
    before, index = state.detach().clone(), torch.tensor([[1], [-1]])
    x = x.view(2, 1, CHANNELS)
    y, after = causal_conv1d_step(x, weight, bias, state[:, None].expand(2, 2, 2, CHANNELS), index=index, donate=True)
    (y.sum() + after.square().sum()).backward()
    assert same_bytes(state, before)
    assert torch.isfinite(state.grad).all()


def test_gradcheck():
    x, weight, bias, state = _case(8, 3, 3)
    cu = _ends([4, 0, 1])

    def run(*leaves: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight, bias, state = leaves
        return causal_conv1d(
            x, weight, bias, activation="silu", initial_state=state, output_final_state=True, cu_seqlens=cu
        )

    assert torch.autograd.gradcheck(run, (x, weight, bias, state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(dtype: torch.dtype):
    """Added up in fp32; a state that is given keeps its dtype."""
    x, weight, bias, state = (t.detach().to(dtype) for t in _case(40, 2, 4))
    cu = _ends([25, 13])
    leaves = [t.requires_grad_() for t in (x, weight, bias, state)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    want = reference.recurrent(exact[0], exact[1], exact[2], True, exact[3], cu)
    got = causal_conv1d(x, weight, bias, activation="silu", initial_state=state, output_final_state=True, cu_seqlens=cu)
    assert [t.dtype for t in got] == [dtype, dtype]
    dy = torch.randn_like(got[0])
    grads = torch.autograd.grad(got[0], leaves, dy), torch.autograd.grad(want[0], exact, dy.double())
    assert {t.dtype for t in grads[0]} == {dtype}
    assert_close(got, want, "op", dtype)
    assert_close(*grads, "op gradient", dtype)
    _, kept = causal_conv1d(x, weight, bias, initial_state=state.float(), output_final_state=True, cu_seqlens=cu)
    assert kept.dtype == torch.float32


def test_views():
    """Channels of a wider projection are read where they are."""
    wide = torch.randn(2, 7, 3 * CHANNELS, dtype=torch.float64)
    x, weight = wide[..., CHANNELS : 2 * CHANNELS], torch.randn(4, CHANNELS, dtype=torch.float64).t()
    assert_close(causal_conv1d(x, weight)[0], causal_conv1d(x.contiguous(), weight.contiguous())[0])


def test_a_compiled_graph_is_whole_and_equal():
    x, weight, bias, state = _case(9, 2, 3)
    cu = _ends([4, 5])

    def run(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> Tensor:
        y, after = causal_conv1d(
            x, weight, bias, activation="silu", initial_state=state, output_final_state=True, cu_seqlens=cu
        )
        y, after = causal_conv1d_step(y[:, :2], weight, bias, after[None], index=torch.tensor([[1, -1]]))
        return y.square().sum() + after.square().sum()

    want = torch.autograd.grad(run(x, weight, bias, state), (x, weight, bias, state))
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        compiled = torch.compile(run, fullgraph=True, backend=backend)
        assert_close(torch.autograd.grad(compiled(x, weight, bias, state), (x, weight, bias, state)), want)


def test_wrong_arguments_are_refused():
    x, weight, bias, state = (t.detach() for t in _case(6, 1, 3))
    with pytest.raises(ValueError, match="activation"):
        causal_conv1d(x, weight, activation="gelu")
    with pytest.raises(ValueError, match="expected x"):
        causal_conv1d(x[..., :2], weight)
    with pytest.raises(ValueError, match="bias"):
        causal_conv1d(x, weight, bias[:2])
    with pytest.raises(ValueError, match="no rows"):
        causal_conv1d(x[:, :0], weight)
    with pytest.raises(ValueError, match="initial_state"):
        causal_conv1d(x, weight, initial_state=state[:, :1])
    with pytest.raises(ValueError, match="cu_seqlens"):
        causal_conv1d(x, weight, cu_seqlens=torch.tensor([0.0, 6.0]))
    with pytest.raises(ValueError, match="slots"):
        causal_conv1d_step(x, weight, bias, state[None])
    with pytest.raises(ValueError, match="index"):
        causal_conv1d_step(x, weight, bias, state[None], index=torch.tensor([0]))
    with pytest.raises(ValueError, match="state"):
        causal_conv1d_step(x[:, :1], weight, bias, state[None, :, :1])
