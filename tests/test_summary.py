"""The table of a model and the command that prints it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from data.config import TokenizerConfig
from data.tokenizer import ByteTokenizer
from models import model_config
from models.__main__ import BYTES_VOCABULARY, main
from models.summary import summary
from tests.cases import MODELS
from tests.test_models import raw

ROOT = Path(__file__).resolve().parent.parent


def test_the_summary_adds_up():
    case = next(case for case in MODELS if case.name == "model-everything")
    model = case.build()
    said = summary(model, 64, torch.float32)
    assert said == summary(case.config(), 64, torch.float32), "weights are not needed"
    cost = model.cost(64)
    assert f"parameters  {cost.params:,} (" in said
    assert f"{cost.active_params:,} active per token" in said
    assert f"{cost.state_bytes} B per sequence after 64 tokens in float32" in said
    rows = [line.split() for line in said.splitlines() if line.startswith(("0 ", "1 ", "2 "))]
    assert [r[0] for r in rows] == ["0", "1", "2"]
    assert "attention heads=2 window=4" in said


def test_the_summary_folds_equal_layers():
    said = summary(
        model_config(raw(n_layers=48, pattern=["a", "a", "b"], blocks={"a": raw()["blocks"]["a"], "b": {}})), 32
    )
    assert "\n0-1,3-4,..,45-46  mixer " in said
    assert "32 layers" in said
    short = summary(model_config(raw(at={2: {"channel": {"hidden": 4}}})), 32)
    assert "\n0-1,3 " in short
    assert "\n2 " in short


def test_the_summary_of_a_large_model_takes_no_memory():
    block = {"mixer": {"kind": "attention", "heads": 48, "kv_heads": 8}, "channel": {"kind": "swiglu"}}
    cfg = model_config({"d_model": 6144, "n_layers": 60, "vocab_size": 128000, "blocks": {"a": block}})
    D, layer = 6144, 6144 * (48 + 2 * 8 + 48) * 128 + 3 * 6144 * 16384 + 2 * 6144
    assert f"parameters  {128000 * D + 60 * layer + D:,} (" in summary(cfg, 8192)


def write_run(path: Path, **data: Any) -> str:
    config = raw()
    config.pop("vocab_size")
    path.write_text(yaml.safe_dump({"model": config, "data": data}))
    return str(path)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = write_run(tmp_path / "run.yaml", seq_len=99)
    assert main([run, "model.n_layers=2", "--dtype", "fp32"]) == 0
    said = capsys.readouterr().out
    assert "after 99 tokens in float32" in said
    assert f"{BYTES_VOCABULARY * 8:,}" in said
    bpe = write_run(tmp_path / "bpe.yaml", tokenizer={"kind": "bpe", "vocab_size": 300})
    assert main([bpe, "--seq-len", "8"]) == 0
    assert f"{300 * 8:,}" in capsys.readouterr().out
    file = write_run(tmp_path / "file.yaml", tokenizer={"kind": "file", "path": "x"})
    bad = {
        (file,): "give model.vocab_size=N",
        (str(tmp_path / "rnu.yaml"),): "did you mean 'run.yaml'?",
        (run, "model.n_layer=3"): "unknown key 'model.n_layer'; did you mean 'n_layers'?",
        (run, "model="): "no 'model' section",
        (run, "--seq-len", "0"): "--seq-len must be at least 1",
        (run, "model.blocks.a.mixer.kind=tests.toys:ToyEMA"): "allow it with --allow-foreign",
    }
    for arguments, expected in bad.items():
        assert main(list(arguments)) == 2
        printed = capsys.readouterr()
        assert not printed.out
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1
        assert expected in printed.err
    assert main([file, "model.vocab_size=50"]) == 0


def test_the_command_agrees_with_the_tokenizers():
    assert ByteTokenizer().vocab_size == BYTES_VOCABULARY
    assert TokenizerConfig().kind == "bytes"
    assert TokenizerConfig(kind="bpe").vocab_size == 8192


def test_the_command_runs_as_a_module(tmp_path: Path):
    run = write_run(tmp_path / "run.yaml")
    done = subprocess.run([sys.executable, "-m", "models", run], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("layers")
