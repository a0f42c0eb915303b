"""The commands: killed, interrupted, run twice at once, and given bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data import DataConfig, DataError, SourceConfig, open_corpus, prepare
from data.__main__ import main

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i} " + "wörd " * (i % 37)}) + "\n" for i in range(300)))
    return path


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


HELD = """
import sys, time
from pathlib import Path
from data import __main__, tokenizer
encode, calls = tokenizer.ByteTokenizer.encode_arrays, []
def held(self, texts):
    calls.append(len(texts))
    while len(calls) > 3 and not Path("go").exists():
        time.sleep(0.01)
    return encode(self, texts)
tokenizer.ByteTokenizer.encode_arrays = held
sys.modules["data.prepare"]._BATCH_DOCUMENTS = 20
sys.exit(__main__.main(sys.argv[1:]))
"""


def start(cwd, *arguments, code=None):
    """A command as a user runs it, or `code` in place of the module."""
    what = ["-c", code] if code else ["-m", "data"]
    return subprocess.Popen(
        [sys.executable, *what, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a job in the background inherits its being ignored
    )


def wait_for_tokens(tmp_path, *processes):
    """Until each process is in the middle of writing tokens, where HELD keeps it."""
    for _ in range(3000):
        if len(list(tmp_path.glob(".out.tmp-*/train-0/tokens-*.bin"))) == len(processes):
            return
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)
    raise AssertionError("never started to write")


def test_kill_in_the_middle_then_again(tmp_path, jsonl):
    out = tmp_path / "out"
    process = start(tmp_path, "prepare", "--source", jsonl, "--out", out, code=HELD)
    wait_for_tokens(tmp_path, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (left,) = tmp_path.glob(".out.tmp-*")
    assert not out.exists()
    with pytest.raises(DataError, match="no such prepared folder"):
        open_corpus(out)
    with pytest.raises(DataError, match="not a finished prepared folder"):
        open_corpus(left)
    cfg = DataConfig((SourceConfig(str(jsonl)),))
    corpus = prepare(cfg, progress=False, out=out)
    assert contents(out) == contents(prepare(cfg, progress=False, out=tmp_path / "whole").dir)
    assert corpus.train[0][0].documents + corpus.val.documents == 300
    assert not list(tmp_path.glob(".out.tmp-*"))


def test_interrupt_says_so_and_leaves_nothing(tmp_path, jsonl):
    process = start(tmp_path, "prepare", "--source", jsonl, "--out", tmp_path / "out", code=HELD)
    wait_for_tokens(tmp_path, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted; nothing was kept"
    assert "Traceback" not in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["texts.jsonl"]


def test_two_at_once_share_one_folder(tmp_path, jsonl):
    both = [start(tmp_path, "prepare", "--source", jsonl, "--out", tmp_path / "out", code=HELD) for _ in range(2)]
    wait_for_tokens(tmp_path, *both)
    (tmp_path / "go").touch()
    for process in both:
        _, err = process.communicate()
        assert process.returncode == 0, err
    assert open_corpus(tmp_path / "out").manifest["train"]["documents"] > 250
    assert sorted(p.name for p in tmp_path.iterdir()) == ["go", "out", "texts.jsonl"]


def test_prepare_and_info_commands(tmp_path, jsonl, capsys):
    process = start(tmp_path, "prepare", "--source", jsonl, "--tokenizer", "bpe", "--vocab-size", 300, "--out", "o")
    out, err = process.communicate()
    assert process.returncode == 0, err
    corpus = open_corpus(tmp_path / "o")
    assert f"{corpus.manifest['train']['tokens']:,}" in out
    assert corpus.fingerprint[:16] in out
    assert "100%" in err  # the progress bar
    assert main(["info", str(tmp_path / "o")]) == 0
    assert capsys.readouterr().out.splitlines()[:-1] == out.splitlines()[:-1]


def test_help_shows_an_example():
    for arguments in (["--help"], ["prepare", "--help"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0


def test_a_missing_source_is_one_line_and_exit_code_2(tmp_path, jsonl):
    process = start(tmp_path, "prepare", "--source", "text.jsonl", "--out", "o")
    out, err = process.communicate()
    assert process.returncode == 2
    assert err == "error: text.jsonl: no such file or folder; did you mean 'texts.jsonl'?\n"
    assert not out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["texts.jsonl"]


BAD = [
    (["info", "nothing"], "no such prepared folder"),
    (["prepare", "--source", "{jsonl}", "--field", "txt", "--out", "{tmp}/o"], "did you mean 'text'?"),
    (["prepare", "--source", "{jsonl}", "--tokenizer", "{tmp}/tok.json", "--out", "{tmp}/o"], "no such tokenizer file"),
    (["prepare", "--source", "{jsonl}", "--val-fraction", "2"], "val_fraction"),
    (["prepare", "--source", "{jsonl}", "--weight", "1", "--weight", "2"], "--weight was given 2 times for 1"),
    (["prepare", "--source", "{jsonl}", "--tokenizer", "bpe", "--vocab-size", "9"], "vocab_size"),
    (["prepare", "--source", "{jsonl}", "--out", "{jsonl}"], "is a file"),
    (["prepare", "--source", "{jsonl}", "--out", "{jsonl}/o"], "cannot be written"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, jsonl, arguments, message, capsys):
    assert main([a.format(jsonl=jsonl, tmp=tmp_path) for a in arguments]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("error: ")
    assert message in last
    assert sorted(p.name for p in tmp_path.iterdir()) == ["texts.jsonl"]
