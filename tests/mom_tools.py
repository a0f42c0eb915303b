"""For the tests of `models.mixers.mom`: a model of one layer, the mixer alone on a random residual stream, the loops beside it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from models import LM, Batch
from models.lm import LMState
from models.mixers.linear import LinearMixer
from models.mixers.mom import MoM, MoMState
from models.parsing import to_dict
from models.types import Aux
from tests.mom_naive import NaiveMoM, last_inputs, matrices
from tests.tools import Case

RULES: dict[str, dict[str, Any]] = {
    "linear_attention": {"kind": "linear_attention", "heads": 2, "conv": 3},
    "retnet": {"kind": "retnet", "heads": 2},
    "gla": {"kind": "gla", "heads": 1, "value_heads": 2, "rank": 3},
    "mamba2": {"kind": "mamba2", "head_dim": 4, "d_state": 3, "groups": 2},
    "delta": {"kind": "delta", "heads": 2, "allow_neg_eigval": True},
    "gated_delta": {"kind": "gated_delta", "heads": 2, "head_dim": 4, "expand_v": 1.5},
}
OTHERS = {
    "normalized": {"kind": "linear_attention", "heads": 2, "normalize": True, "output_norm": False},
    "grouped": {"kind": "gated_delta", "heads": 1, "value_heads": 3, "head_dim": 4, "conv_bias": True},
    "skip": {"kind": "mamba2", "head_dim": 4, "d_state": 3, "conv": 0, "conv_bias": False, "gate": False},
    "bare": {"kind": "delta", "heads": 2, "conv": 0, "gate": True},
}
TRAIN = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
EVERY_RULE = pytest.mark.parametrize("rule", RULES)


def build(rule: str | dict[str, Any], dtype: torch.dtype = torch.float64, d_model: int = 8, **options: Any) -> LM:
    """A model of one layer with that mixer."""
    inner = {**RULES, **OTHERS}[rule] if isinstance(rule, str) else rule
    part = {"kind": "mom", "rule": inner, "top_k": min(2, options.get("memories", 4)), **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # top_k = 1 with renormalised weights is built on purpose
        return Case("mom", "mixer", part).build(dtype, n_layers=1, d_model=d_model)


def mixer(model: LM) -> MoM:
    part = model.layers[0].mixer  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(part, MoM)
    return part


def stream(B: int, T: int, d_model: int = 8, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, T, d_model, dtype=dtype)


def whole(model: LM, x: Tensor, **fields: Any) -> tuple[Tensor, Aux]:
    ctx, _, _ = model.prepare(Batch(torch.zeros(x.shape[:2], dtype=torch.int64), **fields), None)
    y, none, aux = mixer(model)(x, ctx)
    assert none is None
    return y, aux


def pieces(
    model: LM, x: Tensor, sizes: list[int], state: LMState | None = None, valid: Tensor | None = None
) -> tuple[Tensor, LMState]:
    state, outs, start = state or model.init_state(len(x), x.shape[1]), [], 0
    for n in sizes:
        part = slice(start, start + n)
        given = None if valid is None else valid[:, part]
        ctx, seen, _ = model.prepare(Batch(torch.zeros(len(x), n, dtype=torch.int64), valid=given), state)
        y, new, _ = mixer(model)(x[:, part], ctx, state.layers[0]["mixer"])
        state = LMState(seen, ({"mixer": new},), {})
        outs.append(y)
        start += n
    return torch.cat(outs, dim=1), state


def memory_of(state: LMState) -> MoMState:
    return state.layers[0]["mixer"]


def naive(model: LM, x: Tensor) -> tuple[Tensor, MoMState]:
    """Each sequence by itself -> (outputs, the state after them)."""
    part, outs, convs, memories = mixer(model), [], [], []
    book = NaiveMoM(part)
    for sequence in x:
        state = book.new_state()
        outs.append(book(sequence, state))
        memories.append(matrices(state))
        if part.conv is not None:
            convs.append(last_inputs(state, part.cfg.rule.conv, sum(part.heads.widths)))
    return torch.stack(outs), MoMState(torch.stack(convs) if convs else (), torch.stack(memories))


def plain_of(model: LM) -> LM:
    """The plain mixer of the rule, with the weights of memory 0."""
    part = mixer(model)
    case = Case("plain", "mixer", to_dict(part.cfg.rule))
    plain = case.build(model.embed.weight.dtype, n_layers=1, d_model=model.cfg.d_model)
    other = plain.layers[0].mixer  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(other, LinearMixer)
    q, gate = part.project.weight.split(part.common)
    kv, logits = part.kv[0].split((sum(part.heads.widths[1:]), sum(part.rule.logits)))
    weights = part.state_dict()
    found = {"project.weight": torch.cat((q, kv, gate, logits))}
    other.load_state_dict({**{k: v for k, v in weights.items() if k not in ("kv", "router.weight")}, **found})
    return plain


def run_plain(plain: LM, x: Tensor) -> Tensor:
    ctx, _, _ = plain.prepare(Batch(torch.zeros(x.shape[:2], dtype=torch.int64)), None)
    return plain.layers[0].mixer(x, ctx)[0]  # pyright: ignore


def steer(model: LM, target: int) -> None:
    """All tokens go to one memory first: its row of the router is the only one that matters."""
    with torch.no_grad():
        torch.nn.init.ones_(mixer(model).norm.weight)  # pyright: ignore[reportArgumentType]
        mixer(model).router.weight.zero_()
        mixer(model).router.weight[target, 0] = 1e3
