"""Engram's layer: against the book, what reaches what, how it starts, what it costs, and how ids get their meaning."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import models
from configs import schema
from data import open_corpus
from data.tokenizer import load_tokenizer
from eval.run import open_run
from eval.validation import validate
from models import LM, Batch, UserError, meta_model, model_config
from models import state as states
from models.folder import load_model, load_weights
from models.memories.engram import Engram
from models.memories.engram_addressing import EngramAddressing
from models.memories.engram_compression import Compression
from models.parsing import to_dict
from tests.engram_naive import NaiveEngram
from tests.runs import ROOT, assert_same_run, metrics, one_error, tensors, train, write_config
from tests.tools import assert_close, gradients, random_batch, rel_err, same_bytes, segments, spread, state_hash
from training import checkpoint
from training.parallel import World

ENGRAM = {"kind": "engram", "heads": 2, "row_width": 3, "base": 37}
FOLDED = Compression(np.arange(23, dtype=np.int32) // 2, 12)  # each two ids are one


def config(branches: int = 1, d_model: int = 16, vocab_size: int = 23, **part: Any) -> models.ModelConfig:
    """An Engram in layer 1 of 2."""
    memory = {**ENGRAM, **part}
    raw = {"d_model": d_model, "n_layers": 2, "vocab_size": vocab_size, "branches": branches}
    mixer = {"mixer": {"kind": "attention", "heads": 2}}
    return model_config({**raw, "blocks": {"a": mixer}, "at": {1: {"memory": memory}}})


def build(branches: int = 1, dtype: torch.dtype = torch.float64, **part: Any) -> LM:
    """With weights of the size of the stream, and a map that folds ids."""
    model = models.build(config(branches, **part), dtype=dtype)
    spread(model)
    addressing(model).use_map(FOLDED)
    return model


def engram(model: LM) -> Engram:
    (part,) = [part for _, _, part in model.parts() if isinstance(part, Engram)]
    return part


def addressing(model: LM) -> EngramAddressing:
    found = model.addressing["Engram"]
    assert isinstance(found, EngramAddressing)
    return found


def stream(model: LM, B: int, T: int) -> Tensor:
    part = engram(model)
    branches = [part.branches] if part.branches > 1 else []
    return torch.randn(B, T, *branches, 16, dtype=model.embed.weight.dtype)


# -- against the book


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("gate", ["signed_sqrt", "sigmoid"])
@pytest.mark.parametrize("conv", [4, 0])
@pytest.mark.parametrize("branches", [1, 4])
def test_equals_the_book(branches: int, conv: int, gate: str):
    """Documents side by side, padding among them: outputs, gates, and the gradient of everything."""
    model = build(branches, conv=conv, gate=gate, orders=[2, 3, 4])
    part, T = engram(model), 17
    valid = torch.tensor([[1] * 9 + [0, 0] + [1] * 6, [0, 0] + [1] * 12 + [0] * 3], dtype=torch.bool)
    batch = random_batch(2, T)._replace(cu_seqlens=segments([[3, 14], [15, 1]], T, pad_to=7), valid=valid)
    x = stream(model, 2, T).requires_grad_()
    ctx, _, _ = model.prepare(batch, None)
    y, _, _ = part(x, ctx)
    alpha = part.fuse(x.view(2, T, branches, 16), part.look_up(ctx), ctx, None)[1]

    table = part.table.state_dict()["values"].clone().requires_grad_()
    naive = NaiveEngram(part, addressing(model), table)
    want, gates = torch.zeros_like(x).view(2, T, branches, 16), torch.zeros_like(alpha)
    for row, start, end in ((0, 0, 3), (0, 3, 17), (1, 0, 15)):
        at = torch.arange(start, end)[valid[row, start:end]]
        added, let_in = naive(x[row, at].view(-1, branches, 16), batch.tokens[row, at].tolist())
        want, gates = want.index_put((torch.tensor(row), at), added), gates.index_put((torch.tensor(row), at), let_in)
    assert_close(y, want.view_as(x), "forms")
    assert_close(alpha, gates, "forms")
    assert (alpha[valid] > 0).all()

    above = torch.randn_like(y)
    names = [name for name, _ in part.named_parameters()]
    leaves = [x, *part.parameters()]
    y.backward(above)
    got = [p.grad for p in leaves]
    rows, found = part.table.take_grad() or pytest.fail("the table got no gradient")
    *wanted, of_table = torch.autograd.grad(want.view_as(y), [*leaves, table], above)
    for name, a, b in zip(["x", *names], got, wanted, strict=True):
        assert_close(a, b, "gradient", what=name)
    assert_close(torch.zeros_like(table).index_copy(0, rows, found), of_table, "gradient", what="table")


@pytest.mark.parametrize("branches", [1, 4])
def test_ids_without_a_token_get_nothing(branches: int):
    """A vocabulary longer than its tokenizer: the stream stays as it is there, taps pass over, and pieces continue so too."""
    model = models.build(config(branches), dtype=torch.float64)
    spread(model)
    addressing(model).use_map(Compression(np.arange(20, dtype=np.int32) // 2, 10))
    part, tokens = engram(model), random_batch(2, 15).tokens % 20
    dead = torch.zeros_like(tokens, dtype=torch.bool)
    dead[0, [0, 6, 7]] = dead[1, 14] = True
    tokens[dead] = 21
    x = stream(model, 2, 15)
    ctx, _, _ = model.prepare(Batch(tokens), None)
    y, _, aux = part(x, ctx)
    alpha = part.fuse(x.view(2, 15, branches, 16), part.look_up(ctx), ctx, None)[1]
    assert not y[dead].any()
    assert not alpha[dead].any()
    assert (y[~dead] != 0).any(-1).all()
    assert_close(aux.stats["gate"].value, alpha[~dead].mean(), "same")

    valid = torch.ones_like(dead)
    valid[0, 3] = valid[1, :2] = False  # and padding beside them
    padded, _, _ = model.prepare(Batch(tokens, valid=valid), None)
    among, _, _ = part(x, padded)
    assert not among[dead | ~valid].any()
    assert (among[~dead & valid] != 0).any(-1).all()

    without, _, _ = model.prepare(Batch(tokens[:1, 8:]), None)  # lookbacks stop at the dead, and start anew behind them
    assert torch.equal(ctx.rows["1"][:1, 8:], without.rows["1"])
    model_state, pieces = model.init_state(2, 15), []
    for start, end in ((0, 1), (1, 7), (7, 8), (8, 15)):
        piece, _, lookback = model.prepare(Batch(tokens[:, start:end]), model_state)
        layer = model_state.layers[1]["memory"]
        added, layer, _ = part(x[:, start:end], piece, layer)
        layers = (model_state.layers[0], {**model_state.layers[1], "memory": layer})
        model_state = model_state._replace(layers=layers, lookback=lookback)
        pieces.append(added)
    assert_close(torch.cat(pieces, 1), y, "forms")


def test_addresses_are_those_of_another_process():
    """Python's own hash is salted in each process; ours is not."""
    code = (
        "import hashlib, torch; from tests.test_engram import build, random_batch; from models import Batch\n"
        "rows = build().prepare(Batch(random_batch(2, 40).tokens), None)[0].rows['1']\n"
        "print(hashlib.sha256(rows.numpy().tobytes()).hexdigest())"
    )
    found = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": salt},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for salt in ("1", "2")
    ]
    assert found[0] == found[1]
    assert len(found[0].strip()) == 64


def test_rows_that_repeat_add_up():
    """One n-gram over and over: the gradient of its rows is that of one-hot products, and the same at every run."""
    model = build(dtype=torch.float32)
    part, tokens = engram(model), torch.tensor([[3, 3, 3, 3, 3, 3, 5, 3, 3, 3]])
    ctx, _, _ = model.prepare(Batch(tokens), None)
    at, values = ctx.rows["1"], part.look_up(ctx)
    above = torch.randn_like(values)
    values.backward(above)
    rows, found = part.table.take_grad() or pytest.fail("no gradient")
    one_hot = torch.nn.functional.one_hot(at.flatten(), part.table.rows).double()
    want = one_hot.T @ above.double().flatten(0, 2)
    assert sorted(set(at.flatten().tolist())) == rows.tolist()
    assert at.flatten().bincount().max() > 4
    assert_close(found, want[rows], "gradient", torch.float32)
    part.table.clear_grad()
    twice = []
    for _ in range(2):
        model.total(model(random_batch(3, 20)).losses).backward()
        twice.append(gradients(model))
    assert same_bytes(*twice)


# -- what reaches what


@pytest.mark.parametrize("branches", [1, 4])
def test_nothing_comes_from_the_future(branches: int):
    """To the bit: other tokens and another stream from t on leave everything before t."""
    model = build(branches, torch.float32)
    part, x, tokens = engram(model), stream(model, 2, 14), random_batch(2, 14).tokens

    def run(x: Tensor, tokens: Tensor) -> Tensor:
        return part(x, model.prepare(Batch(tokens), None)[0])[0]

    before = run(x, tokens)
    for t in (1, 5, 13):
        other, ids = x.clone(), tokens.clone()
        other[:, t:], ids[:, t:] = 100 * torch.randn_like(x[:, t:]), (tokens[:, t:] + 7) % 23
        after = run(other, ids)
        assert same_bytes(after[:, :t], before[:, :t])
        assert rel_err(after[:, t], before[:, t]) > 1e-2


def test_the_convolution_reaches_as_far_as_it_says():
    """Three taps, three tokens apart: the stream at t moves t, t+3, t+6 and t+9 by way of the gate, and nothing else."""
    model = build(dtype=torch.float64)
    part, x = engram(model), stream(model, 1, 24)
    ctx, _, _ = model.prepare(Batch(random_batch(1, 24).tokens), None)
    other = x.clone()
    other[0, 5] = torch.randn(16)
    moved = (part(other, ctx)[0] != part(x, ctx)[0]).any(-1)[0].nonzero().flatten()
    assert moved.tolist() == [5, 8, 11, 14]
    assert part.cfg.reach == 9


@pytest.mark.parametrize("branches", [1, 4])
def test_an_invalid_token_leaves_the_stream_as_it_is(branches: int):
    model = build(branches, torch.float32)
    part, x = engram(model), stream(model, 2, 12)
    valid = torch.rand(2, 12) < 0.5
    ctx, _, _ = model.prepare(random_batch(2, 12, valid=valid), None)
    after = x + part(x, ctx)[0]
    assert same_bytes(after[~valid], x[~valid])
    assert (after[valid] != x[valid]).any(-1).all()


@torch.no_grad()
@pytest.mark.parametrize("branches", [1, 4])
def test_packed_and_padded_are_separate_in_fp32(branches: int):
    """The contracts say so in fp64; the steep root costs no more than this in fp32."""
    model, T = build(branches, torch.float32), 30
    tokens = random_batch(2, T).tokens
    packed, _, _ = model.features(Batch(tokens, cu_seqlens=segments([[13, 17], [30]], T, pad_to=6)))
    valid = torch.arange(T) >= torch.tensor([[13], [0]])
    padded, _, _ = model.features(Batch(torch.where(valid, tokens, 0), valid=valid))
    for row, start, end in ((0, 0, 13), (0, 13, 30), (1, 0, 30)):
        alone, _, _ = model.features(Batch(tokens[row : row + 1, start:end]))
        assert_close(packed[row : row + 1, start:end], alone, "same", torch.float32)
        if end == T:
            assert_close(padded[row : row + 1, start:], alone, "same", torch.float32)


@torch.no_grad()
@pytest.mark.parametrize("branches", [1, 4])
def test_beams_and_rollback(branches: int):
    """Rows of a state that are reordered go on as their sequences; a state kept from before takes back what came after."""
    model, tokens = build(branches), random_batch(3, 15).tokens
    _, state, _ = model.features(Batch(tokens[:, :8]), model.init_state(3, 20))
    kept = states.clone(state)
    order = torch.tensor([2, 0, 2, 1])
    beams = states.select_rows(state, order)
    model.features(Batch(tokens[:, 9:12].flip(1)), state, donate=True)  # drafted and refused
    got, _, _ = model.features(Batch(tokens[order, 8:]), beams)
    again, _, _ = model.features(Batch(tokens[:, 8:]), kept)
    whole, _, _ = model.features(Batch(tokens))
    assert_close(got, whole[order, 8:], "forms")
    assert_close(again, whole[:, 8:], "forms")


def test_branches_are_interchangeable():
    """What belongs to a branch goes with it; the value and the table are common."""
    model = build(4)
    part, x, order = engram(model), stream(model, 2, 12), torch.tensor([2, 0, 3, 1])
    ctx, _, _ = model.prepare(random_batch(2, 12), None)
    before = part(x, ctx)[0]
    with torch.no_grad():
        keys = part.project.weight[: 4 * 16].view(4, 16, -1)
        keys.copy_(keys[order].clone())
        for p in (part.query_gain, part.key_gain, part.conv_gain, part.conv):
            assert p is not None
            p.copy_(p[order].clone())
    assert_close(part(x[:, :, order], ctx)[0], before[:, :, order], "same")


def test_without_branches_of_its_own_it_reads_the_mixture():
    """per_branch=False: one gate behind the learned read, as mixers have."""
    model = build(3, per_branch=False)
    assert engram(model).branches == 1
    assert hasattr(model.layers[1], "memory_branches")
    assert not hasattr(build(3).layers[1], "memory_branches")


# -- the start


@pytest.mark.parametrize("branches", [1, 4])
def test_the_convolution_starts_as_nothing_that_learns(branches: int):
    model = models.build(config(branches), dtype=torch.float64)
    bare = models.build(config(branches, conv=0), dtype=torch.float64)
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if ".memory.conv" not in k})
    engram(bare).table.load_state_dict(engram(model).table.state_dict())
    batch = random_batch(2, 12)
    out = model(batch)
    assert_close(out.losses, bare(batch).losses)
    out.losses["lm"].backward()
    found = gradients(model)
    assert found["layers.1.memory.conv"].norm() > 0
    assert not found["layers.1.memory.conv_gain"].any()


@pytest.mark.parametrize("branches", [1, 4])
def test_zero_values_start_as_no_memory_at_all(branches: int):
    model = models.build(config(branches, zero_value_init=True))
    plain = meta_model(model_config({**to_dict(model.cfg), "at": {}})).to_empty(device="cpu")
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "memory" not in k and "addressing" not in k})
    batch = random_batch(2, 12)
    assert same_bytes(model(batch).losses, plain(batch).losses)
    model(batch).losses["lm"].backward()
    found = gradients(model)
    assert found["layers.1.memory.project.weight"][-16:].norm() > 0
    assert not found["layers.1.memory.table"].any()


def test_rows_are_looked_up_once_a_forward(monkeypatch: pytest.MonkeyPatch):
    """Activation checkpointing repeats the blocks, not the look-up."""
    model, asked = build(dtype=torch.float32).train(), []
    table, begin = engram(model).table, engram(model).table.begin
    monkeypatch.setattr(table, "begin", lambda rows: asked.append(rows.shape) or begin(rows))
    model.recompute = True
    model.total(model(random_batch(2, 12)).losses).backward()
    assert asked == [(2, 12, 4)]


def test_a_copy_has_a_table_of_its_own():
    model, batch = build(dtype=torch.float32), random_batch(2, 12)
    twin, before = copy.deepcopy(model), model(batch).losses
    assert same_bytes(twin(batch).losses, before)
    engram(twin).table.state_dict()["values"].zero_()
    assert same_bytes(model(batch).losses, before)
    assert not same_bytes(twin(batch).losses, before)
    twin(batch).losses["lm"].backward()
    assert engram(model).table.take_grad() is None
    assert engram(twin).table.take_grad() is not None


def test_the_whole_forward_is_one_graph():
    model, batch = build(4, torch.float32), random_batch(2, 12, targets=False)
    with torch.no_grad():
        torch._dynamo.reset()
        run = torch.compile(model, fullgraph=True, backend="eager")
        assert_close(run(batch).logits, model(batch).logits, "same", torch.float32)


@pytest.mark.cuda
@torch.no_grad()
def test_addresses_can_be_captured():
    """A graph hashes whatever stands in its input when it is replayed."""
    model, tokens = build(dtype=torch.float32).cuda(), random_batch(3, 40).tokens.cuda()
    valid = torch.rand(3, 40, device="cuda") < 0.8
    held = torch.zeros_like(tokens)
    ctx, _, _ = model.prepare(Batch(held, valid=valid), None)
    warm, graph = addressing(model)(ctx, None), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found, _ = addressing(model)(ctx, None)
    held.copy_(tokens)
    graph.replay()
    want = build(dtype=torch.float32).prepare(Batch(tokens.cpu(), valid=valid.cpu()), None)[0].rows
    assert torch.equal(found["1"].cpu(), want["1"])
    assert not torch.equal(found["1"], warm[0]["1"])


# -- sizes and rules


BIG = {"kind": "engram", "conv": 4}
PUBLISHED = {  # d_model, zero-based layers, part, table numbers, those of one layer beside the table, rows per layer
    "27B": (2560, (1, 14), {"row_width": 80, "base": 2_262_400}, 5_792_338_560, 16_455_680, [36_199_972, 36_204_260]),
    "40B": (
        2560,
        (1, 14),
        {"row_width": 80, "base": 7_239_680},
        18_534_311_360,
        16_455_680,
        [115_837_464, 115_841_428],
    ),
    "V4.1": (
        5120,
        (1, 14),
        {"row_width": 256, "base": 16_000_000, "orders": [2, 3, 4], "conv": 0},
        196_613_849_600,
        157_327_360,
        [384_006_168, 384_016_682],
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str):
    """The paper's models as 5.7 B and 18.5 B, and the tables of DeepSeek-V4.1, as built on the meta device."""
    d_model, layers, part, numbers, beside, rows = PUBLISHED[name]
    raw: dict[str, Any] = {"d_model": d_model, "n_layers": 15, "vocab_size": 129_280, "branches": 4}
    at = {layer: {"memory": {**BIG, **part}} for layer in layers}
    model = meta_model(model_config({**raw, "blocks": {"a": {}}, "at": at}))
    parts = [part for _, _, part in model.parts()]
    assert [p.table.rows for p in parts] == rows  # pyright: ignore[reportAttributeAccessIssue]
    assert sum(t.rows * t.width for t in model.tables().values()) == numbers
    width = len(part.get("orders", [2, 3])) * 8 * part["row_width"]
    taps = part.get("conv", 4)
    closed = 5 * width * d_model + (3 if taps else 2) * 4 * d_model + taps * 4 * d_model
    assert closed == beside
    for p in parts:
        cost = p.cost(4096)
        assert cost.active_params == beside + width
        assert cost.flops_per_token == 2 * 5 * width * d_model + 2 * 4 * d_model * (1 + taps)


def test_what_the_optimizer_must_know():
    model = build(4)
    meta = {k.removeprefix("layers.1.memory."): m for k, m in model.meta().items() if ".memory." in k}
    assert meta.pop("project.weight").splits == (16,) * 5
    assert sorted(meta) == ["conv", "conv_gain", "key_gain", "query_gain"]
    assert all(m.optimizer == "adamw" and not m.decay for m in meta.values())
    (table,) = model.tables().values()
    assert (table.meta.role, table.meta.lr_mult, table.meta.decay, table.meta.optimizer) == (
        "table",
        5.0,
        False,
        "adamw",
    )


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"orders": [3, 2]}, r"orders must run from 2 without a gap, got \[3, 2\]; nearest: \[2, 3\]"),
        ({"orders": []}, "orders must run from 2"),
        ({"base": [30, 40, 50]}, "base: 3 sizes for 2 orders"),
        ({"base": 1}, "base must be at least 2"),
        ({"gate": "sigmoi"}, "did you mean 'sigmoid'"),
        ({"compression": "full"}, "unknown compression 'full'"),
        ({"heads": 0}, "heads must be at least 1"),
        ({"store": {"kind": "residnt"}}, "did you mean 'resident'"),
        ({"pad": 23}, "pad token 23 is not in the vocabulary of 23"),
    ],
)
def test_refused(part: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        meta_model(config(**part))


def test_layers_lay_out_their_tables_together():
    def model(first: dict[str, Any], second: dict[str, Any]) -> LM:
        at = {0: {"memory": {**ENGRAM, **first}}, 2: {"memory": {**ENGRAM, **second}}}
        return meta_model(model_config({"n_layers": 3, "vocab_size": 23, "blocks": {"a": {}}, "at": at}))

    with pytest.raises(UserError, match=r"layer 2, memory: engram: heads is 3, but 2 in layer 0"):
        model({}, {"heads": 3})
    with pytest.raises(UserError, match=r"layer keys \[0, 0\] are not distinct"):
        model({}, {"key": 0})
    two = model({}, {"row_width": 5, "gate": "sigmoid"})
    assert [(t.rows, t.width) for t in two.tables().values()] == [(37 + 41 + 43 + 47, 3), (53 + 59 + 61 + 67, 5)]


def test_a_layer_that_moves_keeps_its_rows():
    """Its key goes with it: the same table, the same rows of the same tokens."""
    here = models.build(config())
    moved_config = to_dict(here.cfg)
    moved_config["at"] = {0: {"memory": {**ENGRAM, "key": 1}}}
    moved = models.build(model_config(moved_config))
    tokens = random_batch(2, 9).tokens
    rows = [model.prepare(Batch(tokens), None)[0].rows["1"] for model in (here, moved)]
    assert torch.equal(*rows)


# -- what ids spell


SMALL = {
    "d_model": 16,
    "n_layers": 2,
    "blocks": {"only": {"mixer": {"kind": "attention", "heads": 2}}},
    "at": {1: {"memory": {**ENGRAM, "base": 211, "pad": 256}}},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps on bytes, whose upper and lower case are one."""
    result = train(write_config(tmp_path_factory.mktemp("engram"), SMALL, train={"keep": 9}))
    assert result.code == 0, result.err
    return result.run


def test_a_run_takes_the_map_of_its_tokenizer(run: Path):
    model, _ = load_model(run)
    canonical = addressing(model).canonical
    assert canonical[ord("A")] == canonical[ord("a")]
    assert canonical[ord("\n")] == canonical[ord(" ")]
    assert addressing(model).classes == canonical.max() + 1 < 257
    early, late = (tensors(run, step, ("tables",)) for step in (3, 12))
    moved = (early["tables:layers.1.memory.table/values"] != late["tables:layers.1.memory.table/values"]).any(-1)
    assert 0 < moved.sum() < len(moved)
    upper, lower = (model.prepare(Batch(torch.tensor([list(t)])), None)[0].rows["1"] for t in (b"For X", b"fOR x"))
    assert torch.equal(upper, lower)


def test_a_run_resumes_to_the_bit(run: Path):
    torn = Path(shutil.copytree(run, run.with_name("torn")))
    for step in (9, 12):
        shutil.rmtree(torn / "checkpoints" / f"step_{step:08d}")
    result = train("--resume", torn)
    assert result.code == 0, result.err
    assert_same_run(torn, run, 12)


def test_a_loaded_model_refuses_another_tokenizer(run: Path):
    model, folder = load_model(run)
    model.use_tokenizer(load_tokenizer(run / "tokenizer").json())
    other = models.build(model.cfg)
    addressing(other).use_map(Compression(np.arange(257, dtype=np.int32), 257))
    with pytest.raises(UserError, match="belong to another token map") as said:
        load_weights(other, folder)
    assert "\n" not in str(said.value)
    with pytest.raises(UserError, match="rows of layer key 1 would be those of other n-grams"):
        checkpoint.init_from(other, str(run))


def test_judged_as_it_was_trained(run: Path):
    """Evaluation asks no tokenizer for the map: with that of the checkpoint the last validation loss comes out again."""
    model, cfg = open_run(run, device="cpu").model, schema.load(run / "config.yaml")
    corpus = open_corpus(json.loads((run / "data.json").read_text())["dir"])
    found = validate(model, corpus, cfg, contextlib.nullcontext, 8, World(0, 1, torch.device("cpu")))
    (last,) = [line["val"] for line in metrics(run) if "val" in line and line["step"] == 12]
    assert found == last


@torch.no_grad()
def test_a_saved_folder_travels(run: Path, tmp_path: Path):
    """To our own format and to transformers, which loads tensor by tensor and generates with beams."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("models.hf.modeling")
    from models.hf import export_run, load_pretrained

    export_run(run, tmp_path / "out")
    ours, _ = load_model(run)
    model, _ = load_pretrained(tmp_path / "out")
    assert state_hash(model) == state_hash(ours)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert state_hash(theirs.lm) == state_hash(ours)
    here, there = addressing(ours), addressing(theirs.lm)
    assert (there.pad, there.classes) == (here.pad, here.classes)
    assert here.pad != 256
    tokens = torch.tensor([[256, *b"Import A"], [256, *b"for x in"]])
    assert same_bytes(theirs(tokens, use_cache=False).logits, ours(Batch(tokens)).logits)
    options = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(theirs.generate(tokens, **options), theirs.generate(tokens, **options, use_cache=False))


def test_a_pad_token_that_the_tokenizer_lacks(tmp_path: Path):
    model = {**SMALL, "vocab_size": 300, "at": {1: {"memory": {**ENGRAM, "pad": 280}}}}
    one_error(train(write_config(tmp_path, model)), "pad token 280 is none of the tokenizer's 257")
