"""A decode session on disk: a prompt is read once, its memory is saved, and any number of continuations branch from the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data import ByteTokenizer
from eval.decoding import Decoder, generate, run_decoder
from eval.generate import load_decoder, main, save_state
from eval.run import LoadedRun, open_run
from models import UserError, state
from tests.cases import ENGRAM
from tests.test_eval_runs import HYBRID, LEARNED, LINEAR, tiny_model, tiny_run, write_run
from tests.tools import TOLERANCE, rel_err

MAMBA2 = {"kind": "mamba2", "head_dim": 8, "d_state": 4}
BMOJO: dict[str, Any] = {"kind": "bmojo", "ssm": MAMBA2, "heads": 2, "window": 4, "m_e": 3}
ATTENTION = {"kind": "attention", "heads": 4}
SHAPES: dict[str, dict[str, Any]] = {
    "attention": HYBRID,
    "learned": {**LEARNED, "max_seq_len": 64},
    "linear": LINEAR,
    "mom": {"blocks": {"a": {"mixer": {"kind": "mom", "rule": {"kind": "gated_delta", "heads": 2}}}}},
    "bmojo": {"blocks": {"a": {"mixer": BMOJO, "channel": {"kind": "gelu"}}}},
    "bmojo-band": {"blocks": {"a": {"mixer": {**BMOJO, "fading_mode": "band", "pos": "rope_const"}}}},
    "bmojo-archive": {"blocks": {"a": {"mixer": {**BMOJO, "m_e": 1, "archive": {"rows": 2, "staleness": 1}}}}},
    "engram": {"blocks": {"a": {"memory": ENGRAM, "mixer": ATTENTION}}, "branches": 2},
    "gmt": {"blocks": {"a": {"mixer": ATTENTION, "channel": {"kind": "gmt", "slots": 5, "width": 4}}}},
}
PROMPT = [256, *b"some words to read"]

EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES)


@EVERY_SHAPE
def test_a_saved_state_goes_on_where_it_stopped(tmp_path: Path, shape: str):
    """To the token, wherever it stops; with more prompt behind it; in logits to the rounding of another split."""
    run = tiny_run(tmp_path / "run", SHAPES[shape])
    whole = generate(run.model, [PROMPT], 16)[0]
    decoder = Decoder(run.model, [PROMPT], 9)
    first = run_decoder(decoder, 9)[0]
    save_state(decoder, tmp_path / "memory", run)
    assert first + run_decoder(load_decoder(run, tmp_path / "memory", [], 7), 7)[0] == whole
    read = [*PROMPT, *first, *b" and more"]
    for split in (2, len(PROMPT), len(read) - 1):
        save_state(Decoder(run.model, [read[:split]], 0), tmp_path / "memory", run)
        onward = load_decoder(run, tmp_path / "memory", read[split:], 5)
        at_once = Decoder(run.model, [read], 5)
        assert rel_err(onward.logits(), at_once.logits()) <= TOLERANCE["forms", torch.float32]
        onward = load_decoder(run, tmp_path / "memory", read[split:], 5)
        assert run_decoder(onward, 5)[0] == generate(run.model, [read], 5)[0]


@EVERY_SHAPE
def test_any_number_of_branches_leave_the_file_as_it_is(tmp_path: Path, shape: str):
    run, file = tiny_run(tmp_path / "run", SHAPES[shape]), tmp_path / "memory"
    save_state(Decoder(run.model, [PROMPT], 0), file, run)
    before = file.read_bytes()
    for more in (b"", b"a", b"another way to go on"):
        said = run_decoder(load_decoder(run, file, [*more], 6), 6)[0]
        assert said == generate(run.model, [[*PROMPT, *more]], 6)[0]
    decoder = load_decoder(run, file, [*b"a"], 6)
    decoder.select([0, 0, 0])
    assert run_decoder(decoder, 6) == generate(run.model, [[*PROMPT, *b"a"]], 6) * 3
    save_state(load_decoder(run, file, [], 0), tmp_path / "again", run)
    assert file.read_bytes() == before == (tmp_path / "again").read_bytes()


def test_the_header_says_whose_memory_it_is(tmp_path: Path):
    run = tiny_run(tmp_path / "run")
    save_state(Decoder(run.model, [PROMPT], 0), tmp_path / "memory", run)
    assert state.about(tmp_path / "memory") == {
        "pending": PROMPT[-1:],
        "tokens": len(PROMPT),
        "run": "run",
        "checkpoint": run.checkpoint,
        "tokenizer": run.tokenizer.fingerprint,
    }


def test_a_state_of_another_precision_is_read_in_the_models(tmp_path: Path):
    run = tiny_run(tmp_path / "run", SHAPES["bmojo"])
    half = open_run(run.dir, "cpu", "bfloat16")
    save_state(Decoder(half.model, [PROMPT], 0), tmp_path / "memory", half)
    wide = load_decoder(run, tmp_path / "memory", [], 3).logits()
    assert wide.dtype == torch.float32
    exact = Decoder(run.model, [PROMPT], 3).logits()
    assert 0 < rel_err(wide, exact) < 5 * TOLERANCE["fp32", torch.bfloat16]
    save_state(Decoder(run.model, [PROMPT], 0), tmp_path / "memory", run)
    assert load_decoder(half, tmp_path / "memory", [], 3).logits().dtype == torch.bfloat16


def test_archives_of_other_settings(tmp_path: Path):
    """The same weights may ask an archive for more or fewer rows, sooner or later; without one the state is another model's."""

    def of(name: str, archive: Any) -> LoadedRun:
        return tiny_run(tmp_path / name, {"blocks": {"a": {"mixer": {**BMOJO, "m_e": 1, "archive": archive}}}})

    run = of("run", {"rows": 2, "staleness": 2})
    save_state(Decoder(run.model, [PROMPT], 0), tmp_path / "memory", run)
    for other in (of("more", {"rows": 9}), of("fewer", {"rows": 1, "staleness": 3, "max_rows": 7})):
        assert other.checkpoint == run.checkpoint
        said = run_decoder(load_decoder(other, tmp_path / "memory", [*b" and on"], 12), 12)[0]
        assert len(said) == 12
    with pytest.raises(UserError, match="not a state of this model"):
        load_decoder(of("off", 0), tmp_path / "memory", [], 3)
    off = of("off-too", None)
    save_state(Decoder(off.model, [PROMPT], 0), tmp_path / "none", off)
    with pytest.raises(UserError, match="not a state of this model"):
        load_decoder(run, tmp_path / "none", [], 3)


class OtherTokenizer(ByteTokenizer):
    fingerprint = "another"


def test_a_state_of_another_model_is_refused(tmp_path: Path):
    """In one line: of other weights, of another shape, of another tokenizer; and what is no state, or does not fit the context."""
    run, short = tiny_run(tmp_path / "run"), tiny_run(tmp_path / "short", LEARNED)
    save_state(Decoder(run.model, [PROMPT], 1), tmp_path / "memory", run)
    save_state(Decoder(short.model, [PROMPT], 1), tmp_path / "late", short)
    (tmp_path / "junk").write_bytes(b"no state")
    state.save((torch.zeros(1),), tmp_path / "foreign")
    other = tiny_run(tmp_path / "other", std=0.1)
    spelled = type(run)(run.model, OtherTokenizer(), run.dir, run.name, checkpoint=run.checkpoint)
    for opened, file, words in [
        (other, "memory", r"saved from other weights \(run\)"),
        (short, "memory", r"saved from other weights \(run\)"),
        (run, "foreign", r"saved from other weights \(unknown\)"),
        (spelled, "memory", "saved with another tokenizer"),
        (
            short,
            "late",
            "19 prompt tokens and 6 new ones do not fit the context of 24 of this model; --max-tokens 5 does",
        ),
        (run, "junk", "cannot read the state"),
        (run, "none", "no state at"),
    ]:
        with pytest.raises(UserError, match=words) as caught:
            load_decoder(opened, tmp_path / file, [], 6)
        assert "\n" not in str(caught.value)


def test_nothing_half_written_stays_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A disk that refuses leaves the file that was there."""
    run = tiny_run(tmp_path / "run")
    decoder, folder = Decoder(run.model, [PROMPT], 1), tmp_path / "memories"
    folder.mkdir()
    save_state(decoder, folder / "memory", run)
    before = (folder / "memory").read_bytes()

    def full(seen: Any, path: Path, **about: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(state, "save", full)
    with pytest.raises(UserError, match=r"cannot write .*memory: no space left"):
        save_state(decoder, folder / "memory", run)
    assert [p.name for p in folder.iterdir()] == ["memory"]
    assert (folder / "memory").read_bytes() == before
    monkeypatch.undo()
    with pytest.raises(UserError, match="cannot write"):
        save_state(decoder, folder / "memory" / "below", run)


def test_the_command_reads_a_file_once_and_goes_on_from_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = tiny_model(SHAPES["bmojo"])
    base = [str(write_run(tmp_path / "run", model)), "--device", "cpu", "--greedy"]
    prompt, memory = tmp_path / "prompt.txt", str(tmp_path / "memory")
    prompt.write_text("def forty_two():\n    return ")
    assert main([*base, "--prompt-file", str(prompt), "--max-tokens", "0", "--save-state", memory]) == 0
    read = capsys.readouterr()
    assert read.out == prompt.read_text() + "\n"
    assert read.err == f"state after {1 + len(prompt.read_text())} tokens: {memory}\n"
    for more in ("", "43"):
        assert main([*base, "--load-state", memory, "--prompt", more, "--max-tokens", "6"]) == 0
        ids = generate(model, [[256, *(prompt.read_text() + more).encode()]], 6)[0]
        assert capsys.readouterr().out == more + ByteTokenizer().decode(ids) + "\n"
    other = write_run(tmp_path / "other", tiny_model(SHAPES["bmojo"], std=0.1))
    assert main([str(other), "--device", "cpu", "--load-state", memory]) == 2
    refused = capsys.readouterr()
    assert refused.err.startswith("error: ")
    assert refused.err.count("\n") == 1
    assert refused.out == ""
