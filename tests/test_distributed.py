"""Two ranks are one rank with both batches: the real `train.py` on two gloo processes against the same on one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.rows import sum_rows
from models.types import Write
from tests.runs import (
    IN_STEP,
    PLAIN,
    ROOT,
    TOYS,
    Fault,
    losses,
    metrics,
    one_error,
    steps_saved,
    tensors,
    train,
    write_config,
)
from tests.tools import rel_err, state_hash
from training.parallel import World, merge_writes, reduce_writes

STEPS = 20
CLIP = 0.25  # the global norm of every first step is above it
GRADIENT, LOSS = 1e-5, 1e-4  # relative


def record(rank: int, folder: Path) -> None:
    """Write down, in ``folder``, what this rank sees: tokens, gradients and writes of every step, state at its end."""
    import train as command
    from data import Loader
    from models import LM
    from training import checkpoint
    from training.optim import Optimizer

    seen: dict[str, list[Any]] = {"tokens": [], "gradients": [], "writes": [], "state": []}
    take, step, commit, save = Loader.next, Optimizer.step, LM.commit, checkpoint.save

    def taking(loader: Loader) -> Any:
        batch = take(loader)
        seen["tokens"].append(batch["tokens"])
        return batch

    def stepping(optim: Optimizer) -> None:
        found = {n: p.grad.clone() for n, p in optim.params.items() if p.grad is not None}
        for name, table in optim.tables.items():
            rows, grad = table.take_grad() or (torch.zeros(0, dtype=torch.int64), torch.zeros(0, table.width))
            found[name] = torch.zeros(table.rows, table.width).index_add(0, rows, grad)
        seen["gradients"].append(found)
        step(optim)

    def committing(model: LM, writes: Any, info: Any) -> Any:
        seen["writes"].append({n: (w.value.clone(), w.key) for n, w in writes.items()})
        return commit(model, writes, info)

    def saving(run: Path, done: int, model: LM, optim: Optimizer, *rest: Any) -> Any:
        moments = {n: t.clone() for n, t in optim.state_dict().items()}
        seen["state"].append((done, state_hash(model), moments))
        torch.save(seen, folder / f"rank-{rank}.pt")
        return save(run, done, model, optim, *rest)

    for owner, name, spy in ((Loader, "next", taking), (Optimizer, "step", stepping), (LM, "commit", committing)):
        setattr(owner, name, spy)
    command.checkpoint.save = saving


@dataclass(frozen=True)
class Seen:
    run: Path
    ranks: list[dict[str, list[Any]]]

    @property
    def tokens(self) -> list[Tensor]:
        """The rows of each forward, those of all ranks together."""
        return [torch.cat(rows) for rows in zip(*(r["tokens"] for r in self.ranks), strict=True)]


def watch(folder: Path, *argv: str | Path, ranks: int = 1, fault: Fault | None = None) -> Seen:
    """A run with its records in the folder."""
    folder.mkdir()
    result = train(*argv, "--allow-foreign", ranks=ranks, fault=fault, spy=("tests.test_distributed:record", folder))
    assert result.code == 0, result.err
    found = [torch.load(folder / f"rank-{r}.pt", weights_only=True) for r in range(ranks)]
    return Seen(result.run, found)


@pytest.fixture(scope="module", params=["documents", "stream"])
def trio(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    """One rank, one rank with two micro-batches, two ranks; model memory, row stores and Muon included."""
    folder = tmp_path_factory.mktemp("trio")
    train_section = {"steps": STEPS, "val_every": STEPS, "save_every": STEPS, "sample_every": -1}
    model = json.loads(json.dumps(TOYS))
    if request.param == "documents":  # a mean over valid tokens is not linear in the batch where rows are padded
        model["blocks"]["ema"]["mixer"]["rate_weight"] = 0.0
    optim = {"muon": True, "clip": CLIP}
    config = write_config(folder, model, train=train_section, optim=optim, data={"packing": request.param})
    return {
        "one": watch(folder / "1", config, "name=one"),
        "micro": watch(folder / "2", config, "name=micro", "train.micro_batch=4"),
        "ranks": watch(folder / "3", config, "name=ranks", ranks=2),
    }


def test_gradients_of_the_first_step(trio: dict[str, Seen]):
    expected = trio["one"].ranks[0]["gradients"][0]
    for name in ("micro", "ranks"):
        for rank in trio[name].ranks:
            found = rank["gradients"][0]
            assert found.keys() == expected.keys()
            assert any(n.endswith("table") and g.count_nonzero() for n, g in found.items())
            errors = {n: rel_err(g, expected[n]) for n, g in found.items()}
            assert max(errors.values()) <= GRADIENT, {n: e for n, e in errors.items() if e > GRADIENT}


def test_norm_and_losses(trio: dict[str, Seen]):
    expected = metrics(trio["one"].run)
    for name in ("micro", "ranks"):
        found = metrics(trio[name].run)
        assert found[0]["grad_norm"] == pytest.approx(expected[0]["grad_norm"], rel=GRADIENT)
        assert found[0]["loss"] == pytest.approx(expected[0]["loss"], rel=GRADIENT)
        ours, theirs = losses(trio[name].run), losses(trio["one"].run)
        assert len(ours) == STEPS
        assert ours[-1] == pytest.approx(theirs[-1], rel=LOSS)
        assert found[-1]["val"]["loss"] == pytest.approx(expected[-1]["val"]["loss"], rel=LOSS)
        assert found[-1]["val"]["tokens"] == expected[-1]["val"]["tokens"] == 500
        assert found[-1]["val"]["bytes"] == expected[-1]["val"]["bytes"]


def test_clipping_acts_on_the_global_norm(trio: dict[str, Seen]):
    """The recorded gradients are the clipped ones: their norm, tables included, is the limit where the norm was above."""
    for seen in trio.values():
        line = metrics(seen.run)[0]
        norm = torch.cat([g.flatten() for g in seen.ranks[0]["gradients"][0].values()]).norm().item()
        assert line["grad_norm"] > 2 * CLIP
        assert norm == pytest.approx(CLIP, rel=1e-4)


def test_writes_of_the_first_step(trio: dict[str, Seen]):
    """Exact against the same micro-batches on one rank; the reservoir's candidates also against the whole batch."""
    micro, whole = trio["micro"].ranks[0]["writes"][0], trio["one"].ranks[0]["writes"][0]
    for rank in trio["ranks"].ranks:
        found = rank["writes"][0]
        assert found.keys() == micro.keys() == whole.keys() != set()
        for name, (value, key) in found.items():
            assert torch.equal(value, micro[name][0]), name
            assert rel_err(value, whole[name][0]) <= GRADIENT, name
            if key is not None:
                assert torch.equal(key, micro[name][1])
                assert torch.equal(key, whole[name][1])


def test_ranks_stay_equal_to_the_bit(trio: dict[str, Seen]):
    first, second = trio["ranks"].ranks
    (done, ours, moments), (_, theirs, others) = first["state"][-1], second["state"][-1]
    assert done == STEPS
    assert ours == theirs
    assert moments.keys() == others.keys()
    assert all(torch.equal(t, others[n]) for n, t in moments.items())


def test_each_row_is_seen_once(trio: dict[str, Seen]):
    one, micro, ranks = (trio[name].tokens for name in ("one", "micro", "ranks"))
    assert all(torch.equal(a, b) for a, b in zip(one, ranks, strict=True))
    assert torch.equal(torch.cat(one), torch.cat(micro))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Seen]:
    """(config, the undisturbed run on one rank); with dropout."""
    folder = tmp_path_factory.mktemp("plain")
    config = write_config(folder, {**PLAIN, "dropout": 0.1})
    return config, watch(folder / "whole", config, "name=whole")


def test_one_rank_is_asked_and_all_stop(plain: tuple[Path, Seen], tmp_path: Path):
    """SIGTERM to the second rank alone; then on with one rank: it says what is lost, and the rows are those of one rank."""
    config, whole = plain
    fault = Fault(IN_STEP, 4, number=signal.SIGTERM, rank=1)
    stopped = train(config, "name=two", ranks=2, fault=fault)
    assert stopped.code == 0, stopped.err
    run = stopped.run
    assert steps_saved(run) == [3, 5]
    folder = tmp_path / "seen"
    folder.mkdir()
    result = train("--resume", run, spy=("tests.test_distributed:record", folder))
    assert result.code == 0, result.err
    assert "saved on 2 ranks, resumed on 1" in result.err
    assert "random generators (dropout) start anew" in result.err
    (seen,) = [torch.load(folder / "rank-0.pt", weights_only=True)]
    assert len(seen["tokens"]) == 12 - 5
    assert all(torch.equal(a, b) for a, b in zip(seen["tokens"], whole.tokens[5:], strict=True))


def test_resume_on_the_same_ranks_is_exact(plain: tuple[Path, Seen]):
    config, _ = plain
    whole = train(config, "name=pair", ranks=2)
    stopped = train(config, "name=pair-stopped", ranks=2, fault=Fault(IN_STEP, 6, number=signal.SIGTERM))
    resumed = train("--resume", stopped.run, ranks=2)
    assert [r.code for r in (whole, stopped, resumed)] == [0, 0, 0]
    assert "resumed on" not in resumed.err
    assert metrics(stopped.run) == metrics(whole.run)
    ours, theirs = tensors(stopped.run, 12), tensors(whole.run, 12)
    assert {k.split(":")[1][0] for k in ours if k.startswith("rng")} == {"0", "1"}
    assert all(torch.equal(t, theirs[n]) for n, t in ours.items())


def test_errors_end_all_ranks(plain: tuple[Path, Seen]):
    """What only the first rank can notice ends every rank with the same line; what all notice, too."""
    config, _ = plain
    one_error(train(config, "data.sources.0.path=/nowhere/at/all.txt", ranks=2), "/nowhere/at/all.txt")
    one_error(train(config, "train.batch_size=7", ranks=2), "train.batch_size=7", "2 ranks")


def test_reductions_without_ranks():
    """merge and reduce in one process: sums add up, the reservoir keeps the largest keys in falling order."""
    one = {"a": Write(torch.tensor([1.0, 2.0])), "r": Write(torch.eye(2), "topk_by_key", torch.tensor([5, 1]))}
    two = {"a": Write(torch.tensor([0.5, 0.5])), "r": Write(-torch.eye(2), "topk_by_key", torch.tensor([3, 9]))}
    merged = reduce_writes(merge_writes(merge_writes({}, one), two), World(0, 1, torch.device("cpu")))
    assert torch.equal(merged["a"].value, torch.tensor([1.5, 2.5]))
    assert merged["r"].key is not None
    assert merged["r"].key.tolist() == [9, 5]
    assert torch.equal(merged["r"].value, torch.tensor([[-0.0, -1.0], [1.0, 0.0]]))
    rows, sums = sum_rows(torch.tensor([4, 1, 4]), torch.tensor([[1.0], [2.0], [3.0]]))
    assert (rows.tolist(), sums.tolist()) == ([1, 4], [[2.0], [4.0]])


@pytest.mark.slow
def test_torchrun(tmp_path: Path):
    """The command as users start it, stopped by one signal to the launcher, and started again."""
    config = write_config(tmp_path, train={"steps": 100, "sample_every": -1})
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([*launch, str(config), "name=both"], text=True, **pipes)
    run = tmp_path / "runs" / "both"
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(metrics(run)) < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.terminate()
    process.communicate(timeout=60)
    stopped = steps_saved(run)[-1]
    assert stopped == len(losses(run)) < 100
    done = subprocess.run(
        [*launch, "--resume", str(run), f"train.steps={stopped + 5}"], text=True, check=False, **pipes
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"finished: {run}"
    assert len(losses(run)) == stopped + 5
    assert losses(run)[-1] < losses(run)[0]
