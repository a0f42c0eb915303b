"""Synthetic tasks: rows by construction, splits that cannot meet, the loader's contract, and whole runs on a task."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from configs import schema
from configs.question import Metric
from data import DataConfig, DataError, Synthetic
from data.synthetic import TASKS, task_class
from data.synthetic.dice import Dice, hashed
from data.synthetic.mqar import MQAR
from data.synthetic.task import SPLITS, Rows, Task
from eval import recall
from eval.__main__ import main as eval_main
from eval.ablation_runs import read_metric
from eval.generate import main as generate_main
from models.parsing import to_dict
from tests.runs import PLAIN, Fault, losses, metrics, one_error, tensors, train, write_config

SEQ_LEN = 64
VARIANTS = {
    "plain": MQAR(),
    "uniform": MQAR(power=1.0, vocab_size=40, pairs=12),
    "filled": MQAR(filler="random", vocab_size=40, pairs=12),
    "mixed": MQAR(filler="random", pairs=(2, 5, 9), lead=(0, 3, 17)),
    "full": MQAR(vocab_size=34, pairs=16),  # every key there is, and not a place to spare
}


@pytest.fixture(params=VARIANTS)
def task(request: pytest.FixtureRequest) -> MQAR:
    return VARIANTS[request.param]


def rows(task: Task, n: int = 200, seed: int = 0, split: str = "train", first: int = 0) -> Rows:
    return task.rows(np.arange(first, first + n), SEQ_LEN, seed, split)


def same(a: Rows, b: Rows, which: slice = slice(None)) -> None:
    for old, new in zip((*a[:3], a.meaning, *a.slices.values()), (*b[:3], b.meaning, *b.slices.values()), strict=True):
        assert np.array_equal(old, new[which])


# -- rows


def test_a_dictionary_knows_every_answer(task: MQAR):
    """From the tokens alone; and with the answers shuffled it does not."""
    for split in SPLITS:
        found = rows(task, split=split)
        answers = task.solve(found.tokens)[found.loss_mask]
        right = found.targets[found.loss_mask]
        assert np.array_equal(answers, right)
        assert (np.random.default_rng(0).permutation(right) == answers).mean() < 0.2


def test_the_oracle_looks_only_back(task: MQAR):
    found = rows(task, 20)
    for cut in (7, 30, 51):
        assert np.array_equal(task.solve(found.tokens[:, :cut]), task.solve(found.tokens)[:, :cut])


def test_rows_are_what_they_say(task: MQAR):
    """Every key once as a pair and once as a question, values distinct, filler free of them."""
    found = rows(task)
    several = {"pairs": task.pairs, "lead": task.lead}
    several = {k: v if isinstance(v, tuple) else (v,) for k, v in several.items()}
    seen = set()
    for tokens, targets, mask, pairs, distance, meaning in zip(
        found.tokens, found.targets, found.loss_mask, found.slices["pairs"], found.slices["distance"], found.meaning
    ):
        asked = np.flatnonzero(mask)
        count, labels = len(asked), task.slices(SEQ_LEN)
        keys, values = tokens[asked], targets[asked]
        assert len(set(keys)) == len(set(values)) == count
        assert ((keys > 0) & (keys <= task.keys)).all()
        assert ((task.vocab_size // 2 <= values) & (values < task.vocab_size)).all()
        first = np.array([np.flatnonzero(tokens == key)[0] for key in keys])
        assert [int((tokens == key).sum()) for key in keys] == [2] * count
        assert np.array_equal(tokens[first + 1], values)
        lead = first.min()
        assert sorted(first) == list(range(lead, lead + 2 * count, 2))
        assert ((asked - lead) % 2 == 0).all()
        assert asked.min() >= lead + 2 * count
        assert set(pairs[asked]) == {several["pairs"].index(count)}
        for at, where, index in zip(first, asked, distance[asked], strict=True):
            low, high = map(int, labels["distance"][index].split("-"))
            assert low <= where - at <= high
        noise = meaning == 0
        if task.filler == "constant":
            assert (tokens == meaning).all()
        else:
            assert (tokens > 0).all()
            assert not set(tokens[noise]) & set(keys)
        assert not targets[~mask].any()
        seen.add((count, int(lead)))
    assert {n for n, _ in seen} == set(several["pairs"])
    assert {n for _, n in seen} == set(several["lead"])


def test_a_row_is_a_function_of_its_number(task: MQAR):
    whole = rows(task, 300)
    same(rows(task, 90, first=70), whole, slice(70, 160))
    picked = np.array([250, 3, 299, 3])
    same(task.rows(picked, SEQ_LEN, 0, "train"), whole, picked)  # pyright: ignore[reportArgumentType]
    for other in (rows(task, 300, seed=1), rows(task, 300, split="val")):
        assert (other.tokens != whole.tokens).any(axis=1).mean() > 0.95


def test_more_rows_than_are_drawn_at_once():
    task = MQAR(pairs=(2, 3))
    whole = rows(task, 5000)
    same(rows(task, 30, first=4090), whole, slice(4090, 4120))


GOLDEN = [
    [0, 7, 8, 2, 13, 5, 10, 5, 0, 7, 0, 2, 0, 0],
    [0, 7, 11, 1, 15, 5, 9, 7, 0, 5, 0, 1, 0, 0],
    [0, 5, 12, 7, 10, 2, 9, 7, 0, 2, 0, 5, 0, 0],
]
GOLDEN_FILLED = [
    [11, 7, 8, 2, 13, 5, 10, 5, 1, 7, 3, 2, 13, 3],
    [13, 7, 11, 1, 15, 5, 9, 7, 13, 5, 3, 1, 4, 3],
    [1, 5, 12, 7, 10, 2, 9, 7, 6, 2, 12, 5, 8, 12],
]
GOLDEN_ANSWERS = [[10, 8, 13], [11, 9, 15], [10, 9, 12]]


@pytest.mark.parametrize(("filler", "tokens"), [("constant", GOLDEN), ("random", GOLDEN_FILLED)])
def test_golden_rows(filler: str, tokens: list[list[int]]):
    """Fixed for ever by the seed: a run of today can be repeated tomorrow."""
    task = MQAR(vocab_size=16, pairs=(2, 3), filler=filler, lead=(0, 1))
    found = task.rows(np.arange(1000, 1003), 14, 7, "val")
    assert found.tokens.tolist() == tokens
    assert [t[m].tolist() for t, m in zip(found.targets, found.loss_mask)] == GOLDEN_ANSWERS


def test_splits_cannot_meet():
    """A task so small that every possible row is drawn: no row of one split is one of the other, whatever the seeds."""
    task = MQAR(vocab_size=6, pairs=2)
    drawn = {
        split: {r.tobytes() for seed in range(3) for r in task.rows(np.arange(3000), 8, seed, split).meaning}
        for split in SPLITS
    }
    assert not drawn["train"] & drawn["val"]
    # 2 keys in 2 orders, 2 of 3 values in order, 2 slots in 2 orders
    assert len(drawn["train"] | drawn["val"]) == 2 * 6 * 2
    filled = MQAR(vocab_size=6, pairs=2, filler="random")
    for split in SPLITS:  # noise does not take a row to the other side
        assert {r.tobytes() for r in filled.rows(np.arange(3000), 8, 5, split).meaning} <= drawn[split]


def test_a_task_with_one_row_has_no_splits():
    class Always(Task):
        def draw(self, dice: Dice, seq_len: int) -> Rows:
            row = np.ones((len(dice.words(1)), seq_len), dtype=np.int64)
            return Rows(row, row, row > 0, {}, row)

    task = Always(kind="always")
    side = int(hashed(np.ones((1, 5), dtype=np.int64))[0] & np.uint64(1))
    assert len(task.rows(np.arange(4), 5, 0, SPLITS[side]).tokens) == 4
    with pytest.raises(DataError, match="always has too few different rows"):
        task.rows(np.arange(4), 5, 0, SPLITS[1 - side])


def test_distributions():
    """Keys, values, slots and order are drawn as they should be (4000 rows; bounds of about five standard errors)."""
    uniform, power = (MQAR(vocab_size=34, pairs=4, power=p) for p in (1.0, 0.01))
    drawn = {"uniform": rows(uniform, 4000), "power": rows(power, 4000)}
    for found in drawn.values():
        counts = np.bincount(found.tokens[:, :8:2].ravel(), minlength=17)[1:17] / 4000
        assert np.abs(counts - 4 / 16).max() < 0.035
        counts = np.bincount(found.tokens[:, 1:8:2].ravel(), minlength=34)[17:] / 4000
        assert np.abs(counts - 4 / 17).max() < 0.035
        order = np.stack([np.flatnonzero(m) for m in found.loss_mask])
        asked = np.take_along_axis(found.tokens, order, axis=1)
        which = (asked[:, :, None] == found.tokens[:, None, :8:2]).argmax(axis=2)
        for place in range(4):
            assert np.abs(np.bincount(which[:, place], minlength=4) / 4000 - 0.25).max() < 0.035
    slots = {name: found.loss_mask[:, 8::2].mean(axis=0) for name, found in drawn.items()}
    assert np.abs(slots["uniform"] - 4 / 28).max() < 0.03
    weights = np.arange(1, 29) ** -0.99
    first = 1 - (1 - weights[0] / weights.sum())  # the chance of the first slot in the first of four draws
    assert slots["power"][0] > 2 * first
    assert (np.diff(slots["power"][:6]) < 0).all()


def test_draws_are_independent():
    """Of neighbouring rows, of neighbouring columns, and of keys that differ in one bit."""
    words = Dice(np.arange(4000), 3, 1).uniform(8)
    assert abs(words.mean() - 0.5) < 0.01
    pairs = [(words[1:], words[:-1]), (words[:, 1:], words[:, :-1]), (words, Dice(np.arange(4000), 3, 0).uniform(8))]
    for a, b in pairs:
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.03
    both = Dice(np.arange(4000), 3, 1)
    assert np.array_equal(np.concatenate([both.uniform(3), both.uniform(5)], axis=1), words)


def test_weighted_draws():
    """The first of a draw without replacement falls as the weights; zeros come last."""
    weights = np.array([[1.0, 0.0, 3.0, 4.0]])
    drawn = Dice(np.arange(8000), 1).weighted(weights, 4)
    assert (drawn[:, 3] == 1).all()
    assert np.abs(np.bincount(drawn[:, 0], minlength=4) / 8000 - weights[0] / 8).max() < 0.03
    second = drawn[drawn[:, 0] == 3, 1]
    assert abs((second == 2).mean() - 3 / 4) < 0.04


def test_seconds_for_many_rows():
    """100,000 rows of 128 places take seconds; a tenth of them is drawn here."""
    start = time.process_time()
    MQAR(pairs=16).rows(np.arange(10_000), 128, 0, "train")
    assert time.process_time() - start < 2


# -- settings


@pytest.mark.parametrize("kind", TASKS)
def test_every_task_keeps_the_promises(kind: str):
    """Of the base class: defaults, tiny, slices, oracle, round trip through plain data."""
    task = task_class(kind)().tiny()
    task.check(64)
    found = task.rows(np.arange(50), 64, 0, "val")
    assert task.kind == kind
    assert found.tokens.shape == found.targets.shape == found.loss_mask.shape == (50, 64)
    assert found.loss_mask.any(axis=1).all()
    assert 0 <= found.tokens.min() <= max(found.tokens.max(), found.targets.max()) < task.vocab_size
    assert np.array_equal(task.solve(found.tokens)[found.loss_mask], found.targets[found.loss_mask])
    assert found.slices.keys() == task.slices(64).keys()
    for name, labels in task.slices(64).items():
        index = found.slices[name][found.loss_mask]
        assert 0 <= index.min() <= index.max() < len(labels)
    assert 0 < task.guess(64) <= 1
    cfg = DataConfig(synthetic=task, seq_len=64)
    assert schema.from_dict(DataConfig, json.loads(json.dumps(to_dict(cfg)))) == cfg


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.synthetic.kind=mquar", "unknown task 'mquar'; did you mean 'mqar'"),
        ("data.synthetic.kind=[1]", "unknown task [1]; there is: "),
        ("data.synthetic={vocab_size: 64}", "data.synthetic: missing 'kind'"),
        ("data.synthetic=7", "data.synthetic is not a task: 7"),
        ("data.synthetic.pars=3", "unknown key 'data.synthetic.pars'; did you mean 'pairs'"),
        ("data.synthetic.pairs=many", "data.synthetic.pairs: expected int, got 'many'"),
        ("data.synthetic.pairs=0", "data.synthetic.pairs must be an integer of at least 1, got 0"),
        ("data.synthetic.pairs=[2, 0]", "data.synthetic.pairs must be an integer of at least 1, got 0"),
        ("data.synthetic.pairs=[]", "data.synthetic.pairs is an empty list"),
        ("data.synthetic.pairs=17", "17 pairs need as many keys, vocab_size 34 has 16; give at least 36"),
        ("data.synthetic.lead=-1", "data.synthetic.lead must be an integer of at least 0"),
        ("data.synthetic.filler=rnadom", "unknown value 'rnadom'; did you mean 'random'"),
        ("data.synthetic.power=0", "data.synthetic.power must be a positive number"),
        ("data.seq_len=31", "data.seq_len=31 is too short for 8 pairs after 0 places of lead; they need 32"),
        ("data.synthetic.lead=40", "they need 72"),
        ("data.sources=[{path: x}]", "data.sources and data.synthetic exclude each other"),
        ("data.tokenizer.kind=bpe", "data.tokenizer is not read with data.synthetic"),
        ("data.packing=stream", "data.packing is not read with data.synthetic"),
        ("data.val_fraction=0.5", "data.val_fraction is not read with data.synthetic"),
        ("eval.tasks=[corpus]", "eval.tasks judges text"),
        ("eval.baselines=true", "eval.baselines judges text"),
        ("eval.frequency=2", "eval.frequency judges text"),
        ("eval.length=[64]", "eval.length judges text"),
        ("train.val_tokens=0", "the rows of data.synthetic have no end"),
    ],
)
def test_refused(tmp_path: Path, change: str, message: str):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        schema.load(config(tmp_path), [change])
    assert getattr(caught.value, "one_line", False)
    assert "\n" not in str(caught.value)


# -- the loader's contract


def data(**changes) -> Synthetic:
    return Synthetic(DataConfig(synthetic=MQAR(**changes), seq_len=SEQ_LEN))


def test_batches_are_the_rows():
    loader, task = data().train(3, seed=5), MQAR()
    for step in range(4):
        batch, expected = loader.next(), rows(task, 3, seed=5, first=3 * step)
        assert torch.equal(batch["tokens"], torch.from_numpy(expected.tokens))
        assert torch.equal(batch["targets"], torch.from_numpy(expected.targets))
        assert torch.equal(batch["loss_mask"], torch.from_numpy(expected.loss_mask))
        assert torch.equal(batch["positions"], torch.arange(SEQ_LEN).repeat(3, 1))
        assert batch["cu_seqlens"] is batch["valid"] is None
    loader.close()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_state_continues_to_the_bit(prefetch: int):
    one = data().train(4, seed=1, prefetch=prefetch)
    for _ in range(3):
        one.next()
    state = json.loads(json.dumps(one.state_dict()))
    expected = [one.next() for _ in range(3)]
    other = data().train(4, seed=1, prefetch=prefetch)
    other.next()
    other.load_state_dict(state)
    for batch in expected:
        found = other.next()
        assert torch.equal(batch["tokens"], found["tokens"])
        assert torch.equal(batch["targets"], found["targets"])
    for different in (data().train(4, seed=2), data(pairs=7).train(4, seed=1)):
        with pytest.raises(DataError, match="the row order depends on it"):
            different.load_state_dict(state)


def test_ranks_share_what_one_rank_sees():
    whole = data().train(6, seed=3)
    parts = [data().train(2, 3, rank, 3) for rank in range(3)]
    for _ in range(3):
        batch = whole.next()
        assert torch.equal(batch["tokens"], torch.cat([p.next()["tokens"] for p in parts]))
        assert [p.state_dict() for p in parts] == [whole.state_dict()] * 3


def test_validation_is_seen_once_by_any_ranks():
    """10 rows, also in batches and on ranks that do not divide them; the training seed does not touch them."""
    expected = rows(MQAR(), 10, split="val")
    for size, world in ((10, 1), (3, 1), (2, 3), (16, 2)):
        parts = [list(data().once(10, size, rank, world)) for rank in range(world)]
        assert len({len(p) for p in parts}) == 1
        seen = [r for step in zip(*parts) for r in step]
        tokens, mask = (np.concatenate([getattr(r, n) for r in seen]) for n in ("tokens", "loss_mask"))
        assert np.array_equal(tokens[:10], expected.tokens)
        assert mask.sum() == expected.loss_mask.sum() == mask[:10].sum()


# -- runs


def config(folder: Path, name: str = "small", **sections) -> Path:
    path = write_config(folder, PLAIN, name, **sections)
    raw = yaml.safe_load(path.read_text())
    raw["data"] = {"synthetic": {"kind": "mqar", "vocab_size": 34, "pairs": 8}, "seq_len": 32}
    raw["train"]["val_tokens"] = 640
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of 12 steps and what it printed."""
    result = train(config(tmp_path_factory.mktemp("mqar")))
    assert result.code == 0, result.err
    return result.run, result.out


def test_a_run_reports_accuracy(finished: tuple[Path, str]):
    run, out = finished
    cfg = schema.load(run / "config.yaml")
    assert (cfg.model.vocab_size, cfg.data.sources) == (34, ())
    assert json.loads((run / "data.json").read_text())["synthetic"]["pairs"] == 8
    assert not (run / "tokenizer").exists()
    assert not (run / "samples.txt").exists()
    validated = [line["val"] for line in metrics(run) if "val" in line]
    assert len(validated) == 2
    last = validated[-1]
    assert last["answers"] == 8 * 20
    for by in last["by"].values():
        assert sum(one["answers"] for one in by.values()) == 8 * 20
        assert sum(one["answers"] * one["accuracy"] for one in by.values()) / 160 == pytest.approx(last["accuracy"])
    stored = json.loads((run / "eval" / "mqar_12.json").read_text())
    assert stored["results"]["mqar"] == {"alias": "mqar", "acc,none": last["accuracy"], "nll,none": last["loss"]}
    assert stored["by"] == last["by"]
    assert "| by pairs" in out
    assert "| by distance" in out
    assert "guessing one of the right kind: 0.1250" in out


def test_accuracy_by_hand(finished: tuple[Path, str]):
    """The argmax of the logits at every question of the validation rows, with the saved weights."""
    from models import Batch
    from models.folder import load_model

    run, _ = finished
    model, _ = load_model(run)
    found = MQAR(vocab_size=34).rows(np.arange(20), 32, 0, "val")
    with torch.no_grad():
        logits = model(Batch(torch.from_numpy(found.tokens))).logits
    assert logits is not None
    right = (logits.argmax(-1).numpy() == found.targets)[found.loss_mask]
    assert right.mean() == pytest.approx(metrics(run)[-1]["val"]["accuracy"])
    nll = torch.nn.functional.cross_entropy(
        logits[torch.from_numpy(found.loss_mask)], torch.from_numpy(found.targets[found.loss_mask])
    )
    assert nll.item() == pytest.approx(metrics(run)[-1]["val"]["loss"], rel=1e-5)


def test_stopped_and_resumed_is_the_same_run(finished: tuple[Path, str]):
    run, _ = finished
    path = run.parents[1] / "small.yaml"
    stopped = train(path, "name=stopped", fault=Fault(("training.optim:Optimizer.step",), 8, number=signal.SIGTERM))
    assert "stopped; continue with" in stopped.out
    resumed = train("--resume", stopped.run)
    assert resumed.code == 0, resumed.err
    assert metrics(resumed.run) == metrics(run)
    ours, theirs = tensors(resumed.run, 12), tensors(run, 12)
    assert all(torch.equal(t, theirs[name]) for name, t in ours.items())
    one_error(train("--resume", stopped.run, "data.synthetic.pairs=4"), "data.synthetic.pairs", "may not change")


def test_two_ranks_are_one_rank(finished: tuple[Path, str]):
    run, _ = finished
    pair = train(run.parents[1] / "small.yaml", "name=pair", ranks=2)
    assert pair.code == 0, pair.err
    assert losses(pair.run) == pytest.approx(losses(run), rel=1e-4)
    ours, theirs = metrics(pair.run)[-1]["val"], metrics(run)[-1]["val"]
    assert ours["answers"] == theirs["answers"]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_judged_later_on_other_settings(finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]):
    run, _ = finished
    plain = recall.evaluate(run)
    assert plain["accuracy"] == metrics(run)[-1]["val"]["accuracy"]
    found = recall.evaluate(run, ["data.synthetic.pairs=[2, 4]", "data.seq_len=48"], rows=30)
    assert list(found["by"]["pairs"]) == ["2", "4"]
    assert found["guess"] == 2 / 6
    assert len(list((run / "eval").glob("*.json"))) == 2
    assert recall.main([str(run), "data.synthetic.lead=4", "data.seq_len=40", "--rows", "5"]) == 0
    assert "by distance" in capsys.readouterr().out
    for words, message in (
        (["train.steps=3"], "only settings of the data section can differ"),
        (["data.synthetic.pairs=99"], "99 pairs need as many keys"),
        (["data.synthetic.vocab_size=64"], "the task has 64 ids, the model only 34"),
        (["--rows", "0"], "--rows must be at least 1"),
    ):
        assert recall.main([str(run), *words]) == 2
        assert message in capsys.readouterr().err


def test_a_config_asks_for_other_settings(finished: tuple[Path, str]):
    """Judged when the run ends, as `eval.recall` would judge it later; what cannot be is refused before it starts."""
    run, _ = finished
    path = run.parents[1] / "small.yaml"
    result = train(path, "name=asked", "eval.recall=[data.synthetic.lead=4 data.seq_len=40]")
    assert result.code == 0, result.err
    stored = json.loads((result.run / "eval" / "mqar_synthetic.lead-4_seq_len-40_12.json").read_text())
    later = recall.evaluate(run, ["data.synthetic.lead=4", "data.seq_len=40"])
    assert stored["results"] == later["results"]
    assert stored["accuracy"] == later["accuracy"]
    assert stored["n-samples"]["mqar_synthetic.lead-4_seq_len-40"]["effective"] == recall.validation_rows(
        schema.load(path)
    )
    one = later["by"]["pairs"]["8"]["accuracy"]
    metric = Metric("eval/mqar_synthetic.lead-4_seq_len-40/by/pairs/8/accuracy")
    assert read_metric(metric, result.run, 12) == one
    refused = train(path, "name=refused", "eval.recall=[data.synthetic.lead=4]")
    one_error(refused, "data.seq_len=32 is too short for 8 pairs after 4 places of lead")
    assert not (run.parent / "refused").exists()


def test_there_is_no_text(finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]):
    """lm-eval and sampling say so in one line; the report takes the accuracy."""
    run, _ = finished
    for main, words in ((eval_main, ["--tasks", "corpus"]), (generate_main, ["--prompt", "x"])):
        assert main([str(run), *words]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "trained on the task 'mqar', which is no text" in line
    from eval.report import summary

    row = summary(run)
    assert row["eval"]["mqar/acc"] == metrics(run)[-1]["val"]["accuracy"]
    assert row["val loss"] == metrics(run)[-1]["val"]["loss"]


@pytest.mark.slow
def test_attention_learns_it(tmp_path: Path):
    """A task that a model known to solve it does solve: 4 pairs, in some hundred steps."""
    path = config(tmp_path, train={"steps": 400, "batch_size": 64, "val_every": 400, "save_every": 400})
    model = "{d_model: 32, n_layers: 2, blocks: {only: {mixer: {kind: attention, heads: 1}, channel: {kind: swiglu, hidden: 64}}}}"
    words = [
        f"model={model}",
        "data.synthetic={kind: mqar, vocab_size: 16, pairs: [2, 4]}",
        "optim={lr: 1e-2, muon: true}",
    ]
    result = train(path, *words, "log.every=100")
    assert result.code == 0, result.err
    assert metrics(result.run)[-1]["val"]["accuracy"] > 0.99
