"""The router of a mixture of memories: gradients, extremes, the balance loss."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

from models import Batch
from models.mixers.mom import Choice, MoMConfig
from tests.mom_tools import (
    EVERY_RULE,
    RULES,
    build,
    memory_of,
    mixer,
    pieces,
    plain_of,
    run_plain,
    steer,
    stream,
    whole,
)
from tests.tools import Case, assert_close

pytestmark = pytest.mark.usefixtures("poison")


# -- A12: gradients


@EVERY_RULE
def test_gradcheck(rule: str, monkeypatch: pytest.MonkeyPatch):
    """With the choice held fixed: it jumps, and only its weights have a gradient."""
    narrow = {"groups": 1, "d_state": 4} if rule == "mamba2" else {"heads": 1, "value_heads": 1, "head_dim": 4}
    model, x = build({**RULES[rule], **narrow}, memories=3), stream(1, 7).requires_grad_()
    part = mixer(model)
    ctx, _, _ = model.prepare(Batch(torch.zeros(1, 7, dtype=torch.int64)), None)
    fixed = part._choose(part.norm(x), ctx).index

    def topk(p: Tensor, k: int, dim: int) -> tuple[Tensor, Tensor]:
        return p.gather(dim, fixed), fixed

    monkeypatch.setattr(Tensor, "topk", topk)
    names = [n for n, _ in part.named_parameters()]

    def function(x: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        y, _, aux = torch.func.functional_call(part, dict(zip(names, values, strict=True)), (x, ctx))
        return y, aux.losses["balance"]

    assert torch.autograd.gradcheck(function, (x, *part.parameters()), fast_mode=True)


@pytest.mark.parametrize(("k", "norm", "learns"), [(1, "topk", False), (1, "none", True), (2, "topk", True)])
def test_the_router_learns_from_the_language_model(k: int, norm: str, learns: bool):
    """One memory with renormalised weights: the weight is the constant 1."""
    model, x = build("gated_delta", top_k=k, router_norm=norm).train(), stream(2, 9)
    (grad,) = torch.autograd.grad(whole(model, x)[0].square().sum(), mixer(model).router.weight)
    assert (grad.abs().max() > 1e-3) == learns
    assert learns or grad.abs().max() <= 1e-12


def test_top_one_with_constant_weights_is_warned_about():
    with pytest.warns(UserWarning, match="router_norm=none"):
        MoMConfig(top_k=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MoMConfig(top_k=1, router_norm="none")
        MoMConfig(top_k=1, memories=1)


# -- A13: extremes


@pytest.mark.parametrize(("dtype", "gap"), [(torch.float16, 30.0), (torch.bfloat16, 120.0)], ids=str)
def test_no_assignment_is_lost_to_an_underflow(dtype: torch.dtype, gap: float):
    """The second weight is zero in the dtype of the stream, the second memory is visited all the same."""
    model = build("gated_delta", dtype, memories=4, top_k=2)
    part, x = mixer(model), stream(2, 40, dtype=dtype)
    with torch.no_grad():
        torch.nn.init.ones_(part.norm.weight)  # pyright: ignore[reportArgumentType]
        part.router.weight.zero_()
        part.router.weight[:, 0] = torch.tensor([1.0, 0.0, -1.0, -2.0]) * gap
        x[..., 0] = 4.0
    ctx, _, _ = model.prepare(Batch(torch.zeros(2, 40, dtype=torch.int64)), None)
    chosen = part._choose(part.norm(x), ctx)
    assert not chosen.weight.to(dtype)[..., 1].any()
    assert part._route(chosen, ctx).offsets.diff().tolist() == [80, 80, 0, 0, 80]
    y, _ = whole(model, x)
    assert y.isfinite().all()
    _, state = pieces(model, x, [39, 1])
    assert memory_of(state).memory[:, 1].any(dim=(1, 2, 3)).all()


@EVERY_RULE
def test_all_tokens_to_one_memory(rule: str):
    """No capacity: nothing is dropped, and the others stay empty."""
    model, x = build(rule, top_k=1, shared=False), stream(2, 40)
    x[..., 0] = x[..., 0].abs() + 1
    steer(model, 1)
    out, aux = whole(model, x)
    assert aux.stats["load"].value.tolist() == [0, 1, 0, 0]
    with torch.no_grad():
        mixer(model).kv[0] = mixer(model).kv[1]
    assert_close(out, run_plain(plain_of(model), x), "forms")


# -- A14: the balance loss


@pytest.mark.parametrize("k", [1, 2, 4])
def test_balance_is_one(k: int):
    """Token t goes to memories t, ..., t + k - 1 with equal probabilities."""
    model = build("retnet", memories=4, top_k=k)
    ctx, _, _ = model.prepare(Batch(torch.zeros(1, 8, dtype=torch.int64)), None)
    index = (torch.arange(8)[:, None] + torch.arange(k)) % 4
    p = torch.zeros(1, 8, 4, dtype=torch.float64).scatter(2, index[None], 1 / k)
    chosen = Choice(p, index[None], torch.ones(1, 8, k + 1))
    aux = mixer(model)._aux(chosen, mixer(model)._route(chosen, ctx), ctx)
    assert float(aux.losses["balance"]) == pytest.approx(1.0, abs=1e-12)
    assert aux.stats["load"].value.tolist() == [0.25] * 4
    assert float(aux.stats["dead"].value) == 0
    assert float(aux.stats["router_entropy"].value) == pytest.approx(math.log(k), abs=1e-12)


def test_layers_do_not_balance_each_other():
    """Two layers that use a different pair of four memories each are both collapsed."""
    part = {"kind": "mom", "rule": RULES["retnet"], "memories": 4, "top_k": 2}
    model = Case("two", "mixer", part).build(n_layers=2, d_model=8)
    for layer, pair in zip(model.layers, ([0, 1], [2, 3]), strict=True):
        steered = layer.mixer  # pyright: ignore[reportAttributeAccessIssue]
        with torch.no_grad():
            steered.router.weight.zero_()  # pyright: ignore
            steered.router.weight[pair, :] = 1e3  # pyright: ignore
            torch.nn.init.ones_(steered.norm.weight)  # pyright: ignore
    with torch.no_grad():
        model.embed.weight.abs_().add_(1.0)
        model.layers[0].mixer.out.weight.zero_()  # pyright: ignore
    tokens = torch.randint(0, 23, (2, 16))
    with torch.no_grad():
        losses = model(Batch(tokens, tokens)).losses
    assert float(losses["mom.balance"]) >= 2.0 - 1e-9
