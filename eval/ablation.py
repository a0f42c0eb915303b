"""What the runs of a question say, from their folders alone: values, paired differences, costs, and what is missing."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from configs import schema
from configs.question import MIN_SEEDS, Metric, Question, other_setting, with_vocabulary
from configs.schema import RunConfig
from eval.history import read_metrics
from eval.judge import result_rows
from eval.statistics import Comparison, compare
from models.errors import UserError, nearest
from models.lm import meta_model

QUEUE = "queue"  # the folder beside the run folders where `ablate.py` keeps what it started and how that ended
EQUAL = 0.01  # budgets that differ by at most this share are called equal
BUDGET_NAMES = {"params": "parameters", "flops_per_token": "FLOPs", "state_bytes": "state"}


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


# -- one run


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


# -- all runs


class Line(NamedTuple):
    """One variant by one metric."""

    metric: Metric
    variant: str
    values: list[float]
    comparison: Comparison | None  # with the baseline; None of the baseline itself, and below two shared seeds
    sentence: str


@dataclass(frozen=True)
class Answer:
    """What is known of a question: every run, and each variant by each metric."""

    question: Question
    seeds: tuple[int, ...]
    runs: list[RunResult]
    lines: list[Line]
    not_counted: list[str]  # folders of seeds that were not asked for

    def configs(self) -> dict[str, RunConfig]:
        """Of every variant that has a run folder, from its first."""
        return {r.variant: r.config for r in reversed(self.runs) if r.config}

    def costs(self, variant: str) -> Costs | None:
        """Of the variant's finished runs: alike but for speed (the mean) and memory (the most)."""
        found = [r.costs for r in self.runs if r.variant == variant and r.costs]
        if not found:
            return None
        speeds = [c.tokens_per_s for c in found if c.tokens_per_s]
        peaks = [c.peak_memory_bytes for c in found if c.peak_memory_bytes]
        return Costs(
            **asdict(found[0])
            | {
                "tokens_per_s": statistics.fmean(speeds) if speeds else None,
                "peak_memory_bytes": max(peaks, default=None),
            }
        )


def answer(question: Question, folder: Path, seeds: Sequence[int]) -> Answer:
    """Read every run of ``folder`` and compare. Raises UserError where two runs of a variant differ in more than their seed."""
    metrics = question.all_metrics()
    wanted = (*metrics, *(m for curve in question.curves for m in curve.metrics()))
    runs = [read_run(folder, variant, seed, wanted) for seed in seeds for variant in question.variants]
    for variant in question.variants:
        _must_be_alike([r for r in runs if r.variant == variant])
    asked = {run_name(v, s) for v in question.variants for s in seeds}
    others = [p.name for v in question.variants for p in sorted(folder.glob(f"{v}-s*")) if p.name not in asked]
    found = Answer(question, tuple(seeds), runs, [], [n for n in others if n.rpartition("-s")[2].isdigit()])
    found.lines.extend(_lines(found, metrics))
    return found


def _must_be_alike(runs: Sequence[RunResult]) -> None:
    for first, other in itertools.pairwise(r for r in runs if r.config):
        if first.config and other.config and (what := other_setting(first.config, other.config)):
            here, there = run_name(other.variant, other.seed), run_name(first.variant, first.seed)
            raise UserError(f"{here} and {there} are not runs of one variant: {what}")


def _lines(found: Answer, metrics: Sequence[Metric]) -> Iterator[Line]:
    """Everything is one family of comparisons: all variants by all metrics."""
    question = found.question
    values = {
        (m.path, v): {r.seed: r.values[m.path] for r in found.runs if r.variant == v and m.path in r.values}
        for m in metrics
        for v in question.variants
    }
    pairs: dict[tuple[str, str], list[float]] = {}
    for (path, variant), own in values.items():
        if variant != question.baseline:
            base = values[path, question.baseline]
            pairs[path, variant] = [own[s] - base[s] for s in found.seeds if s in own and s in base]
    enough = {key: d for key, d in pairs.items() if len(d) > 1}
    compared = dict(zip(enough, compare(list(enough.values()), question.alpha), strict=True))
    for metric in metrics:
        for variant in question.variants:
            key = metric.path, variant
            said = ""
            if variant != question.baseline:
                costs = found.costs(variant), found.costs(question.baseline)
                names = variant, question.baseline
                said = sentence(metric, names, costs, compared.get(key), len(pairs[key]), len(found.seeds))
            yield Line(metric, variant, list(values[key].values()), compared.get(key), said)


# -- in words


def is_shown(c: Comparison | None) -> bool:
    """Whether a difference may be claimed: enough seeds, and a corrected interval without zero."""
    return c is not None and c.n >= MIN_SEEDS and c.excludes_zero


def verdict(line: Line) -> str:
    """better, worse or no difference shown; nothing of the baseline."""
    c = line.comparison
    if c is None:
        return ""
    if not is_shown(c):
        return "no difference shown"
    return "better" if (c.mean > 0) == line.metric.more_is_better else "worse"


def sentence(
    metric: Metric,
    names: tuple[str, str],
    costs: tuple[Costs | None, Costs | None],
    c: Comparison | None,
    n: int,
    planned: int,
) -> str:
    """ "B beats A by 0.031 ± 0.006 nats (val/loss) at equal parameters, n=5", or that this is not shown.

    ``names`` and ``costs``: of the variant and of the baseline. ``n`` of ``planned`` seeds gave a pair.
    """
    seeds = f"n={n}" if n == planned else f"n={n} of {planned} seeds"
    variant, baseline = names
    if c is None:
        return f"{variant} and {baseline} cannot be compared by {metric.path} ({seeds}: two pairs are the least)"
    unit = f" {metric.unit}" if metric.unit else ""
    if not is_shown(c):
        few = f"; a claim needs {MIN_SEEDS}" if c.n < MIN_SEEDS else ""
        return (
            f"no difference shown between {variant} and {baseline}: "
            f"{measured(c.mean, c.half, sign=True)}{unit} ({metric.path}), {seeds}{few}"
        )
    better = (c.mean > 0) == metric.more_is_better
    winner, loser = names if better else names[::-1]
    budget = at_budget(*(costs if better else costs[::-1]))
    return f"{winner} beats {loser} by {measured(abs(c.mean), c.half)}{unit} ({metric.path}){budget}, {seeds}"


def measured(mean: float, half: float, sign: bool = False) -> str:
    """A mean with its half-width, both to two digits of the latter."""
    digits = max(0, 1 - math.floor(math.log10(half))) if half > 0 else 6
    return f"{mean:{'+' if sign else ''}z.{digits}f} ± {half:.{digits}f}"


def at_budget(ours: Costs | None, theirs: Costs | None) -> str:
    """How the winner's budget compares with the loser's."""
    if ours is None or theirs is None:
        return ""
    equal, unequal = [], []
    for key, name in BUDGET_NAMES.items():
        a, b = getattr(ours, key), getattr(theirs, key)
        if abs(a - b) <= EQUAL * b:
            equal.append(name)
        elif b:
            unequal.append(f"{name} x {a / b:.3g}")
    at = f" at equal {_and(equal)}" if equal else ""
    return at + (f"{',' if at else ''} with {_and(unequal)}" if unequal else "")


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
