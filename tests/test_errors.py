"""Bad input to `train.py`: one line on stderr, exit code 2, nothing half-written."""

from __future__ import annotations

import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.runs import (
    IN_STEP,
    PLAIN,
    ROOT,
    TOYS,
    Fault,
    assert_same_run,
    metrics,
    one_error,
    snapshot,
    steps_saved,
    train,
    write_config,
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config, its text and a finished run; tests leave it as they find it."""
    folder = tmp_path_factory.mktemp("errors")
    result = train(write_config(folder))
    assert result.code == 0, result.err
    return folder


def refused(folder: Path, *argv: str | Path, words: tuple[str, ...] = ()) -> str:
    """The command is refused with these words and leaves no trace in the folder."""
    harmless = ("cache", "hashes.json")
    before = snapshot(folder, harmless)
    line = one_error(train(*argv), *words)
    assert snapshot(folder, harmless) == before
    return line


OVERRIDES = {
    "unknown key": ("train.stepps=5", "unknown key 'train.stepps'; did you mean 'steps'"),
    "unknown section": ("modle.d_model=4", "unknown key 'modle'; did you mean 'model'"),
    "unknown key in a part": ("model.blocks.only.mixer.head=4", "'model.blocks.only.mixer.head'; did you mean 'heads'"),
    "unknown kind": ("model.blocks.only.mixer.kind=atention", "'atention'; did you mean 'attention'"),
    "wrong type": ("train.steps=many", "train.steps: expected int, got 'many'"),
    "no steps": ("train.steps=0", "train.steps must be at least 1"),
    "log never": ("log.every=0", "log.every must be at least 1"),
    "negative rate": ("optim.lr=-1", "optim.lr must be above 0"),
    "unknown schedule": ("optim.schedule=linear", "unknown optim.schedule 'linear'"),
    "pattern": ("model.pattern=[only,only,only]", "pattern of 3 blocks does not divide n_layers=2; nearest: 3 or 3"),
    "missing block": ("model.pattern=[onyl,only]", "no block 'onyl'; did you mean 'only'"),
    "heads": ("model.blocks.only.mixer.heads=3", "heads=3 does not divide d_model=16"),
    "missing data": ("data.sources.0.path=/no/such/file.txt", "/no/such/file.txt"),
    "vocabulary": ("model.vocab_size=100", "model.vocab_size=100 is smaller than the tokenizer's 257"),
    "positions": ("model={learned_positions: true, max_seq_len: 16, blocks: {a: {}}}", "data.seq_len=32 is longer"),
    "micro batch": ("train.micro_batch=3", "train.micro_batch=3 does not divide train.batch_size=8"),
    "device": ("train.device=tpu", "unknown train.device 'tpu'; valid: auto, cpu, cuda"),
    "device number": ("train.device=cuda:x", "unknown train.device 'cuda:x'"),
    "freeze": ("train.freeze=[layer.*]", "no parameter matches 'layer.*'"),
    "freeze all": ("train.freeze=['*']", "nothing is left to learn"),
    "foreign part": ("model.blocks.only.mixer={kind: 'tests.toys:ToyEMA'}", "allow it with --allow-foreign"),
    "foreign change": ("train.interventions=[{kind: 'tests.test_optim:Poison'}]", "allow it with --allow-foreign"),
    "logger": ("log.wandb=yes", "log.wandb: expected str, got True"),
    "logger mode": ("log.wandb=on-line", "'on-line'; did you mean 'online'"),
    "override": ("train.steps.more=1", "override 'train.steps.more=1'"),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_refused_overrides(shared: Path, case: str):
    override, words = OVERRIDES[case]
    refused(shared, shared / "small.yaml", override, words=(words,))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(shared: Path):
    refused(shared, shared / "small.yaml", "train.device=cuda", words=("there are 0", "train.device=cpu"))


def test_config_files(shared: Path, tmp_path: Path):
    refused(shared, shared / "smal.yaml", words=("no file", "did you mean 'small.yaml'"))
    broken = tmp_path / "broken.yaml"
    broken.write_text("train: {steps: [1\n")
    refused(shared, broken, words=("is not YAML",))
    broken.write_text("- a list\n")
    refused(shared, broken, words=("expected a mapping at the top",))
    broken.write_bytes(b"\xff\xfe\x00")
    refused(shared, broken, words=("is not YAML",))


def test_the_real_command():
    """As a user sees it: the process's own exit code and streams."""
    words = [sys.executable, "train.py", "configs/quickstrat.yaml"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: no file 'configs/quickstrat.yaml'; did you mean 'quickstart.yaml'?")


def test_command_line(shared: Path):
    config = shared / "small.yaml"
    for words in (
        [],
        [config, config],
        ["--resume", shared, config],
        ["--resume", shared, "--tiny"],
        [config, "--tine"],
    ):
        result = train(*words)
        assert result.code == 2, words
        assert "Traceback" not in result.err
        assert result.err.strip().splitlines()[-1].startswith("train.py: error: ")


def test_empty_text(tmp_path: Path):
    config = write_config(tmp_path)
    for path in (tmp_path / "text").iterdir():
        path.write_text("")
    refused(tmp_path, config, words=("no documents with text",))
    for path in list((tmp_path / "text").iterdir())[1:]:
        path.unlink()
    (tmp_path / "text" / "000.txt").write_text("one document alone\n")
    refused(tmp_path, config, words=("the corpus is one document",))
    shutil.rmtree(tmp_path / "text")
    refused(tmp_path, config, words=(str(tmp_path / "text"),))
    assert not (tmp_path / "runs").exists()


def _damage_tokens(cache: Path) -> Path:
    """Flip a bit of the prepared training tokens; -> the corpus folder."""
    (corpus,) = [p for p in cache.iterdir() if p.is_dir()]
    tokens = corpus / "train-0" / "tokens-00000.bin"
    raw = bytearray(tokens.read_bytes())
    raw[len(raw) // 2] ^= 1
    tokens.write_bytes(raw)
    return corpus


def test_corrupt_shards(tmp_path: Path):
    """A corpus that is named, or that a run started with, is refused; one in the cache is made anew from its text."""
    config = write_config(tmp_path)
    run = train(config).run
    corpus = _damage_tokens(tmp_path / "cache")
    refused(tmp_path, config, f"data.sources.0.path={corpus}", words=("tokens-00000.bin", "checksum"))
    refused(tmp_path, "--resume", run, "train.steps=14", words=("tokens-00000.bin", "checksum"))
    again = train(config, "name=again")
    assert again.code == 0, again.err
    assert "preparing it again" in again.err
    assert metrics(again.run) == metrics(run)


def test_prepared_for_another_vocabulary(tmp_path: Path):
    """Shards in one tokenizer, a model asked for with another: refused where they meet."""
    config = write_config(tmp_path, data={"tokenizer": {"kind": "bpe", "vocab_size": 300}})
    assert train(config).code == 0
    (corpus,) = [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]
    path = f"data.sources.0.path={corpus}"
    refused(
        tmp_path,
        config,
        path,
        "model.vocab_size=257",
        words=("is smaller than the tokenizer's 300",),
    )
    refused(tmp_path, config, path, "data.tokenizer.vocab_size=400", words=("was prepared with the tokenizer 'bpe'",))


def test_runs_that_are_not_there(shared: Path, tmp_path: Path):
    runs = shared / "runs"
    refused(shared, "--resume", runs / "smal", words=("no run at", "did you mean 'small'"))
    refused(shared, "--resume", shared / "text", words=("is not a run folder",))
    refused(shared, shared / "small.yaml", "--init-from", runs / "smal", words=("did you mean 'small'",))
    bare = tmp_path / "bare"
    shutil.copytree(runs / "small", bare)
    (bare / "data.json").unlink()
    refused(tmp_path, "--resume", bare, words=("data.json", "missing or damaged"))


def test_weights_that_do_not_fit(shared: Path):
    config, run = shared / "small.yaml", shared / "runs" / "small"
    mixer = "model.blocks.only.channel=null"
    refused(shared, config, "model.d_model=32", "--init-from", run, words=("has shape (257, 16), the model (257, 32)",))
    refused(shared, config, mixer, "--init-from", run, words=("the model has no place for 'layers.0.channel.",))


def test_out_dir_is_a_file(shared: Path, tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("")
    refused(shared, shared / "small.yaml", f"out_dir={path}/runs", words=("cannot make the run folder",))


@pytest.mark.slow
def test_unknown_task_is_refused_before_training(shared: Path):
    pytest.importorskip("lm_eval")
    refused(shared, shared / "small.yaml", "eval.tasks=[corpus,copaa]", words=("unknown task 'copaa'", "'copa'"))


# -- no space left on the device


def limit_files(_: int, size: Path) -> None:
    """No file of this process may grow beyond so many bytes: writing fails as on a full disk."""
    limit = int(size.name)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def limit_files_later(rank: int, size: Path) -> None:
    """The same once the run has begun."""
    import train as command

    make = command.RunLog

    def made(*args: Any) -> Any:
        log = make(*args)
        limit_files(rank, size)
        return log

    setattr(command, "RunLog", made)  # noqa: B010


def test_disk_full_while_saving(tmp_path: Path):
    """The checkpoint that cannot be written leaves nothing behind; the one before it resumes to the same numbers."""
    config = write_config(tmp_path, {**PLAIN, "dropout": 0.1})
    whole = train(config, "name=whole")
    stopped = train(config, fault=Fault(IN_STEP, 4, number=signal.SIGTERM))
    run = stopped.run
    assert steps_saved(run) == [3, 5]
    largest = max(p.stat().st_size for p in (run / "checkpoints").rglob("*"))
    before = snapshot(run / "checkpoints")
    full = train("--resume", run, spy=("tests.test_errors:limit_files_later", Path(str(largest - 1000))))
    one_error(full, f"cannot write {run}/checkpoints/step_00000006", "too large")
    assert snapshot(run / "checkpoints") == before
    resumed = train("--resume", run)
    assert resumed.code == 0, resumed.err
    assert_same_run(run, whole.run, 12)


def test_disk_full_at_the_start_and_in_the_log(tmp_path: Path):
    config = write_config(tmp_path)
    run = train(config).run
    before = snapshot(tmp_path)
    full = train(config, "name=other", spy=("tests.test_errors:limit_files", Path("5000")))
    one_error(full, f"cannot write {tmp_path}/runs/other")
    assert snapshot(tmp_path) == before
    log = (run / "metrics.jsonl").read_text()
    limit = Path(str(len(log) + 300))
    changes = ["train.steps=40", "train.save_every=40", "train.val_every=40"]
    full = train("--resume", run, *changes, spy=("tests.test_errors:limit_files_later", limit))
    one_error(full, f"cannot write {run}/metrics.jsonl")
    assert train("--resume", run, "train.steps=14").code == 0
    assert [line["step"] for line in metrics(run) if "loss" in line] == list(range(1, 15))


def test_toys_need_the_opt_in_on_resume_too(tmp_path: Path):
    config = write_config(tmp_path, TOYS, train={"steps": 2})
    run = train(config, "--allow-foreign").run
    refused(tmp_path, "--resume", run, "train.steps=3", words=("--allow-foreign",))
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["steps"] == 2
