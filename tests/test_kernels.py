"""Each op: the form that runs equals its definition, values and gradients; and the dispatch chooses and says why."""

from __future__ import annotations

import functools
import logging
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import cross_entropy, dispatch, rms_norm, rope, swiglu
from kernels.cross_entropy import reference as ce
from tests.tools import TOLERANCE, assert_close, rel_err

pytestmark = pytest.mark.usefixtures("poison")


@pytest.fixture(autouse=True)
def fresh_dispatch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dispatch, "counts", type(dispatch.counts)())
    monkeypatch.setattr(dispatch, "reasons", {})


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_()


# -- cross-entropy


def cross_entropy_inputs(N: int, K: int, V: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return random(N, K, dtype=dtype), random(V, K, dtype=dtype), torch.randint(V, (N,))


MASKS = {"none": lambda n: None, "some": lambda n: torch.arange(n) % 3 != 1, "all": lambda n: torch.zeros(n).bool()}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("N", [1, 16, 63, 65])
def test_chunked_cross_entropy_is_the_definition(N: int, mask: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ce, "CHUNK_LOGITS", 40)  # sixteen rows at a time
    h, w, targets = cross_entropy_inputs(N, 5, 7)
    keep = MASKS[mask](N)
    out, ref = ce.chunked(h, w, targets, keep), ce.whole(h, w, targets, keep)
    assert_close(out, ref)
    scale = torch.tensor(0.3, dtype=torch.float64)
    got, want = (torch.autograd.grad(loss * scale, (h, w)) for loss in (out, ref))
    assert_close(got, want, "gradient")
    if mask == "all":
        assert out == 0
        assert not got[0].any()


def test_cross_entropy_gradcheck(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ce, "CHUNK_LOGITS", 40)
    h, w, targets = cross_entropy_inputs(18, 3, 5)
    mask = torch.arange(18) % 4 != 0
    assert torch.autograd.gradcheck(lambda h, w: cross_entropy.linear_cross_entropy(h, w, targets, mask), (h, w))


def test_cross_entropy_of_large_logits_is_finite():
    h, w = torch.full((3, 2), 300.0), torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    out = cross_entropy.linear_cross_entropy(h, w, torch.tensor([0, 0, 1]))
    assert out == pytest.approx(1200.0)


def test_cross_entropy_in_autocast():
    h, w, targets = cross_entropy_inputs(40, 16, 50, torch.float32)
    rounded = ce.whole(h.bfloat16().double(), w.bfloat16().double(), targets)
    want = torch.autograd.grad(rounded, (h, w))
    with torch.autocast("cpu", torch.bfloat16):
        out = cross_entropy.linear_cross_entropy(h, w, targets)
    got = torch.autograd.grad(out, (h, w))
    limit = TOLERANCE["fp32", torch.bfloat16]
    assert out.dtype == torch.float32
    assert rel_err(out, rounded) < limit
    for a, b, leaf in zip(got, want, (h, w), strict=True):
        assert a.dtype == leaf.dtype
        assert rel_err(a, b) < limit


def test_cross_entropy_without_gradients():
    h, w, targets = cross_entropy_inputs(9, 4, 6)
    with torch.no_grad():
        assert_close(cross_entropy.linear_cross_entropy(h, w, targets), ce.whole(h, w, targets))
    frozen = cross_entropy.linear_cross_entropy(h, w.detach(), targets)
    assert_close(torch.autograd.grad(frozen, h), torch.autograd.grad(ce.whole(h, w.detach(), targets), h), "gradient")


def test_token_nll(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ce, "CHUNK_LOGITS", 40)
    h, w, targets = cross_entropy_inputs(35, 4, 6)
    nll, greedy = cross_entropy.token_nll(h, w, targets)
    log_p = (h @ w.T).log_softmax(-1)
    assert_close(nll, -log_p.gather(1, targets[:, None]).squeeze(1))
    assert torch.equal(greedy, log_p.argmax(-1) == targets)
    assert not nll.requires_grad
    empty, none = cross_entropy.token_nll(h[:0], w, targets[:0])
    assert len(empty) == len(none) == 0


# -- elementwise ops with a backward of their own


def rope_table(B: int, T: int, K: int) -> tuple[Tensor, Tensor]:
    angle = torch.rand(B, T, 1, K // 2, dtype=torch.float64)
    return angle.cos(), angle.sin()


split_rotate = functools.partial(rope.split_rotate, heads=3, kv_heads=1)
split_rotated = functools.partial(rope.reference.whole, heads=3, kv_heads=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_eager_forms_are_their_definitions(dtype: torch.dtype):
    x, weight = random(2, 5, 6, dtype=dtype), random(6, dtype=dtype)
    fused, (cos, sin) = random(2, 5, 5, 4, dtype=dtype), rope_table(2, 5, 4)
    thirds: list[Any] = [
        (lambda i=i: split_rotate(fused, cos, sin)[i], lambda i=i: split_rotated(fused, cos, sin)[i], (fused,))
        for i in range(3)
    ]
    ops = [
        (lambda: rms_norm.rms_norm(x, weight, 1e-5), lambda: rms_norm.reference.whole(x, weight, 1e-5), (x, weight)),
        (lambda: swiglu.swiglu(x), lambda: swiglu.reference.whole(x), (x,)),
        *thirds,
    ]
    for run, definition, inputs in ops:
        out, ref = run(), definition()
        grad = torch.randn_like(ref)
        limit = TOLERANCE["fp32" if dtype == torch.bfloat16 else "forms", dtype]
        assert out.dtype == ref.dtype
        assert rel_err(out, ref) <= limit
        pairs = zip(torch.autograd.grad(out, inputs, grad), torch.autograd.grad(ref, inputs, grad), strict=True)
        for a, b in pairs:
            assert a.dtype == b.dtype
            assert rel_err(a, b) <= limit


def test_eager_forms_gradcheck():
    x, weight = random(2, 3, 4), random(4)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm.rms_norm(x, w, 1e-5), (x, weight))
    assert torch.autograd.gradcheck(swiglu.swiglu, (x,))
    cos, sin = rope_table(2, 3, 4)
    fused = random(2, 3, 5, 4)
    assert torch.autograd.gradcheck(lambda h: split_rotate(h, cos, sin), (fused,))


def test_definitions_are_those_of_the_papers():
    x, weight = random(3, 4), random(4)
    assert_close(rms_norm.reference.whole(x, weight, 1e-5), F.rms_norm(x, (4,), weight, 1e-5))
    half = torch.tensor([[1.0, 0.0], [0.0, 1.0]])[None, :, None]  # two tokens at angle a, one head of width two
    a = torch.tensor(0.7)
    turned = rope.rotate(half, a.cos().view(1, 1, 1, 1), a.sin().view(1, 1, 1, 1))
    assert_close(turned[0, 0, 0], torch.stack((a.cos(), a.sin())), dtype=torch.float32)
    assert_close(turned[0, 1, 0], torch.stack((-a.sin(), a.cos())), dtype=torch.float32)


# -- dispatch


CPU = torch.device("cpu")


def test_auto_falls_back_once_with_a_reason(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with caplog.at_level(logging.INFO, "loci.kernels"), dispatch.use("auto"):
        for _ in range(3):
            assert dispatch.choose("op", CPU, lambda: None) == "reference"
        assert dispatch.choose("other", CPU, None) == "reference"
    assert dispatch.reasons == {"op": "tensors are on cpu", "other": "it has no Triton form"}
    said = [r.message for r in caplog.records if r.message.startswith("op:")]
    assert said == ["op: reference form, because tensors are on cpu"]
    assert dispatch.report() == {
        "op": {"reference": 3, "reason": "tensors are on cpu"},
        "other": {"reference": 1, "reason": "it has no Triton form"},
    }


def test_an_explicit_choice_is_met_or_fails(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with dispatch.use("triton"):
        assert dispatch.choose("op", CPU, lambda: None) == "triton"
        with pytest.raises(dispatch.KernelUnavailable, match="op: no Triton kernel: heads are odd"):
            dispatch.choose("op", CPU, lambda: "heads are odd")
        assert not dispatch.reasons, "a choice is no fall-back"
        assert torch.isfinite(cross_entropy.linear_cross_entropy(*cross_entropy_inputs(2, 3, 4)))
        assert dispatch.reasons == {"linear_cross_entropy": "it has no Triton form"}
        with dispatch.use("reference"):
            assert dispatch.choose("op", CPU, lambda: None) == "reference"
        assert dispatch.setting() == "triton"
    assert dispatch.counts == {("op", "triton"): 1, ("op", "reference"): 1, ("linear_cross_entropy", "reference"): 1}
    with dispatch.use("auto"):
        assert dispatch.choose("op", CPU, lambda: None) == "triton"
    with pytest.raises(dispatch.KernelUnavailable, match="valid: auto, reference, triton"), dispatch.use("tritn"):
        pass


def test_the_setting_comes_from_the_environment():
    program = "from kernels import dispatch; print(dispatch.setting())"
    for value, said in (("reference", "reference\n"), (None, "auto\n")):
        env = {k: v for k, v in os.environ.items() if k != "KERNELS"} | ({"KERNELS": value} if value else {})
        done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
        assert done.stdout == said, done.stderr


def test_dispatch_leaves_the_graph_whole():
    """Under torch.compile the choice is made while tracing, once, and is counted."""

    def op(x: Tensor) -> Tensor:
        width = x.shape[-1]
        backend = dispatch.choose("toy", x.device, lambda: "width is odd" if width % 2 else None)
        return x + 1 if backend == "reference" else x - 1

    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend="eager")
    x = torch.zeros(3)
    assert torch.equal(compiled(x), compiled(x))
    assert torch.equal(compiled(x), x + 1)
    assert dispatch.counts == {("toy", "reference"): 1}
    h, w, targets = cross_entropy_inputs(20, 4, 6)
    loss = torch.compile(cross_entropy.linear_cross_entropy, fullgraph=True, backend="eager")(h, w, targets)
    assert_close(torch.autograd.grad(loss, (h, w)), torch.autograd.grad(ce.whole(h, w, targets), (h, w)), "gradient")
