"""The run folder's files and the loop's instruments, each alone."""

from __future__ import annotations

import io
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from configs.schema import LogConfig
from models import UserError
from training import runfolder, runlog
from training.runfolder import new_run_folder, write_environment
from training.runlog import Meter, RunLog, StopSignal, peak_flops


def make_log(run: Path, start: int = 0, total: int = 10) -> RunLog:
    return RunLog(run, total, start, 100, LogConfig(), {})


def test_metrics_are_flat_lines(tmp_path: Path):
    log = make_log(tmp_path)
    log.write(1, {"loss": 2.0, "losses": {"lm": 2.0}})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 1,
        "tokens": 100,
        "loss": 2.0,
        "losses": {"lm": 2.0},
    }
    log.close()
    nested = {"a": 1, "b": {"c": 2.5, "d": {"e": 3}}, "text": "no", "list": [1]}
    assert dict(runlog._flat(nested)) == {"a": 1, "b/c": 2.5, "b/d/e": 3}


def test_what_came_after_the_checkpoint_is_forgotten(tmp_path: Path):
    log = make_log(tmp_path)
    for step in (1, 2, 3, 4):
        log.write(step, {"loss": float(step)})
        log.sample(step, f"sample of {step}\n=== step not a heading")
    log.write(2, {"val": {"loss": 0.5}})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')  # a process was killed here
    make_log(tmp_path, start=2).close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], "val" in line) for line in lines] == [(1, False), (2, False), (2, True)]
    samples = (tmp_path / "samples.txt").read_text()
    assert samples.count("sample of") == 2
    assert samples.endswith("sample of 2\n=== step not a heading\n\n")


def test_progress_without_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The first and the last step at once, others after a while; each with the newest value of everything."""
    screen = io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    log = make_log(tmp_path)
    log.progress(1, {"loss": 2.34567, "tokens_per_s": 12345.6})
    log.progress(2, {"loss": 2.0})
    log.last_line -= 11
    log.progress(3, {})
    log.progress(10, {"loss": 1.0})
    lines = screen.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/10", "3/10", "10/10"]
    assert "loss 2.346  tokens_per_s 12,346" in lines[0]
    assert "loss 2  tokens_per_s 12,346" in lines[1]
    assert all("eta 0:0" in line for line in lines)


def test_progress_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    log = make_log(tmp_path, start=4)
    log.progress(5, {"loss": 2.5})
    log.progress(10, {})
    log.say("a line of its own")
    log.close()
    assert "10/10" in screen.getvalue()
    assert "loss=2.5" in screen.getvalue().rsplit("10/10", 1)[1]
    assert "a line of its own\n" in screen.getvalue()


def test_run_folders(tmp_path: Path):
    made = [new_run_folder(str(tmp_path / "runs"), "a") for _ in range(3)]
    assert [p.name for p in made] == ["a", "a-2", "a-3"]
    assert all(p.is_dir() for p in made)
    assert new_run_folder(str(tmp_path), "").name == "run"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make the run folder"):
        new_run_folder(str(tmp_path / "file"), "a")


def test_environment_keeps_those_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for i in range(3):
        monkeypatch.setattr("sys.argv", ["train.py", str(i)])
        write_environment(tmp_path)
    runfolder.write_outcome(tmp_path, torch.device("cpu"), {"memory": {"hit_rate": 0.5}, "silent": {}})
    runfolder.write_finished(tmp_path)
    found = json.loads((tmp_path / "environment.json").read_text())
    assert found["command"][1] == "2"
    assert [e["command"][1] for e in found["earlier"]] == ["0", "1"]
    assert "earlier" not in found["earlier"][1]
    assert set(found["kernels"]) == {"setting", "ran"}
    assert found["tables"] == {"memory": {"hit_rate": 0.5}}
    assert found["finished"] is True
    assert found["peak_memory_bytes"] > 50e6  # this process holds torch
    write_environment(tmp_path)  # resumed: open again
    again = json.loads((tmp_path / "environment.json").read_text())
    assert "finished" not in again
    assert again["earlier"][-1]["finished"] is True


def test_meter(monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    meter = Meter(5, 1000, 6e6, 1e10, 2)
    now[0] += 4
    with meter.paused():
        now[0] += 50
    found = meter.read(9)
    assert found["tokens_per_s"] == pytest.approx(1000)
    assert found["mfu"] == pytest.approx(6e6 * 1000 / 2e10)
    now[0] += 1
    assert meter.read(10)["tokens_per_s"] == pytest.approx(1000)
    assert "mfu" not in Meter(0, 1, 1.0, None, 1).read(1)
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None


def test_signals_are_ours_only_while_armed(monkeypatch: pytest.MonkeyPatch):
    before = signal.getsignal(signal.SIGTERM)
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with StopSignal() as stop:
        assert signal.getsignal(signal.SIGTERM) is before
        stop.arm()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # the launcher passes on what the terminal also sent
        assert stop.asked
        assert not ended
        stop.when -= 1
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended == [128 + signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is before


def test_missing_loggers_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    runlog.check_loggers(LogConfig())
    for wrong in (LogConfig(wandb="offline"), LogConfig(tensorboard=True)):
        with pytest.raises(UserError, match="is not installed"):
            runlog.check_loggers(wrong)
