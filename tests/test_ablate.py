"""A question is asked, killed, resumed and answered: the queue with a stand-in for `train.py`, then all of it with the real one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import ablate
import train
from configs.question import Curve, Metric, Question, Variant, load_question, resolve
from data import DataConfig
from eval import ablation_queue, ablation_report
from eval.ablation import answer, at_budget, measured, sentence, verdict
from eval.ablation_report import render
from eval.ablation_runs import Costs, read_run
from eval.statistics import compare
from models import UserError
from models.lm import meta_model
from models.types import count_params
from tests.runs import PLAIN, ROOT, assert_same_run, write_config
from tests.stand_in import PLOTS, processes, value, write_question
from training.parallel import world

# -- the queue


def test_all_runs_then_a_report_and_nothing_twice(
    stand_in: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    asked = write_question(stand_in, "'b': Variant(['optim.lr=0.2']), 'c': Variant(['optim.lr=0.005'])", "seeds=2")
    runs = stand_in / "runs" / "asked"
    assert ablate.main([str(asked)]) == 0
    names = {f"{v}-s{s}" for v in "abc" for s in (0, 1)}
    assert {p.name for p in runs.iterdir()} == {*names, "queue", "report"}
    assert all(processes(runs / n) == [0] for n in names)
    shown = capsys.readouterr()
    assert shown.err.startswith("Does it matter?\n")
    assert shown.err.count("finished at step 12 of 12") == 6
    assert "6 of 6 runs finished" in shown.out
    for name, plot in PLOTS.items():
        monkeypatch.setattr(ablation_report, name, plot)
    assert ablate.main([str(asked), "--seeds", "3"]) == 0
    assert all(processes(p) == [0] for p in runs.glob("*-s?"))
    assert len(list(runs.glob("*-s?"))) == 9
    assert {p.name for p in (runs / "report").iterdir()} == {
        "report.md",
        "report.csv",
        "report.json",
        "quality.png",
        "loss.png",
    }


def test_seeds_take_turns(stand_in: Path):
    """Whatever is cut short holds whole pairs."""
    question = load_question(write_question(stand_in, "'b': Variant(['optim.lr=0.2'])", "seeds=[4, 2]"))
    runs = ablation_queue.plan(resolve(question), question.all_seeds(), stand_in)
    assert [r.name for r in runs] == ["a-s4", "b-s4", "a-s2", "b-s2"]
    assert [(r.config.seed, r.config.optim.lr) for r in runs] == [(4, 5e-3), (4, 0.2), (2, 5e-3), (2, 0.2)]


def test_failures_are_reported_and_retried_on_request(stand_in: Path, capsys: pytest.CaptureFixture[str]):
    variants = "'b': Variant(['train.sample_prompt=crash']), 'c': Variant(['train.sample_prompt=die'])"
    asked = write_question(stand_in, variants, "seeds=2")
    runs = stand_in / "runs" / "asked"
    assert ablate.main([str(asked)]) == 1
    shown = capsys.readouterr()
    assert "b-s0: failed at step 6 of 12" in shown.err
    assert "4 runs failed; --retry tries them again" in shown.err
    for name, why in (("b-s1", "step 6 of 12: error: out of luck"), ("c-s0", "step 6 of 12: ended by SIGKILL")):
        (row,) = [line for line in shown.out.splitlines() if line.startswith(f"| {name} ")]
        assert "failed" in row
        assert why in row
    assert "b and a cannot be compared by val/loss (n=0 of 2 seeds" in shown.out
    assert ablate.main([str(asked)]) == 1  # not again by itself
    assert processes(runs / "b-s0") == [0]
    assert "4 runs failed" in capsys.readouterr().err
    healed = asked.read_text().replace("=crash", "=go on").replace("=die", "=go on")
    asked.write_text(healed)
    assert ablate.main([str(asked), "--retry"]) == 0
    assert processes(runs / "b-s0") == processes(runs / "c-s1") == [0, 4]
    assert "failed" not in capsys.readouterr().out


def test_what_failed_before_its_first_checkpoint_may_be_changed(stand_in: Path):
    """There is nothing of it to mix with."""
    asked = write_question(stand_in, "'b': Variant(['optim.lr=0.2', 'train.sample_prompt=crash early'])", "seeds=1")
    assert ablate.main([str(asked)]) == 1
    asked.write_text(asked.read_text().replace("0.2", "0.3").replace("crash early", "go on"))
    assert ablate.main([str(asked), "--retry"]) == 0
    assert processes(stand_in / "runs" / "asked" / "b-s0") == [0]


def test_what_another_queue_has_ended_is_not_begun_again(stand_in: Path):
    """A queue that was planned before."""
    asked = write_question(stand_in, "'b': Variant(['train.sample_prompt=crash'])", "seeds=1")
    question = load_question(asked)
    runs = ablation_queue.plan(resolve(question), question.all_seeds(), stand_in / "runs" / "asked")
    assert ablate.main([str(asked)]) == 1
    means = ablation_queue.Means([{}], float("inf"), retry=False, flags=[])
    for run in runs:
        assert ablation_queue.start(run, {}, means) is None
        assert run.note("json").is_file()
        assert processes(run.folder) == [0]
    again = ablation_queue.start(runs[1], {"OMP_NUM_THREADS": "1"}, replace(means, retry=True))
    assert again is not None
    again.process.wait()
    assert processes(runs[1].folder) == [0, 4]


def test_a_changed_config_is_refused(stand_in: Path, capsys: pytest.CaptureFixture[str]):
    asked = write_question(stand_in, "'b': Variant(['optim.lr=0.2'])", "seeds=1")
    assert ablate.main([str(asked), "train.steps=4"]) == 0
    before = sorted((stand_in / "runs").rglob("*"))
    for words, key in ((["train.steps=8"], "train.steps"), (["train.steps=4", "optim.weight_decay=0.3"], "optim")):
        capsys.readouterr()
        assert ablate.main([str(asked), *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert f"'{key}" in line
        assert "a-s0 was started with other settings" in line
    assert sorted((stand_in / "runs").rglob("*")) == before
    assert ablate.main([str(asked), "train.steps=4", "log.every=3", "train.save_every=2"]) == 0  # moves no number


def when(condition: Callable[[], object], action: Callable[[], object]) -> threading.Thread:
    """Do it, in a thread, once that holds."""

    def wait() -> None:
        deadline = time.monotonic() + 60
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.01)
        action()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_interrupted_in_the_middle(stand_in: Path, capsys: pytest.CaptureFixture[str]):
    """Ctrl-C: the processes save and end, and the next call goes on from there; several at a time."""
    asked = write_question(stand_in, "'b': Variant(['optim.lr=0.2'])", "seeds=3", train={"sample_prompt": "slow"})
    runs = stand_in / "runs" / "asked"
    both = [runs / name / "metrics.jsonl" for name in ("a-s0", "b-s0")]
    thread = when(
        lambda: all(p.is_file() and p.read_text().count("\n") >= 3 for p in both),
        lambda: os.kill(os.getpid(), signal.SIGINT),
    )
    assert ablate.main([str(asked), "--jobs", "2"]) == 0
    thread.join()
    shown = capsys.readouterr()
    assert "left: 6 runs" in shown.err
    assert "the same command goes on" in shown.err
    assert sorted(p.name for p in runs.glob("*-s?")) == ["a-s0", "b-s0"]
    assert "| a-s0 | unfinished | step " in shown.out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    saved = {n: max(int(p.name[5:]) for p in (runs / n / "checkpoints").iterdir()) for n in ("a-s0", "b-s0")}
    assert ablate.main([str(asked), "--jobs", "3"]) == 0
    assert all(processes(runs / n) == [0, step] for n, step in saved.items())
    assert "6 of 6 runs finished" in capsys.readouterr().out


def test_a_slice_of_time(stand_in: Path, capsys: pytest.CaptureFixture[str]):
    asked = write_question(stand_in, "'b': Variant(['optim.lr=0.2'])", "seeds=2", train={"sample_prompt": "slow"})
    assert ablate.main([str(asked), "--minutes", "0"]) == 0
    assert "left: 4 runs, 48 steps, eta ?" in capsys.readouterr().err
    assert ablate.main([str(asked), "--minutes", "0.015"]) == 0  # 0.9 s of about 3
    said = capsys.readouterr().err
    assert "left: " in said
    assert "eta 0:0" in said
    assert ablate.main([str(asked)]) == 0
    assert "4 of 4 runs finished" in capsys.readouterr().out


def test_a_killed_queue_leaves_its_runs_alone(stand_in: Path, capsys: pytest.CaptureFixture[str]):
    """Only the parent is killed: the run goes on, and nobody starts it a second time meanwhile."""
    asked = write_question(
        stand_in, "'b': Variant(['optim.lr=0.2'])", "seeds=1", train={"sample_prompt": "slow", "steps": 40}
    )
    runs = stand_in / "runs" / "asked"
    parent = start_queue(ablation_queue.TRAIN, asked)
    log = runs / "a-s0" / "metrics.jsonl"
    when(lambda: log.is_file() and log.read_text().count("\n") >= 2, parent.kill).join()
    assert parent.wait(60) == -signal.SIGKILL
    (child,) = [int(line.split()[0]) for line in (runs / "a-s0" / "processes").read_text().splitlines()]
    assert ablate.main([str(asked)]) == 0
    shown = capsys.readouterr()
    assert f"a-s0: process {child} is training it" in shown.err
    assert "b-s0: finished" in shown.err
    when(lambda: (runs / "a-s0" / "environment.json").is_file(), lambda: None).join()
    assert ablate.main([str(asked)]) == 0
    assert processes(runs / "a-s0") == [0]
    assert "2 of 2 runs finished" in capsys.readouterr().out


def start_queue(script: Path, *words: str | Path) -> subprocess.Popen[bytes]:
    """`ablate.py WORDS` in a process, with ``script`` for train.py."""
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import ablate; from eval import ablation_queue; from pathlib import Path\n"
        f"ablation_queue.TRAIN = Path({str(script)!r}); sys.exit(ablate.main(sys.argv[1:]))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    silent = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, "-c", program, *map(str, words)], env=environment, **silent)


def test_places(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert ablation_queue.places_for(None, [], 8) == [{"OMP_NUM_THREADS": "8"}]
    assert ablation_queue.places_for(3, [], 8) == [{"OMP_NUM_THREADS": "2"}] * 3
    assert ablation_queue.places_for(16, [], 8) == [{"OMP_NUM_THREADS": "1"}] * 16
    one_each = [{"CUDA_VISIBLE_DEVICES": name} for name in ("3", "5")]
    assert ablation_queue.places_for(None, ["3", "5"], 8) == one_each
    assert ablation_queue.places_for(3, ["3", "5"], 8) == [*one_each, one_each[0]]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert ablation_queue.places_for(3, [], 8) == [{"OMP_NUM_THREADS": "2"}] * 3


# -- the report


def test_what_is_claimed(stand_in: Path, capsys: pytest.CaptureFixture[str]):
    """A difference of 0.195 between runs that differ by 0.01 beside their seed, and one of 0.001: from five seeds on."""
    variants = (
        "'b': Variant(['optim.lr=0.2']), 'c': Variant(['optim.lr=0.006', 'model.n_layers=4']), "
        "'d': Variant(['optim.lr=0.007', 'model.n_layers=3', 'train.batch_size=16'], to='a')"
    )
    asked = write_question(stand_in, variants, "seeds=5")
    assert ablate.main([str(asked)]) == 0
    text = capsys.readouterr().out
    (claim,) = [line for line in text.splitlines() if "beats" in line]
    words = claim.split()
    assert claim.startswith("- a beats b by 0.")
    assert claim.endswith("nats (val/loss) at equal parameters, FLOPs and state, n=5")
    assert float(words[5]) == pytest.approx(0.195, abs=0.02)
    assert "no difference shown between c and a: " in text
    assert "in the same order, but for d, whose settings of the data differ." in text
    configs = resolve(load_question(asked))
    sizes = {v: count_params(meta_model_of(configs[v])) for v in "ad"}
    residual = 100 * (sizes["d"] / sizes["a"] - 1)
    assert abs(residual) < 2
    assert f"params of a by channel.hidden: {residual:+.2f}%" in text
    runs = stand_in / "runs" / "asked"
    losses = {
        v: [
            json.loads((runs / f"{v}-s{s}" / "metrics.jsonl").read_text().splitlines()[-1])["val"]["loss"]
            for s in range(5)
        ]
        for v in "abc"
    }
    differences = torch.tensor(losses["b"], dtype=torch.float64) - torch.tensor(losses["a"], dtype=torch.float64)
    assert float(value(runs, "val/loss", "b", "mean")) == pytest.approx(sum(losses["b"]) / 5)
    assert float(value(runs, "val/loss", "b", "mean_difference")) == pytest.approx(differences.mean().item())
    assert float(value(runs, "val/loss", "b", "sd_of_differences")) == pytest.approx(differences.std().item())
    assert [value(runs, "val/loss", v, "verdict") for v in "abc"] == ["", "worse", "no difference shown"]
    assert int(value(runs, "val/loss", "c", "params")) > int(value(runs, "val/loss", "a", "params"))
    assert float(value(runs, "val/loss", "a", "tokens_per_s")) == 1006.5
    assert int(value(runs, "val/loss", "a", "peak_memory_bytes")) == 11 * 2**20
    flops = float(value(runs, "val/loss", "a", "flops_per_token"))
    assert float(value(runs, "val/loss", "a", "training_flops")) == 3 * flops * 12 * 256
    assert ablate.main([str(asked), "--report", "--seeds", "4"]) == 0  # the same differences, too few seeds
    text = capsys.readouterr().out
    assert "beats" not in text
    assert "n=4; a claim needs 5" in text
    assert "not counted: a-s4, b-s4, c-s4, d-s4" in text


def costs(params: int, flops: float, state: float) -> Costs:
    return Costs(params, params, flops, state, 1, 3 * flops, None, None, "", 1)


def test_sentences():
    """Who beats whom, by how much, at what budget, from the side of the winner."""
    loss, accuracy = Metric("val/loss"), Metric("val/accuracy")
    (clear,) = compare([[-0.031, -0.037, -0.025, -0.033, -0.029]])
    small, large = costs(1000, 100.0, 64.0), costs(1008, 200.0, 16.0)
    said = sentence(loss, ("B", "A"), (small, large), clear, {}, 5, 5)
    assert (
        said == "B beats A by 0.0310 ± 0.0056 nats (val/loss) at equal parameters, with FLOPs x 0.5 and state x 4, n=5"
    )
    said = sentence(accuracy, ("B", "A"), (small, large), clear, {}, 5, 6)
    assert said.startswith(
        "A beats B by 0.0310 ± 0.0056 (val/accuracy) at equal parameters, with FLOPs x 2 and state x 0.25"
    )
    assert said.endswith(", n=5 of 6 seeds")
    said = sentence(loss, ("B", "A"), (small, large), clear._replace(n=4), {}, 4, 4)
    assert said == "no difference shown between B and A: -0.0310 ± 0.0056 nats (val/loss), n=4; a claim needs 5"
    assert measured(0.25, 0.0) == "0.250000 ± 0.000000"
    assert measured(-1234.5, 321.0, sign=True) == "-1234 ± 321"
    (unclear,) = compare([[0.3, -0.2, 0.1, -0.1, 0.2, -0.3]])
    said = sentence(loss, ("B", "A"), (small, large), unclear, {}, 6, 6)
    assert said == "no difference shown between B and A: +0.00 ± 0.25 nats (val/loss), n=6"


def test_lost_runs_in_words():
    """The one that is left with its lucky runs is not called better; the other may be."""
    loss, small = Metric("val/loss"), costs(1000, 100.0, 64.0)
    (clear,) = compare([[-0.031, -0.037, -0.025, -0.033, -0.029]])
    said = sentence(loss, ("B", "A"), (small, small), clear, {"B": 2}, 5, 7)
    assert said.startswith("no difference shown between B and A: -0.0310")
    assert said.endswith("n=5 of 7 seeds; no number from 2 runs of B")
    said = sentence(loss, ("B", "A"), (small, small), clear, {"A": 1}, 5, 6)
    assert said.startswith("B beats A by 0.0310")
    assert said.endswith("; no number from 1 run of A")
    assert [verdict(loss, ("B", "A"), clear, lost) for lost in ({}, {"B": 1}, {"A": 1})] == [
        "better",
        "no difference shown",
        "better",
    ]
    assert at_budget(costs(1000, 100.0, 0.0), small) == " at equal parameters and FLOPs, with state 0 against 64"
    assert at_budget(small, costs(1000, 100.0, 0.0)) == " at equal parameters and FLOPs, with state 64 against 0"


def test_survivors_are_not_called_better(stand_in: Path, capsys: pytest.CaptureFixture[str]):
    """`b` is better wherever it gives a number, which two of its runs do not."""
    variants = "'b': Variant(['optim.lr=0.1', 'train.sample_prompt=diverge 3']), 'c': Variant(['optim.lr=0.1'])"
    asked = write_question(stand_in, variants, "seeds=7", optim={"lr": 1.0})
    assert ablate.main([str(asked)]) == 0
    shown = capsys.readouterr().out
    report = json.loads((stand_in / "runs" / "asked" / "report" / "report.json").read_text())
    assert {r["variant"]: r["verdict"] for r in report["results"]} == {
        "a": "",
        "b": "no difference shown",
        "c": "better",
    }
    assert "n=6 of 7 seeds; no number from 1 run of b" in shown
    assert "| b-s3 | finished | val/loss is not a finite number" in shown


def test_from_copied_folders_alone(stand_in: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    asked = write_question(
        stand_in, "'b': Variant(['optim.lr=0.2'])", "seeds=3, metrics=['val/loss', Metric('val/by/x/n', False)]"
    )
    assert ablate.main([str(asked)]) == 0
    first = capsys.readouterr().out.rpartition("\n\n")[0]
    copies = tmp_path / "elsewhere"
    for run in (stand_in / "runs" / "asked").glob("*-s?"):
        shutil.copytree(run, copies / run.name)
    shutil.rmtree(stand_in / "runs")
    assert ablate.main([str(asked), "--report", "--out", str(copies)]) == 0
    assert capsys.readouterr().out.rpartition("\n\n")[0] == first
    shutil.rmtree(copies / "b-s1")
    (copies / "a-s2" / "environment.json").unlink()
    assert ablate.main([str(asked), "--report", "--out", str(copies)]) == 0
    text = capsys.readouterr().out
    assert "| b-s1 | missing    | no run folder" in text
    assert "| a-s2 | unfinished | step 12 of 12" in text
    assert "n=1 of 3 seeds" in text
    assert "4 of 6 runs finished" in text
    path = copies / "b-s2" / "config.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "optim": {"lr": 0.9}}))
    assert ablate.main([str(asked), "--report", "--out", str(copies)]) == 2
    assert "b-s2 and b-s0 are not runs of one variant: 'optim.lr' is 0.2 there, 0.9 here" in capsys.readouterr().err


def test_curves(stand_in: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Means at each setting as a table, a picture and plain numbers; what is missing is said and leaves a gap."""
    monkeypatch.setattr(ablation_report, "plot_curves", PLOTS["plot_curves"])
    curve = "curves=[Curve('val/by/pairs/{}/accuracy', n, 'pairs') for n in ((4, 8, 16), ('4', '8'))]"
    asked = write_question(stand_in, "'b': Variant(['optim.lr=0.02'])", f"seeds=2, {curve}", optim={"lr": 0.01})
    assert ablate.main([str(asked)]) == 0
    text = capsys.readouterr().out
    assert "## val/by/pairs/{}/accuracy, more is better" in text
    rows = [
        [c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith(("| a ", "| b "))
    ]
    assert ["a", "0.0400", "0.0800", "-"] in rows
    assert ["b", "0.0800", "0.1600", "-"] in rows
    assert "no val/by/pairs/16/accuracy" in text
    assert "compared by val/by" not in text
    report = stand_in / "runs" / "asked" / "report"
    text = (report / "report.md").read_text()
    assert text.index("bars and bands from the lowest to the highest") < text.index("![curve](curve.png)")
    assert (report / "curve.png").stat().st_size > 1000
    found, words = json.loads((report / "report.json").read_text())["curves"]
    assert words["over"] == ["4", "8"]
    assert words["means"]["b"] == found["means"]["b"][:2]
    assert found["over"] == [4, 8, 16]
    assert found["means"] == {"a": [pytest.approx(0.04), pytest.approx(0.08), None], "b": [0.08, 0.16, None]}
    with pytest.raises(UserError, match="expected a path with"):
        Curve("val/by/pairs/accuracy", (4,), "pairs")


def test_divergence_is_not_hidden(stand_in: Path, capsys: pytest.CaptureFixture[str]):
    asked = write_question(
        stand_in, "'b': Variant(['train.sample_prompt=diverge'])", "seeds=2, metrics=['val/loss', 'val/bpb']"
    )
    assert ablate.main([str(asked)]) == 0
    text = capsys.readouterr().out
    assert "| b-s0 | finished | val/loss is not a finite number; no val/bpb" in text
    assert "b and a cannot be compared by val/loss (n=0 of 2 seeds: two pairs are the least)" in text


def test_metrics_of_the_eval_folder(tmp_path: Path):
    run = tmp_path / "run"
    (run / "eval").mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 8, "val": {"loss": 1.5}}\n')
    write_config(tmp_path, name="config", train={"steps": 8}).rename(run / "config.yaml")
    (run / "environment.json").write_text('{"finished": true}')
    for step, accuracy in ((4, 0.1), (8, 0.6)):
        results = {"results": {"task": {"acc,none": accuracy, "acc_stderr,none": 0.1}}, "config": {"step": step}}
        (run / "eval" / f"task_{step}.json").write_text(json.dumps(results))
    (run / "eval" / "baselines.json").write_text('{"xz": 1}')
    run.rename(tmp_path / "v-s0")
    metrics = [Metric("eval/task/acc"), Metric("val/loss"), Metric("eval/tusk/acc")]
    found = read_run(tmp_path, "v", 0, metrics)
    assert found.values == {"eval/task/acc": 0.6, "val/loss": 1.5}
    assert found.why == "no eval/tusk/acc at step 8; did you mean 'task/acc'?"


def test_an_empty_folder_is_reported(tmp_path: Path):
    question = load_question(write_question(tmp_path, "'b': Variant(['optim.lr=0.2'])"))
    text = render(answer(question, tmp_path, (0, 1)))
    assert "0 of 4 runs finished" in text
    assert text.count("| missing | no run folder |") == 4


# -- questions


def test_shipped_questions():
    files = sorted((ROOT / "configs" / "ablations").glob("*.py"))
    assert "mixers_mqar.py" in {p.name for p in files}
    for path in files:
        question = load_question(path)
        assert question.text
        configs = resolve(question)
        for name, variant in question.variants.items():
            if variant.to and variant.on == "params":
                own, other = (meta_model_of(configs[n]).cost(64).params for n in (name, variant.to))
                assert own == pytest.approx(other, rel=0.01), name


def meta_model_of(cfg):
    from configs.question import with_vocabulary

    return meta_model(with_vocabulary(cfg))


def test_precedence_and_functions(tmp_path: Path):
    """Base, command line, variant; a function of the base may use what else is in its file; a chain of equal budgets."""
    path = tmp_path / "asked.py"
    base = write_config(tmp_path)
    path.write_text(
        "from dataclasses import replace\n"
        "from configs.question import Question, Variant\n"
        "RATE = 0.25\n"
        "def faster(cfg):\n"
        "    return replace(cfg, optim=replace(cfg.optim, lr=RATE))\n"
        f"question = Question(base={str(base)!r}, baseline='a', variants=dict(a=Variant(), b=Variant(faster),\n"
        "  c=Variant(['model.n_layers=4', 'train.steps=5'], to='a'), d=Variant(['model.d_model=12'], to='c', on='flops')))\n"
    )
    question = load_question(path)
    assert (question.name, question.text, question.all_seeds()) == ("asked", "", (0, 1, 2, 3, 4))
    configs = resolve(question, ["train.steps=7", "optim.lr=0.125"])
    assert list(configs) == list("abcd")
    assert [c.train.steps for c in configs.values()] == [7, 7, 5, 7]
    assert [c.optim.lr for c in configs.values()] == [0.125, 0.25, 0.125, 0.125]
    assert not any(c.model.vocab_size for c in configs.values())
    costs = {n: meta_model_of(c).cost(32) for n, c in configs.items()}
    assert costs["c"].params == pytest.approx(costs["a"].params, rel=0.02)
    assert costs["d"].flops_per_token == pytest.approx(costs["c"].flops_per_token, rel=0.02)
    assert configs["c"].model.blocks["only"].channel.hidden < 24
    tiny = resolve(question, tiny=True)
    assert [c.train.steps for c in tiny.values()] == [2, 2, 2, 2]


ERRORS = {
    "import os\n\nquestion = Question(\n": "line 3: SyntaxError",
    "import nothing_of_this_name": "line 1: ModuleNotFoundError: No module named 'nothing_of_this_name'",
    "def f():\n    return 1 / 0\nf()": "line 2: ZeroDivisionError",
    "answer = 42": "no 'question = Question(...)' in it",
    "QUESTION(baseline='c')": "line 1: no variant 'c' to be the baseline; valid: a, b",
    "QUESTION(variants={'a': Variant()})": "at least two variants",
    "QUESTION(variants={'a': Variant(), 'b/c': Variant()})": "variant 'b/c': a name is made of",
    "QUESTION(variants={'a': Variant(), 'b': ['x=1']})": "variant 'b': expected Variant(...)",
    "QUESTION(variants={'a': Variant(), 'b': Variant('x=1')})": "variant 'b': expected a list of overrides",
    "QUESTION(variants={'aaa': Variant(), 'b': Variant(to='aab')}, baseline='b')": "no variant 'aab' to match; did you mean 'aaa'?",
    "QUESTION(variants={'a': Variant(to='b'), 'b': Variant(to='a')})": "matched in a circle: a -> b -> a",
    "QUESTION(variants={'a': Variant(), 'b': Variant(['optim.lrr=1'])})": "variant 'b': unknown key 'optim.lrr'; did you mean 'lr'?",
    "QUESTION(variants={'a': Variant(), 'b': Variant(['model.blocks.only.mixer.heads=5'])})": "variant 'b': ",
    "QUESTION(variants={'a': Variant(), 'b': Variant(to='a', on='parms')})": "variant 'b': unknown budget 'parms'; did you mean",
    "QUESTION(variants={'a': Variant(), 'b': Variant(lambda cfg: None)})": "its function must return a RunConfig, got None",
    "QUESTION(variants={'a': Variant(), 'b': Variant(lambda cfg: cfg.nothing)})": "variant 'b': AttributeError",
    "QUESTION(metrics='val/loss')": "metrics: expected a list",
    "QUESTION(metrics=['loss'])": "metric 'loss': expected val/KEY or eval/TASK/METRIC",
    "QUESTION(metrics=['val/strangeness'])": "metric 'val/strangeness': is more of it better?",
    "QUESTION(seeds=0)": "seeds: expected",
    "QUESTION(seeds=[1, 1])": "seeds: expected",
    "QUESTION(sweep=Sweep('optim.lr', [0.1, 0.1]))": "sweep of optim.lr: expected at least two different numbers",
    "QUESTION(sweep=Sweep('optim.lr', [0.1, 0.2], []))": "sweep of optim.lr: expected different seeds from 0, got []",
    "QUESTION(sweep=Sweep('model.d_model', [8, 16]))": "sweep: 'model.d_model' cannot be chosen by it",
    "QUESTION(sweep=Sweep('optim.lr', [0.1, 0.2], [7, 4]))": "sweep: seed 4 chooses optim.lr and is compared too",
    "QUESTION(sweep=Sweep('optim.lrr', [0.1, 0.2]))": "unknown key 'optim.lrr'; did you mean 'lr'?",
    "QUESTION(variants={'a': Variant(), 'b': Variant(tuned_as='a')})": "variant 'b': 'a' is not tried by a sweep",
    "QUESTION(alpha=5)": "alpha must be between 0 and 1",
    "QUESTION(base='no-such.yaml')": "no file 'no-such.yaml'",
}


@pytest.mark.parametrize("text", ERRORS, ids=range(len(ERRORS)))
def test_errors_of_a_question(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str):
    base, path = write_config(tmp_path), tmp_path / "asked.py"
    given = f"{{'base': {str(base)!r}, 'baseline': 'a', 'variants': {{'a': Variant(), 'b': Variant()}}, **more}}"
    head = f"from configs.question import Question, Sweep, Variant; QUESTION = lambda **more: Question(**{given}); question = "
    path.write_text(head + text if text.startswith("QUESTION(") else text)
    assert ablate.main([str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert ERRORS[text] in line
    assert not (tmp_path / "runs").exists()


def test_errors_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    asked = write_question(tmp_path, "'b': Variant()")
    for words, message in (
        ([tmp_path / "askd.py"], "did you mean 'asked.py'?"),
        ([asked, "--seeds", "0"], "--seeds must be at least 1, got 0"),
        ([asked, "--minutes", "-1"], "--minutes must be at least 0"),
        ([asked, "--jobs", "0"], "--jobs must be at least 1"),
        ([asked, "--report"], "no folder"),
        ([asked, "--out", asked / "under"], "cannot make the folder"),
        ([asked, "train.stps=3"], "did you mean 'steps'?"),
    ):
        assert ablate.main(list(map(str, words))) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert message in line
    assert not (tmp_path / "runs").exists()
    theirs = tmp_path / "runs" / "asked" / "b-s2"
    theirs.mkdir(parents=True)
    (theirs / "thesis.txt").write_text("years of work")
    assert ablate.main([str(asked)]) == 2
    assert "b-s2 is in the way: no checkpoint in it" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "runs").rglob("*")] == ["asked", "b-s2", "thesis.txt"]
    with pytest.raises(UserError, match="expected Variant"):
        Question("x.yaml", {"a": "b"}, "a")  # pyright: ignore[reportArgumentType]


def test_help():
    done = subprocess.run(
        [sys.executable, "ablate.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "example: python ablate.py configs/ablations/mixers_mqar.py" in done.stdout


# -- with the real train.py


@pytest.mark.parametrize("data", ["text", "task"])
def test_a_seed_is_one_data_order(tmp_path: Path, data: str):
    """The batches that train.py draws depend on the seed and the data's settings, on nothing of the model or the optimizer."""
    task = {
        "synthetic": {"kind": "mqar", "vocab_size": 32, "pairs": 4},
        "sources": [],
        "val_fraction": DataConfig.val_fraction,
    }
    section = {"data": task} if data == "task" else {}
    changes = [
        "model.n_layers=4",
        "model.dropout=0.1",
        "model.blocks.only.mixer={kind: gated_delta, heads: 2}",
        "optim.muon=true",
    ]
    question = Question(str(write_config(tmp_path, **section)), {"a": Variant(), "b": Variant(changes)}, "a")
    configs = resolve(question)

    def batches(variant: str, seed: int) -> list[torch.Tensor]:
        (run,) = ablation_queue.plan({variant: configs[variant]}, [seed], tmp_path)
        with world("cpu") as w:
            source = train.open_data(run.config, w, None)
            cfg = train.complete(run.config, source)
            torch.manual_seed(len(variant))
            train.build(cfg.model, cfg.seed, w.device)
            loader = train.open_loader(source, cfg, 4, w)
            found = [loader.next()["tokens"] for _ in range(6)]
            loader.close()
        return found

    for seed in (0, 3):
        assert all(torch.equal(x, y) for x, y in zip(batches("a", seed), batches("b", seed), strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(batches("a", 0), batches("a", 3), strict=True))


# Kills its parent and itself after a step: lines "RUN CALL" of a file say where, each once.
MORTAL = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import train
from training.optim import Optimizer

plan, inner, calls = Path({plan!r}), Optimizer.step, 0

def step(self):
    global calls
    inner(self)
    calls += 1
    due = plan.read_text().split()
    if due and Path(sys.argv[-1]).stem == due[0] and calls == int(due[1]):
        plan.write_text(" ".join(due[2:]))
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

Optimizer.step = step
sys.exit(train.main())
"""
QUALITY = (
    "metric",
    "variant",
    "n",
    "mean",
    "sd",
    "mean_difference",
    "sd_of_differences",
    "p_holm",
    "low",
    "high",
    "verdict",
)


@pytest.mark.slow
def test_a_whole_ablation_killed_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Once in the middle of a run, once before a run's first checkpoint: every number is that of an ablation left in peace."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    asked = write_question(tmp_path, "'b': Variant(['model.dropout=0.1'])", "seeds=2", model=PLAIN)
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    assert ablate.main([str(asked), "--out", str(whole)]) == 0
    mortal, plan = tmp_path / "mortal.py", tmp_path / "plan"
    mortal.write_text(MORTAL.format(root=str(ROOT), plan=str(plan)))
    plan.write_text("b-s0 7 a-s1 2")
    for name in ("b-s0", "a-s1"):
        assert start_queue(mortal, asked, "--out", torn).wait(300) == -signal.SIGKILL
        assert (
            not (torn / name / "environment.json").is_file()
            or "finished" not in (torn / name / "environment.json").read_text()
        )
    assert plan.read_text() == ""
    assert not list((torn / "a-s1").glob("checkpoints/*"))
    assert ablate.main([str(asked), "--out", str(torn)]) == 0
    assert "4 of 4 runs finished" in capsys.readouterr().out
    assert "after step 6 of 12" in (torn / "queue" / "b-s0.log").read_text()
    for run in ("a-s0", "b-s0", "a-s1", "b-s1"):
        assert_same_run(torn / run, whole / run, 12)
    for variant in "ab":
        assert [value(torn, "val/loss", variant, c) for c in QUALITY] == [
            value(whole, "val/loss", variant, c) for c in QUALITY
        ]
    assert float(value(torn, "val/loss", "a", "peak_memory_bytes")) > 50e6

    broken = write_question(
        tmp_path, "'b': Variant(['model.dropout=0.1']), 'c': Variant(['model.vocab_size=10'])", "seeds=2"
    )
    assert ablate.main([str(broken), "--out", str(whole), "--seeds", "1"]) == 1
    shown = capsys.readouterr()
    assert shown.err.count("finished at") == 0  # the others are there
    assert "| c-s0 | failed | error: model.vocab_size=10 is smaller than the tokenizer's 257 ids" in shown.out
