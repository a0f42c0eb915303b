"""`decay_linear_attention` by Triton: outputs, final state and every gradient against the token-by-token definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.decay_linear_attention import decay_linear_attention, reference
from tests.tools import TOLERANCE, rel_err

# B, T, H, HV, K, V, lengths of segments (None: whole rows)
SHAPES = {
    "one": (1, 1, 1, 1, 16, 16, None),
    "odd": (2, 33, 1, 2, 60, 32, None),
    "chunks": (1, 130, 1, 1, 32, 64, None),
    "groups": (1, 20, 1, 5, 64, 16, None),
    "ragged": (1, 101, 2, 2, 32, 32, [0, 1, 63, 0, 16, 17]),
    "wide": (1, 40, 1, 1, 128, 64, None),
    "widest": (1, 70, 1, 2, 256, 40, None),
}


def run(dtype: torch.dtype, setting: str, inputs: list[Tensor | None], seeds: list[Tensor], cu: Tensor | None):
    leaves = [None if x is None else x.to(dtype if i < 3 else x.dtype).requires_grad_() for i, x in enumerate(inputs)]
    q, k, v, g, h0 = leaves
    with dispatch.use(setting):
        if setting == "reference":
            o, state = reference.recurrent(q, k, v, g, q.shape[-1] ** -0.5, h0, cu)
        else:
            o, state = decay_linear_attention(q, k, v, g, initial_state=h0, output_final_state=True, cu_seqlens=cu)
        assert state is not None
        given = [x for x in leaves if x is not None]
        grads = torch.autograd.grad((o, state), given, [s.to(x.dtype) for s, x in zip(seeds, (o, state), strict=True)])
    return [o, state], dict(zip((n for n, x in zip("qkvgh", leaves, strict=True) if x is not None), grads, strict=True))


@pytest.mark.parametrize("decay", ["none", "constant", "tokens", "strong"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_definition(shape: str, dtype: torch.dtype, decay: str, device: torch.device):
    B, T, H, HV, K, V, lengths = SHAPES[shape]
    if dtype == torch.float32 and K > 64:
        pytest.skip("not dispatched to Triton")
    cu = None
    if lengths is not None:
        cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
    segments = B if lengths is None else len(lengths)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, device=device)

    g = {
        "none": None,
        "constant": -torch.rand(HV, device=device),
        "tokens": -torch.rand(B, T, HV, device=device),
        "strong": -60 * torch.rand(B, T, HV, device=device).round(),
    }[decay]
    inputs = [random(B, T, H, K), random(B, T, H, K), random(B, T, HV, V), g, random(segments, HV, K, V)]
    rounded = [x if x is None or i >= 3 else x.to(dtype) for i, x in enumerate(inputs)]
    seeds = [random(B, T, HV, V).to(dtype).float(), random(segments, HV, K, V)]
    outs, grads = run(dtype, "triton", rounded, seeds, cu)
    exact = [None if x is None else x.double() for x in rounded]
    want, want_grads = run(torch.float64, "reference", exact, [s.double() for s in seeds], cu)
    limit = 1e-5 if dtype == torch.float32 else TOLERANCE["op", dtype]
    for got, ref in zip(outs, want, strict=True):
        assert rel_err(got, ref) <= limit
    for name, ref in want_grads.items():
        purpose = "gate gradient" if name == "g" else "op gradient"
        assert grads[name].isfinite().all()
        scale = 1.0 if ref.abs().max() > 1e-6 else 0.0  # where all is forgotten at once nothing is left to compare
        assert rel_err(grads[name], ref) * scale <= max(TOLERANCE.get((purpose, dtype), 1e-5), 1e-5), name
    assert dispatch.counts["decay_linear_attention", "triton"] > 0
    if cu is not None:
        assert not outs[0].flatten(0, 1)[int(cu[-1]) :].any()
        assert not grads["q"].flatten(0, 1)[int(cu[-1]) :].any()


def test_ends_of_segments_in_another_layout(device: torch.device):
    q, k, v = (torch.randn(1, 20, 2, 32, device=device) for _ in range(3))
    g, ends = -torch.rand(1, 20, 2, device=device), torch.tensor([[0, 5, 20], [9, 9, 9]], device=device)
    o, _ = decay_linear_attention(q, k, v, g, cu_seqlens=ends.T.contiguous().T[0])
    assert torch.equal(o, decay_linear_attention(q, k, v, g, cu_seqlens=ends[0])[0])


def test_states_of_any_layout(device: torch.device):
    """A transposed state, and a transposed gradient of the final one, are read as what they are."""
    q, k, v = (torch.randn(1, 20, 2, 32, device=device) for _ in range(3))
    g = -torch.rand(1, 20, 2, device=device)
    state, seed = (torch.randn(1, 2, 32, 32, device=device).mT for _ in range(2))
    inputs, seeds = [q, k, v, g, state], [torch.randn_like(v), seed]
    outs, grads = run(torch.float32, "triton", inputs, seeds, None)
    want, want_grads = run(torch.float64, "reference", [x.double() for x in inputs], [s.double() for s in seeds], None)
    assert all(rel_err(a, b) <= 1e-5 for a, b in zip(outs, want, strict=True))
    assert all(rel_err(grads[name], ref) <= 1e-5 for name, ref in want_grads.items())
