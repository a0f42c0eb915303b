"""Looking at B'MOJO: shares of attention against the op and the book, kept sets against decoding, recall and ages by loops,
ablations against models built so, and the command end to end."""

from __future__ import annotations

import json
import math
import re
from html import unescape
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from data import ByteTokenizer
from eval import html, inspect
from eval.inspection import bmojo as instrument
from eval.inspection import bmojo_pictures as pictures
from eval.inspection.bmojo_attention import shared_out
from eval.inspection.bmojo_hooks import attending, mixers
from eval.inspection.bmojo_recall import Questions, hits, questions
from eval.inspection.bmojo_watch import final_sets, observe, observe_archive
from eval.inspection.text import Text, cut, loss, read, rows_of_task, text_of, text_of_rows
from eval.run import open_run
from kernels.memory_attention import memory_attention
from models import LM, Batch, UserError, build, model_config
from models.folder import atomic_folder, save_weights
from models.parsing import to_dict
from tests.bmojo_naive import keys_of
from tests.test_eval_runs import write_run

W = 4
MAMBA2 = {"kind": "mamba2", "head_dim": 8, "d_state": 3}
STORY = "def f(x):\n    return x + 1\n\n\nclass Naïve:\n    price = '$5'\n" * 3
PLAIN = {"kind": "attention", "heads": 2}


def model_of(layers: int = 2, dtype: torch.dtype = torch.float64, vocab: int = 257, **options: Any) -> LM:
    """B'MOJO in the first and last layer, attention between; weights so large that shares clearly differ."""
    mixer = {"kind": "bmojo", "ssm": MAMBA2, "heads": 4, "kv_heads": 2, "window": W, "m_e": 3, **options}
    blocks = {"b": {"mixer": mixer}, "a": {"mixer": PLAIN}}
    pattern = ["b", *["a"] * (layers - 2), "b"][:layers]
    shape = {
        "d_model": 16,
        "n_layers": layers,
        "vocab_size": vocab,
        "init_std": 0.5,
        "blocks": blocks,
        "pattern": pattern,
    }
    return build(model_config(shape), seed=1, dtype=dtype).eval()


def story(width: int = 22, tokens: int = 60) -> Text:
    """Windows of 22, 22 and 16 tokens: none and some whole chunks of W, the last row padded."""
    tokenizer = ByteTokenizer()
    return Text("a story", list(cut([[256, *tokenizer.encode(STORY), 256]], width, tokens)), tokenizer)


def spied(model: LM, text: Text) -> tuple[tuple[Tensor, ...], dict[str, Any], Tensor, Tensor]:
    """Of the first layer in one forward: q, k, v and what else its attention was given, what that gave, what the layer added."""
    found: dict[str, Any] = {}

    def spy(_: Any, attend: Any) -> Any:
        def attended(*rows: Tensor, **given: Any) -> Tensor:
            found.update(rows=rows, given=given, o=attend(*rows, **given))
            return found["o"]

        return attended

    part = mixers(model)[0]
    handle = part.register_forward_hook(lambda _, __, out: found.update(out=out[0]))
    with attending([part], spy):
        list(read(model, text))
    handle.remove()
    return found["rows"], found["given"], found["o"], found["out"]


# -- shares


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"m_f": 2, "dedup": False, "pos": "rope_const"},
        {"fading_mode": "band", "pos": "rope_true", "tie_fading": False},
        {"fading_mode": "point", "qk_norm": True},
        {"fading_mode": "self", "m_e": 0},
        {"m_f": 0},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "default",
)
@pytest.mark.parametrize("width", [20, 22], ids=["whole", "padded"])
def test_shares_are_those_of_the_layer(options, width):
    """They sum to 1, they make the layer's output, and each is what the op itself reads of ones in place of that kind's values."""
    model = model_of(**options)
    text = story(width)
    (q, k, v), given, o, out = spied(model, text)
    assert (given.get("cu_seqlens") is None) == (width == 20)
    shares = shared_out(q, k, v, **given)
    valid = len(text.ids)
    torch.testing.assert_close(shares.by_kind[:valid].sum(2), torch.ones(valid, 4, dtype=torch.float64))
    torch.testing.assert_close(shares.o.view_as(o), o)
    rows = mixers(model)[0].out(shares.o[:valid].flatten(1))
    if width == 20:
        torch.testing.assert_close(rows.view_as(out), out, atol=1e-10, rtol=1e-10)

    def ones(x: Tensor, here: bool) -> Tensor:
        return torch.full_like(x, float(here))

    pool = given.get("pool") or (k.flatten(0, 1), v.flatten(0, 1))
    for n, kind in enumerate(("window", "fading", "eidetic")):
        changed = dict(given)
        if "fading_v" in given:
            changed["fading_v"] = ones(given["fading_v"], kind == "fading")
        if "index" in given:
            changed["pool"] = (pool[0], ones(pool[1], kind == "eidetic"))
        said = memory_attention(q, k, ones(v, kind == "window"), **changed).flatten(0, 1)
        torch.testing.assert_close(shares.by_kind[:valid, :, n], said[:valid, :, 0])
    seen, _ = observe(model, text)
    assert seen[0].error < 1e-12
    torch.testing.assert_close(seen[0].shares, shares.by_kind[:valid])


def test_shares_of_a_model_in_single_precision():
    model = model_of(dtype=torch.float32)
    seen, mean = observe(model, story())
    assert mean == pytest.approx(loss(model, story()))
    for one in seen.values():
        assert one.shares is not None
        assert 0 < one.error < 1e-6
        assert (one.shares.sum(2) - 1).abs().max() < 1e-12


@pytest.mark.parametrize("mode", ["chunk", "point", "band", "self"])
def test_keys_in_sight_and_kept_tokens_are_those_of_the_book(mode):
    model, text = model_of(fading_mode=mode), story()
    for n, one in observe(model, text)[0].items():
        assert one.score is not None
        assert one.keys is not None
        first = 0
        for window in text.windows:
            length = len(window) - 1
            book = keys_of(mixers(model)[n].cfg, one.score[first : first + length].tolist())
            for t, keys in enumerate(book):
                assert one.keys[first + t].tolist() == [len(keys.window), len(keys.fading), len(keys.eidetic)]
                kept = one.kept.token[one.kept.chunk[first + t]]
                assert [i - first for i in kept.tolist() if i >= 0] == keys.kept
            first += length
        assert first == len(one.score) == 60


# -- what is kept


@pytest.mark.parametrize(
    "options", [{}, {"evict_gamma": 0.7}, {"score": "stride"}], ids=lambda o: "-".join(map(str, o))
)
def test_kept_sets_are_those_that_decoding_holds(options):
    """After every chunk, and behind the text."""
    model, text = model_of(**options), story()
    seen = observe(model, text)[0]
    first = 0
    for number, window in enumerate(text.windows):
        length = len(window) - 1
        state = model.init_state(1, length)
        for start in range(0, length, W):
            tokens = torch.tensor([window[start : min(start + W, length)]])
            with torch.no_grad():
                _, state, _ = model.features(Batch(tokens), state)
            assert state is not None
            for n, part in mixers(model).items():
                held = [p + first for p in sorted(state.layers[n]["mixer"].position[0].tolist()) if p >= 0]
                end = start + W
                if end < length:
                    chunk = seen[n].kept.chunk[first + end]
                    assert [i for i in seen[n].kept.token[chunk].tolist() if i >= 0] == held
                else:
                    assert final_sets(part, seen[n])[number].tolist() == held
        first += length


def test_ages_turnover_and_weights_by_loops():
    model, text = model_of(m_e=3), story()
    one = observe(model, text)[0][0]
    kept, position = one.kept, one.kept.position.tolist()
    assert position == [t for w in text.windows for t in range(len(w) - 1)]
    (q, k, v), given, _, _ = spied(model, text)
    weights = shared_out(q, k, v, **given).eidetic[:60].mean(1)
    ages, got = torch.zeros(3, 22, dtype=torch.float64), torch.zeros(60, dtype=torch.float64)
    for t in range(60):
        chunk = int(kept.chunk[t])
        before, tokens = int(kept.before[chunk]), [i for i in kept.token[chunk].tolist() if i >= 0]
        for slot, token in enumerate(tokens):
            if t - token >= W:
                ages[0, t - token] += 1
                ages[1, t - token] += weights[t, slot]
                got[token] += weights[t, slot]
        for past in range(before):
            if position[t] - past >= W:
                ages[2, position[t] - past] += len(tokens) / before
    torch.testing.assert_close(one.ages, ages)
    torch.testing.assert_close(one.given, got)

    layer = instrument.measure(model, text)["layers"][0]
    shares: dict[int, list[float]] = {}
    sets = [set(s) for s in layer["kept"]["sets"]]
    for c, (earlier, now) in enumerate(pairwise(sets), start=1):
        if kept.before[c] > 0:
            shares.setdefault(int(kept.before[c]) // W, []).append(len(now - earlier) / len(now))
    assert layer["kept"]["turnover"] == pytest.approx([sum(s) / len(s) for s in shares.values()], rel=1e-4)
    assert layer["kept"]["turnover_iid"] == pytest.approx([1 / c for c in range(1, 6)], rel=1e-4)
    held = [sum(t in s for s in sets) for t in range(60)]
    assert layer["per_token"]["held"] == held
    age = layer["kept"]["age"]
    assert sum(age["kept"]) == pytest.approx(1, abs=1e-4) == sum(age["even"])
    edges = age["edges"]
    assert age["read"] == pytest.approx(
        [float(ages[1, a:b].sum() / ages[1].sum()) for a, b in pairwise(edges)], abs=1e-4
    )
    many = [a for a in range(22) for _ in range(int(ages[0, a]))]
    assert age["quantiles"]["kept"][1] == many[math.ceil(len(many) / 2) - 1]
    bars = layer["per_token"]["bar"]
    assert one.score is not None
    for t in range(60):
        tokens = layer["kept"]["sets"][int(kept.chunk[t])]
        lowest = min((float(one.score[i]) for i in tokens), default=None)
        assert bars[t] == (pytest.approx(lowest, rel=1e-4) if len(tokens) == 3 else None)
    best = max(range(60), key=lambda i: float(got[i]))
    assert (layer["lists"][0]["token"], layer["lists"][0]["held"]) == (best, held[best])
    assert f"«{text.tokenizer.token_text(text.ids[best])}»" in layer["lists"][0]["place"]
    later = [t for t in range(60) if position[t] >= W]
    assert one.shares is not None
    assert layer["shares"] == pytest.approx(one.shares[later].mean((0, 1)).tolist(), rel=1e-4)
    assert layer["queries"] == len(later)


def test_what_changed_between_two_checkpoints():
    earlier, model, text = model_of(), model_of(), story()
    for one in instrument.changes(earlier, model, text)["layers"]:
        assert (one["other"], one["agreement"]) == (0, pytest.approx(1))
    with torch.no_grad():
        mixers(model)[1].ssm.project.weight.normal_(generator=torch.Generator().manual_seed(3))  # pyright: ignore
    first, second = instrument.changes(earlier, model, text)["layers"]
    assert first["other"] == 0
    was, now = (observe(m, text)[0][1] for m in (earlier, model))
    pairs = [(set(a), set(b) - {-1}) for a, b in zip(was.kept.token.tolist(), now.kept.token.tolist(), strict=True)]
    assert second["other"] == pytest.approx(sum(len(b - a) for a, b in pairs) / sum(len(b) for _, b in pairs), rel=1e-4)
    assert second["other"] > 0
    assert was.score is not None
    assert now.score is not None
    stats = pytest.importorskip("scipy.stats")
    assert second["agreement"] == pytest.approx(stats.spearmanr(was.score, now.score).statistic, abs=1e-4)


def test_rows_from_an_archive_are_a_fourth_kind():
    model, text = model_of(archive=2), story()
    shares, errors, mean = observe_archive(model, text)
    plain = observe(model, text)[0]
    position = plain[0].kept.position
    assert plain[0].shares is not None
    for n, found in shares.items():
        torch.testing.assert_close(found.sum(2), torch.ones(60, 4, dtype=torch.float64))
        assert errors[n] < 1e-12
        assert found[position >= 2 * W, :, 3].mean() > 0.01
        assert found[position < W, :, 3].max() == 0
    others = shares[0][..., :3] / (1 - shares[0][..., 3:])  # the rest of the softmax of the first layer is what it was
    torch.testing.assert_close(others, plain[0].shares)
    total, count = 0.0, 0
    for window in text.windows:  # token by token, as generation does
        state = model.init_state(1, len(window))
        for token, target in pairwise(window):
            with torch.no_grad():
                h, state, _ = model.features(Batch(torch.tensor([[token]])), state)
                total += float(model.token_nll(h, torch.tensor([[target]]))[0])
            count += 1
    assert mean == pytest.approx(total / count)
    found = instrument.measure(model, text)["archive"]
    assert found["loss"] == pytest.approx(mean)
    assert sum(found["layers"][1]["shares_by_head"][0]) == pytest.approx(1, abs=1e-4)


def short(*lengths: int) -> Text:
    """Windows of so many tokens."""
    return Text("short", [[256, *range(60, 60 + n)] for n in lengths], ByteTokenizer())


@pytest.mark.parametrize("tokens", [1, 2, 3, W, W + 1])
def test_a_text_that_is_hardly_longer_than_the_window(tokens):
    """No query has a memory before the last length, which is one token behind the window."""
    pytest.importorskip("matplotlib")
    model, text = model_of(archive=2), short(tokens)
    shares, errors, mean = observe_archive(model, text)
    for n, found in shares.items():
        torch.testing.assert_close(found.sum(2), torch.ones(tokens, 4, dtype=torch.float64))
        assert found[:W, :, 1:].abs().max() == 0
        assert errors[n] < 1e-12
    assert mean == pytest.approx(loss(model, text), rel=1e-12)
    found = instrument.measure(model, text)
    assert [layer["queries"] for layer in found["archive"]["layers"]] == [max(0, tokens - W)] * 2
    found |= {"run": "run", "step": 1, "since": None, "recall": None, "ablations": [], "training": None}
    said = instrument.summary(found)
    assert f"with archives: loss {mean:.4f}" in said
    assert ("| layer | window |" in said) == (tokens > W)
    assert instrument.lists(found).startswith("## Layer 0")
    assert pictures.overview(found).get_axes()
    assert pictures.page(found, found["layers"][0]).get_axes()


def test_archives_of_windows_of_one_token_among_longer_ones():
    """Eight windows are a forward, and the ninth is one by itself."""
    model, lengths = model_of(archive=2), [9] * 8 + [1]
    text = short(*lengths)
    both, one = observe_archive(model, text), observe_archive(model, short(1))
    longer = observe_archive(model, short(*lengths[:-1]))
    for n, found in both[0].items():
        torch.testing.assert_close(found, torch.cat((longer[0][n], one[0][n])))
    assert both[2] == pytest.approx((72 * longer[2] + one[2]) / 73)
    assert [layer["queries"] for layer in instrument.measure(model, text)["archive"]["layers"]] == [8 * (9 - W)] * 2


def test_backticks_of_a_text_come_back_from_the_page(tmp_path):
    """Windows as blocks, tokens and where they stand as code."""
    tokenizer = ByteTokenizer()
    text = Text("ticks", list(cut([tokenizer.encode("a```b\n```\n|`` `c`` ```` d" * 2)], 22, 60)), tokenizer)
    measured = instrument.measure(model_of(), text)
    found = html.from_markdown(instrument.lists(measured), tmp_path)
    blocks = re.findall(r'<pre class="wrap">(.*?)</pre>', found, re.DOTALL)
    windows = [re.sub("[«»]", "", unescape(block)).replace("\\n\n", "\n") for block in blocks]
    assert windows == [tokenizer.decode(w[:-1]) for w in text.windows] * 2
    code = [unescape(words) for words in re.findall("<code>(.*?)</code>", found)]
    assert code == [
        words for layer in measured["layers"] for one in layer["lists"] for words in (one["shown"], one["place"])
    ]
    assert sum("``" in words for words in code) > 4


# -- ablations


@pytest.mark.parametrize(
    ("spec", "options", "other"),
    [
        ("no_eidetic", {}, {"m_e": 0}),
        ("no_eidetic", {"pos": "rope_const"}, {"m_e": 0}),
        ("no_fading", {"fading_mode": "band"}, {"m_f": 0}),
        ("no_fading", {"m_f": 2}, {"m_f": 0}),
        ("score:random", {}, {"score": "random"}),
        ("score:fifo+no_fading", {}, {"score": "fifo", "m_f": 0}),
        ("keep:1", {}, {"m_e": 1}),
        ("keep:9", {}, {"m_e": 9}),
    ],
)
def test_an_ablation_is_a_model_built_so(spec, options, other):
    model, text = model_of(**options), story()
    without = model_of(**options | other)
    without.load_state_dict(model.state_dict(), strict=False)
    before = loss(model, text)
    with instrument.ablate(model, spec):
        found = loss(model, text)
    assert found == pytest.approx(loss(without, text), rel=1e-12)
    assert abs(found - before) > 1e-6
    assert loss(model, text) == before
    names = {name for name, _ in without.named_parameters()}
    assert names <= {name for name, _ in model.named_parameters()}


def test_an_ablation_of_one_layer_leaves_the_other():
    model, text = model_of(3), story()
    assert instrument.standard(model) == ["no_eidetic", "no_fading", "score:random", "no_eidetic@0", "no_eidetic@2"]
    with instrument.ablate(model, "no_eidetic@2"):
        seen = observe(model, text)[0]
    assert seen[0].shares is not None
    assert seen[2].shares is not None
    assert seen[0].shares[..., 2].max() > 0.01
    assert seen[2].shares[..., 2].max() == 0
    torch.testing.assert_close(observe(model, text)[0][0].shares, seen[0].shares)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("no_eidetik", "did you mean 'no_eidetic'"),
        ("no_eidetic:1", "write it as no_eidetic[@LAYER]"),
        ("no_fading@1", "there are 0, 2"),
        ("keep", "keep:N"),
        ("keep:0", "at least 1"),
        ("score:innov", "no score 'innov'"),
        ("no_fading+keep:x", "give a number"),
    ],
)
def test_ablations_that_cannot_be(spec, words):
    with pytest.raises(UserError, match=r"--ablate") as error:
        instrument.check(model_of(3), spec)
    assert words in str(error.value)


def test_without_eidetic_memory_there_is_nothing_to_take_away():
    model = model_of(m_e=0)
    with pytest.raises(UserError, match="m_e is 0"):
        instrument.check(model, "score:random")
    assert instrument.standard(model) == ["no_fading"]
    with pytest.raises(UserError, match="--part any"):
        instrument.measure(model_of(window=0, fading_mode="self", m_e=0), story())


# -- recall


TASK = {"kind": "mqar", "vocab_size": 40, "pairs": [2, 4], "power": 1.0}


def task_run(folder: Path, **options: Any) -> Path:
    """A model that was never trained, as a run on associative recall."""
    model = model_of(vocab=40, dtype=torch.float32, **options)
    folder.mkdir()
    data = {"synthetic": TASK, "seq_len": 40}
    config = {"model": to_dict(model.cfg), "data": data, "train": {"steps": 8, "batch_size": 2}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with atomic_folder(folder / "checkpoints" / "step_00000008") as temporary:
        save_weights(model, temporary)
    stats = {f"layers.{n}.mixer.{name}": 0.3 for n in (0, 1) for name in ("kept_age", "kept_new")}
    records = [{"step": s, "tokens": 80 * s, "losses": {"lm": 3.0}, "stats": stats} for s in range(1, 9)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


@pytest.mark.parametrize("shift", [4, 0])
def test_needed_tokens_are_found_by_loops_too(tmp_path, shift):
    run = open_run(task_run(tmp_path / "run", token_shift=shift), "cpu", tasks=True)
    rows = rows_of_task(run, 20)
    text = text_of_rows(run, rows)
    seen = observe(run.model, text, attention=False)[0]
    asked = questions(run.model, text, rows)
    for n, part in mixers(run.model).items():
        counts = dict.fromkeys(("questions", "key", "value", "carried", "right", "hit", "miss"), 0)
        chance = 0.0
        for b, row in enumerate(rows.tokens.tolist()):
            with torch.no_grad():
                logits: Any = run.model.logits(run.model.features(Batch(torch.tensor([row])))[0])
            said = logits[0].argmax(-1).tolist()
            for t in range(40):
                if not rows.loss_mask[b, t]:
                    continue
                key = row.index(row[t])
                assert row[key + 1] == rows.targets[b, t]
                carriers = [key + 1, key + 2, key + 3] if shift else [key + 1]
                if t - carriers[-1] < W:
                    continue
                kept = [i - 40 * b for i in seen[n].kept.token[10 * b + t // W].tolist() if i >= 0]
                carried, right = bool({*carriers} & {*kept}), said[t] == rows.targets[b, t]
                counts["questions"] += 1
                counts["key"] += key in kept
                counts["value"] += key + 1 in kept
                counts["carried"] += carried
                counts["right"] += right
                counts["hit"] += right and carried
                counts["miss"] += right and not carried
                others = t // W * W - len(carriers)
                chance += 1 - math.comb(others, len(kept)) / math.comb(t // W * W, len(kept))
        found, q = hits(part, seen[n].kept, asked), counts["questions"]
        assert (found["questions"], found["hits"]) == (q, counts["carried"])
        assert 0 < counts["carried"] < q
        for name in ("key", "value", "carried", "right"):
            assert found[name] == pytest.approx(counts[name] / q)
        assert found["right_if_kept"] == pytest.approx(counts["hit"] / counts["carried"])
        assert found["right_if_not"] == pytest.approx(counts["miss"] / (q - counts["carried"]))
        assert found["carried_by_chance"] == pytest.approx(chance / q)


def test_right_answers_are_told_apart_by_what_was_kept():
    """Two questions of a row: the pair of one is kept, that of the other is not."""
    from eval.inspection.bmojo_watch import Kept

    kept = Kept(
        torch.arange(0, 20, 4), torch.arange(0, 20, 4), torch.full((5,), 4), torch.tensor([[-1], [1], [1], [1], [1]])
    )
    asked = Questions(torch.tensor([12, 13]), torch.tensor([0, 2]), torch.tensor([True, False]), 20)
    part = mixers(model_of(token_shift=0))[0]
    found = hits(part, kept, asked)
    assert (found["key"], found["value"], found["carried"]) == (0, 0.5, 0.5)
    assert (found["right_if_kept"], found["right_if_not"]) == (1, 0)
    assert found["one_by_chance"] == pytest.approx(1 / 12)
    assert found["kept_of_pairs"] == 1
    assert found["pairs_of_past"] == pytest.approx(16 / 40)


# -- the command


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows are enough here."""
    monkeypatch.setattr("eval.inspection.bmojo_recall.JUDGED", 16)


def test_the_command_on_a_text(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    model = model_of(3, torch.float32, archive=2)
    run = write_run(tmp_path / "run", model, seq_len=22)
    (tmp_path / "story.txt").write_text(STORY, encoding="utf-8")
    words = [str(run), "--text", str(tmp_path / "story.txt"), "--tokens", "60", "--device", "cpu", "--at", "30"]
    assert inspect.main([*words, "--out", str(tmp_path / "out"), "--ablate", "keep:2@0"]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "inspect.json").read_text(encoding="utf-8"))
    assert [layer["layer"] for layer in found["layers"]] == [0, 2]
    assert found["windows"] == [22, 22, 16]
    assert found["recall"] is None
    for name in ("bmojo-layers", "bmojo-layer-00", "bmojo-layer-02", "bmojo-ablations"):
        assert imread(tmp_path / "out" / f"{name}.png")[..., :3].std() > 0.02
    page = (tmp_path / "out" / "inspect.md").read_text(encoding="utf-8")
    shown = "".join(text_of(open_run(run, "cpu"), tmp_path / "story.txt", 60).shown(i) for i in (100, 101))
    assert shown == "de"
    final = set(found["layers"][0]["kept"]["final"])
    first = "".join(f"«{t}»" if i in final else t for i, t in enumerate(found["tokens"][:5]))
    assert f"```text\n{first.replace('␣', ' ')}" in page
    assert "keep:2@0" in printed
    assert "with archives" in printed


def test_the_command_on_a_task(tmp_path, capsys, quick):
    pytest.importorskip("matplotlib")
    run = task_run(tmp_path / "run")
    words = [str(run), "--tokens", "90", "--device", "cpu", "--at", "30", "--since", "8"]
    assert inspect.main([*words, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "inspect.json").read_text(encoding="utf-8"))
    opened = open_run(run, "cpu", tasks=True)
    rows = rows_of_task(opened, 2)
    assert found["tokens"] == [str(i) for i in rows.tokens.flatten().tolist()]
    with torch.no_grad():
        h, _, _ = opened.model.features(Batch(torch.from_numpy(rows.tokens)))
        nll, _ = opened.model.token_nll(h, torch.from_numpy(rows.targets))
    assert found["loss"] == pytest.approx(nll[torch.from_numpy(rows.loss_mask)].mean().item())
    assert [layer["layer"] for layer in found["recall"]["layers"]] == [0, 1]
    assert found["recall"]["rows"] == 16
    assert found["training"]["stats"]["kept_age"]["1"] == [0.3] * 8
    names = ["bmojo-ablations", "bmojo-layer-00", "bmojo-layer-01", "bmojo-layers", "bmojo-recall", "bmojo-training"]
    assert sorted(p.stem for p in (tmp_path / "out").glob("bmojo-*.png")) == names
    assert "answered right" in printed
    assert "nats per answer" in printed
    assert "since step 8" in printed

    (tmp_path / "story.txt").write_text(STORY, encoding="utf-8")
    assert inspect.main([*words, "--text", str(tmp_path / "story.txt"), "--out", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --text: run was trained on the task 'mqar'")
    assert error.count("\n") == 1


@pytest.mark.filterwarnings("error::RuntimeWarning", "error::UserWarning")
@pytest.mark.parametrize(
    "options", [{"m_e": 0}, {"m_f": 0}, {"window": 64}], ids=["no_eidetic", "no_fading", "one_chunk"]
)
def test_less_than_everything_is_drawn_too(options):
    pytest.importorskip("matplotlib")
    found = instrument.measure(model_of(dtype=torch.float32, **options), story())
    found |= {"run": "run", "step": 1, "since": None, "recall": None, "ablations": [], "training": None}
    assert pictures.overview(found).get_axes()
    assert pictures.page(found, found["layers"][0]).get_axes()
    assert instrument.summary(found)
    assert instrument.lists(found).startswith("## Layer 0") == (options.get("m_e") != 0)
