"""Active and temporary forgetting: token embeddings are drawn anew, and nothing else knows."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import models
from models import LM, UserError, model_config
from tests.runs import IN_STEP, PLAIN, Fault, assert_same_run, losses, metrics, one_error, tensors, train, write_config
from tests.tools import random_batch
from training.interventions import Forgetting, freeze, notes, reports
from training.optim import OptimConfig, Optimizer

VOCAB, STEPS = 37, 12
FORGET = {"kind": "forgetting", "every": 3, "until": 10, "tied": "reset"}  # before steps 3, 6 and 9


def build(tied: bool = False, **optim: Any) -> tuple[LM, Optimizer]:
    model = models.build(model_config({**PLAIN, "vocab_size": VOCAB, "tied": tied}))
    return model.train(), Optimizer(model, OptimConfig(**optim))


def step(i: int, model: LM, optim: Optimizer, change: Forgetting | None = None, total: int = 20) -> None:
    """One step of the loop, on a batch of its own."""
    if change is not None:
        change(i, total, model, optim)
    model.total(model(random_batch(4, 6, seed=i)).losses).backward()
    optim.step()
    optim.zero_grad()


def everything(model: LM, optim: Optimizer) -> dict[str, Tensor]:
    return {k: t.clone() for k, t in {**model.state_dict(), **optim.state_dict()}.items()}


def of_embedding(name: str) -> bool:
    return name.startswith("embed.weight")


# -- what is forgotten


@pytest.mark.parametrize("muon", [False, True], ids=["adamw", "muon"])
def test_embeddings_are_new_and_the_rest_goes_on(muon: bool):
    """At the step that forgets, all but the embedding and its moments is that of a run without, to the bit."""
    change = Forgetting(every=4)
    model, optim = build(muon=muon)
    plain, its = build(muon=muon)
    for i in range(4):
        step(i, model, optim, change)
        step(i, plain, its)
    before = everything(model, optim)
    assert all(torch.equal(t, before[k]) for k, t in everything(plain, its).items())
    change(4, 20, model, optim)
    after = everything(model, optim)
    assert {k for k in before if k not in after} == {k for k in before if k.startswith("embed.weight/")} != set()
    changed = [k for k, t in after.items() if not torch.equal(t, before[k])]
    assert changed == ["embed.weight"]
    weight = after["embed.weight"]
    assert abs(weight.std().item() / model.cfg.init_std - 1) < 0.1
    assert abs(torch.corrcoef(torch.stack([weight.flatten(), before["embed.weight"].flatten()]))[0, 1]) < 0.15


def test_the_next_step_is_the_first():
    """Bias correction starts anew: the step is that of an AdamW which has seen nothing else, at the rate of the run."""
    model, optim = build(weight_decay=0.1)
    for i in range(4):
        step(i, model, optim, Forgetting(every=4))
    Forgetting(every=4)(4, 20, model, optim)
    optim.set_lr(3e-3)
    fresh = torch.nn.Parameter(model.embed.weight.detach().clone())
    alone = torch.optim.AdamW([fresh], lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    model.total(model(random_batch(4, 6, seed=4)).losses).backward()
    assert model.embed.weight.grad is not None
    fresh.grad = model.embed.weight.grad.clone()
    alone.step()
    optim.step()
    torch.testing.assert_close(model.embed.weight, fresh, rtol=1e-6, atol=1e-8)
    state = optim.state_dict()
    assert state["embed.weight/step"] == 1
    assert state["head.weight/step"] == 5


def test_draws_depend_on_step_and_seed_alone():
    def drawn(i: int, seed: int = 0, runs: int = 0) -> Tensor:
        model, optim = build()
        for earlier in range(runs):
            step(earlier, model, optim)
        Forgetting(every=1, seed=seed)(i, 20, model, optim)
        return model.embed.weight.detach().clone()

    assert torch.equal(drawn(5), drawn(5, runs=2))
    for other in (drawn(6), drawn(5, seed=1), build()[0].embed.weight):
        assert not torch.isclose(drawn(5), other).any(dim=1).all()


@pytest.mark.parametrize(
    ("every", "until", "total", "steps"),
    [
        (3, 0.0, 12, [3, 6, 9]),
        (3, 9, 12, [3, 6]),
        (3, 10, 12, [3, 6, 9]),
        (2, 0.5, 12, [2, 4]),
        (5, 100, 12, [5, 10]),
        (12, 0.0, 12, []),
        (1, 1, 12, []),
    ],
)
def test_when(every: int, until: float, total: int, steps: list[int]):
    """Never before the first step, never from `until` on; and what is reported counts it."""
    model, optim = build()
    change = Forgetting(every=every, until=until)
    found = []
    for i in range(total):
        before = model.embed.weight.detach().clone()
        change(i, total, model, optim)
        if not torch.equal(model.embed.weight, before):
            found.append(i)
        assert reports([change], i + 1, total, model) == {"forgotten": len(found)}
    assert found == steps
    assert f"drawn anew {len(steps)} times" in notes([change], total, model)[0]


# -- where the head is the embedding


def test_a_tied_head():
    """It must be said what to do; `reset` takes the head along, `skip` does nothing, and an untied head always stays."""
    model, optim = build(tied=True)
    with pytest.raises(UserError, match="the head is the embedding; say tied: reset"):
        Forgetting(every=1)(1, 9, model, optim)
    before = everything(model, optim)
    skip = Forgetting(every=1, tied="skip")
    skip(1, 9, model, optim)
    assert all(torch.equal(t, before[k]) for k, t in everything(model, optim).items())
    assert notes([skip], 9, model) == ["forgetting  nothing: the head is the embedding (tied: skip)"]
    assert reports([skip], 9, 9, model) == {"forgotten": 0}
    Forgetting(every=1, tied="reset")(1, 9, model, optim)
    assert not torch.equal(model.head_weight, before["embed.weight"])
    assert "embeddings and head, 37 x 16," in notes([Forgetting(tied="reset")], 9, model)[0]
    untied, optim = build()
    head = untied.head_weight.clone()
    Forgetting(every=1, tied="skip")(1, 9, untied, optim)
    assert torch.equal(untied.head_weight, head)
    assert "embeddings, 37 x 16," in notes([Forgetting(tied="skip")], 9, untied)[0]


def test_what_is_refused():
    for settings, message in (
        ({"every": 0}, "every must be at least 1"),
        ({"until": -1.0}, "until must not be negative"),
    ):
        with pytest.raises(UserError, match=message):
            Forgetting(**settings)
    with pytest.raises(UserError, match="unknown tied 'rest'; did you mean 'reset'"):
        Forgetting(tied="rest")
    model, optim = build()
    freeze(optim, ["embed.*"])
    with pytest.raises(UserError, match=r"embed\.weight is frozen"):
        notes([Forgetting()], 9, model)


# -- whole runs


@pytest.fixture(scope="module", params=["adamw", "muon"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps with dropout and two micro-batches."""
    config = write_config(
        tmp_path_factory.mktemp("forgetting"),
        {**PLAIN, "dropout": 0.1},
        train={"interventions": [FORGET], "micro_batch": 4, "keep": 9},
        optim={"muon": request.param == "muon"},
    )
    result = train(config)
    assert result.code == 0, result.err
    return result.run


def test_it_is_said(whole: Path):
    lines = [line for line in metrics(whole) if "loss" in line]
    assert [line["forgotten"] for line in lines] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert "every 3 of the first 10 of 12 steps" in (whole / "summary.txt").read_text()
    counts = [int(tensors(whole, saved)["optim:embed.weight/step"]) for saved in (3, 6, 9, 12)]
    assert counts == [3, 3, 3, 3]
    assert int(tensors(whole, 12)["optim:norm.weight/step"]) == 12


@pytest.mark.parametrize("saved", [3, 9])
def test_resumed_to_the_bit(whole: Path, saved: int):
    """From the checkpoint after which the next step forgets."""
    run = Path(shutil.copytree(whole, whole.with_name(f"resumed-{saved}")))
    for later in range(saved + 3, STEPS + 1, 3):
        shutil.rmtree(run / "checkpoints" / f"step_{later:08d}")
    result = train("--resume", run)
    assert result.code == 0, result.err
    assert f"after step {saved} of" in result.err
    assert_same_run(run, whole, STEPS)


def test_killed_and_resumed_to_the_bit(whole: Path):
    """In the middle of the step behind one that forgot, so that it forgets a second time."""
    config = whole.parents[1] / "small.yaml"
    killed = train(config, "name=killed", fault=Fault(IN_STEP, 8, number=signal.SIGKILL))
    assert killed.code == -signal.SIGKILL
    run = whole.parent / "killed"
    assert train("--resume", run).code == 0
    assert_same_run(run, whole, STEPS)


def test_two_ranks_are_one_rank(tmp_path: Path):
    section = {"interventions": [FORGET], "sample_every": -1}
    config = write_config(tmp_path, PLAIN, train=section, data={"packing": "stream"})
    one, two = train(config, "name=one"), train(config, "name=two", ranks=2)
    assert (one.code, two.code) == (0, 0), two.err
    assert losses(two.run) == pytest.approx(losses(one.run), rel=1e-4)


def test_a_run_that_does_not_say_what_to_do_with_its_head_does_not_start(tmp_path: Path):
    config = write_config(tmp_path, PLAIN, train={"interventions": [{"kind": "forgetting"}]})
    one_error(train(config), "say tied: reset to forget both, or tied: skip")
    assert not list((tmp_path / "runs").glob("*"))
