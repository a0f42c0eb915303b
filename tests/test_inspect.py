"""Looking at a memory cell: numbers against plain formulas, ablations against models built without, and the command end to end."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data import ByteTokenizer
from eval import inspect
from eval.history import read_metrics
from eval.inspection import gmt as instrument
from eval.inspection import gmt_pictures as pictures
from eval.inspection.figures import short
from eval.inspection.gmt_hooks import cells, changed
from eval.inspection.text import Text, cut, loss, text_of
from eval.run import open_run
from models import LM, Batch, UserError, build, model_config
from tests.runs import SWIGLU, train, write_config
from tests.test_eval_runs import tiny_run, write_run

SLOTS = 8
STORY = "def f(x):\n    return x + 1\n\n\nclass Naïve:\n    price = '$5'\n" * 4


def shape(slots: int = SLOTS, fidelity: str = "paper") -> dict:
    mixer = {"kind": "attention", "heads": 2}
    cell = {"kind": "gmt", "slots": slots, "width": 6, "fidelity": fidelity}
    return {"d_model": 16, "blocks": {"a": {"mixer": mixer, "channel": cell}}}


def model_of(slots: int = SLOTS, fidelity: str = "paper", **more) -> LM:
    """In fp64; weights so large that slots, edges and tokens clearly differ."""
    cfg = model_config({"n_layers": 2, "vocab_size": 257, "init_std": 0.5, **shape(slots, fidelity), **more})
    model = build(cfg, seed=1, dtype=torch.float64).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        model.progress.fill_(0.6)
        for cell in cells(model).values():
            for p in (cell.query.weight, cell.key.weight, cell.edges, cell.norm_slots.weight):
                p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def story(width: int = 24, tokens: int = 100) -> Text:
    tokenizer = ByteTokenizer()
    document = [256, *tokenizer.encode(STORY), 256]
    return Text("a story", list(cut([document], width, tokens)), tokenizer)


@pytest.fixture(params=["paper", "corrected"])
def model(request: pytest.FixtureRequest) -> LM:
    return model_of(fidelity=request.param)


def residual_streams(model: LM, text: Text, layer: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(into the mixer, into the channel, behind the channel) of one layer, [T, D] of each window."""
    found = []
    block = model.layers[layer]
    for window in text.windows:
        ends = {}
        hooks = [
            block.mixer.register_forward_pre_hook(lambda _, args, ends=ends: ends.update(mixer=args[0][0])),
            block.channel.register_forward_pre_hook(lambda _, args, ends=ends: ends.update(channel=args[0][0])),
            block.register_forward_hook(lambda _, __, out, ends=ends: ends.update(out=out[0][0])),
        ]
        with torch.no_grad():
            model.features(Batch(torch.tensor([window[:-1]])))
        for hook in hooks:
            hook.remove()
        found.append((ends["mixer"], ends["channel"], ends["out"]))
    return found


# -- numbers


@pytest.mark.parametrize("layer", [0, 1])
def test_what_is_seen_follows_the_formulas(model, layer):
    """Steps 1 to 12 of the paper's cell, token by token, from the residual stream alone."""
    text = story()
    seen = instrument.observe(model, text)[0][layer]
    cell = cells(model)[layer]
    points = F.layer_norm(cell.slots, (16,), cell.norm_slots.weight, cell.norm_slots.bias)
    edges = cell.edges.masked_fill(torch.eye(SLOTS, dtype=torch.bool), -math.inf).softmax(1)
    temperature = 1.0 * 0.1 ** math.log1p(model.progress.item() * (math.e - 1))
    n = 0
    for before, stream, after in residual_streams(model, text, layer):
        for x, y, mixed in zip(cell.norm(stream), after - stream, stream - before, strict=True):
            distance = (1 - F.cosine_similarity(points, x[None])).clamp(min=0.01)
            source = (1 / (distance * temperature)).softmax(0)
            asked = (points @ cell.key.weight.T) @ (cell.query.weight @ x) / math.sqrt(6)
            hop = source @ edges
            uniform = torch.full_like(hop, 1 / SLOTS)
            if cell.cfg.edges == "logprob":
                hop, uniform = (hop + 1e-6).log(), (uniform + 1e-6).log()
            target, plain = (hop + asked).softmax(0), (uniform + asked).softmax(0)
            torch.testing.assert_close(seen.source[n], source)
            torch.testing.assert_close(seen.target[n], target)
            torch.testing.assert_close(seen.distance[n], distance.min())
            torch.testing.assert_close(seen.move[n], ((target - source) @ points).norm())
            torch.testing.assert_close(seen.influence[n], (target * (target / plain).log()).sum())
            torch.testing.assert_close(seen.output[n], y.norm())
            torch.testing.assert_close(seen.mixer[n], mixed.norm())
            n += 1
    assert n == len(seen.source) == len(text.ids) == 100
    assert seen.influence.max() > 1e-4


def test_numbers_of_a_layer(model):
    text = story()
    found = instrument.measure(model, text)
    seen = instrument.observe(model, text)[0][1]
    layer = found["layers"][1]
    numbers, cell = layer["numbers"], cells(model)[1]
    start, end = seen.source.argmax(1).tolist(), seen.target.argmax(1).tolist()

    for side, weights in (("source", seen.source), ("target", seen.target)):
        usage = layer["usage"][side]
        assert sum(usage) == pytest.approx(1, abs=1e-5)
        assert usage == pytest.approx([sum(w[i] for w in weights.tolist()) / 100 for i in range(SLOTS)], abs=1e-5)
        assert numbers[f"{side}_slots"] == pytest.approx(math.exp(-sum(u * math.log(u) for u in usage)), rel=1e-4)
        mean = -(weights * weights.log()).sum(1).mean().item()
        assert numbers[f"{side}_entropy"] == pytest.approx(mean, rel=1e-4)
    assert numbers["top_target"] == pytest.approx(Counter(end).most_common(1)[0][1] / 100)
    assert numbers["distinct_sources"] == len(set(start))
    assert numbers["memory_fraction"] == pytest.approx(
        (seen.output / (seen.output + seen.mixer)).mean().item(), rel=1e-4
    )
    assert numbers["gate"] == pytest.approx(1 / (1 + math.exp(-cell.gate.item())), rel=1e-4)

    assert sum(n for _, _, n in layer["flow"]) == 100
    assert {(i, j): n for i, j, n in layer["flow"]} == Counter(zip(start, end, strict=True))
    assert sum(layer["cosines"]) == SLOTS * (SLOTS - 1)
    rows = F.normalize(cell.slots.detach(), dim=1).numpy()
    cosines = rows @ rows.T
    off = cosines[~np.eye(SLOTS, dtype=bool)].reshape(SLOTS, SLOTS - 1)
    assert numbers["slot_cosine"] == pytest.approx(off.mean(), abs=1e-5)
    assert numbers["coverage"] == pytest.approx((1 - off.max(1)).mean(), rel=1e-4)


def test_the_floor_and_dead_slots_are_counted():
    model = model_of()
    cell = cells(model)[0]
    with torch.no_grad():  # every token on slot 3; two slots that training never used
        cell.norm.weight.zero_()
        cell.usage.copy_(torch.tensor([0.5, 0.5, 0, 0, 1e-2, 1e-2, 1e-2, 1e-2]))
    assert instrument.measure(model, story())["layers"][0]["numbers"]["at_floor"] == 0  # no direction at all
    handle = cell.norm.register_forward_hook(lambda _, __, out: out + cell.tables_of_slots().points[3])
    numbers = instrument.measure(model, story())["layers"][0]["numbers"]
    handle.remove()
    assert (numbers["at_floor"], numbers["top_source"], numbers["dead_slots"]) == (1, 1, 2)


def test_lists_say_which_tokens_stand_where(model):
    text = story()
    seen = instrument.observe(model, text)[0][0]
    found = instrument.measure(model, text)["layers"][0]
    shown, start = [text.shown(i) for i in text.ids], seen.source.argmax(1).tolist()
    assert "␣" in shown
    assert "\\n" in shown
    assert sum(s["near"] for s in found["lists"]) == sum(s["going"] for s in found["lists"]) == 100
    for told in found["lists"]:
        here = Counter(w for w, i in zip(shown, start, strict=True) if i == told["slot"])
        assert dict(map(tuple, told["near_tokens"])).items() <= here.items()
        best = seen.source[:, told["slot"]].max().item()
        assert told["closest"][0]["weight"] == pytest.approx(best, rel=1e-4)
    tokens, slots, weight = (found["affinity"][key] for key in ("tokens", "slots", "weight"))
    row, column = tokens.index("e"), 0
    members = [w for w, name in zip(seen.source[:, slots[column]].tolist(), shown, strict=True) if name == "e"]
    assert weight[row][column] == pytest.approx(sum(members) / len(members), rel=1e-4)


def test_what_changed_between_two_checkpoints(model):
    earlier, text = model_of(fidelity=cells(model)[0].cfg.fidelity), story()
    same = instrument.changes(earlier, model, text)["layers"]
    assert [(c["layer"], c["moved_sources"], c["moved_targets"]) for c in same] == [(0, 0, 0), (1, 0, 0)]
    assert max(same[0]["angle"]) < 1e-3
    cell = cells(model)[1]
    with torch.no_grad():  # two slots change places, another one turns by a right angle
        for t in (cell.slots, cell.edges, cell.edges.T):
            t[[0, 1]] = t[[1, 0]]
        turned = torch.randn(16, dtype=torch.float64)
        cell.slots[2] = turned - (turned @ cell.slots[2]) / cell.slots[2].square().sum() * cell.slots[2]
    found = instrument.changes(earlier, model, text)["layers"]
    assert found[0] == same[0]
    now, before = (instrument.observe(m, text)[0][1].source.argmax(1) for m in (model, earlier))
    assert found[1]["moved_sources"] == pytest.approx((now != before).sum().item() / 100)
    assert found[1]["moved_sources"] > 0
    a, b = (cells(earlier)[1].slots[i].tolist() for i in (0, 1))
    between = math.degrees(math.acos(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)))
    assert found[1]["angle"][:3] == pytest.approx([between, between, 90], rel=1e-4)
    assert max(found[1]["angle"][3:]) < 1e-3


# -- ablations


def test_uniform_edges_have_no_influence(model):
    text = story()
    plain = instrument.observe(model, text)
    with instrument.ablate(model, "uniform_edges@1"):
        seen, without = instrument.observe(model, text)
    assert seen[1].influence.max() == 0
    torch.testing.assert_close(seen[0], plain[0][0])
    assert without != plain[1]


def test_a_zeroed_block_adds_nothing(model):
    text = story()
    with instrument.ablate(model, "zero_block:1"):
        seen, without = instrument.observe(model, text)
        assert all(torch.equal(after, before) for _, before, after in residual_streams(model, text, 1))
    assert seen[1].output.max() == 0
    assert seen[0].output.min() > 0
    block = model.layers[1]
    handle = block.channel.register_forward_hook(lambda _, __, out: (torch.zeros_like(out[0]), *out[1:]))
    assert loss(model, text) == pytest.approx(without, rel=1e-12)
    handle.remove()


def test_a_frozen_slot_is_a_model_without_it(model):
    """Its row, and its row and column of edges, cut out of the parameters."""
    text, slot = story(), 5
    keep = [i for i in range(SLOTS) if i != slot]
    less = model_of(SLOTS - 1, cells(model)[0].cfg.fidelity)
    weights = dict(model.state_dict())
    for name, t in weights.items():
        if name.endswith(("channel.slots", "usage", "age")):
            weights[name] = t[keep]
        elif name.endswith("channel.edges"):
            weights[name] = t[keep][:, keep]
    less.load_state_dict(weights)
    with instrument.ablate(model, f"freeze_slot:{slot}"):
        seen, without = instrument.observe(model, text)
    expected, expected_loss = instrument.observe(less, text)
    assert without == pytest.approx(expected_loss, rel=1e-12)
    for layer in (0, 1):
        torch.testing.assert_close(seen[layer].source[:, keep], expected[layer].source)
        torch.testing.assert_close(seen[layer].target[:, keep], expected[layer].target)
        assert seen[layer].source[:, slot].max() == seen[layer].target[:, slot].max() == 0
    assert without != loss(model, text)


def test_ablations_stack(model):
    text = story()
    with instrument.ablate(model, "uniform_edges+zero_block:0"):
        both = loss(model, text)
    with instrument.ablate(model, "zero_block:0"), instrument.ablate(model, "uniform_edges"):
        assert loss(model, text) == both
    with instrument.ablate(model, "zero_block:0"):
        assert loss(model, text) != both


def test_looking_changes_no_byte(model):
    text = story()

    def everything() -> tuple:
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        kept = [sorted(set(vars(cell)) - {"_kept"}) for cell in cells(model).values()]
        state = {name: t.numpy().tobytes() for name, t in model.state_dict().items()}
        return state, kept, hooks, [p.grad for p in model.parameters()], model.training

    before, output = everything(), loss(model, text)
    instrument.measure(model, text)
    for spec in ("uniform_edges", "freeze_slot:0", "zero_block:0", "zero_block:1+freeze_slot:2@1"):
        with instrument.ablate(model, spec):
            instrument.measure(model, text)
    with pytest.raises(ZeroDivisionError), instrument.ablate(model, "zero_block:0"):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), changed(cells(model).values(), lambda hop: lambda *_: 1 // 0):
        instrument.observe(model, text)
    assert everything() == before
    assert loss(model, text) == output


# -- text


def test_windows_hold_every_transition_once():
    text = story(width=24, tokens=100)
    document = [256, *ByteTokenizer().encode(STORY), 256]
    assert [pair for w in text.windows for pair in pairwise(w)] == list(pairwise(document[:101]))
    assert [len(w) for w in text.windows] == [25, 25, 25, 25, 5]
    assert list(cut([[1, 2, 3], [1], [1, 4]], 2, 99)) == [[1, 2, 3], [1, 4]]
    assert list(cut([[1, 2, 3], [1, 4, 5, 6]], 9, 4)) == [[1, 2, 3], [1, 4, 5]]
    places = text.places()
    assert len(places) == len(text.ids) == 100
    assert places[5] == "def «f»(x):"
    assert places[10] == "def f(x):«\\n»    "


def test_the_loss_is_that_of_the_model(model):
    text = story(width=200, tokens=60)
    tokens, targets = torch.tensor(text.windows[0][:-1])[None], torch.tensor(text.windows[0][1:])[None]
    expected = model(Batch(tokens, targets)).losses["lm"].item()
    assert loss(model, text) == pytest.approx(expected, rel=1e-6)
    ragged = story(width=24, tokens=100)  # the last window is shorter
    alone = [loss(model, Text("", [w], text.tokenizer)) * (len(w) - 1) for w in ragged.windows]
    assert loss(model, ragged) == pytest.approx(sum(alone) / 100, rel=1e-6)


# -- the command


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Twelve steps of training on text; the first of two layers has another channel."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("inspect")
    done = train(write_config(folder, {**shape(), "n_layers": 2, "at": {0: {"channel": SWIGLU}}}))
    assert done.code == 0, done.err
    return done.run


def test_the_command(trained, tmp_path, capsys):
    from matplotlib.image import imread

    out = tmp_path / "out"
    assert inspect.main([str(trained), "--out", str(out), "--tokens", "300", "--device", "cpu", "--since", "9"]) == 0
    printed = capsys.readouterr().out
    raw = (out / "inspect.json").read_text(encoding="utf-8")
    found = json.loads(raw)
    assert raw == json.dumps(found, ensure_ascii=False, allow_nan=False) + "\n"
    assert (found["step"], found["kind"], len(found["tokens"]), found["tokens"][0]) == (12, "gmt", 300, "<|endoftext|>")
    assert [a["name"] for a in found["ablations"]] == ["uniform_edges", "zero_block:1"]
    run = open_run(trained, "cpu")
    text = text_of(run, None, 300)
    assert found["loss"] == pytest.approx(loss(run.model, text))
    with instrument.ablate(run.model, "zero_block:1"):
        assert found["ablations"][1]["loss"] == pytest.approx(loss(run.model, text))

    curves = found["training"]
    logged = [r for r in read_metrics(trained) if "losses" in r]
    assert curves["tokens"] == [r["tokens"] for r in logged]
    last = logged[-1]["stats"]["layers.1.channel.temperature"]
    assert curves["stats"]["temperature"]["1"][-1] == pytest.approx(last, rel=1e-5)
    assert last == pytest.approx(found["layers"][0]["numbers"]["temperature"], rel=0.3)
    assert curves["losses"]["gmt.tracking"][0] == pytest.approx(logged[0]["losses"]["gmt.tracking"], rel=1e-5)
    assert [tokens for tokens, _ in curves["validation"]] == [6 * 8 * 32, 12 * 8 * 32]

    names = ["gmt-ablations", "gmt-layer-01", "gmt-layers", "gmt-training"]
    assert sorted(p.stem for p in out.glob("gmt-*.png")) == names
    words = (out / "inspect.md").read_text(encoding="utf-8")
    for name in names:
        assert f"![{name}]({name}.png)" in words
        picture = imread(out / f"{name}.png")[..., :3]
        assert picture.std() > 0.02
    assert "## Layer 1" in words
    assert "zero_block:1" in printed
    assert "since step 9:" in printed
    assert 0 < max(found["since"]["layers"][0]["angle"]) < 90
    assert "inspect.json" in printed

    again = tmp_path / "again"  # everything that is shown is in the JSON
    inspect.write(found, again)
    inspect.write_page(run, again)
    for path in out.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_another_text_without_a_metrics_file(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run = write_run(tmp_path / "run", model_of(n_layers=1).float(), seq_len=16)
    (run / "metrics.jsonl").unlink()
    (tmp_path / "story.txt").write_text(STORY, encoding="utf-8")
    words = [str(run), "--text", str(tmp_path / "story.txt"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert inspect.main([*words, "--tokens", "40", "--ablate", "freeze_slot:1@0"]) == 0
    found = json.loads((tmp_path / "out" / "inspect.json").read_text(encoding="utf-8"))
    assert found["tokens"][1:6] == ["d", "e", "f", "␣", "f"]
    assert [a["name"] for a in found["ablations"]] == ["freeze_slot:1@0"]
    assert found["training"] is None
    assert not (tmp_path / "out" / "gmt-training.png").exists()
    assert "freeze_slot:1@0" in capsys.readouterr().out
    limited = open_run(run, "cpu")
    assert [len(w) for w in text_of(limited, tmp_path / "story.txt", 40).windows] == [17, 17, 9]


@pytest.mark.filterwarnings("error::RuntimeWarning", "error::UserWarning")
def test_a_diverged_model_is_drawn_too(tmp_path):
    pytest.importorskip("matplotlib")
    model = model_of(n_layers=1).float()
    with torch.no_grad():
        model.embed.weight.fill_(math.nan)
    run = open_run(write_run(tmp_path / "run", model), "cpu")
    found = inspect.look(run, story(), ["uniform_edges"])
    assert found["loss"] is found["ablations"][0]["loss"] is found["layers"][0]["numbers"]["source_entropy"] is None
    written = [p.name for p in inspect.write(found, tmp_path / "out")]
    assert written[2:] == [
        "gmt-layers.png", "gmt-layer-00.png", "gmt-ablations.png", "any-attention.png",
    ]  # fmt: skip
    assert "loss nan" in inspect.summary(found)


@pytest.mark.filterwarnings("error::RuntimeWarning", "error::UserWarning")
def test_a_cell_without_norm_beside_no_mixer(tmp_path):
    pytest.importorskip("matplotlib")
    cell = {"kind": "gmt", "slots": 4, "width": 3, "displacement": "none"}
    model = model_of(n_layers=1, blocks={"a": {"channel": cell}}).float()
    run = open_run(write_run(tmp_path / "run", model), "cpu")
    found = inspect.look(run, story(), [])
    numbers = found["layers"][0]["numbers"]
    assert numbers["memory_fraction"] is numbers["displacement_floor"] is None
    assert pictures.overview(found).get_axes()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("zero_blocks:1", "did you mean 'zero_block'"),
        ("zero_block", "zero_block:LAYER"),
        ("zero_block:2", "no layer '2'; there are 0 to 1"),
        ("zero_block:1@0", "zero_block:LAYER"),
        ("uniform_edges:1", "uniform_edges[@LAYER]"),
        ("uniform_edges+freeze_slot:8", "no slot '8'; there are 0 to 7"),
        ("freeze_slot:x@0", "no slot 'x'"),
        ("freeze_slot:1@7", "no layer '7'"),
    ],
)
def test_ablations_that_cannot_be(spec, words):
    model = model_of()
    for call in (lambda: instrument.check(model, spec), lambda: instrument.ablate(model, spec).__enter__()):
        with pytest.raises(UserError, match=r"--ablate") as error:
            call()
        assert words in str(error.value)


def test_a_graph_of_two_slots_needs_both():
    with pytest.raises(UserError, match="2 slots"):
        instrument.check(model_of(2), "freeze_slot:0")


def test_mistakes_are_one_line(trained, tmp_path, capsys):
    out = tmp_path / "out"

    def said(*words: str) -> str:
        assert inspect.main([*words, "--out", str(out), "--device", "cpu"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert not out.exists()
        return error

    dense = tiny_run(tmp_path / "dense").dir
    assert "no such part with an instrument" in said(str(dense), "--part", "gmt")
    assert "cannot read" in said(str(trained), "--text", str(tmp_path / "none.txt"))
    (tmp_path / "empty.txt").write_text("")
    assert "no text" in said(str(trained), "--text", str(tmp_path / "empty.txt"))
    assert "--tokens" in said(str(trained), "--tokens", "0")
    assert "did you mean 'zero_block'" in said(str(trained), "--ablate", "zero_blok:0")
    assert "there are: 9, 12" in said(str(trained), "--since", "5")
    bare = write_run(tmp_path / "bare", model_of().float())
    assert "--text FILE" in said(str(bare))
    out = tmp_path / "file" / "out"
    out.parent.write_text("in the way")
    assert "cannot write" in said(str(trained), "--tokens", "20")


# -- pictures


def test_labels_are_safe_on_an_axis():
    assert short("$x$") == r"\$x\$"
    assert short("日本") == "\\u65e5\\u672c"
    assert short("\\n␣␣␣␣␣␣␣␣") == "\\n␣×8"
    assert short("a_rather_long_name") == "a_rather_lo…"


def test_long_histories_are_thinned():
    model = model_of()
    stats = {"layers.0.channel.gate": 0.5, "layers.1.channel.gate": 0.6, "layers.0.mixer.other": 1.0}
    records = [
        {"step": s, "tokens": 10 * s, "losses": {"lm": 1 / s, "gmt.usage": 0.0}, "stats": stats} for s in range(1, 5001)
    ]
    found = instrument.history(model, records)
    assert found is not None
    assert len(found["tokens"]) == 1000
    assert found["stats"] == {"gate": {"0": [0.5] * 1000, "1": [0.6] * 1000}}
    assert instrument.history(model, [{"step": 1, "tokens": 1, "losses": {"lm": 1.0}, "stats": {}}]) is None
