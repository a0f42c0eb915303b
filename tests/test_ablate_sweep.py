"""Every variant at the value that suits it: chosen on seeds that are not compared, resumable, shown in the report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

import ablate
from configs.question import Sweep, load_question, resolve
from eval.ablation_sweep import read_sweep
from tests.stand_in import processes, write_question

VARIANTS = "'b': Variant(['train.sample_prompt=best 0.5']), 'c': Variant(['model.n_layers=4'], tuned_as='b')"
SWEEP = "sweep=Sweep('optim.lr', (0.1, 0.5, 1.0), seeds=(7, 8))"


def rates(runs: Path) -> dict[str, float]:
    return {p.parent.name: yaml.safe_load(p.read_text())["optim"]["lr"] for p in runs.glob("*-s*/config.yaml")}


def test_each_variant_gets_its_own_best(stand_in: Path, capsys: pytest.CaptureFixture[str]):
    """`a` is worth its rate, `b` the distance of it to 0.5, `c` takes what `b` got; twice the same command repeats nothing."""
    asked = write_question(stand_in, VARIANTS, f"seeds=2, {SWEEP}")
    runs = stand_in / "runs" / "asked"
    assert ablate.main([str(asked)]) == 0
    shown = capsys.readouterr()
    assert "first, 12 runs choose the settings of the variants" in shown.err
    assert rates(runs) == {"a-s0": 0.1, "a-s1": 0.1, "b-s0": 0.5, "b-s1": 0.5, "c-s0": 0.5, "c-s1": 0.5}
    tried = sorted(str(p.parent.relative_to(runs / "sweep")) for p in runs.glob("sweep/*/*-s*/config.yaml"))
    assert tried == [f"optim.lr_{value}/{v}-s{seed}" for value in (0.1, 0.5, 1.0) for v in "ab" for seed in (7, 8)]
    section = shown.out.partition("## What was chosen: optim.lr")[2].partition("## ")[0]
    cells = [[c.strip() for c in x.strip("| ").split("|")] for x in section.splitlines() if x.startswith("| ")]
    rows = {name: rest for name, *rest in cells}
    assert rows["optim.lr"] == ["0.1000", "0.5000", "1.0000", "note"]
    assert [cell.startswith("**") for cell in rows["a"]] == [True, False, False, False]
    assert [cell.startswith("**") for cell in rows["b"]] == [False, True, False, False]
    assert (rows["a"][3], rows["b"][3], rows["c"][3]) == ("at the end", "-", "as b")
    assert rows["c"][:3] == rows["b"][:3]
    assert "is best on seed 7, 8, which is in no comparison" in " ".join(section.split())
    report = json.loads((runs / "report" / "report.json").read_text())["sweep"]
    ends = [(runs / f"sweep/optim.lr_1.0/b-s{s}/metrics.jsonl").read_text().splitlines()[-1] for s in (7, 8)]
    losses = [json.loads(line)["val"]["loss"] for line in ends]
    assert report["results"]["b"][2] == pytest.approx(sum(losses) / 2)
    assert report["chosen"] == {"a": 0.1, "b": 0.5, "c": 0.5}
    before = sorted(runs.rglob("processes"))
    assert ablate.main([str(asked)]) == 0
    assert "choose" not in capsys.readouterr().err
    assert sorted(runs.rglob("processes")) == before
    assert all(processes(p.parent) == [0] for p in before)
    shutil.rmtree(runs / "sweep")  # the report needs no more than what is there
    assert ablate.main([str(asked), "--report"]) == 0
    assert "| optim.lr_0.1/a-s7 | missing" in capsys.readouterr().out


def test_cut_short_nothing_is_compared_yet(stand_in: Path, capsys: pytest.CaptureFixture[str]):
    asked = write_question(stand_in, "'b': Variant(['train.sample_prompt=best 0.5'])", f"seeds=2, {SWEEP}")
    runs = stand_in / "runs" / "asked"
    assert ablate.main([str(asked), "--minutes", "0"]) == 0
    shown = capsys.readouterr()
    assert "left: 12 runs" in shown.err
    assert "| a-s0 " in shown.out
    assert not rates(runs)
    assert ablate.main([str(asked)]) == 0
    assert len(rates(runs)) == 4


def test_what_fails_is_not_chosen(stand_in: Path, capsys: pytest.CaptureFixture[str]):
    """A variant that fails at every value is left out of the comparison, and said to be."""
    variants = "'b': Variant(['train.sample_prompt=crash']), 'c': Variant(['train.sample_prompt=diverge'])"
    asked = write_question(stand_in, variants, f"seeds=2, {SWEEP}")
    runs = stand_in / "runs" / "asked"
    assert ablate.main([str(asked)]) == 1
    shown = capsys.readouterr()
    for variant in "bc":
        assert f"{variant} is left out: not one value of optim.lr gave a result" in shown.err
    assert set(rates(runs)) == {"a-s0", "a-s1"}
    assert "| optim.lr_0.5/b-s8 | failed" in shown.out
    assert "| b-s0              | missing" in shown.out
    assert "6 runs failed; --retry tries them again" in shown.err


def test_a_choice_that_a_retried_run_would_change(stand_in: Path, capsys: pytest.CaptureFixture[str]):
    """Chosen without the run that failed; the report says what the runs have, and how to train them anew is said."""
    asked = write_question(stand_in, "'b': Variant(['train.sample_prompt=best 0.5 crash'])", f"seeds=1, {SWEEP}")
    runs = stand_in / "runs" / "asked"
    assert ablate.main([str(asked)]) == 1
    assert "2 of these runs failed: what is chosen now is chosen without them" in capsys.readouterr().err
    assert rates(runs) == {"a-s0": 0.1, "b-s0": 0.1}
    failed = json.loads((runs / "report" / "report.json").read_text())["sweep"]["without_result"]
    assert [one["run"] for one in failed] == ["optim.lr_0.5/b-s7", "optim.lr_0.5/b-s8"]
    asked.write_text(asked.read_text().replace("0.5 crash", "0.5"))
    assert ablate.main([str(asked), "--retry"]) == 2
    assert "'optim.lr' is 0.1 there, 0.5 here; delete it, or start anew with another --out" in capsys.readouterr().err
    assert ablate.main([str(asked), "--report"]) == 0
    assert "chosen when another result was missing" in capsys.readouterr().out
    assert json.loads((runs / "report" / "report.json").read_text())["sweep"]["chosen"] == {"a": 0.1, "b": 0.1}
    shutil.rmtree(runs / "b-s0")
    assert ablate.main([str(asked)]) == 0
    assert rates(runs) == {"a-s0": 0.1, "b-s0": 0.5}


def test_half_a_sweep_chooses_nothing(stand_in: Path):
    asked = write_question(stand_in, VARIANTS, f"seeds=1, {SWEEP}")
    runs = stand_in / "runs" / "asked"
    assert ablate.main([str(asked)]) == 0
    for gone in ("a-s0", "b-s0", "c-s0", "sweep/optim.lr_1.0/b-s8"):
        shutil.rmtree(runs / gone)
    assert ablate.main([str(asked), "--report"]) == 0
    assert json.loads((runs / "report" / "report.json").read_text())["sweep"]["chosen"] == {
        "a": 0.1,
        "b": None,
        "c": None,
    }


def test_another_choice_is_another_question(stand_in: Path, capsys: pytest.CaptureFixture[str]):
    """Runs that were trained at one value are not mixed with those of another."""
    asked = write_question(stand_in, VARIANTS, f"seeds=2, {SWEEP}")
    assert ablate.main([str(asked)]) == 0
    asked.write_text(asked.read_text().replace("(0.1, 0.5, 1.0)", "(0.05, 0.1, 0.5, 1.0)"))
    assert ablate.main([str(asked)]) == 2
    assert "a-s0 was started with other settings: 'optim.lr' is 0.1 there, 0.05 here" in capsys.readouterr().err


def test_equal_results_and_small_values(stand_in: Path):
    """The first of equals; a value like 1e-05 stays a number on its way through YAML."""
    asked = write_question(
        stand_in, "'b': Variant()", "metrics=[Metric('val/by/x/n', False)], " + SWEEP.replace("0.1", "1e-05")
    )
    question = load_question(asked)
    sweep = question.sweep
    assert isinstance(sweep, Sweep)
    assert sweep.at(resolve(question)["a"], 1e-05).optim.lr == 1e-5
    assert ablate.main([str(asked), "--seeds", "1"]) == 0
    found = read_sweep(question, stand_in / "runs" / "asked")
    assert found is not None
    assert found.results("a") == [2.0, 2.0, 2.0]
    assert found.best("a") == 0


def test_more_may_be_better(stand_in: Path):
    """The first metric decides, in its own direction: here it grows with the rate."""
    asked = write_question(
        stand_in, "'b': Variant()", "seeds=1, metrics=['val/by/pairs/4/accuracy', 'val/loss'], " + SWEEP
    )
    assert ablate.main([str(asked)]) == 0
    assert rates(stand_in / "runs" / "asked") == {"a-s0": 1.0, "b-s0": 1.0}
