"""Learning-rate factor as a pure function of the step."""

from __future__ import annotations

import math


def factor(step: int, total: int, kind: str, warmup: int, decay: float, floor: float) -> float:
    """The factor on the base rate for step 0 <= step < total.

    Linear warm-up over ``warmup`` steps, then: ``cosine`` to ``floor`` at the end (arXiv:1608.03983 without restarts);
    ``wsd``: constant, then linear to ``floor`` over the last ``decay`` of the run (arXiv:2404.06395); ``constant``.
    """
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant":
        return 1.0
    if kind == "cosine":
        share = (step - warmup) / max(1, total - 1 - warmup)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
    start = total - max(1, round(decay * total))
    if step < start:
        return 1.0
    return floor + (1 - floor) * (total - 1 - step) / max(1, total - 1 - start)
