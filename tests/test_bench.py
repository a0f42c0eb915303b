"""The benches at tiny shapes on a CPU: what they measure, what they refuse, and the formulas that they hold times against."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import (
    cells,
    context,
    floors,
    gpu_layers,
    gpu_memories,
    gpu_scans,
    kept_rows,
    kernels,
    scans,
    suites,
    tables,
    tasks,
)
from bench.floors import Floor, Peaks
from bench.scans import SCANS, Shape
from data.synthetic import TASKS
from models.lm import meta_model

LIMITS = Peaks(flops=790e12, bandwidth=4.3e12)
TINY = Shape(2, 70, 2, 16)


@pytest.mark.parametrize(
    ("formula", "k", "v", "c", "forward", "backward"),
    [  # thousands of operations and bytes per token and head
        (floors.gated_delta_floor, 64, 64, 64, (68, 520), (197, 1040)),
        (floors.gated_delta_floor, 128, 128, 64, (183, 1032), (508, 2064)),
        (floors.gated_delta_floor, 128, 128, 32, (140, 1032), (381, 2064)),
        (floors.gated_delta_floor, 256, 256, 64, (560, 2056), (1524, 4112)),
        (floors.gated_delta_floor, 256, 256, 32, (476, 2056), (1282, 4112)),
        (floors.scalar_decay_floor, 128, 64, 64, (57, 772), (147, 1544)),
        (floors.scalar_decay_floor, 128, 128, 64, (98, 1028), (246, 2056)),
        (floors.selective_floor, 16, 64, 64, (0, 512), (0, 896)),
    ],
)
def test_floors(formula, k: int, v: int, c: int, forward: tuple[int, int], backward: tuple[int, int]):
    for floor, (kilo_flops, size) in zip(formula(k, v, c), (forward, backward), strict=True):
        assert round(floor.flops / 1e3) == pytest.approx(kilo_flops, abs=1)
        assert floor.bytes == size


def test_a_floor_is_the_slower_of_two():
    forward, backward = floors.gated_delta_floor(128, 128, 64)
    assert forward.seconds(LIMITS) * 1e9 == pytest.approx(0.24, abs=0.005)
    assert backward.seconds(LIMITS) * 1e9 == pytest.approx(0.64, abs=0.005)
    assert floors.decode_floor(128, 128).seconds(LIMITS) * 1e9 == pytest.approx(30.5, abs=0.05)
    assert Floor(1e12, 0).seconds(Peaks(1e12, 1.0)) == 1.0
    assert Floor(0, 3.0).seconds(Peaks(1e12, 1.0)) == 3.0
    found = floors.peaks("cpu", tiny=True)
    assert min(found.flops, found.bandwidth) > 1e6


CASES = [case for bench in (scans, cells, kept_rows) for case in bench.cases("cpu", tiny=True)]
PEERS = ("token by token", "plain PyTorch", "the paper's equations", "SDPA, one mask", "a top-k per chunk")


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.op)
def test_ops_against_their_definition(case: kernels.Case):
    row = kernels.measure(case, pairs=1)
    assert row["ratio"] > 0
    assert row["peer"] in PEERS
    assert case.op in kernels.table([row])


def test_no_speed_for_a_wrong_result():
    right = scans.cases("cpu", tiny=True)[0]
    wrong = kernels.Case(right.op, right.shape, right.ours, lambda *x: right.peer(*x) * 1.001, right.inputs)
    with pytest.raises(RuntimeError, match="no speed is reported"):
        kernels.measure(wrong, 1)


@pytest.mark.parametrize("scan", SCANS, ids=lambda s: s.op)
def test_scans_beside_peers(scan: scans.Scan, monkeypatch: pytest.MonkeyPatch):
    """A peer that is right gets a ratio, one that is wrong its error, one that is absent nothing."""
    peers = {"absent": None, "right": scan.ours, "wrong": lambda *x: scan.ours(*x) * 1.1}
    for name, peer in peers.items():
        monkeypatch.setattr(gpu_scans, "fla_form", lambda _, peer=peer: peer)
        rows = gpu_scans.measure(scan, TINY, LIMITS, "cpu", pairs=1)
        assert [r["pass"] for r in rows] == ["forward", "forward + backward"]
        for row in rows:
            assert ("fla" in row["ratio"]) == (name == "right")
            assert ("sdpa" in row["ratio"]) != isinstance(scan, scans.Selective)
            assert all(ratio > 0 for ratio in row["ratio"].values())
            assert 0 < row["floor"] < 1
            assert row["wrong"] == ({"fla": pytest.approx(0.1, abs=0.02)} if name == "wrong" else {})
        assert ("wrong by 1.0e-01" in gpu_scans.table(rows)) == (name == "wrong")
        json.dumps(rows)
    broken = dataclasses.replace(scan, ours=lambda *x: scan.ours(*x) * 1.1)
    monkeypatch.setattr(gpu_scans, "compare", lambda *_: [0.1])
    with pytest.raises(RuntimeError, match="no speed is reported"):
        gpu_scans.measure(broken, TINY, LIMITS, "cpu", pairs=1)


def test_comparison_is_with_exact_numbers():
    """Errors of bf16 in the expected size, output first, then q, k, v, g, beta."""
    errors = gpu_scans.compare(SCANS[0], SCANS[0].ours, TINY, torch.bfloat16, "cpu")
    assert len(errors) == 6
    assert all(1e-4 < e < limit for e, limit in zip(errors[:4], gpu_scans.TOLERANCES))
    exact = gpu_scans.compare(SCANS[0], SCANS[0].ours, TINY, torch.float32, "cpu")
    assert max(exact) < 1e-5


def test_shapes_fill_a_gpu():
    found = gpu_scans.shapes(tiny=False)
    assert {(s.length, s.width) for s in found} == {(t, k) for t in (2048, 8192, 32768) for k in (64, 128, 256)}
    assert {s.batch * s.length for s in found} == {32768}
    assert {s.heads * s.width for s in found} == {2048}


def test_layers_and_steps():
    rows, text = gpu_layers.run(LIMITS, "cpu", pairs=1, tiny=True)
    (mom, *steps) = rows
    assert mom["over_plain"] == pytest.approx(mom["ms"]["ours"] / mom["ms"]["plain"])
    assert [s["state_bytes"] for s in steps] == [n * 2 * 16 * 16 * 4 for n in (1, 5, 2, 10)]
    assert all(s["of_copy"] > 0 for s in steps)
    assert "times a plain pass" in text
    assert "of copy bandwidth" in text


def test_cells_beside_their_rivals():
    rows, text = cells.run(LIMITS, "cpu", pairs=1, tiny=True)
    assert [r["cell"] for r in rows] == ["paper", "corrected"]
    assert all(r["of_floor"] > 0 and r["over_equations"] > 0 and r["over_swiglu"] > 0 for r in rows)
    assert "of the physical limit" in text
    forward, backward = floors.cell_floor(768, 128)
    assert (forward.flops, forward.bytes) == (622_592, 3072)
    assert (backward.flops, backward.bytes) == (3 * 622_592, 6144)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_kept_rows_beside_flex_attention():
    """Of 70 tokens in windows of 16: a row of k is seen by the window, one of the 4 kept once it has left that, a fading one by
    its chunk."""
    rows, text = kept_rows.run(LIMITS, "cpu", pairs=1, tiny=True)
    assert [(r["pass"], sorted(r["ratio"])) for r in rows] == [
        ("forward", ["causal", "flex"]),
        ("forward + backward", ["causal"]),
    ]
    for row in rows:
        assert 16 - 16 * 15 / 2 / 70 + 54 / 70 < row["keys"] < 16 - 16 * 15 / 2 / 70 + 5 * 54 / 70
        assert row["wrong"] == {}
        assert row["floor"] > 0
    assert "wanted: 1.3 times the speed of flex_attention, met in " in text
    assert "at most 2 times the physical limit, met in 0 of 2" in text
    json.dumps(rows)


def test_no_speed_for_wrong_attention(monkeypatch: pytest.MonkeyPatch):
    """A peer that is wrong is told of, our own op stops the bench."""
    (shape,) = kept_rows.shapes(tiny=True)
    monkeypatch.setattr(kept_rows.peers, "flex", lambda *x, **options: 1.1 * kept_rows.peers.sdpa(*x, **options))
    monkeypatch.setattr(kept_rows.peers, "block_mask", None)
    rows = kept_rows.measure(shape, LIMITS, "cpu", pairs=1)
    assert all("flex" not in r["ns"] and r["wrong"]["flex"] == pytest.approx(0.1, abs=0.01) for r in rows)
    assert "wrong by 1.0e-01" in kept_rows.table(rows)
    monkeypatch.setattr(kept_rows, "compare", lambda *_: [0.1])
    with pytest.raises(RuntimeError, match="no speed is reported"):
        kept_rows.measure(shape, LIMITS, "cpu", pairs=1)


def test_floor_of_attention_to_kept_rows():
    """The specified sizes: at W = 512 with 65 rows more, 557 keys of a query on average over 8192 tokens, 4.56 MFLOP per token of
    32 heads of 64, which move 2 (H + Hkv) K numbers."""
    window, T, more = 512, 8192, 65
    keys = window * (1 - (window - 1) / (2 * T)) + more * (1 - window / T)
    forward, backward = floors.memory_attention_floor(64, keys)
    assert 32 * forward.flops == pytest.approx(4.56e6, rel=1e-3)
    assert 32 * forward.bytes == 2 * (32 + 32) * 64 * 2
    assert backward.flops == 2.5 * forward.flops
    assert floors.memory_attention_floor(128, keys, 1 / 4)[0].bytes == 4 * 128 * 1.25
    assert {(s.length, s.window, s.kept, s.fading) for s in kept_rows.shapes(tiny=False)} == {
        (8192, 512, 64, 1),
        (32768, 512, 64, 1),
    }


def test_looked_up_memory():
    rows, text = gpu_memories.run(LIMITS, "cpu", pairs=1, tiny=True)
    *tables, layer = rows
    assert [r["rows"] for r in tables] == ["gather", "gather", "update, lazy_adam", "update, rowwise"]
    assert all(r["of_limit"] > 0 for r in tables)
    forward, backward = floors.engram_floor(24, 2, 128)
    assert layer["over_products"] == pytest.approx(
        layer["ns_per_token"] * 1e-9 * LIMITS.flops / (forward.flops + backward.flops)
    )
    assert layer["over_floor"] <= layer["over_products"] * (1 + 1e-9)
    assert "of the bandwidth of a copy" in text
    assert "times its products at peak" in text


def test_floors_of_looked_up_memory():
    """The paper's width and branches: 32.8 MFLOP and 41 KB of stream a token, forward (27 billion parameters)."""
    forward, backward = floors.engram_floor(2560, 4, 1280)
    assert (forward.flops, forward.bytes) == (32_768_000, 40_960 + 5_120)
    assert (backward.flops, backward.bytes) == (65_536_000, 61_440 + 10_240)
    assert floors.gather_floor(128).bytes == 264
    assert floors.update_floor(80, "rowwise").bytes == 8 + 320 + 2 * (320 + 8)
    assert floors.update_floor(80, "lazy_adam").bytes == 8 + 320 + 2 * (960 + 4)


@pytest.mark.parametrize("name", context.MIXERS)
def test_context(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(context, "STEPS", 2)
    rows = context.measure(name, 1, "cpu", contexts=(16, 32, 48), piece=16)
    sizes = rows[0]["state_bytes"]
    assert (len({sizes[n] for n in (16, 32, 48)}) == 1) == (name != "attention")
    assert [(r["short"], r["long"]) for r in rows] == [(16, 32), (16, 48)]
    assert all(r["ratio"] > 0 for r in rows)
    assert f"{sizes[48]:,}" in context.table(rows)


def test_tables_beside_a_step():
    """Both addresses agree, so there is a speed; the work does not grow with the table, and the rows are those of the addressing."""
    rows, text = tables.run(pairs=2, tiny=True)
    about, *sizes = rows
    assert about["addressing_ratio"]["median"] > 0
    for size, row in zip((2_000, 10_000), sizes, strict=True):
        assert size <= row["rows"] < 3 * size
        assert row["bytes"] == row["rows"] * (16 + 1 + 1) * 4
        assert row["looked_up"] == 2 * 16 * 2 * 48
        assert 0 < row["distinct"] < row["looked_up"]
        assert row["share"] == pytest.approx(
            (row["addressing_s"] + row["gather_s"] + row["update_s"]) / about["step_s"]
        )
        assert f"{row['rows']:,}" in text
    assert "times as fast" in text
    json.dumps(rows)


def test_no_speed_for_other_addresses(monkeypatch: pytest.MonkeyPatch):
    hashed = tables.published_hash
    monkeypatch.setattr(tables, "published_hash", lambda *x: {k: v + 1 for k, v in hashed(*x).items()})
    with pytest.raises(RuntimeError, match="no speed is reported"):
        tables.addressing_ratio(tables.TINY, 2_000, 1)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """What a GPU runs, at tiny shapes: tables on the screen and in the file, rows as JSON."""
    monkeypatch.setattr(kernels, "cases", lambda device: [])
    out = tmp_path / "kernels.md"
    assert command.main(["kernels", "--tiny", "--device", "cpu", "--pairs", "1", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert out.read_text().endswith(text)
    for word in (
        "token by token",
        "ns per token and head",
        "times a plain pass",
        "of copy bandwidth",
        "of the bandwidth of a copy",
        "speed ours / flex",
        "measured peaks",
    ):
        assert word in text
    assert re.search(r"fla-core (is not here|\d)", text)
    assert len(json.loads(out.with_suffix(".json").read_text())["rows"]) == 8 + 2 + 8 + 1 + 4 + 5 + 2 + 2
    assert command.main(["context", "--shapes", "gated", "--device", "cpu"]) == 2
    assert "no mixer 'gated'; valid: gated_delta, mom, attention, bmojo-32, bmojo-512" in capsys.readouterr().err


def test_cost_of_asking_a_suite():
    """Twenty times asking, in steps, over the steps of the run."""
    row = suites.measure("configs/mqar.yaml", 1, "cpu", rows=6)
    assert row["layers"] == 2
    assert row["share"] == pytest.approx(20 * row["steps_per_asking"] / row["steps"])
    assert row["low"] <= row["share"] <= row["high"]
    assert "| configs/mqar.yaml | 2 | 62,436 | 600 of 8,192 |" in suites.table([row])


def test_every_task_has_a_recipe():
    """Of every kind of task one at least, and each is of the task that its name begins with."""
    kinds = set()
    for name, recipe in tasks.RECIPES.items():
        cfg = recipe.load()
        assert cfg.data.synthetic is not None
        assert name.startswith(cfg.data.synthetic.kind)
        cfg.data.synthetic.check(cfg.data.seq_len)
        meta_model(dataclasses.replace(cfg.model, vocab_size=cfg.data.synthetic.vocab_size))
        kinds.add(cfg.data.synthetic.kind)
    assert kinds == set(TASKS)


def test_tasks_beside_their_controls(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The program knows all answers, not the shuffled ones; two steps teach nothing; and the second time nothing is trained."""
    words = [
        "tasks",
        "--tasks",
        "flip_flop",
        "--tiny",
        "--folder",
        str(tmp_path / "runs"),
        "--out",
        str(tmp_path / "t.md"),
    ]
    assert command.main(words) == 0
    (row,) = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert (row["task"], row["seed"], row["steps"], row["guess"]) == ("flip_flop", 0, 2, 0.5)
    assert row["oracle"] == 1.0
    assert 0.3 < row["shuffled"] < 0.7
    assert row["accuracy"] < 0.9
    assert row["worst"]["accuracy"] <= row["accuracy"]
    assert "| flip_flop | vocab_size 5, ignore 0.8 | 64 |" in capsys.readouterr().out
    stamp = (tmp_path / "runs" / "flip_flop-s0" / "metrics.jsonl").stat().st_mtime_ns
    assert tasks.run(["flip_flop"], 1, tmp_path / "runs", tiny=True)[0]["accuracy"] == row["accuracy"]
    assert (tmp_path / "runs" / "flip_flop-s0" / "metrics.jsonl").stat().st_mtime_ns == stamp
    assert command.main(["tasks", "--tasks", "flipflop"]) == 2
    assert "no recipe for the task 'flipflop'; did you mean 'flip_flop'" in capsys.readouterr().err
