"""Self-guided training: dense matrices that fade out, leave without a trace, and stand in no one's way when a run is resumed."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import models
from models import LM, Batch, UserError, model_config
from models.channels.structured import Structured
from models.folder import load_model
from tests.runs import PLAIN, assert_same_run, losses, one_error, tensors, train, write_config
from tests.test_distributed import GRADIENT, LOSS, watch
from tests.tools import assert_close, random_batch, rel_err, spread, state_hash
from training.interventions import SelfGuided, freeze, notes
from training.optim import OptimConfig, Optimizer
from training.parallel import World, sync_gradients

VOCAB, STEPS = 23, 12
ATTENTION = {"kind": "attention", "heads": 2}
FFN = {"kind": "structured_ffn", "hidden": 32}
MODEL: dict[str, Any] = {
    "d_model": 16,
    "n_layers": 4,
    "blocks": {
        "a": {"mixer": ATTENTION, "channel": {**FFN, "form": "low_rank", "rank": 4, "bias": True}},
        "b": {"channel": {**FFN, "form": "block_shuffle", "activation": "swiglu"}},
        "c": {"channel": {**FFN, "form": "block_dense", "rank": 8}},
        "d": {"channel": {**FFN, "form": "butterfly", "activation": "relu2"}},
    },
    "pattern": ["a", "b", "c", "d"],
}
GUIDES = 9  # two matrices in each channel, three in the gated one
GUIDED = {"kind": "self_guided", "until": 0.5}


def build(dtype: torch.dtype = torch.float64, **optim: Any) -> tuple[LM, Optimizer, dict[str, Structured]]:
    model = models.build(model_config({**MODEL, "vocab_size": VOCAB}), dtype=dtype)
    spread(model)
    maps = {n: m for n, m in model.named_modules() if isinstance(m, Structured)}
    return model.train(), Optimizer(model, OptimConfig(**optim)), maps


def step(change: SelfGuided, i: int, total: int, model: LM, optim: Optimizer) -> None:
    """One step of the loop, on a batch of its own."""
    change(i, total, model, optim)
    model.total(model(random_batch(2, 6, seed=i)).losses).backward()
    sync_gradients(optim, World(0, 1, torch.device("cpu")))
    optim.step()
    optim.zero_grad()


# -- what is computed


def test_at_first_nothing_changes():
    """The dense matrices start as the structured ones, whatever their form, so that the function is the same at a = 1."""
    model, optim, maps = build()
    batch, before = random_batch(2, 6), state_hash(model)
    logits = model(batch, logits="all").logits
    SelfGuided(until=4)(0, 8, model, optim)
    assert len(maps) == GUIDES
    for name, m in maps.items():
        assert m.guide is not None
        assert m.guide.share == 1
        assert m.guide.weight is optim.params[f"{name}.guide"]
        x = torch.randn(3, m.d_in, dtype=torch.float64)
        assert_close(x @ m.guide.weight.T, m.product(x), "forms")
    assert_close(model(batch, logits="all").logits, logits, "forms")
    assert state_hash(model) == before
    assert not [name for name in model.state_dict() if "guide" in name]


def test_the_mixture_by_hand():
    """Outputs and gradients of one matrix at every share; the shares are a cosine of the step alone."""
    model, optim, maps = build()
    change = SelfGuided(until=0.4)
    for i in range(4):
        change(i, 10, model, optim)
        a = (1 + math.cos(math.pi * i / 4)) / 2
        for m in maps.values():
            assert m.guide is not None
            assert m.guide.share.item() == pytest.approx(a, rel=1e-12)
            with torch.no_grad():
                m.guide.weight.add_(torch.randn_like(m.guide.weight))
            share = m.guide.share.clone()
            x = torch.randn(3, m.d_in, dtype=torch.float64, requires_grad=True)
            W, weight = m.guide.weight, torch.randn(3, m.d_out, dtype=torch.float64)
            bias = 0.0 if m.bias is None else m.bias
            by_hand = share * (x @ W.T) + (1 - share) * (x @ m.dense().T) + bias
            assert_close(m(x), by_hand, "forms")
            inputs = [x, W, *m.parameters()]
            found, wanted = (torch.autograd.grad((y * weight).sum(), inputs) for y in (m(x), by_hand))
            assert_close(found, wanted, "gradient")
    change(4, 10, model, optim)
    assert all(m.guide is None for m in maps.values())


# -- the optimizer


@pytest.mark.parametrize("muon", [False, True], ids=["adamw", "muon"])
def test_they_leave_without_a_trace(muon: bool):
    """Their moments and values go; everybody else's moments, step counts and rates are as they were, to the bit."""
    model, optim, maps = build(muon=muon)
    names, groups = list(optim.params), {key: list(n) for key, n in optim.groups.items()}
    change = SelfGuided(until=3)
    guides = {f"{name}.guide" for name in maps}
    for i in range(3):
        optim.set_lr(1e-2)
        step(change, i, 9, model, optim)
        assert set(optim.params) - set(names) == guides
        in_adamw = [id(p) for group in optim.adamw.param_groups for p in group["params"]]
        in_muon = [id(optim.params[n]) for n in optim.muon_names]
        assert sorted(in_adamw + in_muon) == sorted(id(p) for p in optim.params.values())
        assert (guides <= set(optim.muon_names)) == muon
    before = {k: t.clone() for k, t in optim.state_dict().items()}
    assert {k for k in before if k.endswith("/value")} == {f"{name}/value" for name in guides}
    assert all(before[f"{n}/{'momentum' if muon else 'exp_avg'}"].any() for n in guides)
    change(3, 9, model, optim)
    after = optim.state_dict()
    assert after.keys() == {k for k in before if k.rpartition("/")[0] not in guides}
    assert all(torch.equal(t, before[k]) for k, t in after.items())
    assert (list(optim.params), optim.groups, optim.guests, optim.absent) == (names, groups, set(), {})
    assert list(optim.meta) == list(model.meta())
    assert all(group["lr"] == 1e-2 * group["lr_mult"] for group in optim.adamw.param_groups)
    held = model.state_dict()
    step(change, 4, 9, model, optim)
    assert held.keys() == model.state_dict().keys()


def test_a_checkpoint_waits_for_its_guests():
    """State that is loaded before the dense matrices are there is theirs once they come; without them it is nobody's."""
    model, optim, _ = build(muon=True)
    change = SelfGuided(until=6)
    for i in range(2):
        step(change, i, 9, model, optim)
    weights, moments = model.state_dict(), dict(optim.state_dict())

    def resumed(i: int) -> Optimizer:
        other, its, _ = build(muon=True)
        other.load_state_dict({k: t.clone() for k, t in weights.items()})
        its.load_state_dict({k: t.clone() for k, t in moments.items()})
        assert set(its.params) == {n for n, _ in other.named_parameters()}
        change(i, 9, other, its)
        return its

    found = resumed(2).state_dict()
    assert found.keys() == moments.keys()
    assert all(torch.equal(t, moments[k]) for k, t in found.items())
    late = resumed(6)
    assert late.state_dict().keys() == {k for k in moments if ".guide/" not in k}
    assert not late.absent


def test_frozen_with_their_matrices():
    model, optim, maps = build()
    freeze(optim, ["layers.0.channel.*"])
    change = SelfGuided(until=4)
    step(change, 0, 9, model, optim)
    starts = {n: m.dense() for n, m in maps.items()}
    step(change, 1, 9, model, optim)
    for name, m in maps.items():
        assert m.guide is not None
        assert m.guide.weight.requires_grad == ("layers.0." not in name)
        assert (f"{name}.guide/exp_avg" in optim.state_dict()) == ("layers.0." not in name)
        assert torch.equal(m.dense(), starts[name]) == ("layers.0." in name)


# -- at half the price


def test_reduce_flop():
    """A matrix that is not drawn neither acts nor moves; how often it is drawn follows the share."""
    model, optim, maps = build(weight_decay=0.5)
    change, total = SelfGuided(until=200, reduce_flop=True), 400
    drawn = torch.zeros(200, GUIDES)
    for i in range(200):
        change(i, total, model, optim)
        drawn[i] = torch.tensor([m.guide is not None and m.guide.used for m in maps.values()])
    assert drawn[:20].mean() > 0.95
    assert drawn[-20:].mean() < 0.05
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.03)
    assert 0.3 < drawn[90:110].mean() < 0.7
    assert len({tuple(row.tolist()) for row in drawn[90:110]}) > 15  # each matrix has draws of its own
    for i in (100, 101, 102):
        change(i, total, model, optim)
        before = {n: p.clone() for n, p in optim.params.items() if n in optim.guests}
        step(change, i, total, model, optim)
        for name, m in maps.items():
            assert m.guide is not None
            x = torch.randn(m.d_in, dtype=torch.float64)
            plain = m.product(x) + (0.0 if m.bias is None else m.bias)
            assert torch.equal(m(x), plain) == (not m.guide.used)
            assert torch.equal(m.guide.weight, before[f"{name}.guide"]) == (not m.guide.used)


# -- what is said


def test_what_it_costs_is_said():
    model, _, maps = build()
    size = sum(m.d_in * m.d_out for m in maps.values())
    assert size == GUIDES * 16 * 32
    (said,) = notes([SelfGuided()], 12, model)
    assert f"{GUIDES} dense matrices of {size:,} parameters in the first 6 of 12 steps" in said
    assert f"{2 * size / 1e6:.4g} MFLOP per token forward while used, {size / 1e6:.4g} in the mean" in said
    (half,) = notes([SelfGuided(reduce_flop=True)], 12, model)
    assert f"{size / 2e6:.4g} in the mean" in half


@pytest.mark.parametrize(
    ("until", "total", "said"),
    [
        (0, 9, "until must be above 0, got 0"),
        (9, 9, "9 guided steps leave none"),
        (0.5, 1, "1 guided steps leave none"),
    ],
)
def test_what_is_refused(until: float, total: int, said: str):
    with pytest.raises(UserError, match=said):
        SelfGuided(until=until).steps(total)


# -- compiled


def test_compiles_once_for_each_phase():
    """Shares change in place, so the guided steps are one graph; the time before (a dry run) and after them is another."""
    torch._dynamo.reset()
    model, optim, _ = build()
    counter = CompileCounter()
    compiled = torch.compile(model.layers[1], backend=counter, fullgraph=True)
    ctx, _, _ = model.prepare(Batch(torch.ones(2, 3, dtype=torch.int64)), None)
    change = SelfGuided(until=3)
    for i in range(-1, 5):
        if i >= 0:
            change(i, 9, model, optim)
        x = torch.randn(2, 3, 16, dtype=torch.float64)
        assert_close(compiled(x, ctx)[0], model.layers[1](x, ctx)[0], "forms")
        assert counter.frame_count == (1 if i < 0 else 2)


# -- whole runs


@pytest.fixture(scope="module", params=["adamw", "muon"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps, the first 6 guided, with dropout and two micro-batches."""
    change = GUIDED if request.param == "adamw" else {**GUIDED, "reduce_flop": True}
    config = write_config(
        tmp_path_factory.mktemp("guided"),
        {**MODEL, "dropout": 0.1},
        train={"interventions": [change], "micro_batch": 4, "keep": 9},
        optim={"muon": request.param == "muon"},
    )
    result = train(config)
    assert result.code == 0, result.err
    return result.run


def test_only_the_optimizer_keeps_them(whole: Path):
    """In checkpoints until the step at which they leave; the weights of a run are those of its model at every time."""
    own = {n for n, _ in models.meta_model(model_config({**MODEL, "vocab_size": 257})).state_dict().items()}
    for saved in (3, 6, 9, 12):
        assert {k.removeprefix("model:") for k in tensors(whole, saved, ("model",))} == own
        held = [k for k in tensors(whole, saved, ("optim",)) if ".guide/" in k]
        assert len([k for k in held if k.endswith("/value")]) == (GUIDES if saved <= 6 else 0)
        assert bool(held) == (saved <= 6)
    assert losses(whole)[-1] < losses(whole)[0]
    assert "self_guided  9 dense matrices" in (whole / "summary.txt").read_text()
    model, _ = load_model(whole, step=3)
    assert not any(m.guide for m in model.modules() if isinstance(m, Structured))


@pytest.mark.parametrize("saved", [3, 6, 9])
def test_resumed_to_the_bit(whole: Path, saved: int):
    """From a checkpoint before, at and after the step in which the dense matrices leave; the first time with recomputation."""
    run = Path(shutil.copytree(whole, whole.with_name(f"resumed-{saved}")))
    for later in range(saved + 3, STEPS + 1, 3):
        shutil.rmtree(run / "checkpoints" / f"step_{later:08d}")
    result = train("--resume", run, f"train.recompute={str(saved == 3).lower()}")
    assert result.code == 0, result.err
    assert f"after step {saved} of" in result.err
    assert_same_run(run, whole, STEPS)


def test_ranks_and_micro_batches_are_one_batch(tmp_path: Path):
    """Two ranks with two micro-batches each: the gradients of the first step, the dense matrices' among them, and the loss
    after they have left."""
    section = {"interventions": [GUIDED], "save_every": 4, "sample_every": -1}
    config = write_config(tmp_path, MODEL, train=section, data={"packing": "stream"})
    one = watch(tmp_path / "1", config, "name=one")
    many = watch(tmp_path / "2", config, "name=many", "train.micro_batch=2", ranks=2)
    expected = one.ranks[0]["gradients"]
    assert sum(name.endswith(".guide") for name in expected[5]) == GUIDES
    assert not any(name.endswith(".guide") for name in expected[6])
    for rank in many.ranks:
        found = rank["gradients"]
        assert [set(g) for g in found] == [set(g) for g in expected]
        errors = {n: rel_err(g, expected[0][n]) for n, g in found[0].items()}
        assert max(errors.values()) <= GRADIENT, errors
    assert losses(many.run)[-1] == pytest.approx(losses(one.run)[-1], rel=LOSS)
    (first, second) = ([(done, text) for done, text, _ in rank["state"]] for rank in many.ranks)
    assert first == second
    assert [done for done, _ in first] == [4, 8, 12]


def test_a_run_that_cannot_be_guided_does_not_start(tmp_path: Path):
    config = write_config(tmp_path, PLAIN, train={"interventions": [GUIDED]})
    one_error(train(config), "no structured matrix in this model")
    assert not list((tmp_path / "runs").glob("*"))
