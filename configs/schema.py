"""One run as frozen dataclasses. Precedence: these defaults, the YAML file, ``key.path=value`` on the command line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data import DataConfig
from models.config import ModelConfig, tiny
from models.errors import UserError
from models.parsing import choice, from_dict, load_yaml, set_key, to_dict
from training.optim import OptimConfig


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 1000
    batch_size: int = 32  # rows of seq_len tokens in one optimizer step, over all ranks and micro-batches
    micro_batch: int | None = None  # rows in one forward of one rank; default: batch_size / ranks
    device: str = "auto"  # auto | cpu | cuda
    precision: str = "auto"  # auto | fp32 | bf16 (autocast; parameters stay fp32)
    compile: bool = False
    recompute: bool = False  # activation checkpointing, block by block
    val_every: int = 0  # steps; 0: ten times in a run
    val_tokens: int = 262144  # of the validation split, the same ones every time; 0: all
    save_every: int = 0  # steps; 0: ten times in a run
    keep: int = 2  # newest checkpoints kept; the last one of a run always is
    sample_every: int = 0  # steps; 0: as often as validation; -1: never
    sample_prompt: str = ""
    sample_tokens: int = 200
    freeze: tuple[str, ...] = ()  # glob patterns over parameter names
    interventions: tuple[Any, ...] = ()  # see training.interventions

    def __post_init__(self) -> None:
        choice("train.precision", self.precision, ("auto", "fp32", "bf16"))
        lowest = {"steps": 1, "batch_size": 1, "keep": 1, "val_every": 0, "val_tokens": 0, "save_every": 0}
        for name, low in {**lowest, "sample_every": -1, "sample_tokens": 1}.items():
            if getattr(self, name) < low:
                raise UserError(f"train.{name} must be at least {low}, got {getattr(self, name)}")
        if self.micro_batch is not None and (self.micro_batch < 1 or self.batch_size % self.micro_batch):
            raise UserError(f"train.micro_batch={self.micro_batch} does not divide train.batch_size={self.batch_size}")

    def every(self, name: str) -> int:
        """``val_every``, ``save_every`` or ``sample_every`` with its default filled in."""
        given = getattr(self, name)
        if name == "sample_every" and given == 0:
            return self.every("val_every")
        return given or -(-self.steps // 10)

    def micro_batches(self, ranks: int) -> tuple[int, int]:
        """-> (rows in one forward, forwards of one rank in one step)."""
        micro = self.micro_batch or max(1, self.batch_size // ranks)
        if self.batch_size % (micro * ranks):
            raise UserError(
                f"train.batch_size={self.batch_size} is not a multiple of {ranks} ranks x train.micro_batch={micro}"
            )
        return micro, self.batch_size // (micro * ranks)


@dataclass(frozen=True)
class LogConfig:
    every: int = 10  # steps between lines of metrics.jsonl
    wandb: str = "off"  # off | offline | online
    wandb_project: str = "loci-lm"
    tensorboard: bool = False

    def __post_init__(self) -> None:
        choice("log.wandb", self.wandb, ("off", "offline", "online"))
        if self.every < 1:
            raise UserError(f"log.every must be at least 1, got {self.every}")


@dataclass(frozen=True)
class EvalConfig:
    """What is judged when a run ends."""

    tasks: tuple[str, ...] = ()  # lm-eval tasks, or "corpus": tasks made from the run's own validation text
    limit: int | None = None
    baselines: bool = False  # byte n-gram count models and xz on the same text
    # Other settings of a synthetic task, each as "data.KEY=VALUE ...", that the run is judged on too.
    recall: tuple[str, ...] = ()
    frequency: int = 0  # validation loss by how often the last so-many tokens were seen in training; 0: not
    length: tuple[int, ...] = ()  # context lengths at which long held-out documents are scored
    needle: tuple[int, ...] = ()  # tokens of rows of held-out text in which a sentence is hidden and asked for
    suites: tuple[str, ...] = ()  # of synthetic tasks (`eval.suites`), asked while the run trains and when it ends
    suite_every: int = 0  # steps; 0: twenty times in a run
    suite_rows: int = 512  # over all tasks of a suite, each time

    def __post_init__(self) -> None:
        if self.suite_every < 0 or self.suite_rows < 1:
            raise UserError(f"eval.suite_every={self.suite_every} and eval.suite_rows={self.suite_rows} cannot be")


@dataclass(frozen=True)
class RunConfig:
    name: str = ""
    seed: int = 0
    out_dir: str = "runs"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    log: LogConfig = field(default_factory=LogConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        if self.data.synthetic is None:
            if self.eval.recall:
                raise UserError("eval.recall: settings of data.synthetic, which this run does not have")
            return
        for name in ("tasks", "baselines", "frequency", "length", "needle"):
            if getattr(self.eval, name):
                raise UserError(f"eval.{name} judges text; a run on data.synthetic always reports its accuracy")
        if not self.train.val_tokens:
            raise UserError("train.val_tokens=0 means all, and the rows of data.synthetic have no end: give a number")


# What a resumed run may change; anything else would silently be another run.
MAY_CHANGE = (
    "train.steps",
    "train.device",
    "train.compile",
    "train.recompute",
    "train.micro_batch",
    "train.val_every",
    "train.val_tokens",
    "train.save_every",
    "train.sample_every",
    "train.sample_prompt",
    "train.sample_tokens",
    "train.keep",
    "log",
    "eval",
)


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """A run from its file; raises UserError (one line, nearest valid name) for anything wrong in it."""
    raw = load_yaml(path, list(overrides))
    raw.setdefault("name", Path(path).stem)
    return from_dict(RunConfig, raw)


def changed(cfg: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """The run with each ``key.path=value`` set in it; raises UserError like `load`."""
    raw = to_dict(cfg)
    for override in overrides:
        set_key(raw, override)
    return from_dict(RunConfig, raw)


def check_resumable(before: RunConfig, now: RunConfig) -> None:
    """Raise UserError when a setting differs that may not change on resume."""
    for key, old, _ in differences(before, now):
        if not is_under(key, MAY_CHANGE):
            raise UserError(f"'{key}' may not change on resume (was {old!r}); only these may: {', '.join(MAY_CHANGE)}")


def differences(before: RunConfig, now: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    """(key path, old value, new value) of every setting that differs, as plain data."""
    return _differences(to_dict(before), to_dict(now))


def _differences(before: Any, now: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(k for k in now if k not in before)]:
            yield from _differences(before.get(key), now.get(key), f"{where}.{key}" if where else str(key))
    elif before != now:
        yield where, before, now


def is_under(key: str, sections: Sequence[str]) -> bool:
    """Whether a key path is one of these or inside one."""
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def shrink(cfg: RunConfig) -> RunConfig:
    """The same run, small enough for two steps in seconds on a CPU; nothing is judged at its end."""
    small = {"steps": 2, "batch_size": 4, "micro_batch": None, "compile": False}
    short = {"val_tokens": 2048, "sample_tokens": 16}
    task = cfg.data.synthetic and cfg.data.synthetic.tiny()
    data = replace(cfg.data, seq_len=min(cfg.data.seq_len, 64), synthetic=task)
    train = replace(cfg.train, **small, **short)
    return replace(cfg, name=f"{cfg.name}-tiny", model=tiny(cfg.model), data=data, train=train, eval=EvalConfig())
