"""The shipped configs, and how a run's config is read, overridden and saved."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml

from configs import schema
from models import UserError, meta_model
from models.parsing import from_dict, to_dict
from models.summary import summary
from models.types import count_params
from tests.runs import ROOT, losses, steps_saved, train, write_config, write_text

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def test_there_are_configs():
    assert "quickstart.yaml" in {p.name for p in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_loads_and_summarises(path: Path):
    """On the meta device at full size; a number at the end of the name is that of the parameters, "aN" of the active ones."""
    cfg = schema.load(path)
    assert cfg.name == path.stem
    assert path.read_text().startswith("# ")
    given = cfg.model.vocab_size or (cfg.data.synthetic and cfg.data.synthetic.vocab_size)
    vocab = given or (257 if cfg.data.tokenizer.kind == "bytes" else cfg.data.tokenizer.vocab_size)
    model = meta_model(dataclasses.replace(cfg.model, vocab_size=vocab))
    params = count_params(model) + sum(t.rows * t.width for t in model.tables().values())
    assert model.cost(cfg.data.seq_len).params == params
    text = summary(model, cfg.data.seq_len)
    for kind in {part.cfg.kind for _, _, part in model.parts()}:
        assert kind in text
    if named := re.search(r"-([\d.]+[mb])(?:-a([\d.]+[mb]))?$", path.stem):
        assert params == pytest.approx(said(named[1]), rel=0.12)
        assert model.cost(cfg.data.seq_len).active_params == pytest.approx(said(named[2] or named[1]), rel=0.12)


def said(number: str) -> float:
    """ "1.3b" -> 1.3e9."""
    return float(number[:-1]) * {"m": 1e6, "b": 1e9}[number[-1]]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_two_steps(path: Path, tmp_path: Path):
    """Shrunk by --tiny, on a small text or the config's own task; everything else as shipped."""
    shipped, text = schema.load(path), write_text(tmp_path / "text")
    has_text = shipped.data.synthetic is None
    changes = [f"data.sources=[{{path: '{text}'}}]", "data.tokenizer={kind: bytes}", f"data.cache_dir={tmp_path}/cache"]
    changes = changes if has_text else []
    result = train(path, "--tiny", *changes, "train.device=cpu", f"out_dir={tmp_path}/runs")
    assert result.code == 0, result.err
    assert result.run == tmp_path / "runs" / f"{path.stem}-tiny"
    assert len(losses(result.run)) in (1, 2)  # log.every is the config's own, and the last step is always logged
    assert steps_saved(result.run)[-1] == 2
    assert (result.run / "samples.txt").exists() == (has_text and shipped.train.sample_every >= 0)
    assert bool(list(result.run.glob("eval/*_2.json"))) != has_text


def test_a_saved_config_is_the_same_run(tmp_path: Path):
    """Resolved and saved, it reads back to the same settings."""
    for path in CONFIGS:
        cfg = schema.load(path, ["train.steps=7", "model.at.1.mixer=null", "optim.betas=[0.8, 0.9]"])
        text = yaml.safe_dump(to_dict(cfg), sort_keys=False)
        saved = tmp_path / "config.yaml"
        saved.write_text(text)
        assert schema.load(saved) == cfg
        assert to_dict(from_dict(schema.RunConfig, json.loads(json.dumps(to_dict(cfg))))) == to_dict(cfg)


def test_overrides(tmp_path: Path):
    path = write_config(tmp_path)
    words = [
        "optim.lr=3e-4",
        "train.steps=2e3",
        "data.sources.0.weight=2",
        "model.at.1.channel=null",
        "model.at.0.mixer.window=4",
        "name=other",
    ]
    cfg = schema.load(path, words)
    assert (cfg.optim.lr, cfg.train.steps, cfg.data.sources[0].weight, cfg.name) == (3e-4, 2000, 2.0, "other")
    first, second = cfg.model.layers()
    assert (first.mixer.window, first.mixer.heads, second.mixer.window) == (4, 2, None)
    assert second.channel is None
    assert first.channel is not None


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optim.lrr=1", "unknown key 'optim.lrr'; did you mean 'lr'"),
        ("data.sources.1.path=x", "'data.sources' is a list of 1"),
        ("data.sources.0.pth=x", "did you mean 'path'"),
        ("model.at.7.mixer=null", "no layer 7; valid: 0 to 1"),
        ("model.at.0.mixr=null", "did you mean 'mixer'"),
        ("train.precision=fp16", "unknown train.precision 'fp16'"),
        ("train.steps=1.5", "expected int"),
        ("train.compile=1", "expected bool"),
        ("train.keep=0", "train.keep must be at least 1"),
        ("data.packing=docs", "unknown value 'docs'"),
        ("model.branches=0", "branches must be at least 1"),
        ("eval.tasks=corpus", "expected a list"),
    ],
)
def test_refused(tmp_path: Path, word: str, message: str):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        schema.load(write_config(tmp_path), [word])
    assert getattr(caught.value, "one_line", False)
    assert "\n" not in str(caught.value)


def test_every_setting_is_read_or_refused_on_resume():
    """What may change on resume names settings that exist."""
    plain = to_dict(schema.load(ROOT / "configs" / "quickstart.yaml"))
    for name in schema.MAY_CHANGE:
        at = plain
        for key in name.split("."):
            assert key in at, name
            at = at[key]


def test_what_may_change_on_resume():
    before = schema.load(ROOT / "configs" / "quickstart.yaml")

    def changed(*words: str) -> schema.RunConfig:
        return schema.load(ROOT / "configs" / "quickstart.yaml", words)

    schema.check_resumable(before, changed("train.steps=9", "log.every=1", "eval.tasks=[]", "train.val_every=3"))
    schema.check_resumable(before, changed(f"optim.lr={before.optim.lr}"))
    for word in ("optim.lr=1", "model.at.1.mixer.window=3", "train.batch_size=32", "data.sources.0.weight=2", "seed=3"):
        with pytest.raises(UserError, match="may not change on resume"):
            schema.check_resumable(before, changed(word))


def test_cadence():
    assert schema.TrainConfig(steps=600).every("val_every") == 60
    assert schema.TrainConfig(steps=5).every("save_every") == 1
    assert schema.TrainConfig(steps=600, val_every=7).every("sample_every") == 7
    assert schema.TrainConfig(batch_size=12, micro_batch=2).micro_batches(3) == (2, 2)
    assert schema.TrainConfig(batch_size=12).micro_batches(4) == (3, 1)
    for batch, micro, ranks in ((12, None, 5), (12, 6, 4), (2, None, 4)):
        with pytest.raises(UserError, match=f"train.batch_size={batch} is not a multiple of {ranks} ranks"):
            schema.TrainConfig(batch_size=batch, micro_batch=micro).micro_batches(ranks)
