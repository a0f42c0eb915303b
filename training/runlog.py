"""What a run says while it goes on, and how it is stopped and looked into."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from models.errors import UserError
from training.runfolder import write_whole

# Dense bf16 peak of one device in FLOP/s, from the vendors' data sheets; MFU is only printed for these.
PEAK_FLOPS = {
    **dict.fromkeys(("H100", "H200", "H800"), 989e12),
    **dict.fromkeys(("A100", "A800"), 312e12),
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype | None) -> float | None:
    """Of one device at this precision, where it is known."""
    if device.type != "cuda" or dtype is not torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def check_loggers(log: Any) -> None:
    """Raise UserError when a logger that was asked for is not installed."""
    for wanted, package in ((log.wandb != "off", "wandb"), (log.tensorboard, "tensorboard")):
        if wanted and importlib.util.find_spec(package) is None:
            raise UserError(f"log.{package} was asked for, but the package {package} is not installed")


class RunLog:
    """``metrics.jsonl`` always, wandb and TensorBoard when asked, and a progress line. Only rank 0 makes one."""

    def __init__(
        self, run: Path, total: int, start: int, tokens_per_step: int, log: Any, config: dict[str, Any]
    ) -> None:
        self.run, self.total, self.start, self.tokens_per_step = run, total, start, tokens_per_step
        self.path = run / "metrics.jsonl"
        self._forget_after(start)
        self.file = self.path.open("a")
        self.began = self.last_line = time.monotonic()
        self.shown: dict[str, str] = {}
        self.bar = self._bar() if sys.stderr.isatty() else None
        self.wandb = self._start_wandb(log, config) if log.wandb != "off" else None
        self.board = self._start_board() if log.tensorboard else None

    def _forget_after(self, step: int) -> None:
        """A killed run may have logged steps that its last checkpoint does not hold; they will be logged again."""
        if self.path.exists():
            lines = [x for x in self.path.read_text().splitlines() if _step_of(x) <= step]
            write_whole(self.path, "".join(line + "\n" for line in lines))
        samples = self.run / "samples.txt"
        if samples.exists():
            parts = re.split(r"^(?==== step \d+$)", samples.read_text(), flags=re.MULTILINE)
            headed = ((re.match(r"=== step (\d+)\n", p), p) for p in parts)
            write_whole(samples, "".join(p for head, p in headed if head and int(head[1]) <= step))

    def _bar(self) -> Any:
        from tqdm import tqdm

        return tqdm(total=self.total, initial=self.start, unit="step", dynamic_ncols=True, smoothing=0.05)

    def _start_wandb(self, log: Any, config: dict[str, Any]) -> Any:
        import wandb

        try:
            return wandb.init(
                project=log.wandb_project,
                name=self.run.name,
                id=self.run.name,
                resume="allow",
                mode=log.wandb,
                dir=str(self.run),
                config=config,
            )
        except wandb.Error as error:
            raise UserError(f"wandb: {error}; log.wandb=offline needs no account") from error

    def _start_board(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.run / "tensorboard"), purge_step=self.start + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl, flushed, and the same numbers to the other loggers."""
        line = {"step": step, "tokens": step * self.tokens_per_step, **values}
        try:
            self.file.write(json.dumps(_strict(line)) + "\n")
            self.file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error
        flat = dict(_flat(line))
        if self.wandb is not None:
            self.wandb.log(flat, step=step)
        if self.board is not None:
            for name, value in flat.items():
                self.board.add_scalar(name, value, step)

    def progress(self, step: int, values: dict[str, float]) -> None:
        """Show where the run is, with the newest of each value: a bar on a terminal, else a line every few seconds."""
        self.shown |= {k: _short(v) for k, v in values.items() if v is not None}
        if self.bar is not None:
            self.bar.set_postfix(self.shown, refresh=False)
            self.bar.update(step - self.bar.n)
            return
        now = time.monotonic()
        if now - self.last_line > 10 or step in (self.start + 1, self.total):
            self.last_line = now
            done = step - self.start
            eta = (now - self.began) / max(1, done) * (self.total - step)
            text = "".join(f"  {k} {v}" for k, v in self.shown.items())
            print(f"step {step}/{self.total}{text}  eta {clock(eta)}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def sample(self, step: int, text: str) -> None:
        try:
            with (self.run / "samples.txt").open("a") as file:
                file.write(f"=== step {step}\n{text}\n\n")
        except OSError as error:
            raise UserError(f"cannot write {self.run}/samples.txt: {error.strerror}") from error

    def close(self) -> None:
        self.file.close()
        if self.bar is not None:
            self.bar.close()
        if self.wandb is not None:
            self.wandb.finish()
        if self.board is not None:
            self.board.close()


class Meter:
    """Tokens per second since the last reading, pauses left out, and the share of the device's peak (MFU) if known."""

    def __init__(
        self, start: int, tokens_per_step: int, flops_per_token: float, peak: float | None, devices: int
    ) -> None:
        self.tokens_per_step, self.flops_per_token = tokens_per_step, flops_per_token
        self.peak, self.devices = peak, devices
        self.since, self.clock = start, time.monotonic()

    def read(self, step: int) -> dict[str, float]:
        now = time.monotonic()
        rate = (step - self.since) * self.tokens_per_step / max(1e-9, now - self.clock)
        self.since, self.clock = step, now
        found = {"tokens_per_s": rate}
        if self.peak:
            found["mfu"] = self.flops_per_token * rate / (self.peak * self.devices)
        return found

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.clock += time.monotonic() - began


class StopSignal:
    """The first SIGINT or SIGTERM ends the run after the step in progress, with a checkpoint; a second one at once.

    Only between `arm` and the end of the ``with`` block; elsewhere the signals do what they always do.
    """

    TOGETHER = 0.5  # seconds: a launcher and the terminal may both pass on what was one signal

    def __init__(self) -> None:
        self.asked = False
        self.when = 0.0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def arm(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, _: Any) -> None:
        if not self.asked:
            self.asked, self.when = True, time.monotonic()
            os.write(2, b"\nstopping after this step; once more to stop at once\n")
        elif time.monotonic() - self.when > self.TOGETHER:
            os._exit(128 + number)


class Trace:
    """Profiles a few steps of a run, after one to warm up, and writes ``profile.json`` for any Chrome-trace viewer."""

    STEPS = 4

    def __init__(self, run: Path, start: int) -> None:
        self.path, self.first = run / "profile.json", start + 1
        self.profiler: Any = None
        self.steps = 0

    def after(self, step: int) -> None:
        """Called at the end of every step."""
        if step + 1 == self.first:
            self.profiler = torch.profiler.profile(profile_memory=True)
            self.profiler.start()
        elif self.profiler is not None:
            self.steps += 1
            if self.steps == self.STEPS:
                self.close()

    def close(self) -> None:
        """Write what there is; nothing for a run of a single step."""
        if self.profiler is None:
            return
        self.profiler.stop()
        self.profiler.export_chrome_trace(str(self.path))
        print(self.profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=12), file=sys.stderr)
        print(f"trace of {self.steps} steps: {self.path}", file=sys.stderr)
        self.profiler = None


def _step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinite for one that a killed process left unfinished."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _strict(value: Any) -> Any:
    """JSON has no NaN and no infinity: null, as strict readers want it."""
    if isinstance(value, dict):
        return {k: _strict(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_strict(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(values: dict[str, Any], prefix: str = "") -> Any:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            yield f"{prefix}{key}", value


def _short(value: float) -> str:
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def clock(seconds: float) -> str:
    """Seconds as a person reads them: m:ss or h:mm:ss."""
    minutes, s = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes}:{s:02d}"
