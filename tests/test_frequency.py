"""Loss by n-gram frequency, against a count with dictionaries and losses token by token."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from eval import frequency
from eval.corpus_tasks import open_run_corpus
from eval.run import open_run
from models import Batch, UserError
from tests.runs import PLAIN, metrics, train, write_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps that was judged by pairs of tokens."""
    folder = tmp_path_factory.mktemp("frequency")
    config = write_config(folder, PLAIN, eval={"frequency": 2}, train={"val_tokens": 700})
    return train(config).run


@pytest.fixture(scope="module")
def judged(trained: Path) -> dict[str, Any]:
    """What training left, before anything else judges the run."""
    return json.loads((trained / "eval" / "frequency.json").read_text())


def by_hand(path: Path, order: int) -> dict[str, list[float]]:
    """Losses of each bucket: whole documents, one at a time, in pieces as long as a row."""
    corpus, model = open_run_corpus(path), open_run(path, "cpu").model
    seen: Counter[tuple[int, ...]] = Counter()
    for shards, _ in corpus.train:
        for doc in range(len(shards)):
            tokens = [corpus.tokenizer.bos_id, *shards.read(doc).tolist()]
            seen.update(tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1))
    found: dict[str, list[float]] = {}
    for doc in range(len(corpus.val)):
        whole = [corpus.tokenizer.bos_id, *corpus.val.read(doc).tolist(), corpus.tokenizer.eos_id]
        for start in range(0, len(whole) - 1, 32):
            tokens = torch.tensor(whole[start : start + 33])
            h, _, _ = model.features(Batch(tokens[None, :-1]))
            nll, _ = model.token_nll(h, tokens[None, 1:])
            for t in range(len(tokens) - 1):
                times = seen[tuple(tokens[t - order + 1 : t + 1].tolist())]
                name = "start" if t < order - 1 else next(str(e) for e in reversed(frequency.EDGES) if times >= e)
                found.setdefault(name, []).append(float(nll[0, t]))
    return found


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.usefixtures("judged")
@torch.no_grad()
def test_buckets_are_those_of_a_count_by_hand(trained: Path, order: int, tmp_path: Path):
    whole = shutil.copytree(trained, tmp_path / "whole")
    config = yaml.safe_load((whole / "config.yaml").read_text())
    config["train"]["val_tokens"] = 0  # all of the text
    (whole / "config.yaml").write_text(yaml.safe_dump(config))
    results, want = frequency.run_frequency(whole, order, "cpu"), by_hand(whole, order)
    got = {b["bucket"]: b for b in results["buckets"]}
    assert got.keys() == want.keys()
    for name, losses in want.items():
        assert got[name]["targets"] == len(losses)
        assert got[name]["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_a_run_is_judged_when_its_config_asks(trained: Path, judged: dict[str, Any]):
    """On the tokens of its last validation: the mean over buckets is the loss it reports."""
    val = next(m["val"] for m in reversed(metrics(trained)) if "val" in m)
    assert judged["config"]["step"] == 12
    assert judged["config"]["order"] == 2
    assert sum(b["targets"] for b in judged["buckets"]) == val["tokens"] == 700
    mean = sum(b["targets"] * b["loss"] for b in judged["buckets"]) / val["tokens"]
    assert mean == pytest.approx(val["loss"], rel=1e-5)
    assert len({b["bucket"] for b in judged["buckets"]}) > 2


def test_the_table_names_its_buckets(trained: Path, capsys: pytest.CaptureFixture[str]):
    assert frequency.main([str(trained), "--order", "2"]) == 0
    shown = capsys.readouterr().out
    assert "last 2 tokens seen in training" in shown
    assert "row begins" in shown
    assert "never" in shown or "1 to 9" in shown


def test_an_order_too_long_is_refused(trained: Path):
    with pytest.raises(UserError, match="order must lie between 1 and 7 with"):
        frequency.count(open_run_corpus(trained), 9)
