"""Kill a run at any moment, resume it: losses, weights, moments and samples are those of a run that nothing happened to."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.runs import (
    IN_FSYNC,
    IN_RENAME,
    IN_STEP,
    IN_WRITE,
    PLAIN,
    ROOT,
    TOYS,
    Fault,
    assert_same_run,
    losses,
    metrics,
    one_error,
    snapshot,
    steps_saved,
    train,
    write_config,
)

STEPS = 12
# Two tables in host memory, one with a cache: what the background thread does is done before a checkpoint is written.
_ENGRAM = {"kind": "engram", "heads": 2, "row_width": 4, "base": 61}
HOSTED = {
    **PLAIN,
    "n_layers": 3,
    "at": {
        1: {"memory": {**_ENGRAM, "store": {"kind": "host", "rule": "lazy_adam"}}},
        2: {"memory": {**_ENGRAM, "store": {"kind": "host", "cache_rows": 20}}},
    },
}
CHECKPOINT_FILES = ("model.safetensors", "optim.safetensors", "rng.safetensors", "state.json", "manifest.json")


def _variants() -> dict[str, tuple[dict, dict]]:
    dropout = {"dropout": 0.1}
    accumulate = {"micro_batch": 2}
    return {
        "adamw": ({**PLAIN, **dropout}, {"train": accumulate}),
        "muon": ({**PLAIN, **dropout}, {"optim": {"muon": True, "schedule": "wsd"}, "data": {"packing": "stream"}}),
        "toys": ({**TOYS, **dropout}, {"train": {**accumulate, "recompute": True}, "optim": {"muon": True}}),
        "host": ({**HOSTED, **dropout}, {"train": accumulate}),
    }


@pytest.mark.slow
@pytest.mark.parametrize("variant", _variants())
def test_killed_at_random_moments(tmp_path: Path, variant: str):
    model, sections = _variants()[variant]
    sections = {**sections, "train": {**sections.get("train", {}), "save_every": 2}}
    config = write_config(tmp_path, model, **sections)
    whole = train(config, "name=whole", "--allow-foreign")
    assert whole.code == 0, whole.err
    assert len(losses(whole.run)) == STEPS
    assert losses(whole.run)[-1] < losses(whole.run)[0]
    if variant == "host":
        plain, cached = json.loads((whole.run / "environment.json").read_text())["tables"].values()
        assert plain["hit_rate"] == 0 < cached["hit_rate"] < 1

    rng = random.Random(variant)
    files = 4 if variant in ("toys", "host") else 3  # written in one checkpoint
    faults = [
        Fault(IN_STEP, rng.randint(3, 4), "after"),  # of step 3 or 4: the checkpoint of step 2 is there
        Fault(IN_WRITE, rng.randint(1, files), "half"),
        Fault(IN_FSYNC, rng.randint(1, files + 3), "before"),
        Fault(IN_RENAME, 1 + 2 * rng.randint(0, 1), rng.choice(["before", "after"])),
        Fault(IN_STEP, rng.randint(1, 3), "before"),
    ]
    first = train(config, "name=torn", "--allow-foreign", fault=faults[0])
    assert first.code == -signal.SIGKILL
    run = whole.run.with_name("torn")
    for fault in faults[1:]:
        before = steps_saved(run)
        killed = train("--resume", run, "--allow-foreign", fault=fault)
        assert killed.code == -signal.SIGKILL, (fault, killed.err)
        assert set(steps_saved(run)) >= set(before[-1:]), "the newest checkpoint is lost"
    ended = train("--resume", run, "--allow-foreign")
    assert ended.code == 0, ended.err
    assert_same_run(run, whole.run, STEPS)
    assert steps_saved(run) == [STEPS - 2, STEPS]
    assert not list(run.rglob("*tmp*")), "remains of killed writes"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with dropout. Its config lies two folders up."""
    config = write_config(tmp_path_factory.mktemp("resume"), {**PLAIN, "dropout": 0.1})
    result = train(config)
    assert result.code == 0, result.err
    return result.run


@pytest.fixture(scope="module")
def stopped(uninterrupted: Path) -> Path:
    """The same run, stopped by SIGTERM in step 8: checkpoints of steps 6 and 8."""
    config = uninterrupted.parents[1] / "small.yaml"
    result = train(config, "name=stopped", fault=Fault(IN_STEP, 7, number=signal.SIGTERM))
    assert result.code == 0, result.err
    assert "stopped; continue with" in result.out
    assert steps_saved(result.run) == [6, 8]
    return result.run


def _copy(run: Path, name: str) -> Path:
    return Path(shutil.copytree(run, run.with_name(name)))


def test_sigterm_saves_and_resumes(stopped: Path, uninterrupted: Path):
    run = _copy(stopped, "after-sigterm")
    assert train("--resume", run).code == 0
    assert_same_run(run, uninterrupted, STEPS)


@pytest.mark.slow
def test_sigint_to_the_real_command(tmp_path: Path):
    """Ctrl-C as a user sends it: from outside, at no chosen moment."""
    config = write_config(tmp_path, {**PLAIN, "dropout": 0.1}, train={"steps": 60, "sample_every": -1})
    whole = train(config, "name=whole", "train.sample_every=60")
    words = [sys.executable, "train.py", str(config), "name=broken", "train.sample_every=60"]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run = whole.run.with_name("broken")
    deadline = time.monotonic() + 90
    while not (run / "metrics.jsonl").exists() or len(metrics(run)) < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "stopping after this step" in err
    assert f"continue with: python train.py --resume {run}" in out
    assert len(losses(run)) < 60
    assert steps_saved(run)[-1] == len(losses(run))
    assert train("--resume", run).code == 0
    assert_same_run(run, whole.run, 60)


def test_second_signal_stops_at_once(uninterrupted: Path):
    config = uninterrupted.parents[1] / "small.yaml"
    result = train(config, "name=twice", fault=Fault(IN_STEP, 5, number=signal.SIGINT, twice=True))
    assert result.code == 128 + signal.SIGINT
    run = uninterrupted.with_name("twice")
    assert steps_saved(run) == [3]
    assert train("--resume", run).code == 0
    assert_same_run(run, uninterrupted, STEPS)


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0x10
    path.write_bytes(raw)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
@pytest.mark.parametrize("damage", [_flip, _truncate, Path.unlink], ids=["flip", "truncate", "delete"])
def test_damaged_newest_checkpoint(stopped: Path, uninterrupted: Path, name: str, damage):
    run = _copy(stopped, f"{damage.__name__}-{name}")
    damage(run / "checkpoints" / "step_00000008" / name)
    result = train("--resume", run, "train.save_every=5")
    assert result.code == 0, result.err
    assert "step_00000008 is not whole" in result.err
    assert name in result.err or name == "manifest.json"  # a damaged manifest may accuse another file
    assert f"resumed {run} after step 6" in result.err
    assert_same_run(run, uninterrupted, STEPS)
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step_00000010", "step_00000012"]


def test_a_damaged_checkpoint_does_not_count_as_kept(stopped: Path, uninterrupted: Path):
    """With one to keep, the good one of step 7 stays although a damaged one of step 8 looks newer."""
    run = _copy(stopped, "keep-one")
    _flip(run / "checkpoints" / "step_00000008" / "model.safetensors")
    changes = ["train.keep=1", "train.save_every=7"]
    assert train("--resume", run, *changes, fault=Fault(IN_STEP, 3)).code == -signal.SIGKILL
    assert steps_saved(run) == [7]
    assert train("--resume", run).code == 0
    assert_same_run(run, uninterrupted, STEPS)


def test_no_usable_checkpoint(stopped: Path):
    run = _copy(stopped, "all-damaged")
    for step in (6, 8):
        _flip(run / "checkpoints" / f"step_{step:08d}" / "model.safetensors")
    before = snapshot(run)
    one_error(train("--resume", run), "no usable checkpoint")
    assert snapshot(run) == before
    shutil.rmtree(run / "checkpoints")
    one_error(train("--resume", run), "no usable checkpoint")


def test_finished_run_resumes_to_nothing(uninterrupted: Path):
    run = _copy(uninterrupted, "finished")
    result = train("--resume", run)
    assert result.code == 0, result.err
    assert result.run == run
    assert_same_run(run, uninterrupted, STEPS)


def test_more_steps_are_remembered(uninterrupted: Path):
    """A longer run goes on from the end of a shorter one, and what was changed is the run's config from then on."""
    run = _copy(uninterrupted, "longer")
    assert train("--resume", run, "train.steps=15", "train.save_every=1", "log.every=2").code == 0
    assert steps_saved(run) == [14, 15]
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert (saved["train"]["steps"], saved["log"]["every"]) == (15, 2)
    logged = [line["step"] for line in metrics(run) if "loss" in line]
    assert logged == [*range(1, 13), 14, 15]


@pytest.mark.parametrize(
    "override",
    ["optim.lr=0.1", "seed=1", "data.seq_len=64", "model.n_layers=4", "train.batch_size=16", "optim.muon=true"],
)
def test_what_may_not_change(stopped: Path, override: str):
    before = snapshot(stopped)
    one_error(train("--resume", stopped, override), override.split("=")[0], "may not change on resume")
    assert snapshot(stopped) == before


def test_edited_config_is_refused(stopped: Path):
    """The config file of the run folder is no back door."""
    run = _copy(stopped, "edited")
    path = run / "config.yaml"
    raw = yaml.safe_load(path.read_text())
    raw["optim"]["lr"] = 1.0
    path.write_text(yaml.safe_dump(raw))
    one_error(train("--resume", run), "optim.lr", "may not change on resume")


def test_how_the_run_is_watched_changes_nothing(stopped: Path, uninterrupted: Path):
    """Validation, samples, checkpoints and recomputation may change on resume because they do not touch the numbers."""
    run = _copy(stopped, "watched")
    changes = ["train.val_every=1", "train.sample_every=1", "train.save_every=1", "train.recompute=true"]
    assert train("--resume", run, *changes).code == 0
    assert losses(run) == losses(uninterrupted)


def test_moved_corpus_is_prepared_again(stopped: Path, uninterrupted: Path):
    """The prepared folder is a cache: without it the text is read again, and must be the same."""
    run = _copy(stopped, "moved")
    root = stopped.parents[1]
    cache = root / "cache"
    aside = cache.rename(root / "aside")
    try:
        assert train("--resume", run).code == 0
        assert_same_run(run, uninterrupted, STEPS)
        shutil.rmtree(cache)
        other = _copy(stopped, "other-text")
        (root / "text" / "000.txt").rename(root / "000.txt")
        one_error(train("--resume", other), "sources", "the row order depends on it")
        (root / "000.txt").rename(root / "text" / "000.txt")
    finally:
        shutil.rmtree(cache, ignore_errors=True)
        aside.rename(cache)
