"""The model as a table: kinds, parameters, FLOPs per token and state bytes of every layer, totals below."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from models.config import ModelConfig
from models.lm import LM, meta_model
from models.types import SLOTS, Cost

MAX_RANGES = 6
HEADER = ("layers", "part", "kind", "params", "active", "FLOP/token", "state")


def summary(model: LM | ModelConfig, seq_len: int, dtype: torch.dtype = torch.bfloat16) -> str:
    """One table, without a newline at its end. A layer that stands at several depths is shown once, with all of them.

    ``seq_len``: T, for the mean cost of a token and the state of one sequence after T tokens, held in ``dtype``.
    Works without memory for the weights, so a config of any size prints.
    """
    if isinstance(model, ModelConfig):
        model = meta_model(model)
    rows: list[tuple[str, ...]] = []
    before, layers, after = _grouped(model.costs(seq_len, dtype))
    for place, kind, cost in before:
        rows.append((place, "", kind, *_figures(cost)))
    blocks = model.cfg.layers()
    for depths, parts in _same_layers(blocks, layers):
        where = _ranges(depths)
        for slot, kind, cost in parts:
            config = getattr(blocks[depths[0]], slot) if slot in SLOTS else None
            rows.append((where, slot, kind if config is None else describe(config), *_figures(cost)))
            where = ""
        if len(parts) > 1:
            rows.append(("", "", "one layer", *_figures(_sum(parts))))
        if len(depths) > 1 and parts:
            rows.append(("", "", f"{len(depths)} layers", *_figures(_sum(parts * len(depths)))))
    for place, kind, cost in after:
        rows.append((place, "", kind, *_figures(cost)))
    total = model.cost(seq_len, dtype)
    rows.append(("total", "", "", *_figures(total)))
    embedding = sum(cost.params for place, _, cost in before + after if place in ("embed", "head"))
    name = str(dtype).removeprefix("torch.")
    return "\n".join(
        [
            *_align([HEADER, *rows]),
            "",
            f"parameters  {total.params:,} ({total.params - embedding:,} beside embedding and head), "
            f"{total.active_params:,} active per token",
            f"compute     {_flops(total.flops_per_token)}FLOP per token forward at T={seq_len}",
            f"state       {_bytes(total.state_bytes)} per sequence after {seq_len} tokens in {name}",
        ]
    )


def describe(config: Any) -> str:
    """A part in a few words: its kind and what differs from the defaults."""
    said = [config.kind]
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        if f.name == "kind" or value == default:
            continue
        said.append(f"{f.name}=({describe(value)})" if hasattr(value, "kind") else f"{f.name}={value}")
    return " ".join(said)


Rows = list[tuple[str, str, Cost]]


def _grouped(costs: Rows) -> tuple[Rows, list[Rows], Rows]:
    """(place, kind, cost) -> (before the layers, per layer (slot, kind, cost), after them)."""
    before: Rows = []
    layers: dict[int, Rows] = {}
    after: Rows = []
    for place, kind, cost in costs:
        if place.startswith("layers."):
            _, layer, slot = place.split(".", 2)
            layers.setdefault(int(layer), []).append((slot, kind, cost))
        else:
            (after if layers else before).append((place, kind, cost))
    depth = max(layers, default=-1) + 1
    return before, [layers.get(i, []) for i in range(depth)], after


def _same_layers(blocks: list[Any], layers: list[Rows]) -> list[tuple[list[int], Rows]]:
    """Layers of equal config and equal cost, in order of first appearance."""
    found: list[tuple[Any, Rows, list[int]]] = []
    for i, parts in enumerate(layers):
        same = next((d for block, p, d in found if block == blocks[i] and p == parts), None)
        if same is None:
            found.append((blocks[i], parts, [i]))
        else:
            same.append(i)
    return [(depths, parts) for _, parts, depths in found]


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"; the middle of a long list is left out."""
    said: list[list[int]] = []
    for n in numbers:
        if said and n == said[-1][1] + 1:
            said[-1][1] = n
        else:
            said.append([n, n])
    names = [str(a) if a == b else f"{a}-{b}" for a, b in said]
    if len(names) > MAX_RANGES:
        names[2:-1] = [".."]
    return ",".join(names)


def _sum(parts: Rows) -> Cost:
    return sum((cost for _, _, cost in parts), Cost())


def _figures(cost: Cost) -> tuple[str, str, str, str]:
    state = _bytes(cost.state_bytes) if cost.state_bytes else ""
    flops = _flops(cost.flops_per_token).rstrip() if cost.flops_per_token else ""
    return (f"{cost.params:,}", f"{cost.active_params:,}", flops, state)


def _flops(n: float) -> str:
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= scale:
            return f"{n / scale:.3g} {unit}" if n < 1000 * scale else f"{n / scale:.0f} {unit}"
    return f"{n:.0f} "


def _bytes(n: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= scale:
            return f"{n / scale:.4g} {unit}"
    return f"{n} B"


def _align(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    lines = []
    for row in rows:
        cells = [c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    rule = "-" * max(map(len, lines))
    return [lines[0], rule, *lines[1:-1], rule, lines[-1]]
