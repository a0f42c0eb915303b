"""The kernel of `recurrent_step` against the reference in fp64: every rule, slots and memories, in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.recurrent_step import MAX_WIDTH, recurrent_step, reference
from tests.tools import assert_close, same_bytes

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RULES = ("sum", "decay", "vector decay", "delta", "gated delta", "normalised")
B, S, E = 2, 3, 5
SCALE = 0.3


def _token(
    rule: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    heads: tuple[int, int] = (2, 4),
    k: int = 6,
    v: int = 10,
) -> dict[str, Tensor]:
    """Arguments of one step; gates in fp32."""
    shapes = {"q": (heads[0], k), "k": (heads[0], k), "v": (heads[1], v)}
    found = {name: torch.randn(B, S, *shape, device=device).to(dtype) for name, shape in shapes.items()}
    if rule == "vector decay":
        found["g"] = -torch.rand(B, S, heads[0], k, device=device)
    elif rule in ("decay", "gated delta", "normalised"):
        found["g"] = -torch.rand(B, S, heads[1], device=device)
    if rule in ("delta", "gated delta", "normalised"):
        found["beta"] = torch.rand(B, S, heads[1], device=device)
    return found


def _state(token: dict[str, Tensor], memories: int, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = token["v"].shape[2], token["k"].shape[3], token["v"].shape[3]
    return torch.randn(B, memories, *shape, device=token["v"].device).to(dtype)


def _truth(token: dict[str, Tensor], state: Tensor, index: Tensor | None, norm: bool) -> tuple[Tensor, Tensor]:
    q, k, v, g, beta = (None if (x := token.get(n)) is None else x.double() for n in ("q", "k", "v", "g", "beta"))
    assert q is not None
    assert k is not None
    assert v is not None
    return reference.step(q, k, v, state.double(), g, beta, SCALE, index, norm, False)


@torch.no_grad()
def _check(rule: str, token: dict[str, Tensor], state: Tensor, index: Tensor | None, donate: bool) -> None:
    norm, before = rule == "normalised", state.clone()
    want, count = _truth(token, state, index, norm), dispatch.counts["recurrent_step", "triton"]
    more: dict[str, Any] = {"scale": SCALE, "index": index, "qk_l2norm": norm, "donate": donate}
    o, after = recurrent_step(state=state, **token, **more)
    assert dispatch.counts["recurrent_step", "triton"] == count + 1
    assert (o.dtype, after.dtype) == (token["v"].dtype, state.dtype)
    assert (after is state) == donate
    assert donate or same_bytes(state, before)
    assert_close(o, want[0], "op", o.dtype)
    assert_close(after, want[1], "op", after.dtype)
    if index is not None:
        assert not o[index < 0].any()
        for b in range(len(index)):
            for e in range(state.shape[1]):
                assert e in index[b] or same_bytes(after[b, e], before[b, e])


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_rules_and_slots(rule: str, donate: bool, device: torch.device):
    token = _token(rule, device)
    _check(rule, token, _state(token, S), None, donate)
    index = torch.tensor([[4, -1, 0], [-1, -1, 2]], device=device)
    _check(rule, token, _state(token, E), index, donate)
    _check(rule, token, _state(token, E), index.int(), donate)


@pytest.mark.parametrize("state_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype, state_dtype: torch.dtype | None, device: torch.device):
    token = _token("normalised", device, dtype)
    _check("normalised", token, _state(token, S, state_dtype or dtype), None, True)


@pytest.mark.parametrize(
    ("heads", "k", "v"), [((1, 1), 16, 32), ((1, 3), 1, 1), ((2, 2), 60, 33), ((1, 2), 256, 8)], ids=str
)
@pytest.mark.parametrize("full", [1, 1 << 30], ids=["wide tiles", "narrow tiles"])
def test_widths(
    heads: tuple[int, int], k: int, v: int, full: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
):
    """Every tile of V that dispatch can choose, and widths that it does not divide."""
    monkeypatch.setattr(pytest.importorskip("kernels.recurrent_step.triton"), "FULL", full)
    for rule in ("vector decay", "normalised"):
        token = _token(rule, device, heads=heads, k=k, v=v)
        _check(rule, token, _state(token, S), None, True)


def test_slices_of_a_projection_and_a_state_in_another_layout(device: torch.device):
    token = _token("gated delta", device)
    wide = torch.cat([token[n].flatten(2) for n in ("q", "k", "v")], -1)
    parts = wide.split([12, 12, 40], -1)
    sliced = {n: x.unflatten(2, token[n].shape[2:]) for n, x in zip(("q", "k", "v"), parts, strict=True)}
    state = _state(token, S).mT.contiguous().mT
    _check("gated delta", {**token, **sliced}, state, None, True)


def test_rows_of_one_token_that_were_transposed(device: torch.device):
    """[1, B] turned into [B, 1]: PyTorch calls it contiguous, though the stride of its tokens is that of the whole."""
    token = {n: x.flatten(0, 1)[None].transpose(0, 1) for n, x in _token("gated delta", device).items()}
    assert token["q"].is_contiguous()
    assert token["q"].stride(1) != token["q"].stride(0)
    _check("gated delta", token, _state(token, S).flatten(0, 1)[:, None], None, True)


@pytest.mark.parametrize("g", [0.0, -50.0, -1e4])
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_extremes(g: float, beta: float, device: torch.device):
    token = _token("normalised", device)
    token["g"].fill_(g)
    token["beta"].fill_(beta)
    token["q"][:, 0], token["k"][:, 1] = 0, 0
    token["v"] *= 1e4
    _check("normalised", token, _state(token, S), None, True)


def test_a_recorded_step_is_the_reference(device: torch.device):
    token = _token("gated delta", device)
    state = _state(token, S).requires_grad_()
    before = state.detach().clone()
    o, after = recurrent_step(state=state, **token, donate=True)
    (o.sum() + after.sum()).backward()
    assert same_bytes(state, before)


@torch.no_grad()
def test_what_has_no_kernel_is_refused(device: torch.device):
    token = {n: t.double() for n, t in _token("sum", device).items()}
    with pytest.raises(dispatch.KernelUnavailable, match="float64"):
        recurrent_step(state=_state(token, S).double(), **token)
    token = _token("sum", device, heads=(1, 1), k=MAX_WIDTH + 1, v=1)
    with pytest.raises(dispatch.KernelUnavailable, match="K is"):
        recurrent_step(state=_state(token, S), **token)


@torch.no_grad()
@pytest.mark.parametrize("donate", [False, True])
def test_a_compiled_graph_is_whole_and_equal(donate: bool, device: torch.device):
    token, index = _token("normalised", device), torch.tensor([[4, -1, 0], [1, 3, 2]], device=device)
    start = _state(token, E)

    def run(state: Tensor) -> tuple[Tensor, Tensor]:
        return recurrent_step(state=state, **token, index=index, qk_l2norm=True, donate=donate)

    want = run(start.clone())
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        state = start.clone()
        got = torch.compile(run, fullgraph=True, backend=backend)(state)
        assert_close(got, want, "op", torch.float32)
        assert same_bytes(state, want[1] if donate else start)
