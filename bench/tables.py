"""What two Engram layers cost a training step beside their projections: addresses, rows, and the update of the touched rows.

The tables grow from a million rows to fifty; the work of a step does not. Addresses are also made as the authors' demo makes them
(arXiv:2601.07372), in NumPy, for all layers inside every layer's forward.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import train
from bench.pairs import alternate, timed
from models import build
from models.memories.engram_addressing import EngramAddressing
from models.stores import StoreConfig, Table, build_store
from models.types import Ctx

SIZES = (1_000_000, 2_000_000, 5_000_000, 10_000_000, 20_000_000, 50_000_000)  # rows of both tables together
LAYERS = (1, 4)  # those with a memory
ORDERS, HEADS, WIDTH = 2, 8, 16  # n-grams of 2 and 3 tokens, hashes of each, numbers in a row
HYPER = (1e-3, 0.9, 0.95, 1e-8)  # lr, beta1, beta2, eps


@dataclass(frozen=True)
class Shape:
    """A training step: the backbone (of `bench.train`), rows of the batch, tokens of a row."""

    backbone: str
    batch: int
    seq_len: int

    @property
    def vocab(self) -> int:
        return train.SHAPES[self.backbone][4]

    def tokens(self, seed: int) -> Tensor:
        """[B, T] with the frequencies of words: the r-th most frequent comes 1/r as often as the first (Zipf)."""
        weight = 1 / torch.arange(1, self.vocab + 1, dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        return torch.multinomial(weight, self.batch * self.seq_len, replacement=True, generator=generator).view(
            self.batch, self.seq_len
        )


FULL, TINY = Shape("30M", 8, 2048), Shape("1M", 2, 48)


def run(pairs: int, tiny: bool) -> tuple[list[dict[str, Any]], str]:
    shape, sizes = (TINY, (2_000, 10_000)) if tiny else (FULL, SIZES)
    step = backbone_seconds(shape, min(pairs, 3))
    rows = [measure(shape, size, pairs, step) for size in sizes]
    ratio = addressing_ratio(shape, sizes[0], pairs)
    about = {"backbone": shape.backbone, "batch": shape.batch, "seq_len": shape.seq_len, "step_s": step}
    about |= {"threads": torch.get_num_threads(), "addressing_ratio": ratio}
    return [about, *rows], table(about, rows)


def backbone_seconds(shape: Shape, steps: int) -> float:
    """The median training step in fp32 without any memory."""
    step = train.ours_step(build(train.ours_config(shape.backbone)), shape.tokens(0), None)
    step()
    return statistics.median(timed(step) for _ in range(steps))


def measure(shape: Shape, size: int, pairs: int, step: float) -> dict[str, Any]:
    """Seconds of each piece of work for both layers, on new tokens every time; medians."""
    addressing = make_addressing(shape.vocab, size)
    tables = make_tables(addressing)
    seconds: dict[str, list[float]] = {name: [] for name in ("addressing", "gather", "update")}
    distinct = 0
    for i in range(pairs + 1):
        found, distinct = _steps(addressing, tables, context(shape.tokens(i)))
        for name, value in found.items():
            seconds[name] += [value] if i else []  # the first one is a warm-up
    row: dict[str, Any] = {"rows": sum(t.rows for t in tables), "looked_up": _lookups(shape), "distinct": distinct}
    row |= {"bytes": sum(t.nbytes for table in tables for t in table.state_dict().values()), "pairs": pairs}
    row |= {f"{name}_s": statistics.median(values) for name, values in seconds.items()}
    return row | {"share": sum(row[f"{name}_s"] for name in seconds) / step}


def _steps(addressing: EngramAddressing, tables: Sequence[Table], ctx: Ctx) -> tuple[dict[str, float], int]:
    """One training step's work on the tables. -> (seconds of each piece; distinct rows)."""
    clock = [time.perf_counter()]
    rows = list(addressing(ctx, None)[0].values())
    clock.append(time.perf_counter())
    values = [table.fetch(r) for table, r in zip(tables, rows, strict=True)]
    clock.append(time.perf_counter())
    grads = [torch.randn_like(v) for v in values]  # comes from the layers: not counted
    start = time.perf_counter()
    torch.autograd.backward(values, grads)
    found = [taken for table in tables if (taken := table.take_grad()) is not None]
    norm = torch.nn.utils.get_total_norm([grad for _, grad in found])
    torch._foreach_mul_([grad for _, grad in found], (1 / norm).clamp(max=1.0))
    for table, taken in zip(tables, found, strict=True):
        table.step(*taken, *HYPER)
        table.clear_grad()
    update = time.perf_counter() - start
    pieces = {"addressing": clock[1] - clock[0], "gather": clock[2] - clock[1], "update": update}
    return pieces, sum(len(r) for r, _ in found)


def make_addressing(vocab: int, size: int) -> EngramAddressing:
    """Of tables with about ``size`` rows together."""
    base = size // (len(LAYERS) * ORDERS * HEADS)
    addressing = EngramAddressing(vocab, LAYERS, (base,) * ORDERS, HEADS, pad=0)
    addressing.reset_parameters()
    return addressing


def make_tables(addressing: EngramAddressing) -> list[Table]:
    tables = [build_store(StoreConfig(rule="rowwise"), int(p.sum()), WIDTH) for p in addressing.primes]
    for table in tables:
        table.reset(torch.Generator().manual_seed(0))
    return tables


def context(tokens: Tensor) -> Ctx:
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return Ctx(tokens, positions, None, None, torch.zeros(()), {}, {})


def _lookups(shape: Shape) -> int:
    return len(LAYERS) * ORDERS * HEADS * shape.batch * shape.seq_len


# -- the authors' scheme


def published_hash(addressing: EngramAddressing, tokens: np.ndarray) -> dict[int, np.ndarray]:
    """tokens [B, T] -> rows [B, T, (N-1) K] within their head's table, of every layer."""
    ids = addressing.canonical.numpy()[tokens].astype(np.int64)
    found = {}
    for layer, (multipliers, primes) in enumerate(zip(addressing.multipliers.numpy(), addressing.primes.numpy())):
        before = [ids]
        for back in range(1, addressing.max_order):
            shifted = np.full_like(ids, addressing.pad)
            shifted[:, back:] = ids[:, :-back]
            before.append(shifted)
        rows = []
        for order in range(2, addressing.max_order + 1):
            mix = before[0] * multipliers[0]
            for back in range(1, order):
                mix = np.bitwise_xor(mix, before[back] * multipliers[back])
            rows += [mix % prime for prime in primes[order - 2]]
        found[layer] = np.stack(rows, axis=2)
    return found


def published_addressing(addressing: EngramAddressing, tokens: Tensor) -> list[Tensor]:
    """Every layer hashes for all layers and keeps its own."""
    offsets = addressing.offsets.flatten(1)
    layers = range(len(addressing.keys))
    return [torch.from_numpy(published_hash(addressing, tokens.numpy())[i]) + offsets[i] for i in layers]


def addressing_ratio(shape: Shape, size: int, pairs: int) -> dict[str, float]:
    """The authors' time over ours. Raises RuntimeError when a row differs."""
    addressing, tokens = make_addressing(shape.vocab, size), shape.tokens(0)
    ctx = context(tokens)
    ours = list(addressing(ctx, None)[0].values())
    if not all(torch.equal(a, b) for a, b in zip(ours, published_addressing(addressing, tokens), strict=True)):
        raise RuntimeError("the two ways of addressing differ, so no speed is reported")
    ratio = alternate(
        lambda: addressing(ctx, None), lambda: published_addressing(addressing, tokens), pairs, "addressing"
    )
    return {"median": ratio.median, "low": ratio.low, "high": ratio.high}


def table(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    lines = [
        "| rows of both tables | GiB | looked up | distinct | addressing, ms | gather, ms | update, ms | of a step |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        times = " | ".join(f"{r[f'{name}_s'] * 1e3:.1f}" for name in ("addressing", "gather", "update"))
        lines.append(
            f"| {r['rows']:,} | {r['bytes'] / 2**30:.2f} | {r['looked_up']:,} | {r['distinct']:,} | {times} | {r['share']:.2%} |"
        )
    ratio = about["addressing_ratio"]
    hashing = max(r["addressing_s"] for r in rows) / about["step_s"]
    low, high = (pick(r["share"] for r in rows) for pick in (min, max))
    lines += [
        "",
        f"All of it takes between {low:.2%} and {high:.2%} of a step, over all sizes.",
        f"A step: {about['step_s']:.2f} s, the backbone {about['backbone']} without memory on {about['batch']} x "
        f"{about['seq_len']} tokens in fp32 with {about['threads']} threads. Update: sums of repeated rows, norm, clip and the "
        "row-wise rule.",
        f"Addressing: at most {hashing:.2%} of a step; {ratio['median']:.2f} times as fast "
        f"[{ratio['low']:.2f}, {ratio['high']:.2f}] as the authors' scheme, with the same rows.",
    ]
    return "\n".join(lines)
