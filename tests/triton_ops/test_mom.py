"""A whole mixture of memories by Triton: routing, grouped product, convolution, rule, norm and the step, one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from models import Batch
from models.lm import LMState
from tests.mom_tools import build, mixer
from tests.tools import TOLERANCE, rel_err

RULES = {
    "gated_delta": {"kind": "gated_delta", "heads": 1, "head_dim": 16, "expand_v": 1},
    "gla": {"kind": "gla", "heads": 1, "head_dim": 16, "expand_v": 1, "rank": 4, "conv": 4},
    "mamba2": {"kind": "mamba2", "head_dim": 16, "d_state": 16},
}


@pytest.mark.parametrize("rule", RULES)
def test_equals_the_reference(rule: str, device: torch.device):
    """Outputs, gradients, and a state carried through a prefill that leaves a memory empty and two steps."""
    model = build(RULES[rule], torch.float32, d_model=16, memories=3, top_k=1, router_norm="none").to(device)
    part, x = mixer(model), torch.randn(2, 11, 16, device=device)
    valid = torch.ones(2, 11, dtype=torch.bool, device=device)
    valid[1, :2] = False
    found: list[list[Tensor]] = []
    for setting in ("triton", "reference"):
        with dispatch.use(setting):
            leaf = x.clone().requires_grad_()
            tokens = torch.zeros(2, 11, dtype=torch.int64, device=device)
            ctx, _, _ = model.prepare(Batch(tokens, valid=valid), None)
            y, _, aux = part(leaf, ctx)
            loss = y.sin().sum() + aux.losses["balance"]
            said = [y, *torch.autograd.grad(loss, (leaf, *part.parameters()))]
            state, start = model.init_state(2, 11), 0
            with torch.no_grad():
                for n in (5, 1, 1):
                    piece = slice(start, start + n)
                    ctx, seen, _ = model.prepare(Batch(tokens[:, piece], valid=valid[:, piece]), state)
                    out, new, _ = part(x[:, piece], ctx, state.layers[0]["mixer"])
                    state, start = LMState(seen, ({"mixer": new},), {}), start + n
                    said.append(out)
            found.append([*said, *state.layers[0]["mixer"]])
    for i, (got, want) in enumerate(zip(*found, strict=True)):
        assert rel_err(got, want) <= TOLERANCE["forms", torch.float32], i
