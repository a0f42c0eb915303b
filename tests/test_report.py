"""Reports from run folders, and the count models that every run is compared with."""

import csv
import json
import lzma
import math
from collections import Counter

import numpy as np
import pytest

from eval import baselines as counting
from eval import report as reporting
from eval.history import read_metrics, smooth
from eval.tables import markdown
from models import UserError
from tests.test_eval_runs import LEARNED, add_corpus, tiny_model, write_run

STEPS = range(10, 401, 10)


def metrics(scale: float) -> list[dict]:
    train = [
        {
            "step": s,
            "tokens": 100 * s,
            "loss": scale * 5 / s**0.25,
            "lr": 1e-3,
            "tokens_per_s": 1000 + s,
            "time": s / 10,
        }
        for s in STEPS
    ]
    val = [
        {"step": s, "val": {"loss": scale * 5.5 / s**0.25, "ppl": 9.0, "bpb": scale * 1.5, "tokens": 9, "bytes": 8}}
        for s in STEPS[4::5]
    ]
    return train + val


@pytest.fixture
def runs(tmp_path):
    pytest.importorskip("matplotlib")
    first = write_run(tmp_path / "a" / "one", tiny_model(), metrics(1.0))
    second = write_run(tmp_path / "b" / "one", tiny_model(LEARNED), metrics(0.9))
    (first / "eval").mkdir()
    results = {"results": {"task": {"alias": "task", "acc,none": 0.25, "acc_stderr,none": 0.1}}, "config": {"step": 3}}
    (first / "eval" / "old.json").write_text(json.dumps(results))
    results["results"]["task"]["acc,none"], results["config"]["step"] = 0.5, 400
    (first / "eval" / "a_new.json").write_text(json.dumps(results))
    (first / "eval" / "baselines.json").write_text("{}")
    return [first, second]


def test_numbers_come_from_the_run_folders(runs, tmp_path):
    text = reporting.report(runs, tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [r["run"] for r in rows] == ["a/one", "b/one"]
    one = rows[0]
    assert one["params"] == sum(p.numel() for p in tiny_model().parameters())
    assert (one["step"], one["tokens"]) == (400, 40000)
    assert one["train loss"] == pytest.approx(5 / 400**0.25)
    assert one["val loss"] == pytest.approx(5.5 / 400**0.25)
    assert one["val bpb"] == 1.5
    assert one["tokens/s"] == 1205
    assert one["eval"] == {"task/acc": 0.5}
    assert rows[1]["eval"] == {}
    sheet = list(csv.DictReader((tmp_path / "out" / "report.csv").open()))
    assert float(sheet[1]["val bpb"]) == pytest.approx(1.35)
    assert sheet[1]["task/acc"] == ""
    assert text in (tmp_path / "out" / "report.md").read_text()
    assert "| a/one | " in text


def test_the_picture_shows_both_curves(runs, tmp_path):
    from matplotlib.image import imread

    reporting.report(runs, tmp_path / "out")
    picture = imread(tmp_path / "out" / "loss.png")[..., :3]
    assert picture.shape[0] >= 600
    for color in ((0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)):
        close = np.abs(picture - np.array(color) / 255).max(axis=-1) < 0.02
        assert close.sum() > 300


def test_logged_again_after_a_resume_counts_once(tmp_path):
    path = write_run(tmp_path / "run", tiny_model(), [{"step": 1, "loss": 9.0}, {"step": 2, "loss": 8.0}])
    with (path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 2, "loss": 7.0}\n{"step": 3, "loss": 6.0}\n{"step": 4, "lo')
    assert [(m["step"], m["loss"]) for m in read_metrics(path)] == [(1, 9.0), (2, 7.0), (3, 6.0)]


def test_smoothing_is_a_centered_mean():
    values = np.array([1.0, 2.0, 6.0, 3.0])
    assert smooth(values, 1).tolist() == values.tolist()
    assert smooth(values, 3).tolist() == [1.5, 3.0, 11 / 3, 4.5]


def test_a_run_without_metrics_is_one_line(tmp_path, capsys):
    path = write_run(tmp_path / "run", tiny_model())
    (path / "metrics.jsonl").unlink()
    assert reporting.main([str(path), "--out", str(tmp_path / "out")]) == 2
    assert "no metrics.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tables_are_aligned_markdown():
    lines = markdown(("name", "n"), [("a|b", 12345), ("c", None)]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2] == "| a\\|b | 12,345 |"
    assert lines[1].endswith(":|")


# -- baselines


def brute_force(train: list[bytes], val: list[bytes], order: int, alpha: float) -> float:
    """The definition with dictionaries: total bits of the validation documents."""
    pairs, contexts = Counter(), Counter()

    def walk(doc):
        signs = [256] * order + list(doc) + [256]
        for i in range(order, len(signs)):
            yield tuple(signs[i - order : i]), signs[i]

    for doc in train:
        for context, sign in walk(doc):
            pairs[context, sign] += 1
            contexts[context] += 1
    return sum(-math.log2((pairs[c, s] + alpha) / (contexts[c] + alpha * 257)) for doc in val for c, s in walk(doc))


@pytest.mark.parametrize("order", [0, 1, 2, 3, 5])
def test_count_models_equal_their_definition(order):
    generator = np.random.default_rng(0)
    docs = [bytes(generator.choice([97, 98, 99, 255], size=n).tolist()) for n in (0, 1, 2, 50, 300, 7)]
    train, val = docs[:4], docs[4:]
    model = counting.CountModel(train, order)
    found = model.bits(counting.codes(val, order), (1.0, 0.01))
    assert found == pytest.approx([brute_force(train, val, order, a) for a in (1.0, 0.01)], rel=1e-12)


def test_smoothing_is_chosen_on_held_out_training_text(monkeypatch):
    generator = np.random.default_rng(1)
    docs = [bytes(generator.integers(97, 101, size=200).tolist()) for _ in range(40)]
    train, val = docs[:30], docs[30:]
    found = counting.baselines(train, val, xz=False)
    held = round(counting.HELD_OUT * len(train))
    for order in (0, 1, 2, 3):
        tried = {a: brute_force(train[:-held], train[-held:], order, a) for a in counting.ALPHAS}
        alpha = min(counting.ALPHAS, key=lambda a: tried[a])
        one = found["orders"][str(order)]
        assert one["alpha"] == alpha
        assert one["bpb"] == pytest.approx(brute_force(train, val, order, alpha) / 2000, rel=1e-12)


def test_xz_alone_and_behind_the_training_text(monkeypatch):
    train, val = [b"abcdefgh" * 50, bytes(range(256)) * 4], [bytes(range(256)) * 4]
    monkeypatch.setattr(counting, "XZ_BYTES", 1300)
    found = counting.xz_bpb(train, val)

    def size(raw):
        return len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME))

    before = b"".join(train)[-1300:]
    assert found["xz"] == pytest.approx(8 * size(val[0]) / 1024)
    assert found["xz_after_train"] == pytest.approx(8 * (size(before + val[0]) - size(before)) / 1024)
    assert found["xz_after_train"] < found["xz"]


def test_baselines_of_a_run_beside_its_own_number(tmp_path, capsys):
    path = write_run(tmp_path / "run", tiny_model(), metrics(1.0))
    add_corpus(path, tmp_path / "corpus")
    assert counting.main([str(path)]) == 0
    shown = capsys.readouterr().out
    stored = json.loads((path / "eval" / "baselines.json").read_text())
    assert stored["ours"] == {"step": 400, "bpb": 1.5, "bytes": 8}
    for name in ("unigram", "order-2", "order-3", "xz", "ours"):
        assert f"| {name} " in shown
    assert f"{stored['orders']['3']['bpb']:.4f}" in shown


def test_no_text_is_refused():
    with pytest.raises(UserError, match="not empty"):
        counting.baselines([b"a"], [b""])
