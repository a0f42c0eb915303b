"""What a run does and leaves behind: learning, validation, adding parts to a trained model, the files of its folder."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

import models
from configs import schema
from data import open_corpus
from models import Batch, model_config
from models.folder import load_model
from tests.runs import (
    PLAIN,
    ROOT,
    TOYS,
    assert_same_run,
    losses,
    metrics,
    steps_saved,
    tensors,
    train,
    write_config,
    write_text,
)
from training import checkpoint

WITH_MEMORY = {**PLAIN, "at": {1: {"memory": {"kind": "tests.toy_memory:ToyHash"}}}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 40 steps, long enough to learn something; its config is two folders up."""
    folder = tmp_path_factory.mktemp("train")
    section = {"steps": 40, "val_every": 20, "val_tokens": 0, "save_every": 40}
    config = write_config(folder, train=section, data={"seq_len": 512})
    result = train(config)
    assert result.code == 0, result.err
    return result.run


def test_it_learns(base: Path):
    found = losses(base)
    assert len(found) == 40
    assert abs(found[0] - math.log(257)) < 0.2
    assert found[-1] < found[0] - 1.5
    validated = [line["val"]["loss"] for line in metrics(base) if "val" in line]
    assert len(validated) == 2
    assert validated[1] < validated[0] < math.log(257)


def test_validation_by_hand(base: Path):
    """Every document of the validation split alone, from its beginning to its end mark, with the saved weights."""
    corpus = open_corpus(json.loads((base / "data.json").read_text())["dir"])
    model, folder = load_model(base)
    assert folder.name == "step_00000040"
    nll, targets, size = 0.0, 0, 0
    for i in range(len(corpus.val)):
        ids = [*corpus.val.read(i).tolist(), corpus.tokenizer.eos_id]
        assert len(ids) < 512
        with torch.no_grad():
            logits = model(Batch(torch.tensor([[corpus.tokenizer.bos_id, *ids[:-1]]]))).logits
        nll += F.cross_entropy(logits[0].double(), torch.tensor(ids), reduction="sum").item()
        targets += len(ids)
        size += len(corpus.tokenizer.decode(ids).encode())
    found = metrics(base)[-1]["val"]
    assert (found["tokens"], found["bytes"]) == (targets, size)
    assert found["loss"] == pytest.approx(nll / targets, rel=1e-5)
    assert found["ppl"] == pytest.approx(math.exp(nll / targets), rel=1e-5)
    assert found["bpb"] == pytest.approx(nll / math.log(2) / size, rel=1e-5)


def test_the_folder_explains_itself(base: Path):
    names = {p.name for p in base.iterdir()}
    expected = {"config.yaml", "summary.txt", "environment.json", "data.json", "metrics.jsonl", "samples.txt"}
    assert names >= {*expected, "checkpoints", "tokenizer"}
    assert not [n for n in names if n.startswith(".")]
    cfg = schema.load(base / "config.yaml")
    assert cfg.model.vocab_size == 257
    assert model_config(yaml.safe_load((base / "config.yaml").read_text())["model"]) == cfg.model
    environment = json.loads((base / "environment.json").read_text())
    assert environment["kernels"]["ran"]["linear_cross_entropy"]["reference"] > 40
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["command"][1:] or environment["command"]
    samples = (base / "samples.txt").read_text()
    assert samples.startswith("=== step 20\n")
    assert "\n=== step 40\n" in samples
    assert json.loads((base / "data.json").read_text())["manifest"]["fingerprint"]
    assert "attention" in (base / "summary.txt").read_text()


def test_metrics_schema(base: Path):
    lines = [json.loads(line) for line in (base / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    keys = {"step", "tokens", "loss", "losses", "stats", "grad_norm", "lr", "skipped", "tokens_per_s"}
    assert all(set(line) == keys for line in steps)
    assert all(set(line) == {"step", "tokens", "val"} for line in lines if "val" in line)
    assert len(steps) + 2 == len(lines)
    assert [line["step"] for line in steps] == list(range(1, 41))
    assert all(line["tokens"] == line["step"] * 8 * 512 for line in lines)
    assert all(line["losses"] == {"lm": line["loss"]} for line in steps)
    assert steps[0]["lr"] == pytest.approx(5e-3)
    assert steps[-1]["lr"] == pytest.approx(5e-4)
    assert all(line["tokens_per_s"] > 0 for line in steps)


def test_progress_is_said(base: Path):
    """Without a terminal: lines with step, loss, rate and time left."""
    result = train("--resume", base, "train.steps=41")
    assert result.code == 0
    (line,) = [x for x in result.err.splitlines() if x.startswith("step 41/41")]
    assert all(word in line for word in ("loss ", "lr ", "tokens_per_s ", "eta "))
    assert any(x.startswith("step 41: validation loss") for x in result.err.splitlines())


def test_toys_log_their_losses_and_stats(tmp_path: Path):
    result = train(write_config(tmp_path, TOYS), "--allow-foreign")
    assert result.code == 0, result.err
    line = metrics(result.run)[0]
    kinds = ("tests.toys:ToyEMA.rate", "tests.toys:ToyEMA.spread", "tests.toys:ToySlots.balance")
    assert set(line["losses"]) == {"lm", *kinds}
    assert line["loss"] == line["losses"]["lm"]
    assert len(line["stats"]["layers.1.channel.share"]) == 5
    assert sum(line["stats"]["layers.1.channel.share"]) == pytest.approx(1, rel=1e-5)
    held = tensors(result.run, 12)
    assert {"tables:layers.1.memory.table/values", "tables:layers.2.memory.table/m"} <= set(held)
    assert held["model:layers.1.channel.age"].max() > 0


def test_replaced_rows_start_without_moments(tmp_path: Path):
    """Every slot counts as dead, so each step replaces all of them: they have no momentum left, everything else has."""
    raw = json.loads(json.dumps(TOYS))
    raw["blocks"]["local"]["channel"]["dead"] = 1.0
    result = train(write_config(tmp_path, raw), "--allow-foreign")
    assert result.code == 0, result.err
    moments = {k: t for k, t in tensors(result.run, 12, ("optim",)).items() if k.endswith("exp_avg")}
    assert not moments.pop("optim:layers.1.channel.slots/exp_avg").any()
    assert all(t.any() for t in moments.values())


def test_recompute_changes_nothing(tmp_path: Path):
    config = write_config(tmp_path, {**TOYS, "dropout": 0.1})
    plain = train(config, "--allow-foreign")
    again = train(config, "--allow-foreign", "name=again", "train.recompute=true")
    assert [plain.code, again.code] == [0, 0]
    assert_same_run(again.run, plain.run, 12)


@pytest.mark.parametrize("precision", ["bf16", "auto"])
def test_precision(tmp_path: Path, precision: str):
    result = train(write_config(tmp_path), f"train.precision={precision}")
    assert result.code == 0, result.err
    reference = train(write_config(tmp_path), "name=fp32")
    assert losses(result.run)[-1] == pytest.approx(losses(reference.run)[-1], rel=2e-2)
    assert (losses(result.run) == losses(reference.run)) == (precision == "auto")  # a tiny model stays in fp32
    assert {t.dtype for k, t in tensors(result.run, 12).items() if k.startswith("model")} == {torch.float32}


# -- starting again, and from others


def test_a_fresh_start_never_touches_a_run(tmp_path: Path):
    config = write_config(tmp_path, train={"steps": 2})
    runs = [train(config).run for _ in range(3)]
    assert [r.name for r in runs] == ["small", "small-2", "small-3"]
    assert metrics(runs[0]) == metrics(runs[1]) == metrics(runs[2])
    assert train(config, "seed=1").code == 0
    assert metrics(runs[0]) != metrics(runs[0].with_name("small-4"))


BACKBONE = ("embed.*", "norm.*", "layers.*.mixer.*", "layers.*.channel.*")


def test_init_from_adds_a_memory(base: Path):
    """A memory is added to a trained backbone that does not move, while everything new does."""
    config = write_config(base.parents[1], WITH_MEMORY, "grown", data={"seq_len": 64})
    freeze = [word for pattern in BACKBONE for word in ("--freeze", pattern)]
    words = ["--init-from", base, *freeze, "--allow-foreign", "train.keep=9", "train.save_every=6"]
    result = train(config, *words)
    assert result.code == 0, result.err
    assert "4 keep their fresh initialisation (layers.1.memory.key.weight" in result.err
    start = tensors(base, steps_saved(base)[-1], ("model",))
    early, late = (tensors(result.run, step, ("model", "tables")) for step in (6, 12))
    assert all(torch.equal(late[k], start[k]) for k in start if k != "model:progress")
    moved = {k for k in early if not torch.equal(early[k], late[k])} - {"model:progress"}
    table = {f"tables:layers.1.memory.table/{k}" for k in ("values", "m", "v", "steps")}
    assert moved == table | {f"model:layers.1.memory.{k}.weight" for k in ("key", "value", "norm")}
    assert schema.load(result.run / "config.yaml").train.freeze == BACKBONE


def test_unfreeze_waits(base: Path):
    """First the new memory alone, then the whole model, by a list of interventions; and again after a resume."""
    config = write_config(base.parents[1], WITH_MEMORY, "late", data={"seq_len": 64})
    changes = ", ".join(f"{{kind: unfreeze, pattern: '{p}', at: 6}}" for p in BACKBONE)
    words = ["--allow-foreign", f"train.interventions=[{changes}]", "train.keep=9", "train.save_every=3"]
    result = train(config, "--init-from", base, *words)
    assert result.code == 0, result.err
    start = tensors(base, steps_saved(base)[-1], ("model",))
    inside = [k for k in start if k != "model:progress"]
    before, after = (tensors(result.run, step, ("model",)) for step in (6, 12))
    assert all(torch.equal(before[k], start[k]) for k in inside)
    assert not any(torch.equal(after[k], start[k]) for k in inside)
    torn = Path(shutil.copytree(result.run, result.run.with_name("late-torn")))
    for step in (6, 9, 12):
        shutil.rmtree(torn / "checkpoints" / f"step_{step:08d}")
    assert train("--resume", torn, "--allow-foreign").code == 0
    assert_same_run(torn, result.run, 12)


def test_init_from_takes_tables_without_moments(tmp_path: Path):
    config = write_config(tmp_path, TOYS)
    run = train(config, "--allow-foreign").run
    deeper = {**TOYS, "n_layers": 8}
    model = models.build(model_config({**deeper, "vocab_size": 257}), seed=5)
    said = checkpoint.init_from(model, str(run))
    assert "keep their fresh initialisation (layers.4." in said
    held = tensors(run, 12)
    for name in ("layers.1.memory.table", "layers.2.memory.table"):
        table = model.tables()[name].state_dict()
        assert torch.equal(table["values"], held[f"tables:{name}/values"])
        assert not table["m"].any()
        assert not table["steps"].any()
        assert held[f"tables:{name}/m"].any()
    assert torch.equal(model.get_buffer("layers.1.channel.usage"), held["model:layers.1.channel.usage"])


def test_init_from_a_hugging_face_folder(base: Path, tmp_path: Path):
    from models.hf import export_run

    export_run(base, tmp_path / "hf", "llama")
    config = write_config(base.parents[1], PLAIN, "foreign", data={"seq_len": 64})
    first = train(config, "--init-from", tmp_path / "hf", "name=from-hf")
    second = train(config, "--init-from", base, "name=from-run")
    assert [first.code, second.code] == [0, 0], first.err + second.err
    assert losses(first.run) == pytest.approx(losses(second.run), rel=1e-5)
    assert losses(first.run)[0] < 4.5


def test_weights_of_sources_are_the_runs_own(tmp_path: Path):
    """Two runs over one prepared corpus mix it differently, also after a resume."""
    write_text(tmp_path / "other", seed=1)
    sources = [{"path": str(tmp_path / "text"), "weight": 1.0}, {"path": str(tmp_path / "other"), "weight": 1.0}]
    config = write_config(tmp_path, data={"sources": sources})
    even, uneven = train(config, "name=even"), train(config, "name=uneven", "data.sources.0.weight=9")
    assert len([p for p in (tmp_path / "cache").iterdir() if p.is_dir()]) == 1
    assert losses(even.run) != losses(uneven.run)
    assert train("--resume", uneven.run, "train.steps=14").code == 0
    for result, step, expected in ((even, 12, [1.0, 1.0]), (uneven, 14, [9.0, 1.0])):
        state = json.loads((result.run / "checkpoints" / f"step_{step:08d}" / "state.json").read_text())
        assert [weight for _, weight in state["loader"]["sources"]] == expected


# -- options


def test_tiny(tmp_path: Path):
    """Options and overrides in any order; the real command."""
    config = write_config(tmp_path)
    words = [sys.executable, "train.py", str(config), "--tiny", "data.seq_len=48", "--profile", "seed=3"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "small-tiny"
    assert done.stdout.startswith("sample at step 2\n")
    assert done.stdout.endswith(f"finished: {run}\n")
    cfg = schema.load(run / "config.yaml")
    assert (cfg.train.steps, cfg.model.d_model, cfg.data.seq_len, cfg.seed) == (2, 64, 48, 3)
    assert "traceEvents" in json.loads((run / "profile.json").read_text())


def test_profile(tmp_path: Path):
    result = train(write_config(tmp_path), "--profile")
    assert result.code == 0, result.err
    assert "trace of 4 steps" in result.err
    names = {e.get("name") for e in json.loads((result.run / "profile.json").read_text())["traceEvents"]}
    assert "aten::embedding" in names
    plain = train(write_config(tmp_path), "name=plain")
    assert metrics(result.run) == metrics(plain.run)


def test_help():
    done = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "example: python train.py configs/quickstart.yaml" in done.stdout
    for option in ("--resume", "--init-from", "--freeze", "--profile", "--tiny", "--allow-foreign"):
        assert option in done.stdout


@pytest.mark.slow
def test_wandb_offline(tmp_path: Path):
    """Without network, account, terminal or prompt."""
    pytest.importorskip("wandb")
    config = write_config(tmp_path, log={"every": 2, "wandb": "offline"})
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"HOME": str(tmp_path)}
    words = [sys.executable, "train.py", str(config)]
    done = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "small"
    assert list(run.glob("wandb/offline-run-*/run-*.wandb"))
    assert [line["step"] for line in metrics(run) if "loss" in line] == [2, 4, 6, 8, 10, 12]


def test_tensorboard(tmp_path: Path):
    config = write_config(tmp_path, log={"tensorboard": True})
    result = train(config)
    if importlib.util.find_spec("tensorboard") is None:
        assert result.code == 2
        assert "the package tensorboard is not installed" in result.err
        assert not (tmp_path / "runs").exists()
        return
    assert result.code == 0, result.err
    assert list(result.run.glob("tensorboard/events.*"))
