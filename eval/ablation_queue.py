"""Runs in processes of their own, some at a time: `ablate.py` and `python -m bench tasks` train by them.

Each is a `train.py`. A run that is there is not repeated, one that was cut short goes on from its newest checkpoint. In `queue/`
beside the run folders are each one's config, log, lock and how it ended. The queue may be killed at any moment; a run whose own
process was killed has failed, and is tried again on request.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from configs import schema
from configs.question import MAY_DIFFER, other_setting
from configs.schema import RunConfig
from eval.ablation_runs import QUEUE, last_step, read_status, run_name
from models.errors import UserError
from models.folder import checkpoints
from models.parsing import to_dict
from training.runfolder import write_whole
from training.runlog import clock

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
PROGRESS_EVERY = 10.0  # seconds between progress lines where there is no terminal
POLL = 0.1  # seconds
ATTEMPT = "=== started: "  # before each process's part of a log


@dataclass(frozen=True)
class Means:
    """With what runs are trained."""

    places: Sequence[dict[str, str]]  # a process at a time in each, with these variables
    deadline: float  # of time.monotonic
    retry: bool
    flags: list[str]  # of train.py


def plan(configs: dict[str, RunConfig], seeds: Sequence[int], folder: Path) -> list[Run]:
    """All runs, seed by seed: whatever is cut short holds whole pairs. Raises UserError where a folder is in the way."""
    runs = [
        Run(replace(cfg, seed=seed, name=run_name(variant, seed), out_dir=str(folder)))
        for seed in seeds
        for variant, cfg in configs.items()
    ]
    for run in runs:
        run.check()
    try:
        (folder / QUEUE).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from error
    return runs


def train_all(runs: Sequence[Run], means: Means, later: int = 0) -> bool:
    """Train what is left of ``runs``, in order, until all ended or the deadline came -> whether it was cut short.

    ``later``: steps that follow, for the time left.
    """
    waiting = [r for r in runs if r.is_open(means.retry)]
    free, running = list(means.places), list[Child]()
    progress = Progress(runs, later)
    with stopping() as stop, none_left_behind(running):
        while running or (waiting and not stop.asked):
            # 1. whoever has ended makes room, and what became of it is noted
            for child in [c for c in running if c.process.poll() is not None]:
                running.remove(child)
                free.append(child.place)
                progress.say(child.end(asked=stop.asked))
            # 2. time is up, or someone pressed Ctrl-C: each run saves and ends after its step; asked again, at once
            if time.monotonic() > means.deadline and not stop.asked:
                stop.asked = 1
                progress.say("time is up: every run saves after its step")
            for child in running:
                child.signal(stop.asked)
            # 3. free places take the next runs; one that another process is training is left to it
            while free and waiting and not stop.asked:
                run = waiting.pop(0)
                if child := start(run, free[0], means):
                    running.append(child)
                    free.pop(0)
                elif run.is_open(means.retry):
                    progress.say(f"{run.name}: process {run.note('lock').read_text()} is training it")
            if running:
                progress.show([c.run for c in running])
                time.sleep(POLL)
    progress.close()
    return stop.asked > 0


# -- one run


@dataclass(frozen=True)
class Run:
    """One variant with one seed."""

    config: RunConfig  # its name and folder included

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def folder(self) -> Path:
        return Path(self.config.out_dir) / self.name

    def note(self, kind: str) -> Path:
        """``queue/NAME.kind`` beside the run folder: yaml, log, json or lock."""
        return Path(self.config.out_dir) / QUEUE / f"{self.name}.{kind}"

    def step(self) -> int:
        return last_step(self.folder)

    def is_finished(self) -> bool:
        """Whether its last step is done and judged."""
        try:
            environment = json.loads((self.folder / "environment.json").read_text())
        except (OSError, ValueError):
            return False
        return bool(environment.get("finished")) and self.step() == self.config.train.steps

    def has_failed(self) -> bool:
        return read_status(Path(self.config.out_dir), self.name).get("ended") == "failed"

    def is_open(self, retry: bool) -> bool:
        """Whether there is something left to train; failed ones only on request."""
        return not self.is_finished() and (retry or not self.has_failed())

    def check(self) -> None:
        """Raise UserError when the folder holds a run of other settings, or what should not be replaced."""
        resumable = self.is_finished() or checkpoints(self.folder)
        if self.folder.exists() and not resumable and not self.note("yaml").is_file():
            raise UserError(f"{self.folder} is in the way: no checkpoint in it, and it was not started from here")
        if resumable:
            what = other_setting(schema.load(self.folder / "config.yaml"), self.config)
            if what:
                raise UserError(
                    f"{self.folder} was started with other settings: {what}; delete it, or start anew with another --out"
                )

    def command(self) -> list[str]:
        """`train.py` from the newest checkpoint with what may change since, or from the start: a folder without any is no loss."""
        if not checkpoints(self.folder):
            shutil.rmtree(self.folder, ignore_errors=True)
            self.note("yaml").write_text(yaml.safe_dump(to_dict(self.config), sort_keys=False, allow_unicode=True))
            return [str(self.note("yaml"))]
        changed = schema.differences(schema.load(self.folder / "config.yaml"), self.config)
        may = [key for key in MAY_DIFFER if key in schema.MAY_CHANGE]
        words = [f"{key}={json.dumps(new)}" for key, _, new in changed if schema.is_under(key, may)]
        return ["--resume", str(self.folder), *words]


@dataclass
class Child:
    """A run that is being trained."""

    run: Run
    place: dict[str, str]
    process: subprocess.Popen[bytes]
    began: float = field(default_factory=time.monotonic)
    signalled: int = 0

    def signal(self, asked: int) -> None:
        """Pass on that someone asked to stop, once for each time: first politely, then not."""
        while self.signalled < asked:
            self.signalled += 1
            number = signal.SIGTERM if self.signalled == 1 else signal.SIGKILL
            if self.process.poll() is None:
                self.process.send_signal(number)

    def end(self, asked: int) -> str:
        """Note how the process ended -> the same as a line."""
        code = self.process.returncode
        if self.run.is_finished():
            status: dict[str, Any] = {"ended": "finished"}
        elif asked or code == 0:
            status = {"ended": "stopped"}
        else:
            status = {"ended": "failed", "error": _last_words(self.run.note("log"), code)}
        write_whole(self.run.note("json"), json.dumps(status | {"code": code}))
        step, steps = self.run.step(), self.run.config.train.steps
        took = clock(time.monotonic() - self.began)
        why = f": {status['error']}; all of it in {self.run.note('log')}" if "error" in status else ""
        return f"{self.run.name}: {status['ended']} at step {step} of {steps}, {took}{why}"


def start(run: Run, place: dict[str, str], means: Means) -> Child | None:
    """A process of its own, so that its crash is its own; None if another one is at this run, or has meanwhile ended it.

    The lock is the child's: it is free when that process is gone, however it went, and held on when this one is killed.
    """
    with run.note("lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        if not run.is_open(means.retry):
            return None
        run.note("json").unlink(missing_ok=True)
        words = [sys.executable, str(TRAIN), *run.command(), *means.flags]
        with run.note("log").open("ab") as log:
            log.write(f"{ATTEMPT}{' '.join(words)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                words,
                env={**os.environ, **place},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[lock.fileno()],
                start_new_session=True,  # Ctrl-C reaches it through this process, once
            )
        lock.truncate(0)
        lock.write(str(process.pid))
    return Child(run, place, process)


def _last_words(log: Path, code: int) -> str:
    """Why a process failed: its error line, or the last one; and the signal that ended it."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    newest = log.read_text(errors="replace").rpartition(ATTEMPT)[2]
    _, *lines = [line.strip() for line in newest.splitlines() if line.strip()]  # the first is its command
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [f"exit code {code}, without a word"])[-1]


# -- around them


def places_for(jobs: int | None, gpus: Sequence[str], cores: int) -> list[dict[str, str]]:
    """What each of the processes that run at a time gets: a GPU, in turn, or its share of the CPU's threads."""
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(jobs or len(gpus))]
    share = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // (jobs or 1)))
    return [{"OMP_NUM_THREADS": share} for _ in range(jobs or 1)]


def visible_gpus(configs: Sequence[RunConfig]) -> list[str]:
    """The GPUs that the runs may use, as CUDA_VISIBLE_DEVICES names them."""
    if all(cfg.train.device == "cpu" for cfg in configs) or not torch.cuda.is_available():
        return []
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class Stop:
    """How often someone asked to stop."""

    asked: int = 0


@contextmanager
def stopping() -> Iterator[Stop]:
    """Counts SIGINT, SIGTERM and SIGHUP instead of ending."""
    stop = Stop()

    def handle(*_: Any) -> None:
        stop.asked += 1
        os.write(2, b"\nstopping: every run saves after its step; once more to kill them\n")

    before = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def none_left_behind(running: list[Child]) -> Iterator[None]:
    """Whatever goes wrong here, the runs are asked to save and end."""
    try:
        yield
    finally:
        for child in running:
            child.signal(1)


class Progress:
    """Where all the runs are: a line that is rewritten on a terminal, else a new one every few seconds.

    The time left is that of the steps left at the rate of this session; seeds take turns, so every variant has its share.
    """

    def __init__(self, runs: Sequence[Run], later: int = 0) -> None:
        self.runs, self.later = runs, later
        self.began, self.shown, self.tty = time.monotonic(), 0.0, sys.stderr.isatty()
        self.at_start = self.steps()

    def steps(self) -> int:
        return sum(r.step() for r in self.runs)

    def eta(self) -> str:
        """Of the runs that have not failed; "?" before there is a rate."""
        left = self.later + sum(r.config.train.steps - r.step() for r in self.runs if not r.has_failed())
        made = self.steps() - self.at_start
        return clock(left * (time.monotonic() - self.began) / made) if made > 0 else "?"

    def show(self, running: Sequence[Run]) -> None:
        now = time.monotonic()
        if now - self.shown < (1.0 if self.tty else PROGRESS_EVERY):
            return
        self.shown = now
        finished, failed = sum(r.is_finished() for r in self.runs), sum(r.has_failed() for r in self.runs)
        at = ", ".join(f"{r.name} {r.step()}/{r.config.train.steps}" for r in running)
        head = f"{finished} of {len(self.runs)} runs finished" + (f", {failed} failed" if failed else "")
        self._write(f"{head}; now {at}; eta {self.eta()}", end="" if self.tty else "\n")

    def say(self, text: str) -> None:
        self._write(text, end="\n")

    def _write(self, text: str, end: str) -> None:
        print(f"\r\033[K{text}" if self.tty else text, end=end, file=sys.stderr, flush=True)

    def close(self) -> None:
        """What is left, and how long it would take."""
        left = [r for r in self.runs if r.is_open(retry=False)]
        if left:
            steps = sum(r.config.train.steps - r.step() for r in left)
            self.say(f"left: {len(left)} runs, {steps:,} steps, eta {self.eta()}; the same command goes on")
