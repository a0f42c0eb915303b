"""Paired measurements: ours and the peer in turn, so that a noisy neighbour slows both; the median ratio and its interval."""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tqdm import tqdm


@dataclass(frozen=True)
class Ratio:
    """Peer's time over ours: above 1, ours is faster."""

    median: float
    low: float  # 95 per cent bootstrap interval of the median
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def alternate(ours: Callable[[], object], peer: Callable[[], object], pairs: int, label: str, warmup: int = 1) -> Ratio:
    """Time both ``pairs`` times, changing who goes first; warm-up runs are not counted."""
    for _ in range(warmup):
        ours()
        peer()
    ratios = []
    for i in tqdm(range(pairs), desc=label, file=sys.stderr, leave=False, disable=None):
        first, second = (ours, peer) if i % 2 == 0 else (peer, ours)
        a, b = timed(first), timed(second)
        ratios.append(b / a if first is ours else a / b)
    return summarize(ratios)


def timed(run: Callable[[], object]) -> float:
    """Seconds of wall time, the device's queue emptied before and after."""
    _wait()
    start = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def summarize(ratios: list[float], resamples: int = 2000) -> Ratio:
    """The median with a seeded bootstrap interval."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(resamples))
    low, high = medians[int(0.025 * resamples)], medians[int(0.975 * resamples) - 1]
    return Ratio(statistics.median(ratios), low, high, len(ratios))


def peak_memory(code: str) -> int:
    """Peak resident bytes of a fresh process that runs ``code``, above what it held when ``code`` called ``mark()``.

    Linux only: the high-water mark is reset at ``mark()``, so that what imports needed for a moment does not count.
    """
    prelude = (
        "def field(name):\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return next(int(x.split()[1]) for x in lines if x.startswith(name)) * 1024\n"
        "base = [0]\n"
        "def mark():\n"
        "    open('/proc/self/clear_refs', 'w').write('5')\n"
        "    base[0] = field('VmRSS:')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{prelude}{code}\nprint('peak', field('VmHWM:') - base[0])"],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout.rsplit("peak", 1)[1])
