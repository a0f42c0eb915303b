"""Sources: what is found, in which order, exactly which text comes out, and one-line errors for what cannot be read."""

import bz2
import gzip
import json
import lzma
import random
import sysconfig
from pathlib import Path

import pytest

from data import DataError, SourceConfig
from data.hashes import HashCache
from data.sources import resolve


def read(path, **kwargs):
    return list(resolve(SourceConfig(str(path), **kwargs)).documents())


def write_jsonl(path, rows, opener=open):
    with opener(path, "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    return path


ROWS = [{"text": f"document {i} é\n", "id": i} for i in range(20)]
TEXTS = [row["text"] for row in ROWS]


@pytest.mark.parametrize(("suffix", "opener"), [("", open), (".gz", gzip.open), (".bz2", bz2.open), (".xz", lzma.open)])
def test_jsonl_plain_and_compressed(tmp_path, suffix, opener):
    path = write_jsonl(tmp_path / f"a.jsonl{suffix}", ROWS, opener)
    assert read(path) == TEXTS
    passed = []
    list(resolve(SourceConfig(str(path))).documents(passed.append))
    assert sum(passed) == path.stat().st_size


def test_jsonl_field_limit_nulls_and_blank_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "one"}\n\n{"body": null}\n{"body": ""}\n{"body": "two"}\n{"body": "three"}')
    assert read(path, field="body") == ["one", "two", "three"]
    assert read(path, field="body", limit=2) == ["one", "two"]


@pytest.mark.parametrize("kind", ["string", "large_string"])
def test_parquet(tmp_path, kind):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    column = pa.array([*TEXTS, None], type=getattr(pa, kind)())
    pq.write_table(pa.table({"text": column, "n": list(range(21))}), tmp_path / "a.parquet", row_group_size=6)
    assert read(tmp_path / "a.parquet") == TEXTS
    assert read(tmp_path, limit=7) == TEXTS[:7]
    with pytest.raises(DataError, match=r"no column 'txt'; did you mean 'text'\?"):
        read(tmp_path / "a.parquet", field="txt")
    with pytest.raises(DataError, match="'n' is int64, not text"):
        read(tmp_path / "a.parquet", field="n")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"b\.parquet: not a readable Parquet"):
        read(tmp_path / "b.parquet")


def test_directory_is_recursive_sorted_and_leaves_unknown_files_out(tmp_path):
    many = {f"d{i % 3}/f{i:02d}.txt": f"file {i}" for i in range(60)}
    for name, text in {**many, "image.png": "no", ".hidden.txt": "no", ".git/x.txt": "no"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert read(tmp_path) == [many[name] for name in sorted(many)]
    assert read(tmp_path / "d1" / "*.txt") == [many[name] for name in sorted(many) if name.startswith("d1")]
    names = [f.name for f in resolve(SourceConfig(str(tmp_path / "**" / "f0*.txt"))).files]
    assert names == sorted(n for n in many if n[3:5] == "f0")


def test_format_chosen_by_suffix_or_by_hand(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "readme.md").write_text("about")
    with pytest.raises(DataError, match="mixes jsonl and text"):
        read(tmp_path)
    assert read(tmp_path, format="jsonl") == TEXTS
    write_jsonl(tmp_path / "b.data", ROWS)
    assert read(tmp_path / "b.data", format="jsonl") == TEXTS
    assert "".join(read(tmp_path / "b.data")) == (tmp_path / "b.data").read_text()


def book(kind, words_in_it=40_000):
    rng = random.Random(1)
    words = ["alpha", "β", "gamma🙂", "delta", "日本"]
    ends = {"paragraphs": ["\n\n", " ", " ", " "], "lines": ["\n", " ", " "], "crlf": ["\r\n\r\n", " "], "words": [" "]}
    return "".join(rng.choice(words) + rng.choice(ends.get(kind, [""])) for _ in range(words_in_it))


@pytest.mark.parametrize("kind", ["paragraphs", "lines", "crlf", "words", "solid"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_book_is_cut_and_nothing_is_lost(tmp_path, kind, suffix):
    text = book(kind)
    path = tmp_path / f"book.txt{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if suffix else text.encode())
    source = resolve(SourceConfig(str(path)))
    passed = []
    pieces = list(source.documents(passed.append))
    assert "".join(pieces) == text
    assert 50 <= len(pieces) <= 110
    assert sum(passed) == path.stat().st_size
    assert source.cut_bytes == len(text.encode()) // 50
    assert max(len(piece.encode()) for piece in pieces) <= source.cut_bytes
    mark = {"paragraphs": "\n\n", "lines": "\n", "crlf": "\n\r\n", "words": " "}.get(kind, "")
    assert all(piece.endswith(mark) for piece in pieces[:-1])


def test_long_books_are_cut_near_16_kib_and_many_files_not_at_all(tmp_path):
    (tmp_path / "a.txt").write_text("line\n\n" * 300_000)
    pieces = read(tmp_path / "a.txt")
    assert resolve(SourceConfig(str(tmp_path / "a.txt"))).cut_bytes == 16384
    assert {len(p) for p in pieces[:-1]} == {16384 // 6 * 6}
    many = tmp_path / "many"
    many.mkdir()
    for i in range(50):
        (many / f"{i}.txt").write_text("x\n\n" * 20_000)
    assert resolve(SourceConfig(str(many))).cut_bytes is None
    assert len(read(many)) == 50


def test_stdlib():
    source = resolve(SourceConfig("stdlib"))
    names = [f.name for f in source.files]
    root = Path(sysconfig.get_paths()["stdlib"])
    assert {"argparse.py", "json/decoder.py", "asyncio/base_events.py"} < set(names)
    assert names == sorted(names)
    parts = {part for name in names for part in Path(name).parts}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    assert all(name.endswith(".py") for name in names)
    assert (root / "argparse.py").read_text(encoding="utf-8") in list(source.documents())
    assert source.cut_bytes is None


def test_files_that_are_not_utf8(tmp_path):
    for i in range(60):
        (tmp_path / f"{i:02d}.txt").write_text(f"file {i}")
    (tmp_path / "07.txt").write_bytes(b"caf\xe9 au lait")
    source = resolve(SourceConfig(str(tmp_path)))
    assert len(list(source.documents())) == 59
    assert len(list(source.documents())) == 59
    assert source.skipped == ["07.txt"]
    with pytest.raises(DataError, match=r"07\.txt: not UTF-8 text \(byte 3\)"):
        read(tmp_path / "07.txt")


def test_undecodable_offset_in_a_long_file(tmp_path):
    path = tmp_path / "a.txt"
    good = "é".encode() * 1_000_000
    path.write_bytes(good + b"\xff" + good)
    with pytest.raises(DataError, match=rf"byte {len(good)}\)"):
        read(path)


BAD_LINES = [
    ('{"text": "ok"}\n{"text": broken}\n', r"a\.jsonl:2: not valid JSON"),
    ('{"text": "ok"}\n[1]\n', r"a\.jsonl:2: a list, not an object"),
    ('{"txet": "ok", "n": 1}\n', r"a\.jsonl:1: no field 'text'; did you mean 'txet'\?"),
    ('{"content": "ok", "n": 1}\n', r"no field 'text'; there is: content, n"),
    ('{"text": 5}\n', r"a\.jsonl:1: field 'text' is int, not text"),
]


@pytest.mark.parametrize(("content", "message"), BAD_LINES)
def test_bad_lines_name_file_and_line(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / "a.jsonl")
    assert "\n" not in str(caught.value)


def test_damaged_compression(tmp_path):
    whole = gzip.compress(json.dumps({"text": book("words")}).encode())
    for name in ("a.jsonl.gz", "a.txt.gz"):
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match="damaged or truncated"):
            read(tmp_path / name)
        (tmp_path / name).write_bytes(b"plain text")
        with pytest.raises(DataError, match="damaged or truncated"):
            read(tmp_path / name)


def test_missing_things(tmp_path):
    (tmp_path / "corpus.txt").write_text("x")
    with pytest.raises(DataError, match=r"corpsu\.txt: no such file or folder; did you mean 'corpus\.txt'\?"):
        read(tmp_path / "corpsu.txt")
    with pytest.raises(DataError, match="no such file or folder"):
        read(tmp_path / "nowhere" / "x.txt")
    with pytest.raises(DataError, match="matches no files"):
        read(tmp_path / "*.md")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="it is empty"):
        read(empty)
    (empty / "a.png").write_text("x")
    with pytest.raises(DataError, match=r"it holds \.png"):
        read(empty)


def test_bad_settings_name_the_nearest():
    with pytest.raises(DataError, match="did you mean 'jsonl'"):
        SourceConfig(format="json")
    with pytest.raises(DataError, match="positive"):
        SourceConfig(weight=0.0)
    with pytest.raises(DataError, match="limit"):
        SourceConfig(limit=0)


def test_huggingface_streaming_from_a_local_folder(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", ROWS)
    write_jsonl(folder / "test.jsonl", ROWS[:3])
    assert read(f"hf:{folder}") == TEXTS
    assert read(f"hf:{folder}", limit=4) == TEXTS[:4]
    assert read(f"hf:{folder}::test") == TEXTS[:3]
    with pytest.raises(DataError, match=r"no field 'txt'; did you mean 'text'\?"):
        read(f"hf:{folder}", field="txt")
    with pytest.raises(DataError, match="validation") as caught:
        read(f"hf:{folder}::validation")
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="hf:NAME"):
        read("hf:a:b:c:d")


def test_identity_follows_content_not_place(tmp_path):
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "a.jsonl", ROWS)
    write_jsonl(tmp_path / "three" / "a.jsonl", ROWS[:-1])
    one, two, three = (resolve(SourceConfig(str(tmp_path / n))).identity() for n in ("one", "two", "three"))
    assert one == two != three
    assert resolve(SourceConfig(str(tmp_path / "one"), limit=5)).identity() != one


def test_hash_cache_rereads_only_changed_files(tmp_path, monkeypatch):
    import os

    import data.hashes

    path = tmp_path / "big.txt"
    path.write_text("one")
    os.utime(path, (1, 1))
    first = HashCache(tmp_path / "h.json", large=1)(path)
    monkeypatch.setattr(data.hashes, "file_sha256", lambda p: "reread")
    assert HashCache(tmp_path / "h.json", large=1)(path) == first
    os.utime(path, (2, 2))
    assert HashCache(tmp_path / "h.json", large=1)(path) == "reread"
    (tmp_path / "h.json").write_text("garbage")
    assert HashCache(tmp_path / "h.json", large=1)(path) == "reread"
