"""What one run of a question says, from its folder alone: values, costs, and how it ended."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs import schema
from configs.question import Metric, with_vocabulary
from configs.schema import RunConfig
from eval.history import read_metrics
from eval.judge import result_rows
from models.errors import UserError, nearest
from models.lm import meta_model

QUEUE = "queue"  # the folder beside the run folders where `ablate.py` keeps what it started and how that ended


@dataclass(frozen=True)
class Costs:
    """What one run needed; of a model at the length it is trained at, its state in fp32."""

    params: int
    active_params: int
    flops_per_token: float  # forward
    state_bytes: float
    tokens: int
    training_flops: float  # 3 x forward x tokens
    tokens_per_s: float | None  # median over the run
    peak_memory_bytes: int | None  # of tensors on a GPU, of the process on a CPU
    device: str
    threads: int


@dataclass(frozen=True)
class RunResult:
    """One variant with one seed: what its folder holds."""

    variant: str
    seed: int
    state: str  # finished | unfinished | failed | missing
    why: str = ""  # where it is, and what went wrong
    values: dict[str, float] = field(default_factory=dict)  # by path of the metric
    costs: Costs | None = None
    config: RunConfig | None = None


def run_name(variant: str, seed: int) -> str:
    """Of the run's folder."""
    return f"{variant}-s{seed}"


def read_run(folder: Path, variant: str, seed: int, metrics: Sequence[Metric]) -> RunResult:
    """From its folder and, of a failure, what `ablate.py` noted."""
    run = folder / run_name(variant, seed)
    status = read_status(folder, run.name)
    failure = status.get("error", "") if status.get("ended") == "failed" else ""
    if not (run / "config.yaml").is_file():
        return RunResult(variant, seed, "failed" if failure else "missing", failure or "no run folder")
    cfg = schema.load(run / "config.yaml")
    environment = _read(run / "environment.json")
    step = last_step(run)
    if not environment.get("finished") or step < cfg.train.steps:
        state, why = ("failed", f": {failure}") if failure else ("unfinished", "")
        return RunResult(variant, seed, state, f"step {step} of {cfg.train.steps}{why}", config=cfg)
    values, problems = {}, []
    for metric in metrics:
        try:
            values[metric.path] = read_metric(metric, run, cfg.train.steps)
        except UserError as error:
            problems.append(str(error))
    return RunResult(variant, seed, "finished", "; ".join(problems), values, _costs(run, cfg, environment), cfg)


def read_metric(metric: Metric, run: Path, step: int) -> float:
    """Of a run that ended at ``step``. Raises UserError when it is not there or not a finite number."""
    room, _, rest = metric.path.partition("/")
    value = _last_validation(run, step, rest) if room == "val" else _result(run, step, rest)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{metric.path} is not a finite number")
    return float(value)


def _last_validation(run: Path, step: int, path: str) -> Any:
    value: Any = next((m["val"] for m in reversed(read_metrics(run)) if "val" in m and m["step"] == step), None)
    if value is None:
        raise UserError(f"no validation at step {step}")
    for key in path.split("/"):
        if not isinstance(value, dict) or key not in value:
            raise UserError(f"no val/{path}{nearest(key, value if isinstance(value, dict) else ())}")
        value = value[key]
    return value


def _result(run: Path, step: int, path: str) -> float:
    found: dict[str, float] = {}
    for file in sorted((run / "eval").glob("*.json")):
        try:
            results = json.loads(file.read_text(encoding="utf-8"))
            if results["config"]["step"] == step:
                found |= {f"{task}/{metric}": value for task, metric, value, _, _ in result_rows(results)}
                found |= _slices(results)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # not a result of lm-eval or a synthetic task
    if path not in found:
        raise UserError(f"no eval/{path} at step {step}{nearest(path, found)}")
    return found[path]


def _slices(results: dict[str, Any]) -> dict[str, float]:
    """Of a synthetic task: ``TASK/by/SLICE/LABEL/accuracy``."""
    by = {f"{name}/{label}": one for name, labels in results.get("by", {}).items() for label, one in labels.items()}
    return {f"{task}/by/{key}/accuracy": one["accuracy"] for task in results["results"] for key, one in by.items()}


def read_status(folder: Path, name: str) -> dict[str, Any]:
    """How the last process of a run ended, as `ablate.py` noted it; nothing where it did not."""
    return _read(folder / QUEUE / f"{name}.json")


def last_step(run: Path) -> int:
    """The newest step that is logged, from the end of the file alone; 0 before the first."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - (1 << 16)))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue  # torn, or cut by the seek
    return 0


def _costs(run: Path, cfg: RunConfig, environment: dict[str, Any]) -> Costs:
    one, metrics = meta_model(with_vocabulary(cfg)).cost(cfg.data.seq_len), read_metrics(run)
    tokens = max((m["tokens"] for m in metrics if "tokens" in m), default=0)
    speeds = [m["tokens_per_s"] for m in metrics if m.get("tokens_per_s")]
    peaks = [e.get("peak_memory_bytes") or 0 for e in (environment, *environment.get("earlier", []))]
    return Costs(
        one.params,
        one.active_params,
        one.flops_per_token,
        one.state_bytes,
        tokens,
        3 * one.flops_per_token * tokens,
        statistics.median(speeds) if speeds else None,
        max(peaks) or None,
        environment.get("device", ""),
        environment.get("threads", 0),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
