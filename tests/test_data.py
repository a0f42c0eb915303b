"""The row sequence: packing, batches to the letter, every transition once, shuffling, mixing, ranks and restarts."""

import gc
import json
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch

import data.loader
import data.packing
from data import DataError, Loader, Shards, Tokenizer, iterate_once
from data.packing import DocumentRows, StreamRows, pack
from data.shards import ShardWriter

BOS, EOS = 1, 2


class Ends(Tokenizer):
    """Distinct beginning and end, so that a mix-up shows."""

    vocab_size, bos_id, eos_id = 100_000, BOS, EOS


def make_shards(folder, docs, file_bytes=1 << 20):
    with ShardWriter(folder, Ends.vocab_size, file_bytes) as writer:
        for doc in docs:
            writer.add(np.array(doc), len(doc))
        writer.close()
    return Shards(folder)


def make_docs(lengths, first=10):
    """Documents in which every token is unique, so that each (input, target) pair names one transition."""
    ends = np.cumsum(lengths) + first
    return [list(range(end - n, end)) for end, n in zip(ends, lengths)]


def transitions(docs):
    return Counter(pair for doc in docs for pair in zip([BOS, *doc], [*doc, EOS]))


def scored(batch):
    mask = batch["loss_mask"]
    return Counter(zip(batch["tokens"][mask].tolist(), batch["targets"][mask].tolist()))


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert (a[key] is None) == (b[key] is None), key
        assert a[key] is None or torch.equal(a[key], b[key]), key


@pytest.fixture
def small_windows(monkeypatch):
    for module in (data.packing, data.loader):
        monkeypatch.setattr(module, "WINDOW_DOCUMENTS", 7)
        monkeypatch.setattr(module, "WINDOW_ROWS", 5)


@pytest.fixture
def lengths():
    rng = np.random.default_rng(0)
    return [*rng.integers(1, 20, 40).tolist(), 1, 1, 1, 7, 8, 9, 15, 16, 17, 100]


def test_document_batch_to_the_letter(tmp_path):
    shards = make_shards(tmp_path / "s", [[10, 11, 12, 13, 14], [20], [30, 31]])
    (batch,) = iterate_once(shards, Ends(), seq_len=4, batch_size=4, max_docs_per_row=3)
    assert batch["tokens"].tolist() == [[1, 10, 11, 12], [1, 30, 31, 2], [13, 14, 1, 20], [2, 2, 2, 2]]
    assert batch["targets"].tolist() == [[10, 11, 12, 13], [30, 31, 2, 2], [14, 2, 20, 2], [2, 2, 2, 2]]
    valid = [[True] * 4, [True] * 3 + [False], [True] * 4, [False] * 4]
    assert batch["loss_mask"].tolist() == batch["valid"].tolist() == valid
    assert batch["positions"].tolist() == [[0, 1, 2, 3], [0, 1, 2, 0], [0, 1, 0, 1], [0, 1, 2, 3]]
    assert batch["cu_seqlens"].tolist() == [0, 4, 7, 8, 10, 12, 16, 16, 16, 16, 16, 16, 16]
    assert {k: v.dtype for k, v in batch.items()} == {
        "tokens": torch.int64,
        "targets": torch.int64,
        "positions": torch.int64,
        "loss_mask": torch.bool,
        "valid": torch.bool,
        "cu_seqlens": torch.int32,
    }


def test_stream_batch_to_the_letter(tmp_path):
    shards = make_shards(tmp_path / "s", [[10, 11, 12, 13, 14], [20], [30, 31]])
    (batch,) = iterate_once(shards, Ends(), seq_len=4, batch_size=3, packing="stream")
    assert batch["tokens"].tolist() == [[1, 10, 11, 12], [13, 14, 1, 20], [1, 30, 31, 1]]
    assert batch["targets"].tolist() == [[10, 11, 12, 13], [14, 2, 20, 2], [30, 31, 2, 10]]
    assert batch["loss_mask"].tolist() == [[True] * 4, [True] * 4, [True, True, True, False]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3]] * 3
    assert batch["cu_seqlens"] is None
    assert batch["valid"] is None


def test_full_rows_need_no_boundaries(tmp_path):
    shards = make_shards(tmp_path / "s", make_docs([15, 7, 3]))
    first, second = iterate_once(shards, Ends(), seq_len=8, batch_size=3)
    assert first["cu_seqlens"] is None
    assert first["valid"] is None
    assert first["loss_mask"].all()
    assert first["positions"].tolist() == [list(range(8))] * 3
    assert second["cu_seqlens"] is not None
    assert second["valid"].sum() == 4


def test_two_pieces_that_fill_a_row_keep_their_boundary(tmp_path):
    shards = make_shards(tmp_path / "s", make_docs([3, 3]))
    (batch,) = iterate_once(shards, Ends(), seq_len=8, batch_size=1, max_docs_per_row=4)
    assert batch["cu_seqlens"].tolist() == [0, 4, 8, 8, 8]
    assert batch["valid"].all()


@pytest.mark.parametrize("max_segments", [2, 3, 32])
@pytest.mark.parametrize("seq_len", [1, 2, 8, 64])
def test_packing_limits_and_coverage(lengths, seq_len, max_segments):
    counts = np.array(lengths) + 1
    plan = pack(np.arange(len(counts)), counts, seq_len, max_segments)
    fill = np.add.reduceat(plan.length, plan.row_ptr[:-1])
    segments = np.diff(plan.row_ptr) + (fill < seq_len)
    assert fill.max() <= seq_len
    assert plan.length.min() >= 1
    assert segments.max() <= max_segments
    assert (fill == plan.scored).all()
    seen = [(d, i) for d, s, n in zip(plan.doc, plan.start, plan.length) for i in range(s, s + n)]
    assert sorted(seen) == [(d, i) for d, n in enumerate(counts) for i in range(n)]


def test_packing_is_best_fit():
    counts = np.array([6, 5, 3, 2])
    plan = pack(np.arange(4), counts, 8, 32)
    rows = [sorted(counts[plan.doc[a:b]].tolist()) for a, b in zip(plan.row_ptr, plan.row_ptr[1:])]
    assert rows == [[2, 6], [3, 5]]


def test_packing_wastes_little():
    counts = np.random.default_rng(1).integers(1, 256, 4096)
    plan = pack(np.arange(len(counts)), counts, 256, 32)
    assert counts.sum() / (plan.rows * 256) > 0.99


def take_epoch(loader):
    """Batches up to the end of the first epoch (batch size 1)."""
    batches = []
    while loader.state_dict()["position"]["sources"][0][0] == 0:
        batches.append(loader.next())
    return batches


@pytest.mark.parametrize("seq_len", [1, 5, 16, 500])
@pytest.mark.parametrize("packing", ["documents", "stream"])
def test_every_transition_once_per_epoch(tmp_path, small_windows, lengths, packing, seq_len):
    docs = make_docs(lengths)
    shards = make_shards(tmp_path / "s", docs, file_bytes=64)
    assert len(shards.manifest["files"]) > 3
    loader = Loader([(shards, 1.0)], Ends(), seq_len, 1, seed=5, packing=packing, max_docs_per_row=3, prefetch=0)
    first = sum(map(scored, take_epoch(loader)), Counter())
    assert first == transitions(docs)
    total, size = Counter(), 0
    while size < sum(first.values()):
        total += (more := scored(loader.next()))
        size += sum(more.values())
    assert total == first


@pytest.mark.parametrize("packing", ["documents", "stream"])
def test_iterate_once_scores_all_whatever_the_shape(tmp_path, small_windows, lengths, packing):
    docs = make_docs(lengths)
    shards = make_shards(tmp_path / "s", docs)
    for seq_len, batch_size, world in ((4, 1, 1), (16, 3, 1), (16, 2, 2), (300, 4, 3)):
        ranks = [list(iterate_once(shards, Ends(), seq_len, batch_size, packing, 4, r, world)) for r in range(world)]
        assert len({len(batches) for batches in ranks}) == 1
        assert {b["tokens"].shape for batches in ranks for b in batches} == {(batch_size, seq_len)}
        assert sum((scored(b) for batches in ranks for b in batches), Counter()) == transitions(docs)


def test_limited_validation_is_the_same_set_for_every_shape(tmp_path, lengths):
    docs = make_docs(lengths)
    shards = make_shards(tmp_path / "s", docs)
    sets = [
        sum(map(scored, iterate_once(shards, Ends(), t, b, packing, limit_tokens=77)), Counter())
        for t, b, packing in ((4, 1, "documents"), (16, 3, "documents"), (16, 3, "stream"), (300, 2, "documents"))
    ]
    assert all(s == sets[0] for s in sets)
    assert sum(sets[0].values()) == 77
    assert not sets[0] - transitions(docs)
    everything = sum(map(scored, iterate_once(shards, Ends(), 16, 3, limit_tokens=10**9)), Counter())
    assert everything == transitions(docs)


@pytest.mark.parametrize("order", [DocumentRows, StreamRows])
def test_order_depends_on_seed_epoch_and_source_only(lengths, order):
    def rows(seed, source, epoch):
        args = (np.array(lengths), 8, seed, source)
        plan = (order(*args, 8) if order is DocumentRows else order(*args)).plan(epoch, 0)
        return list(zip(plan.doc.tolist(), plan.start.tolist()))

    base = rows(0, 0, 0)
    assert rows(0, 0, 0) == base
    assert base != sorted(base)
    for other in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        assert rows(*other) != base
        if order is DocumentRows:
            assert sorted(rows(*other)) == sorted(base)


def test_documents_and_rows_are_both_shuffled_anew_in_every_epoch(small_windows):
    order = DocumentRows(np.full(70, 7), 8, 0, 0, 8)  # every document fills a row
    epochs = [[order.plan(e, w).doc.tolist() for w in range(order.windows)] for e in range(2)]
    assert [sorted(doc for w in windows for doc in w) for windows in epochs] == [list(range(70))] * 2
    assert [set(w) for w in epochs[0]] != [set(w) for w in epochs[1]]
    one_document = DocumentRows(np.array([8 * 50 - 1]), 8, 0, 0, 8)  # all shuffling is that of its rows
    rows = [one_document.plan(e, 0).start.tolist() for e in range(2)]
    assert sorted(rows[0]) == sorted(rows[1]) == list(range(0, 400, 8))
    assert len({tuple(r) for r in (*rows, sorted(rows[0]))}) == 3
    stream_rows = StreamRows(np.array([8 * 5 - 1]), 8, 0, 0)
    assert len({tuple(stream_rows.plan(e, 0).start.tolist()) for e in range(4)}) > 1


def two_sources(tmp_path, lengths):
    docs = make_docs([*lengths, 12, 30, 3])
    a = make_shards(tmp_path / "a", docs[: len(lengths)])
    return [(a, 3.0), (make_shards(tmp_path / "b", docs[len(lengths) :]), 1.0)]


@pytest.mark.parametrize("packing", ["documents", "stream"])
def test_restart_is_exact_at_any_point_and_world_size(tmp_path, small_windows, lengths, packing):
    sources = two_sources(tmp_path, lengths)

    def loader(batch, rank=0, world=1, **more):
        return Loader(sources, Ends(), 8, batch, 3, rank, world, packing, 4, **more)

    reference, states = loader(4, prefetch=0), []
    batches = []
    for _ in range(120):
        states.append(json.loads(json.dumps(reference.state_dict())))
        batches.append(reference.next())
    assert min(place[0] for place in states[-1]["position"]["sources"]) >= 2  # several epochs of both
    cuts = np.random.default_rng(4).integers(0, 115, 12)
    for cut in [0, *cuts.tolist()]:
        again = loader(4)
        again.load_state_dict(states[cut])
        assert again.state_dict() == states[cut]
        for batch in batches[cut : cut + 4]:
            assert_same(again.next(), batch)
        again.close()
        halves = [loader(2, rank, 2, prefetch=0) for rank in range(2)]
        for half in halves:
            half.load_state_dict(states[cut])
        for batch in batches[cut : cut + 4]:
            parts = [half.next() for half in halves]
            for key in ("tokens", "targets", "loss_mask", "positions"):
                assert torch.equal(torch.cat([part[key] for part in parts]), batch[key])
        assert halves[0].state_dict() == halves[1].state_dict() == states[cut + 4]


def test_mixture_follows_the_weights(tmp_path, lengths):
    sources = two_sources(tmp_path, lengths)
    boundary = 10 + sum(lengths)
    loader = Loader(sources, Ends(), 8, 50, seed=1, packing="stream", prefetch=0)
    rows = torch.cat([loader.next()["targets"] for _ in range(80)])
    from_first = ((rows >= 10) & (rows < boundary)).any(1).sum().item()
    assert abs(from_first / 4000 - 0.75) < 4 * (0.75 * 0.25 / 4000) ** 0.5
    drawn = [loader._producer._source(i) for i in range(9000)]
    assert drawn[:4000].count(0) == from_first
    assert drawn == [loader._producer._source(i) for i in range(9000)]


def test_prefetch_changes_nothing_and_its_state_is_of_the_consumed_batch(tmp_path, lengths):
    sources = two_sources(tmp_path, lengths)
    plain = Loader(sources, Ends(), 8, 4, 3, prefetch=0)
    ahead = Loader(sources, Ends(), 8, 4, 3, prefetch=2)
    for _ in range(30):
        assert_same(ahead.next(), plain.next())
        assert ahead.state_dict() == plain.state_dict()
    ahead.close()
    assert_same(ahead.next(), plain.next())
    ahead.close()


def loader_threads():
    return [t for t in threading.enumerate() if t.name == "loader"]


def test_thread_ends_on_close_and_when_forgotten(tmp_path, lengths):
    sources = two_sources(tmp_path, lengths)
    loader = Loader(sources, Ends(), 8, 4)
    loader.next()
    assert len(loader_threads()) == 1
    loader.close()
    assert not loader_threads()
    loader.next()
    del loader
    gc.collect()
    assert not loader_threads()


def test_exception_in_the_thread_reaches_the_caller(tmp_path, lengths, monkeypatch):
    sources = two_sources(tmp_path, lengths)
    loader = Loader(sources, Ends(), 8, 4)
    good = loader.next()
    state = loader.state_dict()
    loader.close()
    monkeypatch.setattr(Shards, "read", lambda *_: (_ for _ in ()).throw(OSError("disk gone")))
    with pytest.raises(OSError, match="disk gone"):
        loader.next()
    assert not loader_threads()
    monkeypatch.undo()
    assert loader.state_dict() == state
    twin = Loader(sources, Ends(), 8, 4, prefetch=0)
    assert_same(good, twin.next())
    assert_same(loader.next(), twin.next())
    loader.close()


def test_slow_consumer_does_not_run_the_producer_away(tmp_path, lengths):
    loader = Loader(two_sources(tmp_path, lengths), Ends(), 8, 4, prefetch=2)
    loader.next()
    time.sleep(0.3)
    assert loader._prefetch.ready.qsize() == 2
    assert loader._producer.row <= 4 * 4
    loader.close()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 9}, "seed"),
        ({"seq_len": 9}, "seq_len"),
        ({"packing": "stream"}, "packing"),
        ({"version": 7}, "version"),
    ],
)
def test_state_of_another_sequence_is_refused(tmp_path, lengths, change, named):
    loader = Loader(two_sources(tmp_path, lengths), Ends(), 8, 4, prefetch=0)
    with pytest.raises(DataError, match=named):
        loader.load_state_dict(loader.state_dict() | change)


def test_state_of_other_data_is_refused(tmp_path, lengths):
    one = Loader([(make_shards(tmp_path / "a", make_docs(lengths)), 1.0)], Ends(), 8, 4, prefetch=0)
    two = Loader([(make_shards(tmp_path / "b", make_docs(lengths, first=11)), 1.0)], Ends(), 8, 4, prefetch=0)
    with pytest.raises(DataError, match="sources"):
        two.load_state_dict(one.state_dict())


def test_bad_arguments(tmp_path, lengths):
    sources = two_sources(tmp_path, lengths)
    for arguments in ({"packing": "docs"}, {"max_docs_per_row": 1}, {"seed": -1}, {"rank": 2, "world": 2}):
        with pytest.raises(DataError):
            Loader(sources, Ends(), 8, 4, **arguments)
    with pytest.raises(DataError):
        next(iterate_once(sources[0][0], Ends(), 8, 4, limit_tokens=0))
