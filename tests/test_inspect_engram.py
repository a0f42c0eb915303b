"""Looking at an Engram: numbers against counts with dictionaries and the equations, ablations against models built without, and the
command end to end."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data import ByteTokenizer
from data.synthetic.induction import Induction
from data.synthetic.task import NO_ANSWER
from data.tokenizer import train_bpe
from eval import frequency, inspect
from eval.corpus_tasks import open_run_corpus
from eval.history import read_metrics
from eval.inspection import depth, engram_cache, engram_rows, engram_words, hooks
from eval.inspection import engram as instrument
from eval.inspection.beside import Beside, batches_of
from eval.inspection.engram_hooks import engrams
from eval.inspection.engram_rows import addressing_of
from eval.inspection.text import Text, cut, loss, read, text_of, text_of_rows
from eval.run import Ids, LoadedRun, open_run
from models import LM, Batch, UserError, build, model_config
from models.stores import build_store
from models.stores.base import StoreConfig
from tests.engram_naive import NaiveEngram
from tests.runs import SWIGLU, train, write_config
from tests.test_eval_runs import tiny_run, write_run
from tests.tools import assert_close, random_batch, segments, state_hash

STORY = "The cat sat on the mat.\n\nthe CAT Sat; the bat at the MAT, that cat\n" * 4
MEMORY = {"kind": "engram", "heads": 2, "row_width": 3, "base": 37, "store": {"std": 0.5}}
LAYERS = (1, 2)


def shape(branches: int = 1, **memory: Any) -> dict[str, Any]:
    block = {"mixer": {"kind": "attention", "heads": 2}, "channel": SWIGLU}
    at = {layer: {"memory": {**MEMORY, **memory}} for layer in LAYERS}
    return {"d_model": 16, "n_layers": 3, "branches": branches, "blocks": {"a": block}, "at": at}


def model_of(branches: int = 1, dtype: torch.dtype = torch.float64, **memory: Any) -> LM:
    """Of bytes whose case does not matter; weights so large that everything differs."""
    cfg = model_config({"vocab_size": 257, "init_std": 0.4, **shape(branches, **memory)})
    model = build(cfg, seed=1, dtype=dtype).eval()
    model.use_tokenizer(ByteTokenizer().json())
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for part in engrams(model).values():
            for p in (part.query_gain, part.key_gain, part.conv_gain, part.conv):
                if p is not None:
                    p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def story(width: int = 24, tokens: int = 100) -> Text:
    tokenizer = ByteTokenizer()
    document = [256, *tokenizer.encode(STORY), 256]
    return Text("a story", list(cut([document], width, tokens)), tokenizer)


@pytest.fixture(params=[1, 4])
def model(request: pytest.FixtureRequest) -> LM:
    return model_of(request.param)


def calls(model: LM, text: Text, layer: int) -> list[tuple[Tensor, Tensor]]:
    """Of each window by itself: what the memory of a layer read and what it added, [T, M, D]."""
    found = []

    def keep(part: Any, args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        x, y = args[0][0], output[0][0]
        found.append((x.view(len(x), -1, 16), y.view(len(x), -1, 16)))

    handle = engrams(model)[layer].register_forward_hook(keep)
    for window in text.windows:
        with torch.no_grad():
            model.features(Batch(torch.tensor([window[:-1]])))
    handle.remove()
    return found


def by_the_book(model: LM, layer: int, **change: Any) -> NaiveEngram:
    part = engrams(model)[layer]
    table = change.get("table", part.table.state_dict()["values"])
    return NaiveEngram(part, addressing_of(model), table)


# -- gates


@pytest.mark.parametrize("gate", ["signed_sqrt", "sigmoid"])
@pytest.mark.parametrize("branches", [1, 4])
def test_what_is_seen_follows_the_equations(branches: int, gate: str):
    model, text = model_of(branches, gate=gate), story()
    seen, nll = instrument.observe(model, text)
    for layer in LAYERS:
        book, at = by_the_book(model, layer), 0
        for window, (x, _) in zip(text.windows, calls(model, text, layer), strict=True):
            added, gates = book(x, window[:-1])
            value = torch.stack([_value(book, window[: t + 1], branches) for t in range(len(x))])
            gated = gates[..., None] * value[:, None]
            one = slice(at, at := at + len(x))
            torch.testing.assert_close(seen[layer].alpha[one], gates)
            torch.testing.assert_close(seen[layer].added[one], added.norm(dim=-1) / x.norm(dim=-1))
            torch.testing.assert_close(seen[layer].conv[one], (added - gated).norm(dim=-1) / gated.norm(dim=-1))
            s = gates.logit()
            score = s * s.abs() if gate == "signed_sqrt" else s
            torch.testing.assert_close(seen[layer].score[one], score)
        assert at == len(seen[layer].alpha) == len(text.ids) == len(nll) == 100
    assert seen[1].alpha.std() > 0.05
    assert nll.mean().item() == pytest.approx(loss(model, text), rel=1e-12)


def _value(book: NaiveEngram, tokens: Sequence[int], branches: int) -> Tensor:
    e = torch.cat([book.table[row] for row in book.rows([*tokens])])
    return book.w["project.weight"][branches * 16 :].detach() @ e


def test_numbers_of_a_layer(model: LM):
    text = story()
    found, seen = instrument.measure(model, text), instrument.observe(model, text)[0]
    for layer in found["layers"]:
        mine, n = seen[layer["layer"]], layer["branches"]
        assert np.array(layer["alpha"]).shape == (n, 100)
        assert layer["alpha"][n - 1] == pytest.approx(mine.alpha[:, n - 1].tolist(), rel=1e-3)
        for name in ("alpha", "added", "conv"):
            values = np.sort(getattr(mine, name).numpy(), axis=0)
            for low, _, middle, _, high in [layer["quantiles"][name][m] for m in range(n)]:
                assert low <= middle <= high
            assert layer["quantiles"][name][0][2] == pytest.approx((values[49, 0] + values[50, 0]) / 2, rel=1e-4)
        assert layer["numbers"]["gate"] == pytest.approx(mine.alpha.mean().item(), rel=1e-5)
        assert layer["numbers"]["flat"] == 0
    with torch.no_grad():
        engrams(model)[2].query_gain[0] = 0  # that branch agrees with nothing
    flat = [layer["numbers"]["flat"] for layer in instrument.measure(model, text)["layers"]]
    assert flat == [0, 1 / engrams(model)[2].branches]


def test_without_a_convolution_there_is_no_share_of_it():
    model, text = model_of(conv=0), story()
    layer = instrument.measure(model, text)["layers"][0]
    assert layer["numbers"]["conv"] is layer["quantiles"]["conv"] is None
    assert instrument.observe(model, text)[0][1].conv.max() < 1e-12


def test_one_gate_beside_branches_reads_their_mixture():
    model, text = model_of(4, per_branch=False), story()
    found = instrument.measure(model, text)
    assert [layer["branches"] for layer in found["layers"]] == [1, 1]
    assert "one_branch:0" not in instrument.standard(model)


def test_ngrams_are_spelled_as_they_are_looked_up(model: LM):
    text = story()
    canonical = addressing_of(model).canonical.tolist()
    grams = instrument.measure(model, text)["ngrams"]
    assert set(grams) == {"2", "3"}
    at = 0
    for window in text.windows:
        for t in range(len(window) - 1):
            words = []
            for token in [None, None, *window][t : t + 3]:
                same = [i for i in range(257) if token is not None and canonical[i] == canonical[token]]
                small = [i for i in same if not 65 <= i <= 90]
                words.append(text.shown((small or same)[0]) if same else "·")
            assert grams["3"][at] == " ".join(words)
            assert grams["2"][at] == " ".join(words[1:])
            at += 1
    assert grams["3"][3] == "t h e"


# -- rows


def test_rows_are_those_of_the_model():
    """Also in documents side by side, with padding, and cut after so many tokens."""
    model = model_of(orders=[2, 3, 4])
    addressing, T = addressing_of(model), 17
    valid = torch.tensor([[1] * 9 + [0, 0] + [1] * 6, [0, 0] + [1] * 12 + [0] * 3], dtype=torch.bool)
    batch = random_batch(2, T)._replace(cu_seqlens=segments([[3, 14], [15, 1]], T, pad_to=7), valid=valid)
    rows = model.prepare(batch, None)[0].rows
    tokens = engram_rows.gather(addressing, [batch, batch], 50)
    assert tokens.batch.tolist() == [0] * 27 + [1] * 23
    for layer, part in engrams(model).items():
        wanted = rows[str(layer)][valid].T
        found = torch.cat([order.rows for order in engram_rows.heads(addressing, part, tokens)])
        assert torch.equal(found, torch.cat([wanted, wanted[:, :23]], dim=1))


@pytest.mark.parametrize("seed", range(3))
def test_sharing_follows_a_dictionary(seed: int):
    """Who was last in each row, token by token; who shares a row at all."""
    rng = np.random.default_rng(seed)
    sizes, n = [7, 11, 13], 120
    kinds = rng.integers(0, 2**62, 20)
    mix = kinds[np.minimum(rng.geometric(0.15, n) - 1, 19)]
    rows = np.stack([mix % size for size in sizes])
    order = engram_rows.Heads(torch.from_numpy(mix), torch.from_numpy(rows), sizes)
    found = engram_rows.sharing(order)

    last: list[dict[int, int]] = [{} for _ in sizes]
    told = []
    for t in range(n):
        what = []
        for head, row in enumerate(rows[:, t].tolist()):
            before = last[head].get(row)
            what.append("first" if before is None else "hit" if before == mix[t] else "different")
            last[head][row] = int(mix[t])
        told.append(what)
    flags = {
        name: np.array([[w == name for w in what] for what in told], dtype=float).T
        for name in ("first", "hit", "different")
    }
    flags["any"], flags["all"] = flags["different"].max(0), flags["different"].min(0)
    types = sorted(set(mix.tolist()))
    for name, flag in flags.items():
        by_type = np.mean([flag[..., mix == kind].mean(-1) for kind in types], axis=0)
        assert found["collisions"]["token"][name] == pytest.approx(flag.mean(-1))
        assert found["collisions"]["type"][name] == pytest.approx(by_type)
    assert 0 < found["collisions"]["token"]["all"] < found["collisions"]["token"]["any"]

    assert found["types"] == len(types)
    together = [Counter(kind % size for kind in types) for size in sizes]
    assert found["occupied"] == pytest.approx([len(c) / size for c, size in zip(together, sizes, strict=True)])
    shares = [[c[kind % size] > 1 for kind in types] for c, size in zip(together, sizes, strict=True)]
    assert found["shared"] == pytest.approx(np.mean(shares, axis=1))
    assert found["shared_in_all"] == pytest.approx(np.all(shares, axis=0).mean())
    assert found["ideal"] == pytest.approx([1 - math.exp(-len(types) / size) for size in sizes])


def test_distinct_rows_of_a_batch():
    rows, batch = torch.randint(0, 9, (3, 40)), torch.arange(40) // 15
    pairs = {(b, row) for head in rows.tolist() for b, row in zip(batch.tolist(), head, strict=True)}
    assert engram_rows.unique_ratio(rows, batch, 9) == pytest.approx(len(pairs) / 120)


@pytest.mark.parametrize("seed", range(4))
def test_caches_hold_what_their_rule_says(seed: int):
    rng = np.random.default_rng(seed)
    rows = (rng.zipf(1.4, 300) % 40).astype(np.int64)
    capacities = [1, 2, 3, 8, 20, 50]
    assert engram_cache.lru_hits(rows, capacities) == [_naive(rows.tolist(), c, "lru") for c in capacities]
    least = [engram_cache.lfu_hits(rows.tolist(), c) for c in capacities]
    assert least == [_naive(rows.tolist(), c, "lfu") for c in capacities]
    assert least[-1] == len(rows) - len(set(rows.tolist()))
    assert len(set(least)) > 3
    often = Counter(rows.tolist()).most_common()
    assert engram_cache.best_hits(rows, capacities) == [sum(n for _, n in often[:c]) for c in capacities]


def _naive(rows: Sequence[int], capacity: int, policy: str) -> int:
    held: dict[int, tuple[int, int]] = {}  # row -> (uses since it came, last time)
    hits = 0
    for time, row in enumerate(rows):
        if row in held:
            hits += 1
        elif len(held) == capacity:
            del held[min(held, key=lambda r: held[r] if policy == "lfu" else held[r][1])]
        held[row] = (held.get(row, (0, 0))[0] + 1, time)
    return hits


def test_hit_rates_of_a_table():
    rows = torch.from_numpy(np.random.default_rng(0).zipf(1.3, (4, 200)) % 1000)
    found = engram_rows.caches(rows, 1000)
    asked = [row for token in rows.T.tolist() for row in token]
    assert found["rows"] == [1, 3, 10, 30, 100, 300]
    for policy in ("lru", "lfu"):
        assert found[policy] == pytest.approx([_naive(asked, c, policy) / 800 for c in found["rows"]])
    assert found["ceiling"] == pytest.approx(1 - len(set(asked)) / 800)
    assert found["lookups"] == 800


@pytest.mark.parametrize("rule", ["rowwise", "lazy_adam", "adam"])
def test_touched_rows_of_a_table(rule: str):
    table = build_store(StoreConfig(rule=rule, std=0.1), 50, 4)
    table.reset(torch.Generator().manual_seed(0))
    fresh = engram_rows.contents(table, torch.tensor([3, 3, 4]))
    assert (fresh["touched"], fresh["looked_up"], set(fresh["rms"])) == (None, 2 / 50, {"all"})
    assert sum(fresh["rms"]["all"]["histogram"]) == 50
    table.step(torch.tensor([2, 7, 9]), torch.ones(3, 4), 5.0, 0.9, 0.95, 1e-8)
    found = engram_rows.contents(table, torch.tensor([3]))
    values = table.state_dict()["values"]
    rms = (values**2).mean(1).sqrt().tolist()
    assert found["touched"] == pytest.approx(3 / 50)
    assert found["rms"]["touched"]["mean"] == pytest.approx(np.mean([rms[i] for i in (2, 7, 9)]), rel=1e-5)
    rest = [r for i, r in enumerate(rms) if i not in (2, 7, 9)]
    assert found["rms"]["never"]["quantiles"][2] == pytest.approx(np.median(rest), rel=1e-5)
    assert sum(found["rms"]["never"]["histogram"]) == 47
    assert found["top"] == pytest.approx(max(rms), rel=1e-4)


# -- words


@pytest.mark.parametrize("exponent", [0.8, 1.1, 1.6])
def test_the_exponent_of_drawn_counts(exponent: float):
    weight = np.arange(1.0, 3001) ** -exponent
    counts = np.random.default_rng(0).multinomial(400_000, weight / weight.sum())
    found = engram_words.zipf(np.random.default_rng(1).permutation(counts[counts > 0]))
    assert found["exponent"] == pytest.approx(exponent, abs=0.03)
    ranks, times = found["curve"]
    assert (ranks[0], times[0], times[-1]) == (1, counts.max(), counts[counts > 0].min())
    exact = engram_words.zipf(np.round(1e9 * weight))
    assert exact["exponent"] == pytest.approx(exponent, abs=1e-6)
    assert engram_words.zipf(np.array([50, 9, 9, 1])) == {
        "exponent": None,
        "ranks": 1,
        "curve": [[1, 2, 3, 4], [50, 9, 9, 1]],
    }


def test_kinds_of_ngrams_are_those_of_tuples():
    back = torch.randint(0, 4, (3, 200))
    kinds = engram_words.types(back).tolist()
    columns = list(zip(*back.tolist(), strict=True))
    assert len(set(zip(kinds, columns, strict=True))) == len(set(kinds)) == len(set(columns)) > 40


def test_classes_of_tokens(model: LM):
    addressing, text = addressing_of(model), story()
    canonical = addressing.canonical.tolist()
    read_ = torch.tensor([canonical[i] for i in text.ids])
    found = engram_words.compression(addressing, read_, text.shown)
    size = Counter(canonical)
    assert (found["tokens"], found["classes"]) == (257, len(size))
    assert found["merged"] == pytest.approx(sum(size[canonical[i]] > 1 for i in text.ids) / 100)
    assert 0 < found["merged"] < 1
    biggest, times = size.most_common(1)[0]
    assert found["largest"][0] == {
        "size": times,
        "tokens": [text.shown(i) for i in range(257) if canonical[i] == biggest],
    }
    assert {"size": 2, "tokens": ["A", "a"]} in found["largest"]


def test_a_model_without_compression_has_no_classes():
    found = engram_words.compression(addressing_of(model_of(compression="none")), torch.arange(257), str)
    assert (found["reduction"], found["merged"], found["largest"]) == (0, 0, [])


# -- depth


def test_the_lens_reads_every_layer(model: LM):
    text = story()
    sums, tokens = np.zeros(3), 0
    for window in text.windows:
        behind: list[Tensor] = []
        handles = [b.register_forward_hook(lambda _, __, out, to=behind: to.append(out[0])) for b in model.layers]
        with torch.no_grad():
            model.features(Batch(torch.tensor([window[:-1]])))
        for handle in handles:
            handle.remove()
        flat = [x[0] if x.ndim == 3 else x[0].mean(1) for x in behind]
        ps = [(model.norm(x) @ model.head_weight.T).softmax(-1).detach().numpy() for x in flat]
        for t in range(len(window) - 1):
            sums += [float((ps[-1][t] * np.log(ps[-1][t] / p[t])).sum()) for p in ps]
            tokens += 1
    found = depth.lens(model, text).numpy()
    assert found == pytest.approx(sums / tokens, rel=1e-9, abs=1e-12)
    assert found[-1] == 0
    assert (found[:-1] > 0.01).all()


def naive_hsic(k: np.ndarray, other: np.ndarray) -> float:
    """Kernels, element by element of the formula."""
    n = len(k)
    k, other = (x - np.diag(np.diag(x)) for x in (k, other))
    one = np.ones(n)
    total = np.trace(k @ other) + one @ k @ one * (one @ other @ one) / ((n - 1) * (n - 2))
    return (total - 2 / (n - 2) * (one @ k @ other @ one)) / (n * (n - 3))


def kernel(x: Tensor) -> Tensor:
    return (x @ x.mT)[None]


def test_the_criterion_is_the_formula_and_unbiased():
    generator = torch.Generator().manual_seed(0)

    def draw(n: int, d: int) -> Tensor:
        return torch.randn(n, d, generator=generator, dtype=torch.float64)

    a, b = draw(9, 4), draw(9, 6)
    assert depth.hsic(kernel(a), kernel(b)).item() == pytest.approx(naive_hsic((a @ a.T).numpy(), (b @ b.T).numpy()))
    apart = torch.stack([depth.hsic(kernel(draw(6, 3)), kernel(draw(6, 3))) for _ in range(4000)]).flatten()
    assert abs(apart.mean()) < 4 * apart.std() / 4000**0.5


def test_likeness_does_not_see_rotation_scale_or_shift():
    x = torch.randn(40, 5, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    turned = 3 * x @ turn
    cross, first, second = (depth.hsic(kernel(p), kernel(q)) for p, q in ((x, turned), (x, x), (turned, turned)))
    assert (cross / (first * second).sqrt()).item() == pytest.approx(1, rel=1e-12)
    moved = depth.hsic(kernel(x + 7), kernel(turned))
    assert moved.item() == pytest.approx(cross.item(), rel=1e-6)
    other = torch.randn(40, 5, dtype=torch.float64)
    assert abs(depth.hsic(kernel(x), kernel(other)) / first) < 0.5


def test_likeness_of_layers_adds_up_over_minibatches(model: LM, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(depth, "MINIBATCH", 30)
    text, other = story(), model_of(conv=0)
    found = depth.cka(model, other, text)
    streams = [[torch.cat(layers) for layers in zip(*depth.streams(m, text), strict=True)] for m in (model, other)]
    parts = [slice(0, 30), slice(30, 60), slice(60, 90), slice(90, 100)]
    assert [len(x) for x in streams[0]] == [100] * 3

    def added(x: Tensor, y: Tensor) -> float:
        ks = [[(t[part] @ t[part].T).numpy() for t in (x, y)] for part in parts]
        return sum(naive_hsic(k, other) for k, other in ks)

    for i, x in enumerate(streams[0]):
        for j, y in enumerate(streams[1]):
            wanted = added(x, y) / math.sqrt(added(x, x) * added(y, y))
            assert found[i, j].item() == pytest.approx(wanted, rel=1e-9)
    assert depth.cka(model, model, text).diagonal().tolist() == pytest.approx([1, 1, 1])
    assert found.std() > 0.01


def test_where_a_layer_stands_among_others():
    likeness = torch.zeros(2, 8)
    likeness[0] = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, -0.9, 0.05])
    likeness[1, 2] = 0.7
    found = depth.soft_alignment(likeness)
    assert found.tolist() == pytest.approx([(0.2 * 1 + 0.3 * 2 + 0.4 * 3 + 0.5 * 4 + 0.6 * 5) / 2.0, 2])
    assert depth.soft_alignment(likeness[:, :3])[0] == pytest.approx((0.2 * 1 + 0.3 * 2) / 0.6)


# -- ablations


@pytest.mark.parametrize("branches", [1, 4])
def test_no_memory_is_the_model_without_it(branches: int):
    model, text = model_of(branches), story()
    cfg = {"vocab_size": 257, **shape(branches)} | {"at": {}}
    less = build(model_config(cfg), dtype=torch.float64).eval()
    missing = less.load_state_dict(model.state_dict(), strict=False)
    assert not missing.missing_keys
    with instrument.ablate(model, "no_memory"):
        without = loss(model, text)
    assert without == pytest.approx(loss(less, text), rel=1e-12)
    assert abs(without - loss(model, text)) > 1e-3
    with instrument.ablate(model, "no_memory@2"):
        one = loss(model, text)
        assert all((y == 0).all() for _, y in calls(model, text, 2))
        assert any((y != 0).any() for _, y in calls(model, text, 1))
    handle = engrams(model)[2].register_forward_hook(lambda _, __, out: (torch.zeros_like(out[0]), *out[1:]))
    assert loss(model, text) == pytest.approx(one, rel=1e-12)
    handle.remove()


@pytest.mark.parametrize("gate", ["signed_sqrt", "sigmoid"])
@pytest.mark.parametrize("branches", [1, 4])
def test_a_mean_gate_is_the_same_for_all_tokens(branches: int, gate: str):
    """The equations with that number in place of the gate; windows of one length, so that all are one forward."""
    model, text = model_of(branches, gate=gate), story(25, 100)
    mean = instrument.observe(model, text)[0][1].alpha.mean(0)
    outputs = []
    with instrument.ablate(model, "mean_gate@1"):
        handle = engrams(model)[1].register_forward_hook(lambda _, args, out: outputs.append((args[0], out[0])))
        list(read(model, text))
        handle.remove()
    book = by_the_book(model, 1)
    book.gate = lambda h, key, m: mean[m]
    ((x, y),) = outputs
    for i, window in enumerate(text.windows):
        added, _ = book(x[i].view(25, branches, 16), window[:-1])
        assert_close(y[i].view(25, branches, 16), added.detach(), "forms")


def test_one_order_is_a_table_without_the_others(model: LM):
    text = story()
    with instrument.ablate(model, "one_order:3"):
        without = loss(model, text)
    plain = loss(model, text)
    for layer, part in engrams(model).items():
        index = addressing_of(model).keys.index(layer)
        start = int(addressing_of(model).offsets[index, 1, 0])  # of order 3
        part.table.state_dict()["values"][:start] = 0
    assert loss(model, text) == pytest.approx(without, rel=1e-12)
    assert abs(plain - without) > 1e-3


def test_shuffled_rows_are_those_of_other_tokens(model: LM):
    text, kept = story(), []

    def watch(part: Any, fuse: Any) -> Any:
        def fused(x: Tensor, rows: Tensor, ctx: Any, state: Any) -> Any:
            kept.append(rows[ctx.valid] if ctx.valid is not None else rows.flatten(0, 1))
            return fuse(x, rows, ctx, state)

        return fused

    with hooks.changed(list(engrams(model).values()), "fuse", watch):
        plain = loss(model, text)
        with instrument.ablate(model, "shuffled_rows"):
            shuffled = loss(model, text)
    assert len(kept) == 4
    for before, after in zip(kept[:2], kept[2:], strict=True):
        assert (before != after).flatten(1).any(1).double().mean() > 0.8
        assert sorted(before.flatten(1).tolist()) == sorted(after.flatten(1).tolist())
    assert abs(plain - shuffled) > 1e-3
    with torch.no_grad():
        for part in engrams(model).values():
            part.table.state_dict()["values"][:] = 0.3  # all rows alike: nothing to shuffle
    with instrument.ablate(model, "shuffled_rows"):
        assert loss(model, text) == pytest.approx(loss(model, text), rel=1e-12)


def test_one_branch_alone_is_written():
    model, text = model_of(4), story()
    before = calls(model, text, 1)
    with instrument.ablate(model, "one_branch:2"):
        for (_, whole), (_, y) in zip(before, calls(model, text, 1), strict=True):
            assert (y[:, [0, 1, 3]] == 0).all()
            torch.testing.assert_close(y[:, 2], whole[:, 2])


def test_ablations_stack_in_any_order(model: LM):
    text, found = story(), []
    for spec in ("mean_gate+one_order:2", "one_order:2+mean_gate"):
        with instrument.ablate(model, spec):
            found.append(loss(model, text))
    with instrument.ablate(model, "one_order:2"):
        alone = loss(model, text)
    assert found[0] == found[1] != alone
    values = {part: part.table.state_dict()["values"] for part in engrams(model).values()}
    for layer, part in engrams(model).items():
        start = int(addressing_of(model).offsets[addressing_of(model).keys.index(layer), 1, 0])
        values[part][start:] = 0
    with instrument.ablate(model, "mean_gate"):
        assert loss(model, text) == pytest.approx(found[0], rel=1e-12)


def test_all_that_can_be_told_apart_is_tried():
    both = ["no_memory", "mean_gate", "shuffled_rows", "one_order:2", "one_order:3"]
    layers = ["no_memory@1", "no_memory@2"]
    assert instrument.standard(model_of()) == both + layers
    assert instrument.standard(model_of(4)) == both + [f"one_branch:{m}" for m in range(4)] + layers
    assert instrument.standard(model_of(orders=[2])) == both[:3] + layers


def test_looking_changes_no_byte(model: LM):
    text = story()

    def everything() -> tuple:
        hooked = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        return state_hash(model), ["fuse" in vars(p) for p in engrams(model).values()], hooked, model.training

    before, output = everything(), loss(model, text)
    assert before[1] == [False, False]
    instrument.measure(model, text)
    depth.cka(model, model, text)
    for spec in instrument.standard(model):
        with instrument.ablate(model, spec):
            instrument.measure(model, text)
    with pytest.raises(ZeroDivisionError), instrument.ablate(model, "no_memory"):
        raise ZeroDivisionError
    assert everything() == before
    assert loss(model, text) == output


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("no_memry", "did you mean 'no_memory'"),
        ("one_order", "one_order:N"),
        ("no_memory:1", "no_memory[@LAYER]"),
        ("no_memory@0", "no layer '0'; there are 1 to 2"),
        ("one_order:4", "no order '4'; there are 2 to 3"),
        ("mean_gate+one_branch:1", "no branch '1'; there are 0 to 0"),
    ],
)
def test_ablations_that_cannot_be(spec: str, words: str):
    model = model_of()
    for call in (lambda: instrument.check(model, spec), lambda: instrument.ablate(model, spec).__enter__()):
        with pytest.raises(UserError, match=r"--ablate") as error:
            call()
        assert words in str(error.value)


def test_what_changed_between_two_checkpoints(model: LM):
    branches = engrams(model)[1].branches
    earlier, text = model_of(branches), story()
    same = instrument.changes(earlier, model, text)["layers"]
    assert [(c["rows_changed"], c["row_change"], c["gate_change"]) for c in same] == [(0, None, 0)] * 2
    table = engrams(model)[2].table
    rows = sorted(set(model.prepare(Batch(torch.tensor([text.ids])), None)[0].rows["2"].flatten().tolist()))[:5]
    table.state_dict()["values"][rows] *= 1.5
    first, second = instrument.changes(earlier, model, text)["layers"]
    assert first == same[0]
    assert second["rows_changed"] == pytest.approx(5 / table.rows, rel=1e-5)
    assert second["row_change"] == pytest.approx(0.5)
    was, now = (instrument.observe(m, text)[0][2].alpha for m in (earlier, model))
    assert second["gate"] == pytest.approx(was.mean().item(), rel=1e-5)
    assert second["gate_change"] == pytest.approx((was - now).abs().mean().item(), rel=1e-4)
    assert second["gate_change"] > 0


# -- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("matplotlib")
    return tmp_path_factory.mktemp("engram")


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """Twelve steps on text."""
    done = train(write_config(folder, shape(), name="engram", train={"keep": 9}))
    assert done.code == 0, done.err
    return done.run


@pytest.fixture(scope="module")
def dense(folder: Path) -> Path:
    """The same data, no memory, one layer less."""
    done = train(write_config(folder, {**shape(), "at": {}, "n_layers": 2}, name="dense"))
    assert done.code == 0, done.err
    return done.run


def test_the_command(trained: Path, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from matplotlib.image import imread

    out = tmp_path / "out"
    words = [str(trained), "--out", str(out), "--tokens", "300", "--device", "cpu", "--train-tokens", "2000"]
    assert inspect.main([*words, "--since", "3", "--baseline", str(dense)]) == 0
    printed = capsys.readouterr().out
    raw = (out / "inspect.json").read_text(encoding="utf-8")
    found = json.loads(raw)
    assert raw == json.dumps(found, ensure_ascii=False, allow_nan=False) + "\n"
    assert (found["step"], found["kind"], len(found["tokens"])) == (12, "engram", 300)
    run = open_run(trained, "cpu")
    text = text_of(run, None, 300)
    assert found["loss"] == pytest.approx(loss(run.model, text))
    names = [a["name"] for a in found["ablations"]]
    assert names == instrument.standard(run.model)
    with instrument.ablate(run.model, "one_order:2"):
        assert found["ablations"][names.index("one_order:2")]["loss"] == pytest.approx(loss(run.model, text))

    assert found["counted"]["tokens"] == 2000
    batches = math.ceil(2000 / (8 * 32))  # a step has 8 rows of 32 tokens, not all of which are some
    assert batches <= found["counted"]["batches"] <= 12
    other = found["baseline"]
    assert other["loss"] == pytest.approx(loss(open_run(dense, "cpu").model, text), rel=1e-5)
    assert (len(found["lens"]), len(other["lens"]), len(other["cka"]), len(other["cka"][0])) == (3, 2, 3, 2)
    assert found["lens"][-1] == other["lens"][-1] == 0
    assert len(other["alignment"]) == 3
    assert all(0 < now["rows_changed"] < 1 for now in found["since"]["layers"])
    touched = [table["values"]["touched"] for table in found["tables"]]
    assert all(0 < t <= 1 for t in touched)
    curves = found["training"]
    logged = [r for r in read_metrics(trained) if "losses" in r]
    assert curves["stats"]["gate"]["1"][-1] == pytest.approx(logged[-1]["stats"]["layers.1.memory.gate"], rel=1e-5)

    made = ["engram-ablations", "engram-cka", "engram-frequency", "engram-gates", "engram-layers", "engram-rows"]
    made.append("engram-training")
    assert sorted(p.stem for p in out.glob("engram-*.png")) == made
    page = (out / "inspect.md").read_text(encoding="utf-8")
    for name in made:
        assert f"![{name}]({name}.png)" in page
        assert imread(out / f"{name}.png")[..., :3].std() > 0.02
    for title in ("## Loss by frequency, order 3", "## Caches", "## Compression", "## Layer 2"):
        assert title in page
    assert "one_order:2" in printed
    assert "since step 3:" in printed

    again = tmp_path / "again"  # everything that is shown is in the JSON
    inspect.write(found, again)
    inspect.write_page(open_run(trained, "cpu"), again)
    for path in out.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


@pytest.mark.parametrize("tables", ["host", "mmap"])
def test_tables_may_be_anywhere(trained: Path, tables: str):
    beside = Beside(1000)
    here, there = (open_run(trained, "cpu", tables=kind) for kind in ("resident", tables))
    text = text_of(here, None, 200)
    found = [inspect.look(run, text, ["shuffled_rows"], beside=beside) for run in (here, there)]
    for key in ("loss", "layers", "tables", "ablations"):
        assert found[0][key] == found[1][key]


def test_counted_is_what_it_was_trained_on(trained: Path):
    """All rows that training touched; but for those of nothing but PAD, which places without a token look up."""
    run, corpus = open_run(trained, "cpu"), open_run_corpus(trained)
    addressing, everything = addressing_of(run.model), 10**9
    tokens = engram_rows.gather(addressing, batches_of(run, corpus), everything)
    assert int(tokens.batch[-1]) == 11
    nothing = run.model.prepare(Batch(torch.zeros(1, 1, dtype=torch.int64), valid=torch.tensor([[False]])), None)[
        0
    ].rows
    for layer, part in engrams(run.model).items():
        rows = torch.cat([order.rows for order in engram_rows.heads(addressing, part, tokens)])
        touched = set((part.table.state_dict()["steps"] > 0).nonzero().flatten().tolist())
        counted = set(rows.flatten().tolist())
        assert touched == counted | set(nothing[str(layer)].flatten().tolist())
        values = engram_rows.contents(part.table, rows)
        assert values["touched"] == len(touched) / part.table.rows
        assert values["looked_up"] == len(counted) / part.table.rows


def test_loss_by_frequency(trained: Path):
    """Against a count with a dictionary."""
    run, corpus = open_run(trained, "cpu"), open_run_corpus(trained)
    text, limit = text_of(run, None, 400), 3000
    seen, nll = instrument.observe(run.model, text)
    found = instrument.more(run, text, Beside(limit))["frequency"]["3"]
    times: Counter[tuple[int, ...]] = Counter()
    read_ = 0
    for shards, _ in corpus.train:
        for document in (shards.read(i).tolist() for i in range(len(shards))):
            if read_ < limit:
                whole = [corpus.tokenizer.bos_id, *document]
                times.update(zip(whole, whole[1:], whole[2:]))
                read_ += len(document)
    buckets, at = defaultdict(list), 0
    for window in text.windows:
        for t in range(len(window) - 1):
            n = times[tuple(window[t - 2 : t + 1])] if t > 1 else -1
            name = "window begins" if n < 0 else "never" if not n else f"{10 ** (len(str(n)) - 1)}-"
            buckets[name].append(at)
            at += 1
    assert found["tokens_counted"] == read_
    assert sum(found["tokens"]) == at == 400
    assert len(found["names"]) == len(buckets) >= 4
    with instrument.ablate(run.model, "no_memory"):
        without = torch.cat([x for x, _ in read(run.model, text)])
    for i, name in enumerate(found["names"]):
        mine = next(places for key, places in buckets.items() if name.startswith(key))
        assert found["tokens"][i] == len(mine)
        assert found["losses"]["whole"][i] == pytest.approx(nll[mine].mean().item(), rel=1e-4)
        assert found["losses"]["without memory"][i] == pytest.approx(without[mine].mean().item(), rel=1e-4)
        assert found["gates"]["1"][i] == pytest.approx(seen[1].alpha[mine].mean().item(), rel=1e-4)


def test_loss_by_frequency_is_of_what_is_asked(trained: Path):
    """Of a text on which every second token has an answer, and the first of a window has none."""
    run = open_run(trained, "cpu")
    text = text_of(run, None, 200)
    some = replace(text, answers=[[t if i % 2 else NO_ANSWER for i, t in enumerate(row)] for row in text.targets])
    nll = instrument.observe(run.model, text)[1]
    all_of, found = (instrument.more(run, t, Beside(3000))["frequency"]["2"] for t in (text, some))
    assert all(found[name] == all_of[name] for name in ("names", "tokens", "gates"))
    whole = dict(zip(found["names"], found["losses"]["whole"], strict=True))
    assert whole.pop("window begins") is None
    batches = [Batch(torch.tensor([window[:-1]])) for window in text.windows]
    counts = frequency.count(open_run_corpus(trained), 2, 3000)
    times = torch.cat([frequency.seen_in_training(batch, counts)[0] for batch in batches])
    places = torch.cat([torch.arange(len(row)) for row in text.targets])
    few = (times >= 1) & (times < 10)
    assert 0 < (few & (places % 2 == 1)).sum() < few.sum()
    assert whole["1-9"] == pytest.approx(nll[few & (places % 2 == 1)].mean().item(), rel=1e-4)


def test_a_run_on_a_task(tmp_path: Path):
    """A loss is the mean over answers: of the run, without its memory, and of a baseline."""
    pytest.importorskip("matplotlib")
    model, other = model_of(), model_of(conv=0)
    task = {"synthetic": {"kind": "induction", "vocab_size": 257}, "seq_len": 32}
    run, baseline = (
        LoadedRun(m, Ids(257), tmp_path / name, name, {"data": task}, 0, "none")
        for m, name in ((model, "run"), (other, "baseline"))
    )
    text = text_of_rows(run, Induction(vocab_size=257).rows(np.arange(4), 32, 0, "val"))
    found = inspect.look(run, text, ["no_memory"], beside=Beside(0, baseline))
    assert found["loss"] == pytest.approx(loss(model, text))
    assert found["baseline"]["loss"] == pytest.approx(loss(other, text), rel=1e-5)
    with instrument.ablate(model, "no_memory"):
        without = loss(model, text)
    assert len({round(x, 6) for x in (found["loss"], found["baseline"]["loss"], without)}) == 3
    said = inspect.summary(found)
    assert f"loss {loss(model, text):.4f} nats per answer" in said
    assert f"loss {loss(other, text):.4f} nats per answer" in said
    change = next(line for line in said.splitlines() if line.startswith("| no_memory")).split("|")[3]
    assert float(change) == pytest.approx(without - loss(model, text), abs=1e-4)
    inspect.write(found, tmp_path / "out")
    assert "nan" not in (tmp_path / "out" / "inspect.md").read_text(encoding="utf-8")


def test_branches_on_a_text_without_the_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    run = write_run(tmp_path / "run", model_of(4, torch.float32, orders=[2, 3, 4]), seq_len=30)
    (run / "metrics.jsonl").unlink()
    (tmp_path / "story.txt").write_text(STORY, encoding="utf-8")
    out = tmp_path / "out"
    words = [str(run), "--text", str(tmp_path / "story.txt"), "--out", str(out), "--device", "cpu", "--tokens", "200"]
    assert inspect.main([*words, "--ablate", "one_branch:3"]) == 0
    found = json.loads((out / "inspect.json").read_text(encoding="utf-8"))
    assert found["counted"]["source"].startswith("the text itself (")
    assert found["counted"]["tokens"] == 200
    assert found["frequency"] is found["baseline"] is found["training"] is None
    assert [len(layer["alpha"]) for layer in found["layers"]] == [4, 4]
    assert sorted(p.stem for p in out.glob("engram-*.png")) == [
        "engram-ablations", "engram-gates", "engram-layers", "engram-rows",
    ]  # fmt: skip
    assert "| one_branch:3 |" in capsys.readouterr().out


@pytest.mark.filterwarnings("error::RuntimeWarning", "error::UserWarning")
@pytest.mark.parametrize("options", [{}, {"conv": 0, "orders": [2]}])
def test_a_diverged_model_is_drawn_too(tmp_path: Path, options: dict[str, Any]):
    pytest.importorskip("matplotlib")
    model = model_of(dtype=torch.float32, **options)
    with torch.no_grad():
        model.embed.weight.fill_(math.nan)
        engrams(model)[1].table.state_dict()["values"][:] = math.nan
    run = open_run(write_run(tmp_path / "run", model), "cpu")
    found = inspect.look(run, story(), ["no_memory"], beside=Beside(baseline=run))
    assert found["loss"] is found["layers"][0]["numbers"]["gate"] is found["lens"][0] is None
    inspect.write(found, tmp_path / "out")
    assert "loss nan" in inspect.summary(found)


def test_mistakes_are_one_line(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"

    def said(*words: str) -> str:
        assert inspect.main([*words, "--out", str(out), "--device", "cpu"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert not out.exists()
        return error

    plain = tiny_run(tmp_path / "plain").dir
    assert "no such part with an instrument" in said(str(plain), "--part", "engram")
    assert "--part gmt: the model has no such part" in said(str(trained), "--part", "gmt")
    assert "--train-tokens" in said(str(trained), "--train-tokens", "-1")
    assert "did you mean 'mean_gate'" in said(str(trained), "--ablate", "mean_gat")
    cell = {"kind": "gmt", "slots": 4, "width": 3}
    gmt = build(model_config({"vocab_size": 257, **shape(), "blocks": {"a": {"channel": cell}}, "at": {}}))
    gmt_run = write_run(tmp_path / "gmt", gmt.eval())
    (tmp_path / "story.txt").write_text(STORY, encoding="utf-8")
    text = ("--text", str(tmp_path / "story.txt"))
    assert "--baseline: nothing of a gmt part" in said(str(gmt_run), "--baseline", str(trained), *text)


def test_a_baseline_reads_the_same_tokens(trained: Path, tmp_path: Path):
    run = open_run(trained, "cpu")
    other = write_run(tmp_path / "bpe", model_of(dtype=torch.float32))
    train_bpe([STORY], 257, progress=False).save(other / "tokenizer")
    with pytest.raises(UserError, match="another tokenizer"):
        inspect.check_beside(run, Beside(baseline=open_run(other, "cpu")))


def test_a_model_of_both_kinds_is_asked_which(tmp_path: Path):
    pytest.importorskip("matplotlib")
    cell = {"kind": "gmt", "slots": 4, "width": 3}
    block = {"mixer": {"kind": "attention", "heads": 2}, "channel": cell}
    cfg = {"vocab_size": 257, **shape(), "blocks": {"a": block}}
    run = open_run(write_run(tmp_path / "run", build(model_config(cfg)).eval()), "cpu")
    assert inspect.kind_of(run.model) == "gmt"
    assert inspect.look(run, story(), [], part="engram")["kind"] == "engram"
