"""Prepared folders: whole or absent, checked when opened, reused by fingerprint; the split; the commands."""

import errno
import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest

from data import DataConfig, DataError, Loader, SourceConfig, TokenizerConfig, open_corpus, prepare
from data.folders import building, remove_leftovers
from data.prepare import split
from data.shards import Shards, ShardWriter

ROOT = Path(__file__).resolve().parent.parent
TEXTS = [f"document {i}: " + "wörd " * (i % 37) + "\n" for i in range(300)]


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def config(tmp_path, *paths, tokenizer=None, **more):
    sources = tuple(p if isinstance(p, SourceConfig) else SourceConfig(str(p)) for p in paths)
    return DataConfig(sources, tokenizer or TokenizerConfig(), cache_dir=str(tmp_path / "cache"), **more)


def documents(shards, tokenizer):
    return [tokenizer.decode(shards.read(i)) for i in range(len(shards))]


def snapshot(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


BPE = TokenizerConfig("bpe", vocab_size=320)


@pytest.mark.parametrize("tokenizer", [TokenizerConfig(), BPE])
def test_prepare_keeps_every_document(tmp_path, jsonl, tokenizer):
    corpus = prepare(config(tmp_path, jsonl, tokenizer=tokenizer), progress=False)
    (train, weight), manifest = corpus.train[0], corpus.manifest
    together = documents(train, corpus.tokenizer) + documents(corpus.val, corpus.tokenizer)
    assert sorted(together) == sorted(TEXTS)
    assert weight == 1.0
    assert train.documents + corpus.val.documents == 300
    for shards, counts in ((train, manifest["train"]), (corpus.val, manifest["val"])):
        sizes = corpus.tokenizer.token_bytes()
        assert counts == {"documents": len(shards), "tokens": shards.tokens, "bytes": shards.bytes}
        assert sum(sizes[shards.read(i)].sum() for i in range(len(shards))) == shards.bytes
    assert manifest["tokenizer"]["fingerprint"] == corpus.tokenizer.fingerprint
    assert corpus.tokenizer.vocab_size == (257 if tokenizer.kind == "bytes" else 320)
    (row,) = manifest["sources"]
    assert [f["name"] for f in row["files"]] == ["texts.jsonl"]
    assert json.loads(json.dumps(manifest)) == manifest


def test_prepare_again_reuses(tmp_path, jsonl, monkeypatch):
    cfg = config(tmp_path, jsonl, tokenizer=BPE)
    first = prepare(cfg, progress=False)
    before = {p: p.stat().st_mtime_ns for p in first.dir.rglob("*")}
    monkeypatch.setattr(ShardWriter, "add", None)
    again = prepare(cfg, progress=False)
    assert again.dir == first.dir
    assert {p: p.stat().st_mtime_ns for p in first.dir.rglob("*")} == before


def test_equal_input_gives_equal_folders_and_other_input_another(tmp_path, jsonl):
    one = prepare(config(tmp_path, jsonl, tokenizer=BPE), progress=False, out=tmp_path / "one")
    two = prepare(config(tmp_path / "elsewhere", jsonl, tokenizer=BPE), progress=False, out=tmp_path / "two")
    assert snapshot(one.dir) == snapshot(two.dir)
    fingerprints = {one.fingerprint}
    for more in ({"val_fraction": 0.1}, {"split_seed": 1}, {"tokenizer": TokenizerConfig()}):
        fingerprints.add(prepare(config(tmp_path, jsonl, **{"tokenizer": BPE, **more}), progress=False).fingerprint)
    jsonl.write_text(jsonl.read_text().replace("document 7:", "document 8:"))
    fingerprints.add(prepare(config(tmp_path, jsonl, tokenizer=BPE), progress=False).fingerprint)
    assert len(fingerprints) == 5


def test_weights_belong_to_the_run_not_to_the_folder(tmp_path, jsonl):
    other = tmp_path / "other.txt"
    other.write_text("some other text, a line\n" * 2000)
    first = prepare(config(tmp_path, jsonl, other), progress=False)
    second = prepare(config(tmp_path, jsonl, SourceConfig(str(other), weight=3.0)), progress=False)
    assert second.dir == first.dir
    assert [w for _, w in first.train] == [1.0, 1.0]
    assert [w for _, w in second.train] == [s["weight"] for s in second.manifest["sources"]] == [1.0, 3.0]
    assert first.val.documents == sum(s["val"]["documents"] for s in first.manifest["sources"])
    assert min(s["val"]["documents"] for s in first.manifest["sources"]) >= 1


@pytest.mark.parametrize("n", [2, 3, 10, 200, 5000])
@pytest.mark.parametrize("fraction", [0.001, 0.02, 0.5, 0.999])
def test_split_loses_nothing_and_leaves_no_side_empty(n, fraction):
    items = [str(i) for i in range(n)]
    for seed in range(4):
        sides = list(split(items, fraction, seed))
        held_out = {t for t, val in sides if val}
        assert sorted(t for t, _ in sides) == sorted(items)
        assert 1 <= len(held_out) <= n - 1
        if n == 5000:
            assert abs(len(held_out) - n * fraction) <= 5 * (n * fraction * (1 - fraction)) ** 0.5 + 1
            longer = {t for t, val in split([*items, "x", "y"], fraction, seed) if val and t not in "xy"}
            assert longer == held_out
    if n == 5000:
        assert held_out != {t for t, val in split(items, fraction, 99) if val}


def test_one_document_is_not_a_corpus(tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text('{"text": "alone"}\n')
    with pytest.raises(DataError, match="one document"):
        prepare(config(tmp_path, path), progress=False)
    path.write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="no documents with text"):
        prepare(config(tmp_path, path), progress=False)
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]


def test_single_book(tmp_path):
    book = tmp_path / "book.txt"
    text = "".join(f"Paragraph {i} of the book.\n\n" for i in range(4000))
    book.write_text(text)
    corpus = prepare(config(tmp_path, book), progress=False)
    together = documents(corpus.train[0][0], corpus.tokenizer) + documents(corpus.val, corpus.tokenizer)
    assert len(together) >= 50
    assert sorted("".join(together).split("\n\n")) == sorted(text.split("\n\n"))
    assert corpus.manifest["sources"][0]["cut_bytes"] == len(text) // 50
    assert corpus.val.documents >= 1


def test_token_width_follows_the_vocabulary(tmp_path):
    for vocab, dtype in ((65536, np.uint16), (65537, np.uint32)):
        with ShardWriter(tmp_path / str(vocab), vocab) as writer:
            writer.add(np.array([0, vocab - 1]), 2)
            writer.close()
        ids = Shards(tmp_path / str(vocab)).read(0)
        assert ids.dtype == dtype
        assert ids.tolist() == [0, vocab - 1]


def some_file(corpus, pattern):
    return sorted(corpus.dir.rglob(pattern))[0]


@pytest.mark.parametrize("pattern", ["val/tokens-*.bin", "train-0/tokens-*.bin", "train-0/ends.bin"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_corrupt_files_are_found_and_named(tmp_path, jsonl, pattern, harm, capsys):
    cfg = config(tmp_path, jsonl)
    corpus = prepare(cfg, progress=False)
    whole = snapshot(corpus.dir)
    path = some_file(corpus, pattern)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    damaged = {"flip": bytes(raw), "truncate": bytes(raw[:-3])}
    path.unlink() if harm == "remove" else path.write_bytes(damaged[harm])
    says = {"flip": "checksum", "truncate": "bytes instead of", "remove": "missing"}
    with pytest.raises(DataError, match=f"corrupt corpus, .*{says[harm]}") as caught:
        open_corpus(corpus.dir)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    again = prepare(cfg, progress=False)
    assert "preparing it again" in capsys.readouterr().err
    assert snapshot(again.dir) == whole


@pytest.mark.parametrize("where", ["manifest.json", "val/manifest.json", "tokenizer/tokenizer.json"])
def test_unfinished_folders_are_refused_and_rebuilt(tmp_path, jsonl, where):
    cfg = config(tmp_path, jsonl, tokenizer=BPE)
    corpus = prepare(cfg, progress=False)
    whole = snapshot(corpus.dir)
    for content in (None, "", "{}", '{"version":'):
        path = corpus.dir / where
        path.unlink() if content is None else path.write_text(content)
        with pytest.raises(DataError) as caught:
            open_corpus(corpus.dir)
        assert "\n" not in str(caught.value)
        assert snapshot(prepare(cfg, progress=False).dir) == whole


def test_another_tokenizer_in_the_folder_is_found(tmp_path, jsonl):
    one = prepare(config(tmp_path, jsonl, tokenizer=BPE), progress=False)
    two = prepare(config(tmp_path, jsonl), progress=False)
    two.tokenizer.save(one.dir / "tokenizer")
    with pytest.raises(DataError, match="not the tokenizer"):
        open_corpus(one.dir)


def test_foreign_folders_are_left_alone(tmp_path, jsonl):
    out = tmp_path / "home"
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    with pytest.raises(DataError, match="not a prepared corpus"):
        prepare(config(tmp_path, jsonl), progress=False, out=out)
    assert [p.name for p in out.iterdir()] == ["thesis.tex"]
    ours = tmp_path / "ours"
    prepare(config(tmp_path, jsonl), progress=False, out=ours)
    before = snapshot(ours)
    with pytest.raises(DataError, match="another corpus"):
        prepare(config(tmp_path, jsonl, tokenizer=BPE), progress=False, out=ours)
    assert snapshot(ours) == before


def test_full_disk_leaves_nothing(tmp_path, jsonl, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("data.shards.os.fsync", full)
    with pytest.raises(DataError, match="No space left on device") as caught:
        prepare(config(tmp_path, jsonl), progress=False)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("theirs_is_whole", [True, False])
def test_who_comes_second_keeps_a_whole_folder_and_replaces_a_broken_one(tmp_path, theirs_is_whole):
    target = tmp_path / "out"
    with building(target, lambda folder: (folder / "theirs").exists() and theirs_is_whole) as temp:
        (temp / "ours").touch()
        target.mkdir()
        (target / "theirs").touch()
    assert [p.name for p in target.iterdir()] == ["theirs" if theirs_is_whole else "ours"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_prepared_folder_as_a_source(tmp_path, jsonl):
    made = prepare(config(tmp_path, jsonl, tokenizer=BPE), progress=False)
    again = prepare(config(tmp_path, made.dir), progress=False)
    assert again.dir == made.dir
    assert again.tokenizer.fingerprint == made.tokenizer.fingerprint
    for refused in (
        config(tmp_path, made.dir, jsonl),
        config(tmp_path, made.dir, tokenizer=TokenizerConfig("bpe", 999)),
        config(tmp_path, made.dir, val_fraction=0.3),
    ):
        with pytest.raises(DataError):
            prepare(refused, progress=False)


def test_tokenizer_file_of_a_corpus_serves_another(tmp_path, jsonl):
    made = prepare(config(tmp_path, jsonl, tokenizer=BPE), progress=False)
    given = TokenizerConfig("file", path=str(made.dir / "tokenizer"))
    other = prepare(config(tmp_path, jsonl, tokenizer=given, val_fraction=0.1), progress=False)
    assert other.tokenizer.fingerprint == made.tokenizer.fingerprint
    assert other.manifest["tokenizer"]["kind"] == "file"


def test_bpe_sees_the_train_split_only(tmp_path):
    texts = [f"aaaa bbbb {i}" for i in range(100)]
    held_out = [t for t, val in split(texts, 0.1, 0) if val]
    marked = [t + " zqxzqxzqxzqx" * 50 if t in held_out else t for t in texts]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in marked))
    cfg = config(tmp_path, path, tokenizer=TokenizerConfig("bpe", 300), val_fraction=0.1)
    tokenizer = prepare(cfg, progress=False).tokenizer
    assert not any("zq" in tokenizer.token_text(i) for i in range(tokenizer.vocab_size))
    assert any("bbbb" in tokenizer.token_text(i) for i in range(tokenizer.vocab_size))


def test_leftovers_of_the_living_stay(tmp_path):
    names = {
        f".out.tmp-{socket.gethostname()}-{os.getppid()}-aaaaaaaa": True,
        f".out.tmp-{socket.gethostname()}-{2**22 + 1}-aaaaaaaa": False,
        f".out.tmp-{socket.gethostname()}-{os.getpid()}-bbbbbbbb": False,
        ".out.tmp-another-host-77-aaaaaaaa": True,
        ".out.tmp-another-host-78-aaaaaaaa": False,
        ".other.tmp-another-host-78-aaaaaaaa": True,
        "out-of-the-way": True,
    }
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    for path in (tmp_path / ".out.tmp-another-host-78-aaaaaaaa").rglob("*"):
        os.utime(path, (1, 1))
    os.utime(tmp_path / ".out.tmp-another-host-78-aaaaaaaa", (1, 1))
    remove_leftovers(tmp_path / "out")
    assert {name: (tmp_path / name).exists() for name in names} == names


def test_config_errors():
    for make, message in (
        (lambda: DataConfig(packing="document"), "did you mean 'documents'"),
        (lambda: DataConfig(sources=()), "sources is empty"),
        (lambda: DataConfig(seq_len=0), "seq_len"),
        (lambda: TokenizerConfig(kind="byte"), "did you mean 'bytes'"),
        (lambda: TokenizerConfig(kind="file"), "path is needed"),
        (lambda: TokenizerConfig(path="x"), "only read with"),
    ):
        with pytest.raises(DataError, match=message):
            make()


def test_from_text_to_batches(tmp_path, jsonl):
    corpus = prepare(config(tmp_path, jsonl), progress=False)
    loader = Loader(corpus.train, corpus.tokenizer, seq_len=64, batch_size=4, seed=0)
    batch = loader.next()
    loader.close()
    starts = (batch["tokens"] == corpus.tokenizer.bos_id) & batch["loss_mask"]
    assert (batch["positions"][starts] == 0).all()
    row = [t for t, m in zip(batch["targets"][0].tolist(), batch["loss_mask"][0].tolist()) if m]
    text = corpus.tokenizer.decode(row)
    assert any(text[:20].strip("\ufffd") in t for t in TEXTS)
