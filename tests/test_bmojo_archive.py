"""B'MOJO's memory in storage: the host object by itself, against lists and sorts; then the layer that reads it, against loops."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models import Batch, UserError
from models import state as states
from models.mixers import bmojo_archive
from models.mixers.bmojo_archive import Archive, ArchiveConfig, Rows, Shelf
from tests import bmojo_naive
from tests.bmojo_naive import Keys, NaiveBMojo, keys_of
from tests.bmojo_tools import DEDUP, EVERY_MODE, MODES, build, memory_of, mixer, pieces, stream, whole
from tests.tools import CAUSAL, assert_close, in_pieces, random_batch, same_bytes

pytestmark = pytest.mark.usefixtures("poison")

HEADS, WIDTH = 2, 4


def some(n: int, first: int = 0, width: int = WIDTH) -> Rows:
    k, v = torch.randn(2, n, HEADS, width, dtype=torch.float64)
    return Rows(k, v, torch.arange(first, first + n), torch.rand(n))


def empty(batch: int = 1, width: int = WIDTH, **options: Any) -> Archive:
    return Archive.empty(ArchiveConfig(**options), batch, HEADS, width, torch.float64)


def filled(archive: Archive, sizes: list[int], width: int = WIDTH) -> tuple[Archive, list[Rows]]:
    puts, first = [], 0
    for n in sizes:
        puts.append(some(n, first, width))
        archive, first = archive.put(0, puts[-1]), first + n
    return archive, puts


def best(rows: Rows, query: Tensor, count: int) -> list[int]:
    """Positions that some head ranks among its ``count`` best."""
    found: set[int] = set()
    for head in range(HEADS):
        products = [(-float(k[head] @ query[head]), int(p)) for k, p in zip(rows.k, rows.position, strict=True)]
        found |= {p for _, p in sorted(products)[:count]}
    return sorted(found)


# -- the host object


def test_a_search_finds_the_best_of_every_head():
    archive, puts = filled(empty(rows=3), [5, 0, 1, 70, 200])
    rows = Rows.joined(puts)
    assert same_bytes(archive.held(0), rows)
    for _ in range(10):
        query = torch.randn(HEADS, WIDTH, dtype=torch.float64)
        found = archive.search(0, query)
        assert found.position.tolist() == best(rows, query, 3)
        assert same_bytes(found, rows.at(found.position))
    assert empty(rows=3).search(0, query).count == 0
    few, puts = filled(empty(rows=9), [4])
    assert same_bytes(few.search(0, query), puts[0])


def test_of_equals_the_first_are_found():
    rows = some(40)
    rows = rows._replace(k=rows.k[:1].expand_as(rows.k))
    archive = empty(rows=3).put(0, rows.at(slice(20, 40))).put(0, rows.at(slice(0, 20)))
    assert archive.search(0, torch.ones(HEADS, WIDTH)).position.tolist() == [20, 21, 22]


def test_rows_of_another_order_and_low_ones():
    """They are filed by position; those below ``min_score`` are not."""
    rows = some(20)
    archive = empty(min_score=0.5).put(0, rows.at(torch.randperm(20)))
    assert same_bytes(archive.held(0), rows.at(rows.score >= 0.5))


@pytest.mark.parametrize("drop", ["oldest", "lowest"])
def test_bounded(drop: str):
    """More rows than fit make others leave, and memory does not grow; ties of the lowest score leave newest first."""
    archive, held = empty(max_rows=50, drop=drop), []
    for n in range(100):
        rows = some(n % 7, 7 * n)
        rows = rows._replace(score=(rows.score * 4).round() / 4)
        archive = archive.put(0, rows)
        held += list(zip(rows.position.tolist(), rows.score.tolist(), strict=True))
        while len(held) > 50:
            held.remove(min(held) if drop == "oldest" else min(held, key=lambda row: (row[1], -row[0])))
        assert archive.held(0).position.tolist() == [p for p, _ in held]
        shelf = archive.sequences[0][-1].shelf.result()
        assert shelf.pages.rows.count <= 2 * 50 + 2 * 7
    small = empty(max_rows=3, drop=drop).put(0, some(20))
    assert small.held(0).count == 3


def test_an_archive_is_a_value():
    """Branches that go on from one archive do not see each other, and what it was it stays, for as many as go on from it."""
    root, puts = filled(empty(max_rows=40), [10, 10])
    before = root.tensors()
    ways = []
    for _ in range(4):
        branch, more = root.select_rows(torch.tensor([0])), [some(n, 20 + 15 * i) for i, n in enumerate((3, 15, 15))]
        for rows in more:
            branch = branch.put(0, rows)
        ways.append((branch, more))
    for branch, more in ways:
        alone = empty(max_rows=40)
        for rows in (*puts, *more):
            alone = alone.put(0, rows)
        assert same_bytes(branch.tensors(), alone.tensors())
    assert same_bytes(root.tensors(), before)


def test_sequences_do_not_mix():
    archive, rows = empty(batch=3), [some(6), some(9, 100)]
    archive = archive.put(0, rows[0]).put(2, rows[1])
    query = torch.randn(HEADS, WIDTH, dtype=torch.float64)
    assert archive.search(1, query).count == 0
    assert same_bytes((archive.held(0), archive.held(2)), tuple(rows))
    turned = archive.select_rows(torch.tensor([2, 1, 2, 0]))
    assert [turned.held(i).count for i in range(4)] == [9, 0, 9, 6]


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_results_depend_on_staleness_and_never_on_timing(monkeypatch: pytest.MonkeyPatch, staleness: int):
    """A slow thread makes a search wait for what it may see, and a put wait for nothing."""
    puts = [some(n, 20 * i) for i, n in enumerate((4, 0, 7, 20, 1, 9))]
    query = torch.randn(HEADS, WIDTH, dtype=torch.float64)

    def searched() -> list[Rows]:
        archive, found = empty(rows=3, staleness=staleness), []
        for rows in puts:
            archive = archive.put(0, rows)
            found.append(archive.search(0, query))
        return found

    at_once = searched()
    for n, rows in enumerate(at_once):
        seen = Rows.joined([some(0), *puts[: max(n + 1 - staleness, 0)]])
        assert rows.position.tolist() == best(seen, query, 3)
    plus = Shelf.plus

    def slow(self: Shelf, rows: Rows, cfg: ArchiveConfig) -> Shelf:
        time.sleep(0.05)
        return plus(self, rows, cfg)

    monkeypatch.setattr(Shelf, "plus", slow)
    start, archive = time.perf_counter(), empty()
    for rows in puts * 4:
        archive = archive.put(0, rows)
    assert time.perf_counter() - start < 0.5 < 20 * 0.05
    assert same_bytes(searched(), at_once)


def read_back(archive: Archive, path: Path) -> Archive:
    states.save({"archive": archive}, path)
    return states.load(path, {"archive": empty(**vars(archive.cfg))})["archive"]


@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize("drop", ["oldest", "lowest"])
def test_a_file_gives_back_the_archive(tmp_path: Path, staleness: int, drop: str):
    """And what is put later leaves it as it leaves the one that was saved, late rows too."""
    archive, _ = filled(empty(max_rows=30, staleness=staleness, drop=drop), [9, 0, 14, 5, 8])
    archive = archive.select_rows(torch.tensor([0, 0])).put(1, some(4, 200))
    back = read_back(archive, tmp_path / "archive")
    for n in range(5):
        assert same_bytes(back.tensors(), archive.tensors())
        query, rows = torch.randn(HEADS, WIDTH, dtype=torch.float64), some(6, 300 + 10 * n)
        for i in range(2):
            assert same_bytes(back.search(i, query), archive.search(i, query))
            archive, back = archive.put(i, rows), back.put(i, rows)


def test_a_file_of_another_shape_is_refused(tmp_path: Path):
    states.save({"archive": filled(empty(), [3])[0]}, tmp_path / "archive")
    with pytest.raises(UserError, match="its archive does not match"):
        states.load(tmp_path / "archive", {"archive": empty(width=5)})


# -- the approximate index


def of_topics(sizes: list[int], **options: Any) -> tuple[Archive, Rows, Tensor]:
    """Keys around eight directions, as those of text are -> (the archive, all rows, a hundred queries)."""
    topics = 2 * torch.randn(8, HEADS, 16, dtype=torch.float64)
    archive, puts, first = empty(width=16, index="ivf", **options), [], 0
    for n in sizes:
        rows = some(n, first, 16)
        puts.append(rows._replace(k=rows.k + topics[torch.randint(8, (n,))]))
        archive, first = archive.put(0, puts[-1]), first + n
    queries = torch.randn(100, HEADS, 16, dtype=torch.float64) + topics[torch.randint(8, (100,))]
    return archive, Rows.joined(puts), queries


def test_all_cells_are_an_exact_search():
    pytest.importorskip("faiss")
    archive, rows, queries = of_topics([100, 50, 300, 7, 200], rows=5, exact_rows=120, probe=1000)
    assert archive.sequences[0][-1].shelf.result().cells is not None
    for query in queries:
        assert archive.search(0, query).position.tolist() == best(rows, query, 5)


def test_few_cells_find_most():
    """Recall at 8 of a search that looks into an eighth of the cells; more cells find more."""
    pytest.importorskip("faiss")
    recall = {}
    for probe in (1, 4, 8):
        torch.manual_seed(0)
        archive, rows, queries = of_topics([256] * 4, rows=8, exact_rows=500, probe=probe, cells=32)
        shares = []
        for query in queries[:40]:
            wanted, found = best(rows, query, 8), archive.search(0, query).position.tolist()
            shares.append(len(set(found) & set(wanted)) / len(wanted))
        recall[probe] = sum(shares) / len(shares)
    assert 0.3 < recall[1] < recall[4] < recall[8]
    assert recall[4] > 0.8


def test_cells_are_drawn_anew_and_never_show_dropped_rows(tmp_path: Path):
    """Centroids follow what is held; a branch, a file and the original find the same."""
    pytest.importorskip("faiss")
    options: dict[str, Any] = {"rows": 5, "exact_rows": 60, "max_rows": 150, "probe": 2}
    archive, _, queries = of_topics([64] * 3, **options)
    drawn = archive.sequences[0][0].shelf.result().cells
    for n in range(6):
        new = some(40, 192 + 40 * n, 16)
        states.save({"archive": archive}, tmp_path / "archive")
        back = states.load(tmp_path / "archive", {"archive": empty(width=16, index="ivf", **options)})["archive"]
        branch = archive.put(0, some(30, 5000, 16))
        ways = [way.put(0, new) for way in (archive, archive, back)]  # the second one finds its place taken
        oldest = int(ways[0].held(0).position.min())
        assert oldest == 192 + 40 * (n + 1) - 150
        for query in queries[:10]:
            found = [way.search(0, query) for way in ways]
            assert found[0].position.min() >= oldest
            assert found[0].position.max() < 5000
            assert same_bytes(found[0], found[1])
            assert same_bytes(found[0], found[2])
            assert not torch.isin(branch.search(0, query).position, new.position).any()
        archive = ways[0]
    assert archive.sequences[0][0].shelf.result().cells is not drawn


def test_without_the_library_a_search_is_exact_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    bmojo_archive._faiss.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "loci.archive"):
            archive, rows, queries = of_topics([100, 50, 300], rows=5, exact_rows=120, probe=1)
            for query in queries[:5]:
                assert archive.search(0, query).position.tolist() == best(rows, query, 5)
        assert len(caplog.records) == 1
        assert "pip install faiss-cpu" in caplog.text
    finally:
        bmojo_archive._faiss.cache_clear()


# -- the layer


class Book:
    """The archive of one sequence as a list: what each chunk sees of it, by the numbers of tokens."""

    def __init__(self, part: Any, x: Tensor) -> None:
        self.naive, self.part, self.cfg, self.archive = NaiveBMojo(part), part, part.cfg, part.cfg.archive
        u = self.naive.normed(x, "norm.weight")
        y = bmojo_naive.by_the_paper(part.ssm, u)
        self.scores = self.naive.scores(y)
        w = self.naive.w["qkv.weight"].split(part.splits)
        self.q, self.k, _ = (self.naive.shifted(u) @ each.T for each in w)

    def found(self, keys: list[Keys], scores: list[float]) -> list[list[int]]:
        W, cfg = self.cfg.window, self.archive
        held: list[int] = []
        moments: list[list[int]] = []
        found: list[list[int]] = [[]]
        for c in range(1, -(-len(keys) // W)):
            could = {*keys[(c - 1) * W].kept, *range((c - 1) * W, c * W)}
            gone = sorted(p for p in could - {*keys[c * W].kept} if scores[p] >= cfg.min_score)
            held = held + gone
            while len(held) > cfg.max_rows:
                held.remove(min(held) if cfg.drop == "oldest" else min(held, key=lambda p: (scores[p], -held.index(p))))
            moments.append(held)
            seen = moments[-1 - cfg.staleness] if cfg.staleness < len(moments) else []
            best: set[int] = set()
            for head in range(self.part.kv_heads):
                best |= {*sorted(seen, key=lambda p: (-self.asked(c - 1, head, p), seen.index(p)))[: cfg.rows]}
            found.append(sorted(best))
        return found

    def asked(self, c: int, head: int, p: int) -> float:
        """Of a key, by all queries of chunk c that read this head."""
        W, K, group = self.cfg.window, self.part.head_dim, self.part.heads // self.part.kv_heads
        key = self.naive.head(self.k[p, head * K : (head + 1) * K], "k_norm")
        total = 0.0
        for t in range(c * W, (c + 1) * W):
            for h in range(head * group, (head + 1) * group):
                query = self.naive.head(self.q[t, h * K : (h + 1) * K], "q_norm")
                total += float(self.naive.product(query, key, t, p, True))
        return total


def by_the_book(model: Any, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, list[list[Keys]]]:
    """Outputs [B, T, D] and the keys of each token, the eidetic ones with those that the archive found."""
    part, outs, seen = mixer(model), [], []
    for row in x:
        book = Book(part, row)

        def with_archive(cfg: Any, scores: list[float], book: Book = book) -> list[Keys]:
            keys = keys_of(cfg, scores)
            found = book.found(keys, scores)
            visible = [
                [p for p in found[t // cfg.window] if t - p >= cfg.window or not cfg.dedup] for t in range(len(keys))
            ]
            return [k._replace(eidetic=k.eidetic + more) for k, more in zip(keys, visible, strict=True)]

        with monkeypatch.context() as patch:
            patch.setattr(bmojo_naive, "keys_of", with_archive)
            y, keys = book.naive(row)
        outs.append(y)
        seen.append(keys)
    return torch.stack(outs), seen


OPTIONS: list[dict[str, Any]] = [
    {"archive": 2},
    {"archive": 1, "kv_heads": 1, "heads": 4, "qk_norm": True},
    {"archive": {"rows": 2, "staleness": 2}, "window": 3},
    {"archive": {"rows": 2, "max_rows": 6}, "m_e": 1, "evict_gamma": 0.9},
    {"archive": {"rows": 1, "max_rows": 5, "drop": "lowest", "min_score": 0.3}, "window": 5},
    {"archive": 2, "window": 1, "m_f": 0},
]


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o))
def test_every_split_is_the_book(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]):
    model, T = build(**options), 27
    x = stream(2, T)
    want, keys = by_the_book(model, x, monkeypatch)
    plain, _ = NaiveBMojo(mixer(model))(x[0])
    assert not torch.allclose(plain, want[0])
    assert any(len(k.eidetic) > mixer(model).cfg.m_e for k in keys[0])
    once, end = pieces(model, x, [T])
    assert_close(once, want, "forms")
    for sizes in ([1] * T, [6, 1, 9, 11], [13, 1, 1, 12], [2] * 13 + [1]):
        out, state = pieces(model, x, sizes, donate=True)
        assert_close(out, want, "forms")
        ends = [memory_of(s).archive._replace(store=memory_of(s).archive.store.tensors()) for s in (state, end)]
        assert_close(*ends, "forms")


@torch.no_grad()
@DEDUP
@EVERY_MODE
def test_every_kind_of_fading_key(monkeypatch: pytest.MonkeyPatch, mode: str, dedup: bool):
    model, x = build("gated_delta", archive=2, fading_mode=mode, dedup=dedup), stream(1, 22)
    want, _ = by_the_book(model, x, monkeypatch)
    for sizes in ([22], [1] * 22, [7, 1, 14]):
        assert_close(pieces(model, x, sizes)[0], want, "forms")


@torch.no_grad()
@pytest.mark.parametrize("pos", ["rope_const", "rope_true"])
def test_rotary_positions(monkeypatch: pytest.MonkeyPatch, pos: str):
    """Rotations are tabulated in fp32."""
    model, x = build(pos=pos, archive=2), stream(2, 23)
    want, _ = by_the_book(model, x, monkeypatch)
    for sizes in ([23], [1] * 23, [6, 1, 9, 7]):
        assert_close(pieces(model, x, sizes)[0], want, "forms", torch.float32)


@torch.no_grad()
@pytest.mark.parametrize("pos", ["nope", "rope_true"])
@pytest.mark.parametrize("sizes", [[41], [1] * 41, [11, 1, 29]], ids=["once", "steps", "pieces"])
def test_with_room_for_everything_it_is_an_eidetic_memory_of_everything(sizes: list[int], pos: str):
    """Causal attention over all tokens: what one memory gave up the other has."""
    x = stream(2, 41)
    everything = build(m_e=41, pos=pos, m_f=0)
    archived = build(m_e=3, pos=pos, m_f=0, archive=41)
    archived.load_state_dict(everything.state_dict())
    assert_close(pieces(archived, x, sizes)[0], whole(everything, x)[0], "forms")


@torch.no_grad()
def test_off_or_without_a_state_nothing_changes():
    """To the bit, in training too; and no object lies in the state."""
    x, off, on = stream(2, 30), build(), build(archive=2)
    on.load_state_dict(off.state_dict())
    assert torch.equal(whole(on, x)[0], whole(off, x)[0])
    assert torch.equal(whole(on.train(), x)[0], whole(off.train(), x)[0])
    zero = build(archive=0)
    zero.load_state_dict(off.state_dict())
    for sizes in ([30], [1] * 30):
        out, state = pieces(zero, x, sizes)
        assert same_bytes((out, state), pieces(off, x, sizes))
        assert memory_of(state).archive == ()
        assert not torch.equal(pieces(on, x, sizes)[0], out)


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES[:2])
def test_causal(mode: str):
    """A spike changes nothing before it, and from it on what is asked for."""
    model, x, T = build(archive=2, fading_mode=mode), stream(2, 21), 21
    for sizes in ([T], [1] * T):
        before, _ = pieces(model, x, sizes)
        for j in (1, 3, 4, 7, 8, 11, 20):
            disturbed = x.clone()
            disturbed[:, j] = 1e3 * torch.randn(2, 8, dtype=torch.float64)
            moved = (pieces(model, disturbed, sizes)[0] - before).abs().amax((0, 2))
            assert moved[:j].max() <= CAUSAL
            assert moved[j:].max() > 1e-6


def test_gradients_reach_queries_and_not_the_archive():
    """In a call that continues a state: those found before it have none."""
    model, x = build(archive=3, m_f=0), stream(1, 24)
    with torch.no_grad():
        _, state = pieces(model, x[:, :16], [16])
    late = x[:, 16:].clone().requires_grad_()
    out, _ = pieces(model, late, [8], state)
    (grad,) = torch.autograd.grad(out.sum(), late)
    assert torch.isfinite(grad).all()
    assert grad.abs().sum(-1).min() > 0
    assert not any(t.requires_grad for t in memory_of(state).archive.store.tensors().values())


def test_a_state_made_in_inference_mode():
    """Is filled by a thread that is in none, and goes on outside of it."""
    model, x = build(archive=2), stream(1, 30)
    with torch.no_grad():
        want, _ = pieces(model, x, [30])
    with torch.inference_mode():
        first, state = pieces(model, x[:, :13], [13])
    with torch.no_grad():
        second, _ = pieces(model, x[:, 13:], [1] * 5 + [12], state)
    assert_close(torch.cat((first, second), 1), want, "forms")


@torch.no_grad()
def test_a_passed_state_is_not_written():
    model, x = build(archive=2), stream(1, 30)
    _, state = pieces(model, x[:, :13], [13])
    held = memory_of(state).archive.store
    before = states.clone(state), held.tensors()
    first, _ = pieces(model, x[:, 13:], [17], state)
    second, _ = pieces(model, x[:, 13:], [1] * 17, state)
    assert_close(first, second, "forms")
    assert same_bytes(held.tensors(), before[1])
    assert same_bytes([*memory_of(state)[:-1]], [*memory_of(before[0])[:-1]])


@torch.no_grad()
def test_ragged_rows_advance_at_their_own_pace():
    model = build(window=3, archive=2)
    tokens = random_batch(3, 30).tokens
    valid = torch.rand(3, 30) < torch.tensor([[0.9], [0.5], [0.2]])
    for sizes in ([30], [1] * 30, [4, 1, 11, 1, 1, 12]):
        out, state, _ = in_pieces(model, tokens, sizes, 30, valid=valid)
        for row in range(3):
            own = tokens[row : row + 1, valid[row]]
            alone, end, _ = in_pieces(model, own, [own.shape[1]], 30)
            assert_close(out[row : row + 1, valid[row]], alone, "forms")
            mine = memory_of(states.select_rows(state, torch.tensor([row]))).archive
            assert_close(mine.store.tensors(), memory_of(end).archive.store.tensors(), "forms")


@torch.no_grad()
def test_save_load_and_branches(tmp_path: Path):
    """Of beams that exchange their places while they write."""
    model, tokens = build(archive={"rows": 2, "staleness": 1, "max_rows": 9}), random_batch(2, 40).tokens
    _, state, _ = in_pieces(model, tokens[:, :17], [17], 40)
    states.save(state, tmp_path / "state.safetensors")
    loaded = states.load(tmp_path / "state.safetensors", model.init_state(1, 40))
    order = torch.tensor([1, 0, 1])
    branch = states.select_rows(loaded, order)
    more = random_batch(3, 20, seed=1).tokens
    texts = [torch.cat((tokens[i, :17], more[row])) for row, i in enumerate(order.tolist())]
    out: Any = None
    for start in range(0, 20, 5):
        out, branch, _ = model.features(Batch(torch.stack([text[17 + start : 22 + start] for text in texts])), branch)
        branch, texts = states.select_rows(branch, torch.tensor([2, 0, 1])), [texts[i] for i in (2, 0, 1)]
        alone, _, _ = in_pieces(model, torch.stack(texts)[:, : 22 + start], [22 + start], 40)
        assert_close(out[[2, 0, 1]], alone[:, 17 + start :], "forms")


@torch.no_grad()
def test_state_bytes_are_bounded():
    model = build(archive={"rows": 3, "max_rows": 20}, dtype=torch.float32, kv_heads=1)
    x, state = stream(1, 512, dtype=torch.float32), None
    for _ in range(3):
        _, state = pieces(model, x, [512], state)
        assert states.nbytes(memory_of(state)) == mixer(model).cost(512).state_bytes
        assert memory_of(state).archive.store.held(0).count == 20
    bf16 = build(archive=3, dtype=torch.bfloat16)
    assert states.nbytes(memory_of(bf16.init_state(1, 9))) == mixer(bf16).cost(9, torch.bfloat16).state_bytes


REFUSED: list[tuple[Any, str]] = [
    ({"rows": 0}, "rows must be at least 1, got 0"),
    (-1, "rows must be at least 1, got -1"),
    ({"max_rows": 0}, "max_rows must be at least 1"),
    ({"staleness": -1}, "staleness must not be negative"),
    ({"drop": "old"}, "unknown drop 'old'"),
    ({"index": "hnsw"}, "unknown index 'hnsw'"),
    ({"row": 3}, "unknown key 'archive.row'"),
    ("exact", "archive: expected a mapping"),
]


@pytest.mark.parametrize(("archive", "message"), REFUSED, ids=str)
def test_refused(archive: Any, message: str):
    with pytest.raises(UserError, match=message):
        build(archive=archive)


def test_an_archive_needs_an_eidetic_memory():
    with pytest.raises(UserError, match="m_e=0 means that there is none"):
        build(archive=2, m_e=0)
    assert mixer(build(archive=5)).cfg.archive == ArchiveConfig(rows=5)
    assert mixer(build(archive=0)).cfg.archive is mixer(build()).cfg.archive is None
