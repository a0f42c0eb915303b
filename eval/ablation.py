"""What the runs of a question say, from their folders alone: what was chosen for each variant, and paired differences."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from configs.question import MIN_SEEDS, Curve, Metric, Question, other_setting
from configs.schema import RunConfig
from eval.ablation_runs import Costs, RunResult, read_run, run_name
from eval.ablation_sweep import Swept, read_sweep
from eval.statistics import Comparison, compare
from models.errors import UserError

EQUAL = 0.01  # budgets that differ by at most this share are called equal
BUDGET_NAMES = {"params": "parameters", "flops_per_token": "FLOPs", "state_bytes": "state"}


class Line(NamedTuple):
    """One variant by one metric."""

    metric: Metric
    variant: str
    values: list[float]
    comparison: Comparison | None  # with the baseline; None of the baseline itself, and below two shared seeds
    verdict: str  # better | worse | no difference shown; "" without a comparison
    sentence: str


@dataclass(frozen=True)
class Answer:
    """What is known of a question: every run, and each variant by each metric."""

    question: Question
    seeds: tuple[int, ...]
    runs: list[RunResult]
    lines: list[Line]
    not_counted: list[str]  # folders of seeds that were not asked for
    swept: Swept | None  # how each variant got its setting, where the question has a sweep

    def configs(self) -> dict[str, RunConfig]:
        """Of every variant that has a run folder, from its first."""
        return {r.variant: r.config for r in reversed(self.runs) if r.config}

    def chosen(self, variant: str) -> int | None:
        """Which value of the sweep its runs have; before there are any, the one that is best."""
        if self.swept is None:
            return None
        cfg = self.configs().get(variant)
        return self.swept.value_of(cfg) if cfg else self.swept.best(variant)

    def lost(self, variant: str, metric: Metric) -> int:
        """Runs of it that failed, or ended without a number: those that are left may be the lucky ones."""
        ended = [r for r in self.runs if r.variant == variant and r.state in ("failed", "finished")]
        return sum(metric.path not in r.values for r in ended)

    def all_runs(self) -> Iterator[RunResult]:
        """Those of the sweep first."""
        for at_value in self.swept.runs if self.swept else ():
            yield from at_value
        yield from self.runs

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

    def along(self, curve: Curve, variant: str) -> list[list[float]]:
        """What the variant's finished runs reached at each setting of the curve."""
        runs = [r.values for r in self.runs if r.variant == variant]
        return [[run[m.path] for run in runs if m.path in run] for m in curve.metrics()]

    def means(self, curve: Curve, variant: str) -> list[float | None]:
        """Of `along`; None where no run reached anything."""
        return [statistics.fmean(v) if v else None for v in self.along(curve, variant)]


def answer(question: Question, folder: Path, seeds: Sequence[int]) -> Answer:
    """Read every run of ``folder`` and compare. Raises UserError where two runs of a variant differ in more than their seed."""
    metrics = question.all_metrics()
    wanted = (*metrics, *(m for curve in question.curves for m in curve.metrics()))
    runs = [read_run(folder, variant, seed, wanted) for seed in seeds for variant in question.variants]
    for variant in question.variants:
        _must_be_alike([r for r in runs if r.variant == variant])
    asked = {run_name(v, s) for v in question.variants for s in seeds}
    others = [p.name for v in question.variants for p in sorted(folder.glob(f"{v}-s*")) if p.name not in asked]
    not_counted = [n for n in others if n.rpartition("-s")[2].isdigit()]
    found = Answer(question, tuple(seeds), runs, [], not_counted, read_sweep(question, folder))
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
            c, judged, said = compared.get(key), "", ""
            if variant != question.baseline:
                names = variant, question.baseline
                lost = {name: n for name in names if (n := found.lost(name, metric))}
                costs = found.costs(variant), found.costs(question.baseline)
                judged = verdict(metric, names, c, lost) if c else ""
                said = sentence(metric, names, costs, c, lost, len(pairs[key]), len(found.seeds))
            yield Line(metric, variant, list(values[key].values()), c, judged, said)


# -- in words


def is_shown(c: Comparison | None) -> bool:
    """Whether a difference may be claimed: enough seeds, and a corrected interval without zero."""
    return c is not None and c.n >= MIN_SEEDS and c.excludes_zero


def verdict(metric: Metric, names: tuple[str, str], c: Comparison, lost: Mapping[str, int]) -> str:
    """better, worse or no difference shown. ``lost``: how many runs of either gave no number; who has some is not called better."""
    better = (c.mean > 0) == metric.more_is_better
    if not is_shown(c) or lost.get(names[0] if better else names[1]):
        return "no difference shown"
    return "better" if better else "worse"


def sentence(
    metric: Metric,
    names: tuple[str, str],
    costs: tuple[Costs | None, Costs | None],
    c: Comparison | None,
    lost: Mapping[str, int],
    n: int,
    planned: int,
) -> str:
    """ "B beats A by 0.031 ± 0.006 nats (val/loss) at equal parameters, n=5", or that this is not shown.

    ``names`` and ``costs``: of the variant and of the baseline. ``lost``: as for `verdict`. ``n`` of ``planned`` seeds gave a pair.
    """
    seeds = f"n={n}" if n == planned else f"n={n} of {planned} seeds"
    without = "".join(f"; no number from {of} run{'s' * (of > 1)} of {name}" for name, of in lost.items())
    variant, baseline = names
    if c is None:
        return (
            f"{variant} and {baseline} cannot be compared by {metric.path} ({seeds}: two pairs are the least){without}"
        )
    unit = f" {metric.unit}" if metric.unit else ""
    if verdict(metric, names, c, lost) == "no difference shown":
        few = f"; a claim needs {MIN_SEEDS}" if c.n < MIN_SEEDS else ""
        return (
            f"no difference shown between {variant} and {baseline}: "
            f"{measured(c.mean, c.half, sign=True)}{unit} ({metric.path}), {seeds}{without}{few}"
        )
    better = (c.mean > 0) == metric.more_is_better
    winner, loser = names if better else names[::-1]
    budget = at_budget(*(costs if better else costs[::-1]))
    return f"{winner} beats {loser} by {measured(abs(c.mean), c.half)}{unit} ({metric.path}){budget}, {seeds}{without}"


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
        else:
            unequal.append(f"{name} x {a / b:.3g}" if a and b else f"{name} {a:,.0f} against {b:,.0f}")
    at = f" at equal {_and(equal)}" if equal else ""
    return at + (f"{',' if at else ''} with {_and(unequal)}" if unequal else "")


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
