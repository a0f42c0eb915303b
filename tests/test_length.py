"""Loss by context length, against one document and one token at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from eval import length
from eval.corpus_tasks import open_run_corpus
from eval.run import open_run
from models import Batch, UserError
from tests.runs import PLAIN, one_error, train, write_config

LENGTHS = (8, 32, 64)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps with rows of 32 tokens that was judged at its end."""
    folder = tmp_path_factory.mktemp("length")
    return train(write_config(folder, PLAIN, eval={"length": list(LENGTHS)})).run


def test_every_target_is_scored_at_every_length(trained: Path):
    (file,) = (trained / "eval").glob("length_*.json")
    results = json.loads(file.read_text())
    run, val = open_run(trained, "cpu"), open_run_corpus(trained).val
    documents = [val.read(doc).tolist() for doc in range(len(val))]
    whole = [[run.tokenizer.bos_id, *d[:64]] for d in documents if len(d) >= 64][: length.DOCUMENTS]
    assert len(whole) > 1
    for one in results["lengths"]:
        losses = []
        for tokens in whole:
            for start in range(0, 64, one["length"]):
                piece = torch.tensor(tokens[start : start + one["length"] + 1])
                logits = run.model(Batch(piece[None, :-1]), logits="all").logits[0].double()
                losses.append(torch.nn.functional.cross_entropy(logits, piece[1:]).item())
        assert one["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert one["ppl"] == pytest.approx(math.exp(one["loss"]))
        assert results["results"]["length"][f"loss_{one['length']},none"] == one["loss"]
    assert [one["length"] for one in results["lengths"]] == list(LENGTHS)
    assert len({one["loss"] for one in results["lengths"]}) == len(LENGTHS)
    assert results["config"] == {"step": 12, "trained_length": 32, "tokens": 64 * len(whole)}


def test_positions_cover_the_longest_once():
    losses = torch.arange(2048.0).expand(2, -1)
    found = length.by_position(losses)
    assert [(one["from"], one["to"]) for one in found] == [(0, 256), (256, 512), (512, 1024), (1024, 2048)]
    assert [one["loss"] for one in found] == [127.5, 383.5, 767.5, 1535.5]
    assert [(one["from"], one["to"]) for one in length.by_position(losses[:, :100])] == [(0, 100)]
    assert [one["to"] for one in length.by_position(losses[:, :300])] == [256, 300]


def test_the_command(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "text.txt").write_text("a long text, " * 40)
    arguments = [str(trained), "--lengths", "16,32", "--text", str(tmp_path / "text.txt")]
    assert length.main(arguments) == 0
    said = capsys.readouterr().out
    assert "| pieces of " in said
    assert "| 32 (trained at) |" in said
    assert "| position in 32 " in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "24,32"], "24 does not divide the longest, 32"),
        (["--lengths", "1,32"], "1 does not divide"),
        (["--lengths", "a,32"], "expected numbers with commas between them, got 'a,32'"),
        (["--lengths", "1048576"], "no held-out document has 1048576 tokens, the longest has"),
        (["--text", "nowhere.txt"], "cannot read 'nowhere.txt'"),
        (["--documents", "0"], "--documents must be at least 1"),
    ],
)
def test_refused(trained: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str):
    assert length.main([str(trained), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_refused_before_training(trained: Path):
    path = trained.parents[1] / "small.yaml"
    one_error(
        train(path, "name=refused", "eval.length=[1048576]"), "eval.length: no held-out document has 1048576 tokens"
    )
    one_error(train(path, "name=refused", "eval.length=[24, 32]"), "24 does not divide the longest, 32")
    assert not (trained.parent / "refused").exists()


def test_reach_is_the_longest_length_that_is_not_refused(trained: Path):
    run = open_run(trained, "cpu")
    longest, why = length.reach(run.model.cfg, open_run_corpus(trained))
    assert why == f"the longest held-out document has {longest} tokens"
    assert length.evaluate(run, [longest])["lengths"][0]["length"] == longest
    with pytest.raises(UserError, match=f"has {longest + 1} tokens, the longest has {longest}"):
        length.evaluate(run, [longest + 1])


def test_learned_positions_end(trained: Path):
    run = open_run(trained, "cpu")
    model = run.model.cfg.__class__(**{**vars(run.model.cfg), "learned_positions": True, "max_seq_len": 32})
    with pytest.raises(UserError, match="64 is longer than the learned positions, 32"):
        length.check(model, LENGTHS)
    assert length.reach(model, open_run_corpus(trained)) == (32, "the model has only 32 learned positions")
