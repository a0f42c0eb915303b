"""`recurrent_step`: token after token it is the scans' recurrence; slots find their memories and leave all others alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.decay_linear_attention import reference as decay_reference
from kernels.gated_delta_rule import reference as delta_reference
from kernels.gla import reference as gla_reference
from kernels.recurrent_step import recurrent_step
from tests.tools import assert_close, same_bytes

pytestmark = pytest.mark.usefixtures("poison")

B, S, E, H, HV, K, V = 2, 3, 5, 2, 4, 6, 3
SCALE = 0.3
RULES = ("sum", "decay", "vector decay", "delta", "gated delta", "normalised")
ALL: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}


def _token(rule: str, dtype: torch.dtype = torch.float64, slots: int = S, time: int | None = None) -> dict[str, Tensor]:
    """Arguments of one step, leaves; with ``time`` those of a scan of that length for ``slots`` sequences."""
    lead = (B, slots) if time is None else (slots, time)
    shapes = {"q": (*lead, H, K), "k": (*lead, H, K), "v": (*lead, HV, V)}
    found = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    if rule == "vector decay":
        found["g"] = -torch.rand(*lead, H, K, dtype=dtype)
    elif rule in ("decay", "gated delta", "normalised"):
        found["g"] = -torch.rand(*lead, HV, dtype=dtype)
    if rule in ("delta", "gated delta", "normalised"):
        found["beta"] = torch.rand(*lead, HV, dtype=dtype)
        if rule != "normalised":
            found["k"] = torch.nn.functional.normalize(found["k"], dim=-1)
    return {name: t.requires_grad_() for name, t in found.items()}


def _state(dtype: torch.dtype = torch.float64, memories: int = S) -> Tensor:
    return torch.randn(B, memories, HV, K, V, dtype=dtype)


def _scan(rule: str, a: dict[str, Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    """The truth of the scan that has this rule."""
    q, k, v, g, beta = a["q"], a["k"], a["v"], a.get("g"), a.get("beta")
    if rule in ("sum", "decay"):
        return decay_reference.recurrent(q, k, v, g, SCALE, state, None)
    if rule == "vector decay":
        assert g is not None
        return gla_reference.recurrent(q, k, v, g, SCALE, state, None)
    return delta_reference.recurrent(q, k, v, g, beta, SCALE, state, None, rule == "normalised")


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_token_after_token_it_is_the_recurrence(rule: str, donate: bool):
    """One row of the batch, a memory per sequence; with gradients where nothing is donated."""
    time = 4
    args, start = _token(rule, time=time), _state().flatten(0, 1)[:S].requires_grad_()
    want = _scan(rule, args, start)
    with torch.set_grad_enabled(not donate):
        now, outs = start.clone()[None], []
        for t in range(time):
            token = {name: x[None, :, t] for name, x in args.items()}
            o, now = recurrent_step(state=now, **token, scale=SCALE, qk_l2norm=rule == "normalised", donate=donate)
            outs.append(o)
    got = (torch.cat(outs).transpose(0, 1), now[0])
    assert_close(got, want)
    if not donate:
        leaves, seeds = [*args.values(), start], [torch.randn_like(t) for t in want]
        assert_close(*(torch.autograd.grad(out, leaves, seeds) for out in (got, want)), "gradient")


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_slots_find_their_memories(rule: str, donate: bool, compiling: bool, monkeypatch: pytest.MonkeyPatch):
    """Slot s of row b is memory index[b, s]; -1 is none, and what no slot uses keeps its bytes."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)  # the form that does not look at values
    args, state = _token(rule), _state(memories=E)
    before, index = state.clone(), torch.tensor([[4, -1, 0], [-1, -1, 2]])
    more: dict[str, Any] = {"scale": SCALE, "qk_l2norm": rule == "normalised"}
    with torch.no_grad():
        o, after = recurrent_step(state=state, **args, **more, index=index, donate=donate)
        assert (after is state) == donate
        assert donate or same_bytes(state, before)
        for b in range(B):
            for e in range(E):
                if e not in index[b]:
                    assert same_bytes(after[b, e], before[b, e])
        for b, s in (index >= 0).nonzero().tolist():
            e = index[b, s]
            token = {name: x[b, s][None, None] for name, x in args.items()}
            want = recurrent_step(state=before[b, e][None, None], **token, **more)
            assert_close((o[b, s], after[b, e]), (want[0][0, 0], want[1][0, 0]))
    assert not o[index < 0].any()


@pytest.mark.parametrize("rule", ["vector decay", "normalised"])
@pytest.mark.parametrize("indexed", [False, True])
def test_gradcheck(rule: str, indexed: bool):
    args, state = _token(rule), _state(memories=E if indexed else S).requires_grad_()
    index = torch.tensor([[4, -1, 0], [1, 3, 2]]) if indexed else None

    def run(state: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        token = dict(zip(args, values, strict=True))
        return recurrent_step(state=state, **token, index=index, qk_l2norm=rule == "normalised", donate=True)

    before = state.detach().clone()
    assert torch.autograd.gradcheck(run, (state, *args.values()), fast_mode=True)
    assert same_bytes(state, before)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("donate", [False, True])
def test_dtypes(dtype: torch.dtype, state_dtype: torch.dtype, donate: bool):
    """Gates in fp32 beside tokens in any dtype; the state keeps its own."""
    token, state = _token("normalised", torch.float32), _state(state_dtype)
    token = {name: t.detach() if name in ("g", "beta") else t.detach().to(dtype) for name, t in token.items()}
    exact = {name: t.double() for name, t in token.items()}
    want = recurrent_step(state=state.double(), **exact, scale=SCALE, qk_l2norm=True)
    with torch.no_grad():
        got = recurrent_step(state=state, **token, scale=SCALE, qk_l2norm=True, donate=donate)
    assert [t.dtype for t in got] == [dtype, state_dtype]
    assert_close(got[0], want[0], "op", dtype)
    assert_close(got[1], want[1], "op", state_dtype)


def test_extremes():
    """Total and no forgetting, full and no writing, zero keys: finite, and equal to fp64."""
    for g in (0.0, -50.0, -1e4):
        for beta in (0.0, 1.0, 2.0):
            token, state = _token("normalised", torch.float32), _state(torch.float32)
            token = {name: t.detach() for name, t in token.items()}
            token["g"], token["beta"] = torch.full_like(token["g"], g), torch.full_like(token["beta"], beta)
            token["q"][:, 0], token["k"][:, 1] = 0, 0
            token["v"] *= 1e4
            want = recurrent_step(state=state.double(), **{n: t.double() for n, t in token.items()}, qk_l2norm=True)
            got = recurrent_step(state=state, **token, qk_l2norm=True)
            assert_close(got, want, "op", torch.float32)


def test_the_memory_of_a_state_in_another_layout_is_found():
    """A state that is a view of a larger tensor is written where it is."""
    token, whole = {n: t.detach() for n, t in _token("gated delta").items()}, torch.randn(B, S, HV, V, K).double()
    state = whole.mT
    before = state.clone()
    want = recurrent_step(state=before, **token)
    with torch.no_grad():
        o, after = recurrent_step(state=state, **token, donate=True)
    assert after is state
    assert_close((o, whole.mT), want)


def test_a_compiled_graph_is_whole_and_equal():
    args, state, index = (
        _token("normalised"),
        _state(memories=E).requires_grad_(),
        torch.tensor([[4, -1, 0], [1, 3, 2]]),
    )
    leaves = (state, *args.values())

    def run(state: Tensor, *values: Tensor) -> Tensor:
        o, after = recurrent_step(state=state, **dict(zip(args, values, strict=True)), index=index, qk_l2norm=True)
        return o.square().sum() + after.square().sum()

    want = torch.autograd.grad(run(*leaves), leaves)
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        compiled = torch.compile(run, fullgraph=True, backend=backend)
        assert_close(torch.autograd.grad(compiled(*leaves), leaves), want, "gradient")


def test_wrong_arguments_are_refused():
    token, state = {n: t.detach() for n, t in _token("gated delta").items()}, _state(memories=E)
    index = torch.zeros(B, S, dtype=torch.int64)
    with pytest.raises(TypeError, match="float"):
        recurrent_step(state=state, **token, index=index, scale=1)
    with pytest.raises(ValueError, match="slots"):
        recurrent_step(state=state, **token)
    with pytest.raises(ValueError, match="index"):
        recurrent_step(state=state, **token, index=index[:, :1])
    with pytest.raises(ValueError, match="state"):
        recurrent_step(state=state.mT, **token, index=index)
    with pytest.raises(ValueError, match="beta"):
        recurrent_step(state=state, **{**token, "beta": token["beta"][..., :1]}, index=index)
    with pytest.raises(ValueError, match="g must"):
        recurrent_step(state=state, **{**token, "g": token["g"][..., :1]}, index=index)
