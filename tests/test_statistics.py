"""Paired comparisons against recorded numbers of scipy 1.17 and statsmodels 0.15, and their error rate where nothing differs."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from eval.ablation import is_shown
from eval.statistics import compare, holm, holm_levels, interval_half_width, mean_and_sd, paired_p

# Two samples -> p and the intervals at 95% and 99% of scipy.stats.ttest_rel.
PAIRED = {
    "clear": (
        [2.031, 2.045, 2.019, 2.052, 2.038],
        [2.062, 2.071, 2.055, 2.079, 2.074],
        0.00012654953115464747,
        (-0.03711584814685788, -0.025284151853142173),
        (-0.04101007190152722, -0.02138992809847283),
    ),
    "two": (
        [0.71, 0.83],
        [0.7, 0.79],
        0.34404173924526094,
        (-0.16559307104261992, 0.21559307104261985),
        (-0.9298511174430701, 0.9798511174430702),
    ),
    "unclear": (
        [0.91, 0.88, 0.93, 0.9, 0.89, 0.95, 0.87, 0.92],
        [0.9, 0.89, 0.91, 0.91, 0.88, 0.93, 0.89, 0.9],
        0.40708382206558996,
        (-0.008406159386771582, 0.018406159386771564),
        (-0.01484020540431508, 0.02484020540431506),
    ),
}
# p values -> those that statsmodels.stats.multitest.multipletests(method="holm") corrects them to.
HOLM = [
    ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
    ([0.02, 0.02, 0.9], [0.06, 0.06, 0.9]),
    ([0.001, 0.2, 0.011, 0.04, 0.6], [0.005, 0.4, 0.044, 0.12, 0.6]),
    ([0.7, 0.8], [1.0, 1.0]),
    ([], []),
]


@pytest.mark.parametrize("name", PAIRED)
def test_paired_t(name: str):
    a, b, p, *intervals = PAIRED[name]
    differences = [x - y for x, y in zip(a, b)]
    assert paired_p(differences) == pytest.approx(p, rel=1e-9)
    for alpha, (low, high) in zip((0.05, 0.01), intervals):
        (found,) = compare([differences], alpha)
        assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9)
        assert interval_half_width(differences, alpha) == pytest.approx((high - low) / 2, rel=1e-9)
        assert found.half == pytest.approx((high - low) / 2, rel=1e-9)
        assert (found.n, found.p, found.p_holm) == (len(a), pytest.approx(p), pytest.approx(p))
        assert found.effect == pytest.approx(statistics.fmean(differences) / statistics.stdev(differences))
        assert found.excludes_zero == (name == "clear")


@pytest.mark.parametrize(("p_values", "corrected"), HOLM)
def test_holm(p_values: list[float], corrected: list[float]):
    assert holm(p_values) == pytest.approx(corrected)


def test_intervals_and_corrected_p_agree():
    """At every level, in any order: an interval excludes zero where the corrected p is at most alpha, and nowhere else."""
    rng = random.Random(1)
    both = set()
    for _ in range(400):
        family = [[rng.gauss(shift, 1) for _ in range(5)] for shift in rng.choices((0, 1, 2, 4), k=4)]
        alpha = rng.choice((0.01, 0.05, 0.2))
        for c in compare(family, alpha):
            assert c.excludes_zero == (c.p_holm <= alpha)
            both.add((c.excludes_zero, c.p <= alpha))
    assert both == {(True, True), (False, True), (False, False)}  # the correction takes some back and adds none


def test_levels_step_down_and_stop():
    assert holm_levels([0.2, 0.001, 0.02], 0.05) == pytest.approx([0.05, 0.05 / 3, 0.05 / 2])
    assert holm_levels([0.03, 0.03], 0.05) == pytest.approx([0.025, 0.025])  # the second is not tried at 0.05


@pytest.mark.parametrize("variants", [1, 3])
def test_error_rate_where_nothing_differs(variants: int):
    """The same variant several times against the same baseline: all 3000 families are null, and share their baseline's runs.

    The share that claims anything is alpha within three standard errors; for a single comparison also not below that, so
    the claims are neither too bold nor too shy.
    """
    rng, families, alpha, claims = random.Random(7), 3000, 0.05, 0
    for _ in range(families):
        seeds = [rng.gauss(0, 3) for _ in range(5)]  # some seeds are harder for everyone
        runs = [[s + rng.gauss(0, 1) for s in seeds] for _ in range(variants + 1)]
        claims += any(is_shown(c) for c in compare([[a - b for a, b in zip(r, runs[0])] for r in runs[1:]], alpha))
    margin = 3 * math.sqrt(alpha * (1 - alpha) / families)
    assert claims / families <= alpha + margin
    if variants == 1:
        assert claims / families >= alpha - margin


def test_a_real_difference_is_found():
    rng, found = random.Random(3), 0
    for _ in range(100):
        found += compare([[rng.gauss(4, 1) for _ in range(5)], [rng.gauss(0, 1) for _ in range(5)]])[0].excludes_zero
    assert found > 90


def test_what_has_no_spread():
    same, shifted = compare([[0.0, 0.0, 0.0], [-0.5, -0.5, -0.5]])
    assert (same.p, same.effect, same.low, same.high, same.excludes_zero) == (1.0, 0.0, 0.0, 0.0, False)
    assert (shifted.p, shifted.effect, shifted.excludes_zero) == (0.0, -math.inf, True)
    (rounded,) = compare([[x + 0.2 - x for x in (0.1, 1.3, 2.7, 3.9, 5.1)]])  # 0.2 but for floats
    assert (rounded.p, rounded.effect, rounded.sd) == (0.0, math.inf, 0.0)
    assert mean_and_sd([2.0]) == (2.0, None)
    assert mean_and_sd([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert compare([]) == []
