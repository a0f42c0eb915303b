"""What instruments find, as JSON can hold it."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor


def plain(value: Any, digits: int = 6) -> Any:
    """Tensors as rounded numbers, in lists, also inside of dicts; JSON has no NaN and no infinity: None."""
    if isinstance(value, Tensor):
        return plain(value.tolist(), digits)
    if isinstance(value, dict):
        return {k: plain(v, digits) for k, v in value.items()}
    if isinstance(value, list):
        return [plain(v, digits) for v in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value


def number(value: float | None) -> float:
    """What was no number, as NaN again."""
    return math.nan if value is None else float(value)


def rank_correlation(a: Tensor, b: Tensor) -> float | None:
    """Spearman's; None where one of them is constant or there are fewer than three."""
    from scipy.stats import spearmanr

    if len(a) < 3 or not bool(a.isfinite().all() and b.isfinite().all()) or a.min() == a.max() or b.min() == b.max():
        return None
    return float(spearmanr(a.numpy(), b.numpy()).statistic)  # pyright: ignore[reportAttributeAccessIssue]
