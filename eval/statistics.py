"""Is one variant better than another? Differences paired by seed, with one error rate for everything that is compared."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

ROUNDING = 1e-12  # of the largest value: a smaller deviation is that of floats


class Comparison(NamedTuple):
    """What the differences of n pairs say about their mean."""

    n: int
    mean: float
    sd: float  # of the differences, with n - 1
    effect: float  # Cohen's d for pairs: mean / sd
    p: float  # two-sided paired t test that the mean is zero
    p_holm: float  # corrected for all that was compared together
    low: float  # the confidence interval of the mean, see `compare`
    high: float

    @property
    def half(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2

    @property
    def excludes_zero(self) -> bool:
        """Whether the corrected interval does; then ``p_holm`` is at most alpha, and only then."""
        return self.low > 0 or self.high < 0


def mean_and_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation with n - 1; None of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def compare(differences: Sequence[Sequence[float]], alpha: float = 0.05) -> list[Comparison]:
    """One `Comparison` for each list of at least two paired differences.

    The chance that any of them excludes zero although nothing differs is at most ``alpha``: Holm's step-down procedure
    (Scandinavian Journal of Statistics 6, 1979). Each interval has the level at which that procedure tested its
    comparison, 1 - ``alpha`` or more; those from the first one retained share that one's, so that intervals and corrected p values
    agree. They are not simultaneous: that all of them hold their means is less sure than 1 - ``alpha``.
    """
    p_values = [paired_p(d) for d in differences]
    corrected, levels = holm(p_values), holm_levels(p_values, alpha)
    found = []
    for values, p, p_holm, level in zip(differences, p_values, corrected, levels, strict=True):
        mean, sd = statistics.fmean(values), _deviation(values)
        half = interval_half_width(values, level)
        effect = mean / sd if sd else math.copysign(math.inf, mean) if mean else 0.0
        found.append(Comparison(len(values), mean, sd, effect, p, p_holm, mean - half, mean + half))
    return found


def paired_p(differences: Sequence[float]) -> float:
    """Two-sided p of the paired t test on n >= 2 differences; 1 where all are zero, 0 where all are the same other number."""
    from scipy.special import stdtr  # the distribution function of Student's t

    mean, error = statistics.fmean(differences), _standard_error(differences)
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return 2 * float(stdtr(len(differences) - 1, -abs(mean) / error))


def interval_half_width(differences: Sequence[float], alpha: float) -> float:
    """Of the t interval of the mean at level 1 - ``alpha``."""
    from scipy.special import stdtrit  # the quantile of Student's t

    return float(stdtrit(len(differences) - 1, 1 - alpha / 2)) * _standard_error(differences)


def _standard_error(values: Sequence[float]) -> float:
    return _deviation(values) / math.sqrt(len(values))


def _deviation(values: Sequence[float]) -> float:
    """Standard deviation with n - 1; 0 where there is nothing but rounding."""
    sd = statistics.stdev(values)
    return sd if sd > ROUNDING * max(map(abs, values)) else 0.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrected p values: the i-th smallest of m (from 0) times m - i, never below the one before it, at most 1."""
    corrected, highest = [0.0] * len(p_values), 0.0
    for i, at in enumerate(_ascending(p_values)):
        highest = max(highest, min(1.0, (len(p_values) - i) * p_values[at]))
        corrected[at] = highest
    return corrected


def holm_levels(p_values: Sequence[float], alpha: float) -> list[float]:
    """The level at which Holm's procedure tests each hypothesis; that of the first retained for all that follow it."""
    levels, left, retained = [alpha] * len(p_values), len(p_values), False
    for at in _ascending(p_values):
        levels[at] = alpha / left
        retained = retained or p_values[at] > levels[at]
        left -= not retained
    return levels


def _ascending(values: Sequence[float]) -> list[int]:
    return sorted(range(len(values)), key=values.__getitem__)
