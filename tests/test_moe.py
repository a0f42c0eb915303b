"""The mixture of experts: a model by the book, its extremes, how a bias balances the load, and what has to be refused."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models import LM, Batch, ModelConfig, UserError, build, meta_model, model_config
from models.channels.mlp import SwiGLU
from models.channels.moe import MoE, MoEConfig
from models.match import match
from models.types import Aux, CommitInfo, Write, count_params
from tests.moe_naive import NaiveMoE, feed_forward
from tests.runs import losses, tensors, write_config
from tests.test_distributed import watch
from tests.tools import Case, assert_close, random_batch, same_bytes, segments, state_hash
from training.muon import Muon
from training.parallel import merge_writes

pytestmark = pytest.mark.usefixtures("poison")

D, F = 8, 6
KINDS: dict[str, dict[str, Any]] = {
    "bias": {"experts": 5},
    "softmax-bias": {"experts": 4, "shared": 2, "score": "softmax", "scale": 2.5},
    "loss": {"experts": 4, "shared": 0, "score": "softmax", "balance": "loss"},
    "sigmoid-loss": {"experts": 4, "balance": "loss"},
    "raw": {"experts": 6, "top_k": 3, "router_norm": "none", "balance": "none"},
    "one": {"experts": 3, "top_k": 1, "router_norm": "none"},
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def model(dtype: torch.dtype = torch.float64, **options: Any) -> LM:
    """One layer with that channel alone."""
    return Case("moe", "channel", {"kind": "moe", "hidden": F, **options}).build(dtype, n_layers=1, d_model=D)


def experts(lm: LM) -> MoE:
    part = lm.layers[0].channel  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(part, MoE)
    return part


def stream(B: int, T: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, T, D, dtype=dtype)


def run(lm: LM, x: Tensor, **fields: Any) -> tuple[Tensor, Aux]:
    ctx, _, _ = lm.prepare(Batch(torch.zeros(x.shape[:2], dtype=torch.int64), **fields), None)
    y, none, aux = experts(lm)(x, ctx)
    assert none is None
    return y, aux


def chosen(lm: LM, x: Tensor) -> Tensor:
    """[B, T, k]."""
    return experts(lm)._choose(experts(lm).norm(x)).index


def commit(part: MoE, counts: Any, step: int = 1) -> None:
    with torch.no_grad():
        info = CommitInfo(step, 100, seed=0, micro_batches=1, world_size=1)
        assert part.commit({"counts": Write(torch.as_tensor(counts))}, info) == []


def bias_of(part: MoE) -> Tensor:
    assert part.bias is not None
    return part.bias


# -- by the book


@EVERY_KIND
def test_is_the_sum_over_the_experts_of_each_token(kind: str):
    """Outputs, the choice, the balance loss, and gradients of the stream and every parameter, the router's included."""
    lm, x = model(**KINDS[kind]).train(), stream(2, 9)
    part = experts(lm)
    if part.bias is not None:
        part.bias.normal_(std=0.3)
    x.requires_grad_()
    wish = torch.randn(2, 9, D, dtype=torch.float64)
    y, aux = run(lm, x)
    expected, best = NaiveMoE(part)(x.flatten(0, 1))
    assert_close(y, expected.view_as(y), "forms")
    ours, theirs = (y * wish).sum(), (expected.view_as(y) * wish).sum()
    if part.cfg.balance == "loss":
        balance = NaiveMoE(part).balance(x.flatten(0, 1))
        assert_close(aux.losses["balance"], balance, "forms")
        ours, theirs = ours + 3 * aux.losses["balance"], theirs + 3 * balance
    assert chosen(lm, x).flatten(0, 1).tolist() == best
    counts = torch.bincount(torch.tensor(best).flatten(), minlength=part.cfg.experts)
    assert_close(aux.stats["load"].value, counts.double() / (18 * part.cfg.top_k))
    if part.bias is not None:
        assert aux.writes["counts"].value.tolist() == counts.tolist()
    inputs = [x, *part.parameters()]
    grads = zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True)
    names = ["x", *(n for n, _ in part.named_parameters())]
    for name, (mine, other) in zip(names, grads, strict=True):
        assert other.abs().max() > 1e-4, f"{name}: nothing to compare"
        assert_close(mine, other, "gradient", what=name)


def test_the_bias_changes_who_is_chosen_and_no_weight():
    """A bias that is the same for all changes nothing; one that picks an expert gives it the weight of its own score."""
    lm, x = model(experts=4, shared=0, router_norm="none").eval(), stream(1, 12)
    part = experts(lm)
    before, _ = run(lm, x)
    bias_of(part).fill_(-3.0)
    assert same_bytes(run(lm, x)[0], before)
    bias_of(part).copy_(torch.tensor([0.0, 0.0, 5.0, 5.0]))
    assert chosen(lm, x).sort(-1).values.eq(torch.tensor([2, 3])).all()
    h = part.norm(x)[0]
    weight = (h @ part.router.weight.T).sigmoid()
    want = [sum(w[e] * feed_forward(row, part.up[e], part.down[e]) for e in (2, 3)) for row, w in zip(h, weight)]
    assert_close(run(lm, x)[0][0], torch.stack(want), "forms")  # pyright: ignore[reportArgumentType]


# -- extremes


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_one_expert_is_a_swiglu(score: str):
    lm = model(experts=1, top_k=1, shared=0, score=score)
    dense = Case("dense", "channel", {"kind": "swiglu", "hidden": F}).build(n_layers=1, d_model=D)
    part, other = experts(lm), dense.layers[0].channel  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(other, SwiGLU)
    other.load_state_dict({"norm.weight": part.norm.weight, "up.weight": part.up[0], "down.weight": part.down[0]})
    x = stream(2, 7)
    ctx, _, _ = dense.prepare(Batch(torch.zeros(2, 7, dtype=torch.int64)), None)
    assert_close(run(lm, x)[0], other(x, ctx)[0])


def test_all_experts_are_a_dense_sum():
    lm = model(experts=3, top_k=3, shared=0, score="softmax", scale=1.5)
    part, x = experts(lm), stream(2, 7)
    h = part.norm(x)
    weight = 1.5 * (h @ part.router.weight.T).softmax(-1)
    gate, value = torch.einsum("efd,btd->btef", part.up, h).chunk(2, dim=-1)
    each = torch.einsum("edf,btef->bted", part.down, torch.nn.functional.silu(gate) * value)
    assert_close(run(lm, x)[0], (weight[..., None] * each).sum(2), "forms")


@EVERY_KIND
def test_equal_scores_go_to_the_lower_number(kind: str):
    """A router of zeros, a hundred tokens; the load of the first experts is everything."""
    lm, x = model(torch.float32, **KINDS[kind]), stream(2, 50, torch.float32)
    part = experts(lm)
    with torch.no_grad():
        part.router.weight.zero_()
    assert chosen(lm, x).eq(torch.arange(part.cfg.top_k)).all()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_no_choice_and_no_weight_is_lost_to_an_underflow(score: str):
    """Logits so far apart, or so low, that the scores are zero in fp32: chosen in order, weights sum to one all the same."""
    lm, x = model(torch.float32, experts=4, shared=0, score=score, balance="none"), stream(1, 3, torch.float32)
    part = experts(lm)
    with torch.no_grad():
        torch.nn.init.ones_(part.norm.weight)  # pyright: ignore[reportArgumentType]
        part.router.weight.zero_()
        part.router.weight[:, 0] = torch.tensor([-800.0, -200.0, -201.0, -400.0])
        x[..., 0], x[..., 1:] = 4.0, 0.0
    found = part._choose(part.norm(x))
    assert found.index.eq(torch.tensor([1, 2])).all()
    assert_close(found.weight.sum(-1), torch.ones(1, 3), "same", torch.float32)
    x.requires_grad_()
    (run(lm, x)[0].sum() + part.router.weight.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in (x, *part.parameters()))


def test_all_tokens_to_one_expert():
    """No capacity: nothing is dropped."""
    lm, x = model(experts=4, top_k=1, shared=0, router_norm="none"), stream(4, 25)
    part = experts(lm)
    bias_of(part)[2] = 10.0
    y, aux = run(lm, x)
    assert aux.stats["load"].value.tolist() == [0, 0, 1, 0]
    assert float(aux.stats["dead"].value) == 3
    assert (y.abs().amax(-1) > 0).all()
    assert_close(y.flatten(0, 1), NaiveMoE(part)(x.flatten(0, 1))[0], "forms")


# -- padding, packing, streaming


@EVERY_KIND
def test_padding_counts_nowhere(kind: str):
    """Not in outputs, losses, stats or writes, whatever stands there; invalid tokens get no gradient."""
    lm = model(**KINDS[kind]).train()
    x, valid = stream(2, 8), torch.tensor([[1, 1, 0, 1, 1, 0, 1, 1], [0, 0, 0, 1, 1, 1, 1, 0]], dtype=torch.bool)
    whole, said = run(lm, x[valid][None])
    padded = x.masked_fill(~valid[..., None], 1e3).requires_grad_()
    out, padded_said = run(lm, padded, valid=valid)
    assert_close(out[valid], whole[0], "forms")
    assert_close(padded_said, said, "forms")
    (grad,) = torch.autograd.grad(out[valid].sum(), padded)
    assert not grad[~valid].any()


def test_documents_and_pieces_are_the_whole():
    """A token's output depends on nothing but the token."""
    lm, x = model(experts=5).eval(), stream(2, 9)
    whole, said = run(lm, x)
    packed, packed_said = run(lm, x, cu_seqlens=segments([[4, 0, 5], [2, 7]], 9, pad_to=9))
    assert same_bytes((packed, packed_said), (whole, said))
    single = torch.cat([run(lm, x[:, t : t + 1])[0] for t in range(9)], dim=1)
    assert_close(single, whole)


def test_decode_says_nothing_and_remembers_nothing():
    lm = model(experts=5).eval()
    before, batch = state_hash(lm), random_batch(3, 1)
    with torch.no_grad():
        ctx, _, _ = lm.prepare(batch, lm.init_state(3, 4))
        y, state, aux = experts(lm)(stream(3, 1), ctx, ())
    assert y.shape == (3, 1, D)
    assert state == ()
    assert aux == Aux()
    assert state_hash(lm) == before


# -- balance


def test_a_bias_moves_against_the_load_by_its_rate():
    part = experts(model(experts=4, bias_rate=0.25))
    commit(part, [10, 2, 6, 6])
    assert bias_of(part).tolist() == [-0.25, 0.25, 0, 0]
    commit(part, [0, 0, 0, 0])
    assert bias_of(part).tolist() == [-0.25, 0.25, 0, 0]
    commit(part, [1, 0, 0, 0])
    assert bias_of(part).tolist() == [-0.5, 0.5, 0.25, 0.25]
    commit(part, [2**52 + 1, 2**52 + 1, 2**52 + 1, 2**52])  # equal in floating point
    assert bias_of(part).tolist() == [-0.75, 0.25, 0, 0.5]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_skewed_router_is_balanced_within_two_hundred_steps(score: str):
    """Most tokens prefer two of eight experts; with a bias the largest share ends near 1/8, without one it stays."""
    lm = model(torch.float32, experts=8, score=score, bias_rate=5e-3).train()
    part = experts(lm)
    with torch.no_grad():
        part.router.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
        part.router.weight[:2, 0] += 2.0
    generator, shares = torch.Generator().manual_seed(1), []
    for step in range(1, 221):
        x = torch.randn(1, 512, D, generator=generator)
        x[..., 0] += 1.0
        with torch.no_grad():
            _, aux = run(lm, x)
        shares.append(float(aux.stats["max_share"].value))
        commit(part, aux.writes["counts"].value, step)
    assert shares[0] > 0.3, "the router is not skewed"
    assert sum(shares[-20:]) / 20 < 0.16
    bias_of(part).zero_()
    assert float(run(lm, x)[1].stats["max_share"].value) > 0.3


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_balance_loss_is_one_where_the_load_is_even(k: int):
    """Each token prefers k of four experts, taking turns; and E / k where all prefer the same ones."""
    lm = model(experts=4, top_k=k, shared=0, score="softmax", balance="loss", router_norm="none")
    part, x = experts(lm), torch.zeros(1, 8, D, dtype=torch.float64)
    with torch.no_grad():
        torch.nn.init.ones_(part.norm.weight)  # pyright: ignore[reportArgumentType]
        part.router.weight.zero_()
        part.router.weight[:, :4] = 100 * torch.eye(4, dtype=torch.float64)
    for t in range(8):
        x[0, t, [(t + i) % 4 for i in range(k)]] = 1.0
    _, aux = run(lm, x)
    assert float(aux.losses["balance"].detach()) == pytest.approx(1.0, abs=1e-12)
    assert aux.stats["load"].value.tolist() == [0.25] * 4
    assert float(aux.stats["router_entropy"].value) == pytest.approx(math.log(k), abs=1e-9)
    _, aux = run(lm, x[:, :1].expand(1, 8, D))
    assert float(aux.losses["balance"].detach()) == pytest.approx(4 / k, abs=1e-9)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_balance_loss_pulls_tokens_off_a_crowded_expert(score: str):
    lm, x = model(experts=4, shared=0, score=score, balance="loss"), stream(1, 64)
    x[..., 0] = x[..., 0].abs() + 1
    part = experts(lm)
    with torch.no_grad():
        part.router.weight[0, 0] += 2.0
    before = run(lm, x)[1].losses["balance"]
    (grad,) = torch.autograd.grad(before, part.router.weight)
    with torch.no_grad():
        part.router.weight.sub_(grad, alpha=0.05 / float(grad.norm()))
        assert run(lm, x)[1].losses["balance"] < before


def test_only_a_balance_that_is_asked_for_has_loss_bias_or_writes():
    for balance, loss, bias in (("loss_free", False, True), ("loss", True, False), ("none", False, False)):
        lm = model(experts=4, balance=balance).train()
        _, aux = run(lm, stream(1, 5))
        assert (bool(aux.losses), "moe.balance" in lm.loss_weights) == (loss, loss)
        assert (bool(aux.writes), experts(lm).bias is not None) == (bias, bias)
        assert not run(lm.eval(), stream(1, 5))[1].writes


def test_the_load_is_in_fp32_under_autocast_and_in_bf16():
    """Router and balance loss see full precision: the choice of a bf16 model is that of its weights in fp32."""
    lm, x = model(torch.float32, experts=8, balance="loss").to(torch.bfloat16), stream(2, 200).bfloat16()
    part = experts(lm)
    h = part.norm(x)
    found = part._choose(h)
    logits = h.float() @ part.router.weight.float().T
    assert found.index.equal(logits.sort(dim=-1, descending=True, stable=True).indices[..., :2])
    assert {found.weight.dtype, found.probability.dtype, run(lm, x)[1].losses["balance"].dtype} == {torch.float32}
    part.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert part._choose(h.float()).index.equal(found.index)
        assert run(lm, x.float())[0].dtype == torch.bfloat16


# -- one step, however it is cut


def test_micro_batches_commit_the_same_bias():
    whole, pieces = (Case("moe", "channel", {"kind": "moe", "experts": 5, "hidden": F}).build() for _ in range(2))
    for step in range(1, 6):
        batch, writes = random_batch(6, 7, seed=step), {}
        for rows in (slice(0, 1), slice(1, 2), slice(2, 5), slice(5, 6)):
            said = pieces.train()(Batch(batch.tokens[rows], batch.targets[rows])).writes  # pyright: ignore
            writes = merge_writes(writes, said)
        whole.commit(whole.train()(batch).writes, CommitInfo(step, 5, 0, 1, 1))
        pieces.commit(writes, CommitInfo(step, 5, 0, 4, 1))
        assert state_hash(pieces) == state_hash(whole)
    assert state_hash(whole) != state_hash(Case("moe", "channel", {"kind": "moe", "experts": 5, "hidden": F}).build())


RUN = {
    "d_model": 16,
    "n_layers": 2,
    "blocks": {
        "only": {
            "mixer": {"kind": "attention", "heads": 2},
            "channel": {"kind": "moe", "experts": 4, "hidden": 8, "bias_rate": 0.05},
        }
    },
}


@pytest.mark.slow
def test_two_ranks_are_one(tmp_path: Path):
    """Counts and biases are equal to the bit, and validation moves none."""
    steps = {"steps": 3, "val_every": 1, "save_every": 3, "sample_every": -1}
    config = write_config(tmp_path, RUN, train=steps, data={"packing": "stream"}, optim={"lr": 1e-4})
    one, two = watch(tmp_path / "1", config, "name=one"), watch(tmp_path / "2", config, "name=two", ranks=2)
    for seen in two.ranks:
        for ours, theirs in zip(seen["writes"], one.ranks[0]["writes"], strict=True):
            assert {n: v.tolist() for n, (v, _) in ours.items()} == {n: v.tolist() for n, (v, _) in theirs.items()}
    biases = [{n: t for n, t in tensors(s.run, 3).items() if n.endswith(".bias")} for s in (one, two)]
    assert len(biases[0]) == 2
    assert all(0.04 < t.abs().max() < 0.16 for t in biases[0].values())
    assert all(torch.equal(biases[1][n], t) for n, t in biases[0].items())
    assert losses(two.run) == pytest.approx(losses(one.run), rel=1e-4)
    assert len({rank["state"][-1][1] for rank in two.ranks}) == 1, "ranks hold different bytes"


# -- sizes


def sized(channel: dict[str, Any], d: int = 32) -> ModelConfig:
    block = {"mixer": {"kind": "attention", "heads": 4}, "channel": channel}
    return model_config({"d_model": d, "n_layers": 3, "vocab_size": 50, "blocks": {"b": block}})


def test_cost_by_hand():
    """D 32, F 24, 6 experts of which 2 are used, one shared: an expert is 3 * 32 * 24 = 2304 weights, the router 192."""
    part = meta_model(sized({"kind": "moe", "experts": 6, "hidden": 24})).layers[0].channel  # pyright: ignore
    assert isinstance(part, MoE)
    cost = part.cost(100)
    assert cost.params == 32 + 192 + 7 * 2304
    assert cost.active_params == 32 + 192 + 3 * 2304
    assert cost.flops_per_token == 2 * (192 + 3 * 2304)
    assert cost.state_bytes == 0


def test_a_published_size():
    """DeepSeekMoE 16B (arXiv:2401.06066): 28 layers of width 2048, the first with a dense channel, 64 experts of width 1408 of
    which 6 are active, 2 shared: 16.4B parameters, 2.8B active."""
    channel = {"kind": "moe", "experts": 64, "top_k": 6, "shared": 2, "hidden": 1408, "score": "softmax"}
    raw = {
        "d_model": 2048,
        "n_layers": 28,
        "vocab_size": 102400,
        "tied": False,
        "blocks": {"b": {"mixer": {"kind": "attention", "heads": 16}, "channel": channel}},
        "at": {0: {"channel": {"kind": "swiglu", "hidden": 10944}}},
    }
    cost = meta_model(model_config(raw)).cost(4096)
    assert cost.params == pytest.approx(16.4e9, rel=0.01)
    assert cost.active_params == pytest.approx(2.8e9, rel=0.02)


def test_the_default_width_is_that_of_a_dense_channel_shared_out():
    part = meta_model(sized({"kind": "moe", "experts": 16, "top_k": 4}, d=384)).layers[0].channel  # pyright: ignore
    assert isinstance(part, MoE)
    assert part.hidden == 224  # 1024 over five, to the next multiple of 32
    assert part.up.shape == (16, 448, 384)


def test_matches_a_dense_model_on_active_parameters():
    dense = sized({"kind": "swiglu", "hidden": 90})
    found = match(sized({"kind": "moe", "experts": 8}), dense, on="active_params", vary="channel.hidden")
    assert found.value == 29  # the router's 256 weights are worth 256 / 96 of 90 rows: 3 * 29 + 2.7 = 89.7
    ours = meta_model(found.config).cost(64)
    assert abs(ours.active_params - count_params(meta_model(dense))) <= 3 * 3 * 3 * 32 / 2
    assert ours.params > 1.5 * ours.active_params


def test_muon_sees_every_expert_and_both_halves():
    """Each gate, up and down matrix alone gets an update of orthogonal rows or columns: one of all experts together would not."""
    lm = model(torch.float32, experts=3)
    part, meta = experts(lm), lm.meta()
    assert meta["layers.0.channel.router.weight"].optimizer == "adamw"
    assert meta["layers.0.channel.up"].splits == (F, F)
    assert meta["layers.0.channel.common.up.weight"].splits == (F, F)
    before = part.up.detach().clone()
    part.up.grad = torch.randn_like(part.up)
    part.up.grad[0] *= 1e-3
    part.up.grad[1, :F] *= 1e3
    Muon().step({"up": part.up}, {"up": meta["layers.0.channel.up"].splits}, {"up": 1.0}, {"up": 0.0})
    moved = (part.up.detach() - before).view(6, F, D)
    sizes = torch.linalg.svdvals(moved) / (0.2 * D**0.5)
    assert sizes.min() > 0.5
    assert sizes.max() < 1.4


# -- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 0}, "experts must be at least 1, got 0; nearest: experts=1"),
        ({"experts": 4, "top_k": 5}, "top_k=5 is more than experts=4; nearest: top_k=4"),
        ({"top_k": 0}, "top_k must be at least 1, got 0; nearest: top_k=1"),
        ({"shared": -1}, "shared must be at least 0, got -1; nearest: shared=0"),
        ({"hidden": 0}, "hidden must be at least 1, got 0; nearest: hidden=1"),
        ({"multiple_of": 0}, "multiple_of must be at least 1, got 0; nearest: multiple_of=1"),
        ({"ratio": 0.0}, "ratio must be positive, got 0"),
        ({"scale": float("nan")}, "scale must be positive, got nan"),
        ({"bias_rate": -1e-3}, "bias_rate must be positive, got -0.001"),
        ({"balance_weight": -0.5}, "balance_weight must not be negative, got -0.5; nearest: 0"),
        ({"score": "sigmoidal"}, "unknown score 'sigmoidal'; did you mean 'sigmoid'?"),
        ({"router_norm": "topk2"}, "unknown router_norm 'topk2'; did you mean 'topk'?"),
        ({"balance": "lossfree"}, "unknown balance 'lossfree'; did you mean 'loss_free'?"),
        ({"expert": 3}, "did you mean 'experts'?"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refusals_name_the_bad_and_the_nearest_good_value(options: dict[str, Any], message: str):
    with pytest.raises(UserError) as refused:
        sized({"kind": "moe", **options})
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_top_one_with_constant_weights_is_warned_about():
    with pytest.warns(UserWarning, match="router_norm=none"):
        MoEConfig(top_k=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MoEConfig(top_k=1, router_norm="none")
        MoEConfig(top_k=1, experts=1)


def test_tiny_keeps_what_it_is():
    tiny = MoEConfig(experts=64, top_k=12, shared=2, balance="loss").tiny()
    assert (tiny.experts, tiny.top_k, tiny.shared, tiny.balance) == (8, 8, 2, "loss")
    assert build(sized(json.loads(json.dumps(vars(tiny))), d=64), seed=0)(random_batch(1, 4)).losses["lm"].isfinite()
