"""`gla` by Triton: outputs, final state and every gradient against the token-by-token definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.gla import gla, reference
from tests.tools import TOLERANCE, assert_close, rel_err

# B, T, H, HV, K, V, lengths of segments (None: whole rows)
Shape = tuple[int, int, int, int, int, int, list[int] | None]
SHAPES: dict[str, Shape] = {
    "one": (1, 1, 1, 1, 16, 16, None),
    "odd": (2, 63, 1, 2, 60, 32, None),
    "chunks": (1, 130, 1, 1, 32, 64, None),
    "groups": (1, 65, 1, 5, 64, 16, None),
    "ragged": (2, 51, 2, 2, 32, 32, [0, 1, 63, 0, 16, 17, 0]),
    "wide": (1, 70, 1, 1, 128, 128, None),
    "widest": (1, 66, 1, 1, 256, 48, None),
}
DECAYS = ("none", "tokens", "strong", "resets")


def run(dtype: torch.dtype, setting: str, inputs: list[Tensor], seeds: list[Tensor], cu: Tensor | None):
    leaves = [x.to(dtype if i < 3 else x.dtype).requires_grad_() for i, x in enumerate(inputs)]
    q, k, v, g, h0 = leaves
    with dispatch.use(setting):
        if setting == "reference":
            o, state = reference.recurrent(q, k, v, g, q.shape[-1] ** -0.5, h0, cu)
        else:
            o, state = gla(q, k, v, g, initial_state=h0, output_final_state=True, cu_seqlens=cu)
        assert state is not None
        grads = torch.autograd.grad((o, state), leaves, [s.to(x.dtype) for s, x in zip(seeds, (o, state), strict=True)])
    return [o, state], dict(zip("qkvgh", grads, strict=True))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_definition(shape: str, dtype: torch.dtype, decay: str, device: torch.device):
    if dtype == torch.float32 and SHAPES[shape][4] > 64:
        pytest.skip("not dispatched to Triton")
    check(SHAPES[shape], dtype, decay, device)


@pytest.mark.parametrize("decay", ["tokens", "resets"])
def test_many_chunks(decay: str, device: torch.device):
    check((1, 500, 1, 1, 16, 16, None), torch.bfloat16, decay, device)


def check(shape: Shape, dtype: torch.dtype, decay: str, device: torch.device):
    B, T, H, HV, K, V, lengths = shape
    cu = None
    if lengths is not None:
        cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
    segments = B if lengths is None else len(lengths)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, device=device)

    often = torch.rand(B, T, H, K, device=device)
    g = {
        "none": torch.zeros(B, T, H, K, device=device),
        "tokens": -often,
        "strong": -60 * often.round(),
        "resets": torch.where(often < 0.1, -1e4, -often / 8),
    }[decay]
    inputs = [random(B, T, H, K), random(B, T, H, K), random(B, T, HV, V), g, random(segments, HV, K, V)]
    rounded = [x if i >= 3 else x.to(dtype) for i, x in enumerate(inputs)]
    seeds = [random(B, T, HV, V).to(dtype).float(), random(segments, HV, K, V)]
    outs, grads = run(dtype, "triton", rounded, seeds, cu)
    exact = [x.double() for x in rounded]
    want, want_grads = run(torch.float64, "reference", exact, [s.double() for s in seeds], cu)
    for got, ref in zip(outs, want, strict=True):
        assert rel_err(got, ref) <= TOLERANCE["op", dtype]
    for name, ref in want_grads.items():
        assert grads[name].isfinite().all(), name
        assert rel_err(grads[name], ref) <= TOLERANCE["gate gradient" if name == "g" else "op gradient", dtype], name
    assert dispatch.counts["gla", "triton"] > 0
    if cu is not None:
        for x in (outs[0], *(grads[name] for name in "qkvg")):
            assert not x.flatten(0, 1)[int(cu[-1]) :].any()


def test_ends_of_segments_in_another_layout(device: torch.device):
    q, k, v = (torch.randn(1, 20, 2, 32, device=device) for _ in range(3))
    g, ends = -torch.rand(1, 20, 2, 32, device=device), torch.tensor([[0, 5, 20], [9, 9, 9]], device=device)
    o, _ = gla(q, k, v, g, cu_seqlens=ends.T.contiguous().T[0])
    assert torch.equal(o, gla(q, k, v, g, cu_seqlens=ends[0])[0])


def test_inputs_of_any_layout(device: torch.device):
    """q, k and g out of one projection, transposed states and a transposed gradient of the final one are read as what they are."""
    q, k, g = torch.randn(1, 20, 3, 2, 32, device=device).unbind(2)
    v = torch.randn(1, 2, 20, 32, device=device).transpose(1, 2)
    state, seed = (torch.randn(1, 2, 32, 32, device=device).mT for _ in range(2))
    inputs, seeds = [q, k, v, -g.abs(), state], [torch.randn(1, 2, 20, 32, device=device).transpose(1, 2), seed]
    outs, grads = run(torch.float32, "triton", inputs, seeds, None)
    want, want_grads = run(torch.float64, "reference", [x.double() for x in inputs], [s.double() for s in seeds], None)
    assert all(rel_err(a, b) <= TOLERANCE["op", torch.float32] for a, b in zip(outs, want, strict=True))
    assert all(rel_err(grads[n], ref) <= TOLERANCE["op gradient", torch.float32] for n, ref in want_grads.items())


def test_rows_of_one_token_that_were_transposed(device: torch.device):
    """[1, B] turned into [B, 1]: PyTorch calls it contiguous, though the stride of its tokens is that of the whole."""
    q, k, v, g, seed = (torch.randn(1, 3, 2, 16, device=device).transpose(0, 1) for _ in range(5))
    inputs, seeds = (
        [q, k, v, -g.abs(), torch.randn(3, 2, 16, 16, device=device)],
        [seed, torch.randn(3, 2, 16, 16, device=device)],
    )
    outs, grads = run(torch.float32, "triton", inputs, seeds, None)
    want, want_grads = run(torch.float64, "reference", [x.double() for x in inputs], [s.double() for s in seeds], None)
    assert all(rel_err(a, b) <= TOLERANCE["op", torch.float32] for a, b in zip(outs, want, strict=True))
    assert all(rel_err(grads[n], ref) <= TOLERANCE["op gradient", torch.float32] for n, ref in want_grads.items())


def test_infinite_decays(device: torch.device):
    """g = -inf forgets all, and leaves the rows after it as exact as if they came first."""
    T, cut = 75, 37
    q, k, v, g = (torch.randn(1, T, 1, 32, device=device) for _ in range(4))
    g = -g.abs() / 8
    g[:, cut] = float("-inf")
    leaves = [x.requires_grad_() for x in (q, k, v, g, torch.randn(1, 1, 32, 32, device=device))]
    o, state = gla(*leaves[:4], initial_state=leaves[4], output_final_state=True)
    late, last = gla(*(x[:, cut:] for x in leaves[:4]), output_final_state=True)
    assert state is not None
    assert last is not None
    assert rel_err(o[:, cut:], late) <= TOLERANCE["op", torch.float32]
    assert rel_err(state, last) <= TOLERANCE["op", torch.float32]
    grads = torch.autograd.grad(state.square().sum(), leaves)
    assert all(x.isfinite().all() for x in grads)
    assert not any(x[:, :cut].any() for x in grads[1:3])  # of k and v that are forgotten
    assert not grads[4].any()


def test_nothing_but_empty_segments(device: torch.device):
    q, k, v, g = (torch.randn(1, 3, 1, 16, device=device, requires_grad=True) for _ in range(4))
    state = torch.randn(2, 1, 16, 16, device=device, requires_grad=True)
    cu = torch.zeros(3, dtype=torch.int64, device=device)
    o, final = gla(q, k, v, g, initial_state=state, output_final_state=True, cu_seqlens=cu)
    assert final is not None
    assert not o.any()
    assert torch.equal(final, state)
    *grads, dstate = torch.autograd.grad(o.sum() + final.sum(), (q, k, v, g, state))
    assert not any(x.any() for x in grads)
    assert (dstate == 1).all()


def test_what_nobody_asks_for(device: torch.device):
    """Without a backward nothing is kept, and the numbers are the same; a gate without a gradient changes no other gradient."""
    q, k, v, g = (torch.randn(2, 40, 1, 16, device=device) for _ in range(4))
    g = -g.abs()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o, nothing = gla(q, k, v, g)
    assert nothing is None
    with torch.no_grad():
        assert torch.equal(gla(q, k, v, g)[0], o)
    seed = torch.randn_like(o)
    grads = torch.autograd.grad(o, leaves, seed)
    gate = g.clone().requires_grad_()
    again = torch.autograd.grad(gla(q, k, v, gate)[0], [*leaves, gate], seed)
    assert all(torch.equal(a, b) for a, b in zip(grads, again[:3], strict=True))
    assert again[3].any()


def test_what_it_refuses(device: torch.device):
    wide, exact = (
        torch.randn(1, 3, 1, n, dtype=t, device=device) for n, t in ((128, torch.float32), (16, torch.float64))
    )
    with pytest.raises(dispatch.KernelUnavailable, match="K is 128, above 64"):
        gla(wide, wide, wide, wide)
    with pytest.raises(dispatch.KernelUnavailable, match="float64"):
        gla(exact, exact, exact, exact)


def test_a_compiled_graph_is_whole_and_equal(device: torch.device):
    inputs = [torch.randn(2, 40, 1, 16, device=device, requires_grad=True) for _ in range(4)]
    cu = torch.tensor([0, 5, 5, 70], device=device)

    def loss(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        o, state = gla(q, k, v, -g.abs(), output_final_state=True, cu_seqlens=cu)
        assert state is not None
        return o.square().sum() + state.square().sum()

    want = torch.autograd.grad(loss(*inputs), inputs)
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=backend)(*inputs), inputs)
        assert_close(got, want, "same", torch.float32)
