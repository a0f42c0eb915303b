"""`selective_scan`: the fast form equals the token-by-token definition, outputs, final states and gradients, in every layout."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.gla import gla
from kernels.recurrent_step import recurrent_step
from kernels.selective_scan import reference, selective_scan
from tests.tools import assert_close

pytestmark = pytest.mark.usefixtures("poison")

SPLITS = {  # numbers of a block, numbers below which chunks are cut into pieces
    "as shipped": (reference.BLOCK, reference.STEP),
    "one chunk at a time": (1, 0),
    "one piece": (reference.BLOCK, 0),
    "many pieces": (1 << 10, 1 << 20),
}


@pytest.fixture(params=SPLITS.values(), ids=SPLITS)
def split(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "BLOCK", request.param[0])
    monkeypatch.setattr(reference, "STEP", request.param[1])


def inputs(B: int, T: int, D: int, N: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """u, delta, A, B, C, D."""
    return [
        torch.randn(B, T, D, dtype=dtype),
        torch.rand(B, T, D, dtype=dtype),
        -3 * torch.rand(D, N, dtype=dtype),
        torch.randn(B, T, N, dtype=dtype),
        torch.randn(B, T, N, dtype=dtype),
        torch.randn(D, dtype=dtype),
    ]


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def both(given: list[Tensor], initial: Tensor | None, cu: Tensor | None, dtype: torch.dtype) -> tuple[Any, Any]:
    """-> what the op says in ``dtype`` and what the definition says in fp64: outputs, final state, gradients."""
    said = []
    for kind, op in ((dtype, partial(selective_scan, output_final_state=True)), (torch.float64, reference.recurrent)):
        leaves = [x.to(kind).requires_grad_() for x in given]
        state = None if initial is None else initial.to(kind).requires_grad_()
        skip = leaves[5] if len(leaves) > 5 else None
        y, final = op(*leaves[:5], skip, initial_state=state, cu_seqlens=cu)
        weights = [torch.cos(torch.arange(x.numel(), dtype=kind)).view_as(x) for x in (y, final)]
        wanted = [*leaves, *([] if state is None else [state])]
        said.append((y, final, torch.autograd.grad((y, final), wanted, weights)))
    return said[0], said[1]


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("shape", [(2, 1, 4, 3), (1, 2, 3, 5), (2, 17, 8, 4), (1, 64, 5, 1), (3, 65, 2, 16)], ids=str)
@pytest.mark.parametrize("carry", [True, False], ids=["carried", "fresh"])
def test_chunks_equal_tokens(shape: tuple[int, ...], carry: bool):
    B, _, D, N = shape
    given = inputs(*shape)
    initial = torch.randn(B, D, N, dtype=torch.float64) if carry else None
    got, want = both(given if carry else given[:5], initial, None, torch.float64)  # carried, and with the skip
    assert_close(got, want, "forms")


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("lengths", [[63, 64, 65], [0, 0, 1, 15, 0, 130, 2, 0]], ids=str)
def test_segments_with_slack(lengths: list[int]):
    """Ragged, empty ones among them, over two rows of a batch; rows past the end give zeros everywhere."""
    given = inputs(2, (sum(lengths) + 8) // 2, 4, 3)
    initial = torch.randn(len(lengths), 4, 3, dtype=torch.float64)
    cu = offsets(lengths)
    got, want = both(given, initial, cu, torch.float64)
    assert_close(got, want, "forms")
    end = int(cu[-1])
    assert not got[0].flatten(0, 1)[end:].any()
    assert not any(got[2][i].flatten(0, 1)[end:].any() for i in (0, 1, 3, 4))
    for i, n in enumerate(lengths):
        if n == 0:
            assert torch.equal(got[1][i], initial[i])


@pytest.mark.usefixtures("split")
def test_fp32():
    got, want = both(inputs(2, 130, 32, 16), torch.randn(2, 32, 16), None, torch.float32)
    assert_close(got, want, "forms", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_inputs(dtype: torch.dtype):
    """u, B and C as a model under autocast has them; step sizes, rates and states stay in fp32."""
    exact = [x.to(dtype).double() if i in (0, 3, 4) else x.float().double() for i, x in enumerate(inputs(2, 70, 8, 4))]
    leaves = [x.to(dtype if i in (0, 3, 4) else torch.float32).requires_grad_() for i, x in enumerate(exact)]
    y, final = selective_scan(*leaves, output_final_state=True)
    want, state = reference.recurrent(*[x.requires_grad_() for x in exact], None, None)
    assert final is not None
    assert (y.dtype, final.dtype) == (dtype, torch.float32)
    assert_close(y, want, "op", dtype)
    assert_close(final, state, "op", torch.float32)
    seed = torch.randn_like(want).to(dtype)
    got = torch.autograd.grad(y, leaves, seed)
    assert [g.dtype for g in got] == [x.dtype for x in leaves]
    for a, b in zip(got, torch.autograd.grad(want, exact, seed.double()), strict=True):
        assert_close(a, b, "op gradient", dtype)


def test_nothing_but_empty_segments():
    given = [x.requires_grad_() for x in inputs(1, 3, 4, 2)]
    state = torch.randn(2, 4, 2, dtype=torch.float64, requires_grad=True)
    y, final = selective_scan(*given, initial_state=state, output_final_state=True, cu_seqlens=offsets([0, 0]))
    assert final is not None
    assert not y.any()
    assert torch.equal(final, state)
    *grads, dstate = torch.autograd.grad(y.sum() + final.sum(), (*given, state))
    assert not any(g.any() for g in grads)
    assert (dstate == 1).all()


@pytest.mark.usefixtures("split")
def test_gradcheck():
    given = [x.requires_grad_() for x in inputs(1, 9, 3, 2)]
    state = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    run = partial(selective_scan, output_final_state=True, cu_seqlens=offsets([4, 3]))
    assert torch.autograd.gradcheck(lambda *x: run(*x[:-1], initial_state=x[-1]), (*given, state))


@pytest.mark.parametrize("cuts", [[0, 1, 7, 70], [0, 64, 65, 70]], ids=str)
def test_any_split_is_the_whole(cuts: list[int]):
    given = [x.requires_grad_() for x in inputs(2, 70, 4, 3)]
    whole = selective_scan(*given, output_final_state=True)
    outs, state = [], None
    for start, end in pairwise(cuts):
        piece = [x[:, start:end] if x.ndim == 3 else x for x in given]
        y, state = selective_scan(*piece, initial_state=state, output_final_state=True)
        outs.append(y)
    pieces = (torch.cat(outs, 1), state)
    assert_close(pieces, whole, "forms")
    both_grads = [torch.autograd.grad(sum(x.square().sum() for x in said), given) for said in (pieces, whole)]  # pyright: ignore
    assert_close(both_grads[0], both_grads[1], "forms")


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("exponent", [-1e4, -50.0, 0.0])
def test_extreme_decays(exponent: float):
    """States that are gone after one token beside states that stay: nothing overflows, nothing is lost."""
    given = inputs(1, 70, 4, 3)
    often = torch.rand(1, 70, 4) < 0.5
    given[1] = torch.where(often, 1.0, 1e-3 * given[1]) if exponent else torch.zeros_like(given[1])
    given[2][:, ::2] = exponent
    initial = torch.randn(1, 4, 3, dtype=torch.float64)
    got, want = both(given, initial, None, torch.float64)
    assert all(x.isfinite().all() for x in (got[0], got[1], *got[2]))
    assert_close(got, want, "forms")
    assert_close(both(given, initial, None, torch.float32)[0], want, "forms", torch.float32)


def test_without_channels_of_their_own_it_is_gated_linear_attention():
    """One value per head, as many key channels as a state is wide, and exp(delta A) as their decays: the same recurrence."""
    u, delta, A, B, C, D = inputs(2, 70, 4, 3)
    q, k = (x.unsqueeze(2).expand(-1, -1, 4, -1) for x in (C, B))
    o, state = gla(q, k, (delta * u).unsqueeze(3), delta.unsqueeze(3) * A, scale=1.0, output_final_state=True)
    assert state is not None
    got = selective_scan(u, delta, A, B, C, D, output_final_state=True)
    assert_close(got, (o.squeeze(3) + D * u, state.squeeze(3)), "forms")
    before = torch.randn(2, 1, 4, 3, 1, dtype=torch.float64)
    token = (q[:, :1], k[:, :1], (delta * u)[:, :1].unsqueeze(3))
    o, state = recurrent_step(*token, before, delta[:, :1].unsqueeze(3) * A, scale=1.0)
    one = [x[:, :1] for x in (u, delta)], [x[:, :1] for x in (B, C)]
    got = selective_scan(*one[0], A, *one[1], None, initial_state=before[:, 0, ..., 0], output_final_state=True)
    assert_close(got, (o.squeeze(3), state[:, 0, ..., 0]), "forms")


@pytest.mark.parametrize("packed", [False, True])
def test_a_compiled_graph_is_whole_and_equal(packed: bool):
    leaves = [x.requires_grad_() for x in inputs(2, 20, 3, 2)]
    cu = offsets([7, 0, 30]) if packed else None

    def run(*given: Tensor) -> Tensor:
        y, state = selective_scan(*given, output_final_state=True, cu_seqlens=cu)
        assert state is not None
        return y.square().sum() + state.square().sum()

    want = torch.autograd.grad(run(*leaves), leaves)
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        compiled = torch.compile(run, fullgraph=True, backend=backend)
        assert_close(torch.autograd.grad(compiled(*leaves), leaves), want, "gradient")


def test_only_states_between_chunks_are_kept():
    """Of T states a backward gets those before the chunks of at least 16 rows."""
    given = [x.requires_grad_() for x in inputs(4, 256, 64, 16, torch.float32)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        selective_scan(*given)
    assert sum(kept) - sum(x.numel() for x in given) <= 4 * 256 * 64 * 16 / reference.CHUNKS[0]


@pytest.mark.parametrize(
    ("name", "index", "change"),
    [
        ("A", 2, lambda x: x[:-1]),
        ("delta", 1, lambda x: x[:, :1]),
        ("B", 3, lambda x: x[..., :1]),
        ("C", 4, lambda x: x[:1]),
        ("D", 5, lambda x: x[:1]),
        ("no rows", 0, lambda x: x[:, :0]),
    ],
)
def test_wrong_arguments_are_refused(name: str, index: int, change: Any):
    given = inputs(2, 5, 4, 3)
    given[index] = change(given[index])
    with pytest.raises(ValueError, match=name):
        selective_scan(*given)


def test_wrong_states_and_segments_are_refused():
    given = inputs(2, 5, 4, 3)
    with pytest.raises(ValueError, match="initial_state"):
        selective_scan(*given, initial_state=torch.zeros(2, 3, 4))
    for cu in (torch.tensor([0.0, 5.0]), torch.tensor([0])):
        with pytest.raises(ValueError, match="cu_seqlens"):
            selective_scan(*given, cu_seqlens=cu)
