"""What a commit does to the slots of a memory cell, and that it is the same however a step is cut into batches, ranks and runs."""

from __future__ import annotations

import copy
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models import Batch
from models.channels import gmt_memory
from models.channels.gmt import GMT
from models.types import CommitInfo, Write
from tests.runs import IN_STEP, PLAIN, Fault, assert_same_run, losses, metrics, tensors, train, write_config
from tests.test_distributed import watch
from tests.test_gmt import cells, model
from tests.tools import assert_close, random_batch, rel_err
from training.parallel import merge_writes

SLOTS, WIDTH = 5, 6
MAINTAINED = 10


def info(step: int = 1, micro_batches: int = 1, seed: int = 7) -> CommitInfo:
    return CommitInfo(step, 100, seed, micro_batches, 1)


def cell(**options: Any) -> GMT:
    (found,) = cells(
        model(
            layers=1, maintenance_every=MAINTAINED, cooldown=2, dead_below=0.05, **{"usage_momentum": 0.99, **options}
        )
    )
    return found


def said(
    c: GMT, counts: Iterable[float] = (4, 3, 0, 1, 2), candidates: int = 20, scale: float = 9.0
) -> dict[str, Write]:
    """Writes as of a step in which this many tokens were nearest to each slot."""
    count = torch.tensor(list(counts), dtype=torch.float64)
    keys = torch.rand(candidates, dtype=torch.float64).sort(descending=True).values
    return {
        "sums": Write(scale * torch.randn(SLOTS, WIDTH, dtype=torch.float64) * (count > 0)[:, None]),
        "counts": Write(count),
        "weights": Write(torch.rand(SLOTS, dtype=torch.float64).softmax(0) * count.sum()),
        "tokens": Write(count.sum()),
        "candidates": Write(scale * torch.randn(candidates, WIDTH, dtype=torch.float64), "topk_by_key", keys),
    }


@torch.no_grad()
def commit(c: GMT, writes: dict[str, Write], **how: Any) -> list[Any]:
    return c.commit(writes, info(**how))


# -- write-back


@pytest.mark.parametrize("write_norm", ["raw", "unit"])
def test_slots_move_towards_their_tokens(write_norm: str):
    c = cell(write_norm=write_norm, momentum=0.7)
    before, writes = c.slots.detach().clone(), said(c)
    assert commit(c, writes) == []
    for i, count in enumerate(writes["counts"].value.tolist()):
        want = before[i]
        if count:
            mean = writes["sums"].value[i] / count
            want = 0.7 * want + 0.3 * (mean / mean.norm() if write_norm == "unit" else mean)
        assert_close(c.slots[i].detach(), want / want.norm(), "forms")
    assert_close(c.slots.norm(dim=1).detach(), torch.ones(SLOTS, dtype=torch.float64), "same")


def test_an_unused_slot_keeps_its_direction_and_gets_its_length_back():
    c = cell()
    with torch.no_grad():
        c.slots[2] *= 3.0
    before = c.slots[2].detach().clone()
    commit(c, said(c))
    assert_close(c.slots[2].detach(), before / 3.0, "forms")


def test_a_momentum_of_one_writes_nothing_back():
    c = cell()
    with torch.no_grad():
        c.write_momentum.fill_(1e3)
    before = c.slots.detach().clone()
    commit(c, said(c))
    assert_close(c.slots.detach(), before, "same")


def test_rates():
    """``reference`` counts micro-batches: momenta to their power, ages by their number."""
    for rate, times, slow in (("per_step", 1, 0.99**33), ("reference", 3, 0.99**3)):
        c = cell(rate=rate, momentum=0.8, usage_momentum=None)
        before, writes = c.slots.detach().clone(), said(c)
        commit(c, writes, micro_batches=3)
        mean, m = writes["sums"].value[0] / writes["counts"].value[0], 0.8**times
        assert_close(c.slots[0].detach(), F.normalize(m * before[0] + (1 - m) * mean, dim=0), "forms")
        assert c.age.tolist() == [times] * SLOTS
        share = writes["weights"].value / writes["tokens"].value
        assert_close(c.usage, slow / SLOTS + (1 - slow) * share, "forms")
        assert c.usage.sum().item() == pytest.approx(1.0, abs=1e-4)


def test_a_step_without_tokens_changes_no_usage():
    c = cell()
    commit(c, said(c, counts=[0] * SLOTS))
    assert_close(c.usage, torch.full((SLOTS,), 1 / SLOTS, dtype=torch.float64), "same")


# -- maintenance


def test_only_on_schedule():
    for step in range(1, 2 * MAINTAINED + 1):
        c = cell()
        c.usage[1] = 0.0
        assert bool(commit(c, said(c), step=step)) == (step % MAINTAINED == 0)


def test_dead_slots_start_again_at_tokens():
    c = cell()
    c.usage[:2] = 0.0
    writes = said(c)
    (reset,) = commit(c, writes, step=MAINTAINED)
    assert reset.name == "slots"
    assert reset.rows.tolist() == [0, 1]
    assert_close(c.slots[:2].detach(), F.normalize(writes["candidates"].value[:2], dim=1), "forms")
    assert c.usage[:2].tolist() == pytest.approx([1 / SLOTS] * 2)
    assert c.age.tolist() == [0, 0, 1, 1, 1]


def test_most_slots_dead_start_again_in_directions_of_the_seed():
    found = []
    for seed in (7, 7, 8):
        torch.manual_seed(0)
        c = cell()
        c.usage[:3] = 0.0
        writes = said(c)
        commit(c, writes, step=MAINTAINED, seed=seed)
        found.append(c.slots.detach().clone())
        tokens = F.normalize(writes["candidates"].value, dim=1)
        assert (c.slots.detach()[:3] @ tokens.T).max() < 0.999
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0][:3], found[2][:3])


def test_of_two_slots_that_point_the_same_way_one_moves_on():
    for used in (0.1, 0.4):  # the one that is used less
        c = cell()
        with torch.no_grad():
            c.slots[3] = c.slots[0] + 0.01
            c.usage[0], c.usage[3] = 0.25, used
            c.age.fill_(5.0)
        before = c.slots.detach().clone()
        writes = said(c, counts=[0] * SLOTS)
        (reset,) = commit(c, writes, step=MAINTAINED)
        moved = 3 if used < 0.25 else 0
        assert reset.rows.tolist() == [moved]
        assert_close(c.slots[moved].detach(), F.normalize(writes["candidates"].value[0], dim=0), "forms")
        assert_close(c.slots[3 - moved].detach(), F.normalize(before[3 - moved], dim=0), "forms")


def test_young_slots_are_not_merged():
    c = cell()
    with torch.no_grad():
        c.slots[3] = c.slots[0] + 0.01
    assert commit(c, said(c, counts=[0] * SLOTS), step=MAINTAINED) == []


def test_of_three_that_point_the_same_way_one_stays():
    """A pair is looked at again once one of it has moved."""
    c = cell()
    with torch.no_grad():
        c.slots[1], c.slots[2] = c.slots[0] + 0.01, c.slots[0] - 0.01
        c.usage.copy_(torch.tensor([0.3, 0.2, 0.1, 0.2, 0.2]))
        c.age.fill_(5.0)
    (reset,) = commit(c, said(c, counts=[0] * SLOTS), step=MAINTAINED)
    assert reset.rows.tolist() == [1, 2]


def test_too_few_tokens_are_filled_up_with_directions():
    c = cell()
    c.usage[:2] = 0.0
    writes = said(c, candidates=2)
    lots = writes["candidates"]
    assert lots.key is not None
    writes["candidates"] = lots._replace(key=torch.tensor([0.5, -1.0], dtype=torch.float64))
    commit(c, writes, step=MAINTAINED)
    assert_close(c.slots[0].detach(), F.normalize(lots.value[0], dim=0), "forms")
    assert c.slots[1].norm().item() == pytest.approx(1.0)
    assert abs(F.cosine_similarity(c.slots[1].detach(), lots.value[1], dim=0)) < 0.999


# -- what is written


def test_writes_are_what_the_tokens_say():
    for source in ("post_residual", "cell_input"):
        lm = model(layers=1, write_source=source).train()
        (c,) = cells(lm)
        batch = random_batch(2, 7)
        x, ctx = torch.randn(2, 7, WIDTH, dtype=torch.float64), lm.prepare(batch, None)[0]
        y, _, aux = c(x, ctx)
        hop = c.hop(c.norm(x).flatten(0, 1), c.tables_of_slots(), c.temperature(ctx.progress))
        states = (x + y if source == "post_residual" else c.norm(x)).flatten(0, 1)
        nearest = hop.source.argmax(1)
        for i in range(SLOTS):
            rows = states[nearest == i]
            assert aux.writes["counts"].value[i] == len(rows)
            assert_close(aux.writes["sums"].value[i], rows.sum(0), "forms")
        assert_close(aux.writes["weights"].value, hop.source.sum(0), "forms")
        lots = aux.writes["candidates"]
        assert lots.key is not None
        real = lots.value[lots.key >= 0]
        assert len(real) == 14
        assert torch.cdist(real, states.detach()).amin(1).max() < 1e-9
        assert not any(w.value.requires_grad for w in aux.writes.values())


def test_lots_do_not_depend_on_the_batch():
    """The key of a token is the same wherever its row stands, with padding before it too, and other at another time."""
    lm = model(layers=1)
    tokens = torch.randint(23, (6, 9))
    tokens[:, 0] = torch.arange(6)  # rows that begin alike have the same lots there

    def keys(batch: Batch) -> Tensor:
        return gmt_memory.keys(lm.prepare(batch, None)[0])

    whole = keys(Batch(tokens))
    assert torch.equal(keys(Batch(tokens[3:5])), whole[3:5])
    assert torch.equal(keys(Batch(tokens[:, :5])), whole[:, :5])
    valid = torch.tensor([[False] * 2 + [True] * 9]).expand(6, -1)
    padded = keys(Batch(torch.cat([torch.randint(23, (6, 2)), tokens], dim=1), valid=valid))
    assert torch.equal(padded[:, 2:], whole)
    assert (padded[:, :2] == -1).all()
    assert len(whole.unique()) == whole.numel()
    lm.progress.fill_(0.25)
    assert not (keys(Batch(tokens)) == whole).any()


def test_lots_are_fair():
    """Uniform keys: of many tokens each tenth of the range gets a tenth, and neighbours say nothing about each other."""
    lm = model(layers=1)
    keys = gmt_memory.keys(lm.prepare(Batch(torch.randint(23, (64, 256))), None)[0])
    counts = torch.histc(keys.float(), bins=10, min=0, max=1)
    expected = keys.numel() / 10
    assert ((counts - expected).square() / expected).sum() < 27.9  # chi-square with 9 degrees, 0.1 per cent
    for other in (keys.roll(1, 1), keys.roll(1, 0)):
        assert torch.corrcoef(torch.stack([keys.flatten(), other.flatten()]))[0, 1].abs() < 0.03


def test_micro_batches_commit_what_one_batch_does():
    batch = random_batch(4, 6)
    ends = []
    for sizes in ([4], [1, 3], [1, 1, 1, 1]):
        lm, writes, start = model(layers=2, maintenance_every=1, dead_below=0.5).train(), {}, 0
        for size in sizes:
            piece = Batch(*(None if t is None else t[start : start + size] for t in batch))  # pyright: ignore[reportArgumentType]
            writes, start = merge_writes(writes, lm(piece).writes), start + size
        lm.commit(writes, info(micro_batches=1))
        ends.append(lm.state_dict())
    for end in ends[1:]:
        assert_close(end, ends[0], "forms")


# -- whole runs

RUN: dict[str, Any] = {
    **PLAIN,
    "norm": "layernorm",
    "blocks": {
        "only": {
            "mixer": {"kind": "attention", "heads": 2},
            "channel": {
                "kind": "gmt",
                "slots": 6,
                "width": 4,
                "fidelity": "corrected",
                "maintenance_every": 3,
                "cooldown": 2,
                "dead_below": 0.12,
                "merge_above": 0.6,
                "momentum": 0.8,
                "usage_weight": 0.0,
                "target_usage_weight": 0.0,
            },
        }
    },
}


@pytest.mark.slow
def test_two_ranks_are_one(tmp_path: Path):
    """Model memory too, through dead and doubled slots; and all ranks hold the same bytes."""
    steps = {"steps": 20, "val_every": 20, "save_every": 5, "sample_every": -1, "keep": 8}
    # Cooling to 0.1 within 20 steps makes routing so steep that rounding grows threefold a step.
    mild = copy.deepcopy(RUN)
    mild["blocks"]["only"]["channel"]["temperature_end"] = 0.5
    config = write_config(tmp_path, mild, train=steps, data={"packing": "stream"})
    one, two = watch(tmp_path / "1", config, "name=one"), watch(tmp_path / "2", config, "name=two", ranks=2)
    for rank in two.ranks:
        for name, (value, key) in one.ranks[0]["writes"][0].items():
            mine, lots = rank["writes"][0][name]
            assert rel_err(mine, value) < 1e-5, name
            assert key is None or torch.equal(lots, key)
    assert losses(two.run) == pytest.approx(losses(one.run), rel=2e-5)
    for step in (5, 10, 15, 20):
        ours, theirs = tensors(two.run, step), tensors(one.run, step)
        for name in (n for n in theirs if n.endswith((".slots", ".usage", ".age"))):
            assert rel_err(ours[name], theirs[name]) < 1e-4, (step, name)
    assert all(len({r["state"][i][1] for r in two.ranks}) == 1 for i in range(4)), "ranks hold different bytes"
    ages = [t for n, t in tensors(one.run, 20).items() if n.endswith(".age")]
    assert any((age < 20).any() for age in ages), "no slot ever started again"


@pytest.mark.slow
def test_resume_is_to_the_bit(tmp_path: Path):
    steps = {"steps": 12, "save_every": 4, "micro_batch": 2, "recompute": True}
    config = write_config(tmp_path, RUN, train=steps)
    whole, part = train(config, "name=whole"), train(config, "name=part", fault=Fault(IN_STEP, 6, "after"))
    assert whole.code == 0, whole.err
    assert part.code == -signal.SIGKILL
    run = whole.run.with_name("part")
    rest = train("--resume", run)
    assert rest.code == 0, rest.err
    assert_same_run(run, whole.run, 12)
    assert any(name.endswith("source_slots") for entry in metrics(whole.run) for name in _names(entry))


def _names(entry: Any, prefix: str = "") -> list[str]:
    if not isinstance(entry, dict):
        return [prefix]
    return [name for key, value in entry.items() for name in _names(value, f"{prefix}.{key}")]
