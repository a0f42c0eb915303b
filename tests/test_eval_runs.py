"""Opening runs; and the tiny run that the other tests of the eval room share."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from data import ByteTokenizer, DataConfig, SourceConfig, prepare
from eval.run import LoadedRun, open_run
from models import LM, Batch, UserError, build, model_config
from models.folder import atomic_folder, save_weights
from models.parsing import to_dict

LLAMA = {"mixer": {"kind": "attention", "heads": 4, "kv_heads": 2}, "channel": {"kind": "swiglu", "hidden": 48}}
WINDOWED = {"mixer": {"kind": "attention", "heads": 4, "window": 6, "qk_norm": True}, "channel": {"kind": "gelu"}}
HYBRID = {"blocks": {"full": LLAMA, "local": WINDOWED}, "pattern": ["full", "local"]}
LINEAR = {
    "blocks": {
        "delta": {"mixer": {"kind": "gated_delta", "heads": 3}, "channel": {"kind": "relu2"}},
        "retention": {"mixer": {"kind": "retnet", "heads": 2}},
    },
    "pattern": ["delta", "retention"],
}
LEARNED = {
    "blocks": {"a": {"mixer": {"kind": "attention", "heads": 4, "rope_theta": None}, "channel": {"kind": "relu2"}}},
    "learned_positions": True,
    "max_seq_len": 24,
}


def tiny_model(shape: dict = HYBRID, std: float = 0.3, **more) -> LM:
    """Weights large enough that log-likelihoods of different texts clearly differ."""
    cfg = model_config({"d_model": 32, "n_layers": 2, "vocab_size": 257, "init_std": std, **shape, **more})
    return build(cfg, seed=1).eval()


def write_run(folder: Path, model: LM, metrics: list[dict] = (), step: int = 7, seq_len: int | None = None) -> Path:
    folder.mkdir(parents=True)
    config = {"model": to_dict(model.cfg)}
    if seq_len:
        config["data"] = {"seq_len": seq_len}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    ByteTokenizer().save(folder / "tokenizer")
    with atomic_folder(folder / "checkpoints" / f"step_{step:08d}") as temporary:
        save_weights(model, temporary)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    return folder


def add_corpus(run: Path, where: Path) -> Path:
    """A small prepared corpus of distinct lines, recorded in the run as training does."""
    source = where / "text"
    source.mkdir(parents=True)
    for d in range(40):
        lines = [f"value_{d}_{i} = compute({i * d}, 'naïve {i}')" for i in range(30)]
        (source / f"{d:02d}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    cfg = DataConfig(sources=(SourceConfig(path=str(source)),), val_fraction=0.2, cache_dir=str(where / "cache"))
    corpus = prepare(cfg, progress=False)
    (run / "data.json").write_text(json.dumps({"dir": str(corpus.dir), "manifest": corpus.manifest}))
    return corpus.dir


def tiny_run(folder: Path, shape: dict = HYBRID, **more) -> LoadedRun:
    return open_run(write_run(folder, tiny_model(shape, **more)), "cpu")


def test_newest_checkpoint_opens_and_names_its_weights(tmp_path):
    path = write_run(tmp_path / "run", tiny_model(), step=3)
    first = open_run(path, "cpu")
    with atomic_folder(path / "checkpoints" / "step_00000009") as temporary:
        save_weights(tiny_model(std=0.1), temporary)
    second = open_run(path, "cpu", dtype="bfloat16")
    assert (first.step, second.step, second.name) == (3, 9, "run")
    assert first.checkpoint != second.checkpoint == open_run(path, "cpu").checkpoint
    assert not second.model.training
    assert second.model.embed.weight.dtype == torch.bfloat16
    assert open_run(path, "cpu", step=3).checkpoint == first.checkpoint


def test_progress_can_be_chosen(tmp_path):
    """What follows training, a temperature, is that of the chosen moment; such results go by another name."""
    cell = {"kind": "gmt", "slots": 5, "width": 4}
    model = tiny_model({"blocks": {"a": {"mixer": {"kind": "attention", "heads": 4}, "channel": cell}}})
    model.progress.fill_(0.25)
    folder, batch = write_run(tmp_path / "run", model), Batch(torch.arange(12)[None])
    stored, cold = open_run(folder, "cpu"), open_run(folder, "cpu", progress=1.0)
    assert stored.model.progress == 0.25
    assert cold.model.progress == 1.0
    assert cold.checkpoint != stored.checkpoint
    with torch.no_grad():
        warm, found = (run.model(batch).logits for run in (stored, cold))
        model.progress.fill_(1.0)
        assert torch.equal(found, model(batch).logits)
    assert not torch.allclose(warm, found)
    with pytest.raises(UserError, match=r"progress must lie in \[0, 1\], got 1.5"):
        open_run(folder, "cpu", progress=1.5)


def test_errors_are_one_line_and_name_the_nearest(tmp_path):
    path = write_run(tmp_path / "quickstart", tiny_model())
    for call, words in [
        (lambda: open_run(tmp_path / "quickstrat"), "quickstart"),
        (lambda: open_run(path, dtype="bfloat"), "bfloat16"),
        (lambda: open_run(path, device="gpu"), "gpu"),
        (lambda: open_run(path, step=5), "there are: 7"),
    ]:
        with pytest.raises(UserError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_tokenizer_larger_than_the_model_is_refused(tmp_path):
    path = write_run(tmp_path / "run", tiny_model(vocab_size=200))
    with pytest.raises(UserError, match="257 ids, the model only 200"):
        open_run(path, "cpu")


def test_missing_tokenizer_is_one_line(tmp_path):
    path = write_run(tmp_path / "run", tiny_model())
    (path / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="tokenizer") as caught:
        open_run(path, "cpu")
    assert getattr(caught.value, "one_line", False)


@pytest.mark.parametrize("shape", [{"blocks": {"a": LLAMA}}, HYBRID])
def test_an_exported_folder_opens_like_its_run(tmp_path, shape):
    pytest.importorskip("transformers")
    from models.hf import export_run

    path = write_run(tmp_path / "run", tiny_model(shape))
    export_run(path, tmp_path / "exported")
    run, exported = open_run(path, "cpu"), open_run(tmp_path / "exported", "cpu")
    tokens = torch.tensor([[256, *range(60, 90)]])
    with torch.no_grad():
        torch.testing.assert_close(exported.model(Batch(tokens)).logits, run.model(Batch(tokens)).logits)
    assert (exported.name, exported.config, exported.model.training) == ("exported", {}, False)
    assert exported.tokenizer.encode("naïve") == run.tokenizer.encode("naïve")
    assert exported.tokenizer.eos_id == run.tokenizer.eos_id
    with pytest.raises(UserError, match="no checkpoint of step 3"):
        open_run(tmp_path / "exported", "cpu", step=3)
