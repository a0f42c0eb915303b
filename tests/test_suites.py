"""Suites: asked of a run of text and of a run on a task, while it trains and afterwards, with one set of figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from configs import schema
from configs.question import Metric
from eval import length, needle, recall, suites
from eval.__main__ import main
from eval.ablation_runs import read_metric
from eval.corpus_tasks import open_run_corpus
from eval.run import LoadedRun, open_run
from models import UserError, build, model_config
from models.hf import export_run
from tests.runs import PLAIN, metrics, one_error, train, write_config
from tests.test_eval_runs import LEARNED, add_corpus, tiny_model, write_run

TASKS = ("induction", "copying", "selective_copying", "mqar", "needle", "variable_tracking")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of text that was asked the recall suite twice while it trained, and once at its end."""
    folder = tmp_path_factory.mktemp("suites")
    return train(write_config(folder, PLAIN, eval={"suites": ["recall"], "suite_every": 7, "suite_rows": 20})).run


@pytest.fixture(scope="module")
def on_a_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_config(tmp_path_factory.mktemp("suites"))
    raw = yaml.safe_load(path.read_text())
    raw["data"] = {"synthetic": {"kind": "mqar", "vocab_size": 34}, "seq_len": 32}
    path.write_text(yaml.safe_dump(raw))
    return train(path).run


def test_asked_while_it_trains(trained: Path):
    asked = [(line["step"], line["suite"]["recall"]) for line in metrics(trained) if "suite" in line]
    assert [step for step, _ in asked] == [7, 12]
    assert tuple(asked[-1][1]) == TASKS
    assert all(0 <= value <= 1 for _, found in asked for value in found.values())


def test_the_same_figures_afterwards(trained: Path):
    """Of the same rows; and a run's last figures are metrics of an ablation."""
    run = open_run(trained, "cpu")
    during = suites.during(run.model, ["recall"], 20)["recall"]
    (logged,) = [line["suite"]["recall"] for line in metrics(trained) if "suite" in line and line["step"] == 12]
    assert during == pytest.approx(logged, abs=1e-9)
    assert during == {
        task: one["accuracy"] for task, one in suites.ask(run.model.eval(), "recall", 4).items()
    }  # 20 over six tasks
    stored = json.loads((trained / "eval" / "suite-recall_12.json").read_text())
    for task in TASKS:
        assert stored["results"][f"recall.{task}"]["acc,none"] == stored["tasks"][task]["accuracy"]
        assert read_metric(Metric(f"eval/recall.{task}/acc"), trained, 12) == stored["tasks"][task]["accuracy"]


def test_rows_are_those_of_the_task(trained: Path):
    """What a suite says of a task is `eval.recall.measure` of it with all the ids of the model."""
    model = open_run(trained, "cpu").model
    data = suites.feed(model.cfg, *suites.suite("recall").synthetic["mqar"])
    assert data.vocab_size == model.cfg.vocab_size
    model.eval()
    found = recall.measure(model, data, data.once(10, 3))
    assert suites.ask(model, "recall", 10)["mqar"]["accuracy"] == found["accuracy"]
    assert found["answers"] == suites.ask(model, "recall", 10)["mqar"]["answers"]


def test_asking_changes_nothing(trained: Path):
    model = open_run(trained, "cpu").model
    before = {name: t.clone() for name, t in model.state_dict().items()}
    model.train()
    suites.during(model, ["recall", "memory"], 12)
    assert model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_run_on_a_task(on_a_task: Path, capsys: pytest.CaptureFixture[str]):
    """Without a tokenizer: no text is read, and tasks that it has too few ids for are named."""
    assert main([str(on_a_task), "--suite", "smoke,memory", "--rows", "6", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "| smoke.induction" in said
    assert "| memory.flip_flop" in said
    assert "memory.S5 was left out: the task has 128 ids, the model only 34" in said
    assert "corpus" not in said
    assert (on_a_task / "eval" / "suite-memory_12.json").is_file()


def test_tasks_and_suites_in_one_command(trained: Path, capsys: pytest.CaptureFixture[str]):
    words = ["--tasks", "corpus_ppl", "--limit", "2", "--suite", "recall", "--rows", "6", "--device", "cpu"]
    assert main([str(trained), *words]) == 0
    said = capsys.readouterr().out
    assert "| corpus_ppl" in said
    assert said.index("| corpus_ppl") < said.index("suite recall: finds again") < said.index("| recall.mqar")


def test_long_contexts_of_text(trained: Path, monkeypatch: pytest.MonkeyPatch):
    """As far as the held-out documents reach; beyond, it is said."""
    short = suites.Suite("short", synthetic={}, lengths=(16, 64), needles=(1 << 20,))
    monkeypatch.setitem(suites.SUITES, "long", short)
    found = suites.evaluate(open_run(trained, "cpu"), "long", bar=False)
    assert {"loss_16,none", "loss_64,none"} <= set(found["results"]["long.text_length"])
    assert "skipped" in found["tasks"]["text needle 1048576"]
    assert "long.text needle 1048576 was left out" in suites.table(found)
    monkeypatch.setitem(suites.SUITES, "long", suites.Suite("short", synthetic={}, needles=(120,)))
    said = suites.table(suites.evaluate(open_run(trained, "cpu"), "long", bar=False))
    assert [line.split("|")[2].strip() for line in said.splitlines() if "text_needle" in line] == ["acc", "exact"]


def of_text(
    run: LoadedRun, monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...], needles: tuple[int, ...]
) -> dict:
    monkeypatch.setitem(suites.SUITES, "long", suites.Suite("short", lengths=lengths, needles=needles))
    return suites.evaluate(run, "long", bar=False)


def test_only_lengths_out_of_reach_of_the_documents_are_left_out(trained: Path, monkeypatch: pytest.MonkeyPatch):
    """The others are measured as if nothing else had been asked."""
    run = open_run(trained, "cpu")
    found = of_text(run, monkeypatch, (16, 64, 1024, 4096), (120, 200, 1 << 20))
    for label, alone in (("length", length.evaluate(run, (16, 64))), ("needle", needle.evaluate(run, (120, 200)))):
        key = f"long.text_{label}"
        assert found["results"][key] == {**alone["results"][label], "alias": key}
        assert found["n-samples"][key] == alone["n-samples"][label]
    held = open_run_corpus(trained).val.lengths
    assert [line.partition(" was left out: ") for line in suites.table(found).splitlines() if "left out" in line] == [
        ("long.text length 1024", " was left out: ", f"the longest held-out document has {max(held)} tokens"),
        ("long.text length 4096", " was left out: ", f"the longest held-out document has {max(held)} tokens"),
        ("long.text needle 1048576", " was left out: ", f"the held-out text has {sum(held) + 2 * len(held)} tokens"),
    ]


def test_only_lengths_beyond_learned_positions_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_run(tmp_path / "run", tiny_model({**LEARNED, "max_seq_len": 200}))
    add_corpus(path, tmp_path)
    found = of_text(open_run(path, "cpu"), monkeypatch, (50, 200, 400), (200, 201))
    assert {"loss_50,none", "loss_200,none"} <= set(found["results"]["long.text_length"])
    assert found["n-samples"]["long.text_needle"]["effective"] == needle.DEPTHS * needle.SAMPLES
    why = {"skipped": "the model has only 200 learned positions"}
    assert found["tasks"] == {"text length 400": why, "text needle 201": why}


def test_a_corpus_that_is_gone_leaves_the_synthetic_tasks(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(suites.SUITES, "long", replace(suites.SUITES["smoke"], tasks=(), lengths=(16,), needles=(120,)))
    (tmp_path / "data.json").write_text(json.dumps({"dir": str(tmp_path / "gone")}))
    found = suites.evaluate(replace(open_run(trained, "cpu"), dir=tmp_path), "long", 2, bar=False)
    assert list(found["results"]) == ["long.induction"]
    for label in ("text length", "text needle"):
        assert "no such prepared folder" in found["tasks"][label]["skipped"]


def test_rows_that_are_longer_than_learned_positions():
    """Are left out, in training too, and said."""
    model = build(model_config({**PLAIN, "vocab_size": 130, "learned_positions": True, "max_seq_len": 100})).eval()
    found = suites.ask(model, "memory", 2)
    assert "accuracy" in found["listops"]
    assert found["flip_flop"] == {"skipped": "its rows have 128 places, the model only 100 learned positions"}
    assert list(suites.during(model, ["memory"], 6)["memory"]) == ["listops"]


def test_an_exported_model_has_no_corpus(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A suite goes without the tasks made from it and says so, and takes no other suite with it; asked for by name it is missed."""
    words = [str(tmp_path / "exported"), "--suite", "smoke,recall", "--rows", "2", "--device", "cpu"]
    export_run(trained, words[0])
    assert main(words) == 0
    said = capsys.readouterr().out
    why = f"{words[0]}: no data.json that names the corpus it was trained on"
    line = f"smoke.corpus was left out: {why}\n"
    assert said.index("| smoke.induction") < said.index(line) < said.index("| recall.mqar")
    stored = json.loads((tmp_path / "exported" / "eval" / "suite-smoke_0.json").read_text())
    assert stored["tasks"]["corpus"] == {"skipped": why}
    assert list(stored["results"]) == ["smoke.induction"]
    assert main([*words, "--tasks", "corpus"]) == 2
    assert capsys.readouterr().err == f"error: {why}\n"


def test_only_tasks_made_from_the_corpus_need_it(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also where a run names a corpus that is gone."""
    monkeypatch.setitem(suites.SUITES, "smoke", suites.Suite("two", ("corpus", "sciq")))
    run = open_run(trained, "cpu")
    assert suites.lm_eval_tasks(run, "smoke") == (["corpus", "sciq"], {})
    (tmp_path / "data.json").write_text(json.dumps({"dir": str(tmp_path / "gone")}))
    asked, left_out = suites.lm_eval_tasks(replace(run, dir=tmp_path), "smoke")
    assert asked == ["sciq"]
    assert left_out == {"corpus": f"{tmp_path / 'gone'}: no such prepared folder; `python -m data prepare` makes one"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--suite", "recall,recal"], "unknown suite 'recal'; did you mean 'recall'"),
        (["--suite", "recall", "--rows", "0"], "--rows must be at least 1"),
        ([], "give --tasks, --suite or both"),
    ],
)
def test_refused(trained: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str):
    assert main([str(trained), *words]) == 2
    assert message in capsys.readouterr().err


def test_refused_before_training(trained: Path):
    path = trained.parents[1] / "small.yaml"
    one_error(train(path, "name=refused", "eval.suites=[recal]"), "unknown suite 'recal'; did you mean 'recall'")
    with pytest.raises(UserError, match="suite_rows=0"):
        schema.load(path, ["eval.suite_rows=0"])


def test_every_suite_fits_a_byte_vocabulary():
    model = model_config({**PLAIN, "vocab_size": 257})
    for name, one in suites.SUITES.items():
        for task, asked in one.synthetic.items():
            data = suites.feed(model, *asked)
            assert data.task.guess(data.seq_len) < 0.7, (name, task)
