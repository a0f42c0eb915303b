"""The kernels of `causal_conv1d` against the reference: tiles that segments cross, states, gradients, steps in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.causal_conv1d import causal_conv1d, causal_conv1d_step, reference
from tests.tools import assert_close, same_bytes

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LENGTHS = [[40], [0, 4, 0, 1, 5, 0, 32], [1, 2, 3, 4, 0], [0, 0, 1], [17, 3, 49]]
ALL: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}


@pytest.fixture(autouse=True)
def tiles(monkeypatch: pytest.MonkeyPatch):
    """Small ones, so that little cases have several."""
    triton = pytest.importorskip("kernels.causal_conv1d.triton")
    for name, value in {"ROWS": 16, "CHANNELS": 16, "BACK": 32}.items():
        monkeypatch.setattr(triton, name, value)


def _case(
    rows: int, segments: int, width: int, device: torch.device, dtype: torch.dtype = torch.float32, channels: int = 5
) -> list[Tensor]:
    """-> x [1, rows, C], weight, bias, initial state, leaves."""
    shapes = (1, rows, channels), (channels, width), (channels,), (segments, width - 1, channels)
    return [torch.randn(s, device=device).to(dtype).requires_grad_() for s in shapes]


def _ends(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)


def _both(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, cu: Tensor | None, silu: bool, used: list[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs ``used`` and gradients, by Triton and by the fp64 truth."""
    found = []
    for exact in (False, True):
        leaves = [None if t is None else t.detach() for t in (x, weight, bias, state)]
        leaves = [None if t is None else (t.double() if exact else t).requires_grad_() for t in leaves]
        if exact:
            outs = reference.recurrent(leaves[0], leaves[1], leaves[2], silu, leaves[3], cu)
        else:
            more: dict[str, Any] = {"activation": "silu" if silu else None, "initial_state": leaves[3]}
            outs = causal_conv1d(*leaves[:3], **more, cu_seqlens=cu, output_final_state=True)
        seeds = [torch.cos(torch.arange(o.numel(), device=o.device)).view_as(o).to(o.dtype) for o in outs]
        present = [t for t in leaves if t is not None]
        grads = torch.autograd.grad([outs[i] for i in used], present, [seeds[i] for i in used], **ALL)
        found.append((list(outs), list(grads)))
    (outs, grads), (want, want_grads) = found
    assert {t.dtype for t in (*outs, *grads)} == {x.dtype}
    assert_close(outs, want, "op", x.dtype)
    return grads, want_grads


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("silu", "whole"), [(True, True), (False, False)])
def test_segments(lengths: list[int], width: int, silu: bool, whole: bool, device: torch.device):
    """``whole``: with bias and initial state. Three rows of no segment stand at the end."""
    cu = _ends(lengths, device)
    x, weight, bias, state = _case(int(cu[-1]) + 3, len(lengths), width, device)
    for used in ([0, 1], [0], [1]) if width == 3 else ([0, 1],):
        grads = _both(x, weight, bias if whole else None, state if whole else None, cu, silu, used)
        assert_close(*grads, "op gradient", torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [16, 21])
def test_dtypes_and_rows(dtype: torch.dtype, channels: int, device: torch.device):
    """Rows of equal length, several tiles of channels."""
    x, weight, bias, state = _case(2 * 21, 2, 4, device, dtype, channels)
    x = x.detach().view(2, 21, channels)
    before = dispatch.counts["causal_conv1d", "triton"]
    grads = _both(x, weight, bias, state, None, True, [0, 1])
    assert_close(*grads, "op gradient", dtype)
    assert dispatch.counts["causal_conv1d", "triton"] == before + 1


def test_channels_of_a_wider_projection_are_read_where_they_are(device: torch.device):
    x, weight, bias, _ = (t.detach() for t in _case(20, 1, 4, device, channels=15))
    wide = x.view(2, 10, 15)
    with dispatch.use("reference"):
        want = causal_conv1d(wide[..., 5:10].contiguous(), weight[:5], bias[:5])
    assert_close(causal_conv1d(wide[..., 5:10], weight[:5], bias[:5]), want, "op", torch.float32)
    assert_close(causal_conv1d(wide.mT.contiguous().mT[..., 5:10], weight[:5], bias[:5]), want, "op", torch.float32)


@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.float32, 1), (torch.float32, 2), *((t, 4) for t in DTYPES)], ids=str
)
@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("indexed", [False, True])
def test_step(dtype: torch.dtype, width: int, donate: bool, indexed: bool, device: torch.device):
    """Of several memories per row; those without a slot keep their bytes."""
    x = torch.randn(2, 3, 21, device=device).to(dtype)
    weight, bias = torch.randn(21, width, device=device), torch.randn(21, device=device)
    index = torch.tensor([[2, -1, 0], [-1, -1, 3]], device=device) if indexed else None
    state = torch.randn(2, 4 if indexed else 3, width - 1, 21, device=device).to(dtype)
    before, count = state.clone(), dispatch.counts["causal_conv1d_step", "triton"]
    want = reference.step(x.double(), weight.double(), bias.double(), state.double(), True, index, False)
    with torch.no_grad():
        y, after = causal_conv1d_step(x, weight, bias, state, activation="silu", index=index, donate=donate)
    assert dispatch.counts["causal_conv1d_step", "triton"] == count + 1
    assert (after is state) == donate
    assert donate or same_bytes(state, before)
    assert_close((y, after), want, "op", dtype)
    assert same_bytes(after.double(), want[1])  # inputs are copied, never rounded
    if index is not None:
        assert not y[index < 0].any()


def test_a_recorded_step_is_the_reference(device: torch.device):
    x, weight, _, state = _case(3, 3, 4, device)
    before = state.detach().clone()
    y, after = causal_conv1d_step(x, weight, None, state[None], donate=True)
    (y.sum() + after.square().sum()).backward()
    assert same_bytes(state, before)


def test_a_state_in_another_layout(device: torch.device):
    x, weight, _, state = (t.detach() for t in _case(3, 3, 4, device))
    layout = state[None].mT.contiguous().mT
    with torch.no_grad():
        want = causal_conv1d_step(x, weight, None, state[None])
        y, after = causal_conv1d_step(x, weight, None, layout, donate=True)
    assert after is layout
    assert_close((y, layout), want, "op", torch.float32)


def test_fp64_is_refused(device: torch.device):
    x, weight, _, _ = (t.detach() for t in _case(3, 1, 2, device))
    with pytest.raises(dispatch.KernelUnavailable, match="float64"):
        causal_conv1d(x.double(), weight.double())


def test_a_compiled_graph_is_whole_and_equal(device: torch.device):
    x, weight, bias, state = _case(9, 2, 3, device)
    cu = _ends([4, 5], device)

    def run(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> Tensor:
        more: dict[str, Any] = {"initial_state": state, "output_final_state": True, "cu_seqlens": cu}
        y, after = causal_conv1d(x, weight, bias, activation="silu", **more)
        with torch.no_grad():
            step, _ = causal_conv1d_step(y.detach()[:, :2], weight, bias, after.detach()[None], donate=True)
        return y.square().sum() + after.square().sum() + step.sum()

    want = run(x, weight, bias, state)
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        got = torch.compile(run, fullgraph=True, backend=backend)(x, weight, bias, state)
        assert_close(got, want, "op", torch.float32)
        leaves = (x, weight, bias, state)
        grads = [torch.autograd.grad(out, leaves, retain_graph=True) for out in (got, want)]
        assert_close(*grads, "op gradient", torch.float32)
