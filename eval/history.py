"""What a run logged while it trained, as lists and as pictures."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from models import UserError

SMOOTH = 0.02  # of a curve's length: the width of the running mean over training losses
PANELS = 24  # curves beside the loss that are drawn, at most
LABELLED = 10  # lines that a legend names


def read_metrics(run: Path | str) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``; a line that was torn at the end is left out.

    After a resume the same steps may be logged again: the later lines replace the earlier ones.
    """
    path = Path(run) / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{run}: no metrics.jsonl, so there is nothing to report") from error
    found: dict[tuple[int, bool], dict[str, Any]] = {}
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            key = (record["step"], "val" in record)
            found[key] = {**found.pop(key, {}), **record}
    return sorted(found.values(), key=lambda r: (r["step"], "val" in r))


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Centered running mean over ``width`` values [n] -> [n]; at the ends over what is there."""
    half = width // 2
    total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def plot(metrics: dict[str, list[dict[str, Any]]], target: Path | IO[bytes]) -> None:
    """Loss against training tokens: the smoothed training curve and the validation points of every run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ends: list[float] = []
    for i, (name, records) in enumerate(metrics.items()):
        color = f"C{i % 10}"
        train = [(m.get("tokens", m["step"]), m["loss"]) for m in records if finite(m.get("loss"))]
        tokens_at = {m["step"]: m["tokens"] for m in records if "tokens" in m}
        val = [
            (m.get("tokens", tokens_at.get(m["step"], m["step"])), m["val"]["loss"])
            for m in records
            if finite(m.get("val", {}).get("loss"))
        ]
        if train:
            x, y = np.array(train, dtype=np.float64).T
            mean = smooth(y, max(1, round(SMOOTH * len(y))))
            if len(metrics) == 1:
                axes.plot(x, y, color=color, alpha=0.2, linewidth=0.8)
            axes.plot(x, mean, color=color, linewidth=1.4, label=f"{name}, training")
            ends += [float(v) for v in mean[len(mean) // 20 :]]
        if val:
            x, y = np.array(val, dtype=np.float64).T
            axes.plot(
                x, y, color=color, linestyle="--", linewidth=0.8, marker="o", markersize=4, label=f"{name}, validation"
            )
            ends += [float(v) for v in y[1:]] or [float(y[0])]
    if ends:  # the first steps fall from ln V and would flatten everything that follows
        low, high = min(ends), max(ends)
        margin = 0.05 * (high - low) or 0.1
        axes.set_ylim(low - margin, high + margin)
    axes.set(xlabel="training tokens", ylabel="loss (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if ends:
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(target, format="png")


def finite(value: Any) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))


def panels(records: Sequence[dict[str, Any]], target: IO[bytes]) -> bool:
    """Everything else that was logged, a panel each: learning rate, gradient norm, speed, losses of parts, accuracies, and what
    parts report, with a line for each layer. -> False where there is nothing, and nothing was written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    shown = list(_series(records).items())[:PANELS]
    if not shown:
        return False
    columns = 3
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(13, 0.4 + 2.3 * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    for (title, lines), axes in zip(shown, grid):
        for label, points in lines.items():
            x, y = np.array(points, dtype=np.float64).T
            axes.plot(x, y, linewidth=1.1, marker="." if len(x) < 12 else None, label=label)
        axes.set_title(title, fontsize=10, loc="left")
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if 1 < len(lines) <= LABELLED:
            axes.legend(frameon=False, fontsize=7, ncols=1 + len(lines) // 5)
    figure.savefig(target, format="png")
    return True


def _series(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """-> points (tokens, value) by title and line. Lists of numbers are left out."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        x = record.get("tokens", record["step"])
        named = [(key, "", record.get(key)) for key in ("lr", "grad_norm", "tokens_per_s")]
        named += [(f"loss, {key}", "", value) for key, value in record.get("losses", {}).items() if key != "lm"]
        named += [(f"validation, {key}", "", record.get("val", {}).get(key)) for key in ("bpb", "accuracy")]
        for name, value in record.get("stats", {}).items():
            place, _, what = name.rpartition(".")
            words = place.split(".", 2)
            named.append((f"{words[-1]}, {what}", f"layer {words[1]}" if len(words) == 3 else place, value))
        for title, line, value in named:
            if value is not None and finite(value):
                found[title][line].append((x, value))
    return found
