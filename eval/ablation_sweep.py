"""What the sweep of a question says, from its folders alone: each variant's result at each value, and which one it gets."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.question import Metric, Question, Sweep
from configs.schema import RunConfig
from eval.ablation_runs import RunResult, read_run

SWEEP = "sweep"  # the folder beside the run folders; in it one folder of runs for each value


@dataclass(frozen=True)
class Swept:
    """A `Sweep` and its runs: at each of its values, in order, all variants."""

    sweep: Sweep
    metric: Metric
    tuned_as: Mapping[str, str]  # of every variant: itself, or the one whose choice it takes
    runs: Sequence[Sequence[RunResult]]

    def results(self, variant: str) -> list[float | None]:
        """Mean of the metric at each value, of the variant as which this one is tuned.

        None where a seed is missing, failed or diverged.
        """
        return [self._mean(at_value, variant) for at_value in self.runs]

    def _mean(self, at_value: Sequence[RunResult], variant: str) -> float | None:
        found = [r.values.get(self.metric.path) for r in at_value if r.variant == self.tuned_as[variant]]
        known = [v for v in found if v is not None]
        return statistics.fmean(known) if known and len(known) == len(found) else None

    def best(self, variant: str) -> int | None:
        """Which value gives the best result, the first of equals; None while a run is open, or without any result."""
        tried = [r for at_value in self.runs for r in at_value if r.variant == self.tuned_as[variant]]
        if any(r.state in ("missing", "unfinished") for r in tried):
            return None
        sign = 1 if self.metric.more_is_better else -1
        known = [(i, sign * r) for i, r in enumerate(self.results(variant)) if r is not None]
        return max(known, key=lambda one: one[1])[0] if known else None

    def value_of(self, cfg: RunConfig) -> int | None:
        """Which value a run has; None if none of them."""
        alike = (i for i, value in enumerate(self.sweep.values) if self.sweep.at(cfg, value) == cfg)
        return next(alike, None)


def sweep_folder(folder: Path, sweep: Sweep, value: float | int | str) -> Path:
    """Where the runs at one value lie, in the question's folder."""
    return folder / SWEEP / sweep.folder(value)


def read_sweep(question: Question, folder: Path) -> Swept | None:
    """From the question's folder; None where the question has no sweep."""
    sweep, metric = question.sweep, question.all_metrics()[0]
    if sweep is None:
        return None
    return Swept(
        sweep,
        metric,
        {name: variant.tuned_as or name for name, variant in question.variants.items()},
        [
            [
                read_run(sweep_folder(folder, sweep, value), variant, seed, [metric])
                for seed in sweep.seeds
                for variant in question.tried()
            ]
            for value in sweep.values
        ],
    )
