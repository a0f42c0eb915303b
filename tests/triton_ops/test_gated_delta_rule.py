"""`gated_delta_rule` by Triton: outputs, final state and every gradient against the token-by-token definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.gated_delta_rule import gated_delta_rule, reference
from tests.tools import TOLERANCE, rel_err

# B, T, H, HV, K, V, lengths of segments (None: whole rows)
SHAPES = {
    "one": (1, 1, 1, 1, 16, 16, None),
    "odd": (2, 33, 1, 2, 60, 32, None),
    "chunks": (1, 130, 1, 1, 32, 64, None),
    "groups": (1, 20, 1, 4, 64, 16, None),
    "ragged": (1, 101, 1, 2, 32, 32, [0, 1, 63, 0, 16, 17]),
    "long-segments": (2, 66, 1, 1, 16, 32, [64, 0, 65]),
    "wide": (1, 40, 1, 1, 128, 128, None),
    "widest": (1, 36, 1, 1, 256, 256, None),
}
NAMES = ("q", "k", "v", "g", "beta", "initial")


def run(inputs: list[Tensor | None], seeds: list[Tensor], cu: Tensor | None, norm: bool, exact: bool):
    """-> (outputs, gradients by name); ``exact``: by the definition in fp64."""
    leaves = [None if x is None else (x.double() if exact else x.clone()).requires_grad_() for x in inputs]
    q, k, v, g, beta, h0 = leaves
    if exact:
        outs = reference.recurrent(q, k, v, g, beta, q.shape[-1] ** -0.5, h0, cu, norm)
    else:
        outs = gated_delta_rule(
            q, k, v, g, beta, initial_state=h0, output_final_state=True, cu_seqlens=cu, qk_l2norm=norm
        )
    given = {n: x for n, x in zip(NAMES, leaves, strict=True) if x is not None}
    grads = torch.autograd.grad(outs, list(given.values()), [s.to(o.dtype) for s, o in zip(seeds, outs, strict=True)])
    return outs, dict(zip(given, grads, strict=True))


def compare(inputs: list[Tensor | None], seeds: list[Tensor], cu: Tensor | None, norm: bool, dtype: torch.dtype):
    outs, grads = run(inputs, seeds, cu, norm, exact=False)
    want, want_grads = run(inputs, seeds, cu, norm, exact=True)
    for got, ref in zip(outs, want, strict=True):
        assert rel_err(got, ref) <= (1e-5 if dtype == torch.float32 else TOLERANCE["op", dtype])
    for name, ref in want_grads.items():
        purpose = "gate gradient" if name in ("g", "beta") else "op gradient"
        assert grads[name].isfinite().all(), name
        if ref.norm() > 1e-12:
            limit = 1e-5 if dtype == torch.float32 else TOLERANCE[purpose, dtype]
            assert rel_err(grads[name], ref) <= limit, name
    if cu is not None:
        assert not outs[0].flatten(0, 1)[int(cu[-1]) :].any()
        for name in ("q", "k", "v"):
            assert not grads[name].flatten(0, 1)[int(cu[-1]) :].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", [True, False], ids=["normalised", "given"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_definition(shape: str, norm: bool, dtype: torch.dtype, device: torch.device):
    B, T, H, HV, K, V, lengths = SHAPES[shape]
    if dtype == torch.float32 and K > 64:
        pytest.skip("not dispatched to Triton")
    cu = None
    if lengths is not None:
        cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
    segments = B if lengths is None else len(lengths)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, device=device)

    q, k = random(B, T, H, K), random(B, T, H, K)
    if not norm:
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    gates = -torch.rand(B, T, HV, device=device), torch.rand(B, T, HV, device=device)
    inputs = [q.to(dtype), k.to(dtype), random(B, T, HV, V).to(dtype), *gates, random(segments, HV, K, V)]
    seeds = [random(B, T, HV, V).to(dtype).float(), random(segments, HV, K, V)]
    compare(inputs, seeds, cu, norm, dtype)
    assert dispatch.counts["gated_delta_rule", "triton"] > 0


@pytest.mark.parametrize(
    "extreme", ["no decay", "no gates", "strong", "forgets all", "beta 0", "beta 1", "beta 2", "zero keys", "one key"]
)
def test_extremes(extreme: str, device: torch.device):
    B, T, HV, K, V = 1, 70, 2, 32, 16
    q, k = torch.randn(B, T, HV, K, device=device), torch.randn(B, T, HV, K, device=device)
    g, beta = -torch.rand(B, T, HV, device=device), torch.rand(B, T, HV, device=device)
    if extreme == "strong":
        g = g - 50 * (torch.rand_like(g) < 0.2)
    elif extreme == "forgets all":
        g = torch.full_like(g, -1e4)
    elif extreme.startswith("beta"):
        beta = torch.full_like(beta, float(extreme[-1]))
    elif extreme == "zero keys":
        q[:, ::3], k[:, ::2] = 0, 0
    elif extreme == "one key":
        k[:] = k[:, :1]
    gates: list[Tensor | None] = [None, beta] if extreme == "no decay" else [g, beta]
    gates = [None, None] if extreme == "no gates" else gates
    inputs = [q, k, torch.randn(B, T, HV, V, device=device), *gates, torch.randn(B, HV, K, V, device=device)]
    seeds = [torch.randn(B, T, HV, V, device=device), torch.randn(B, HV, K, V, device=device)]
    compare(inputs, seeds, None, True, torch.float32)
