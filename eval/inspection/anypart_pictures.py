"""Pictures of what can be said of any model, from what `eval.inspection.anypart` measured and nothing else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from eval.inspection import gates_pictures
from eval.inspection.attribution import lost_without
from eval.inspection.figures import (
    LABELLED,
    Found,
    ablations,
    floats,
    head,
    heat,
    new_figure,
    panel_grid,
    save,
    shade,
    short,
    start_at_zero,
)
from eval.inspection.numbers import number

PANELS = 24  # of one kind in a picture, the first ones
COLUMNS = 110  # characters in a line of text
SHOWN = 480  # tokens before a target that are drawn


def draw(found: Found, folder: Path) -> list[Path]:
    """What the loss is without each part."""
    return save({"any-ablations": ablations(found)}, folder) if found["ablations"] else []


def draw_all(found: Found, folder: Path) -> list[Path]:
    """PNG files in ``folder`` of what there is: states, gates, attention, what parts reported, attribution."""
    made = {}
    if found["states"]:
        made["any-states"] = states(found["states"])
    if found["gates"]["parts"]:
        made["any-gates"] = gates_pictures.along(found["gates"])
        made["any-gates-tokens"] = gates_pictures.tokens(found["gates"])
    if found["attention"]:
        made["any-attention"] = attention(found["attention"])
    if found["said"]:
        made["any-reported"] = said(found["said"])
    if found["attribution"]["targets"]:
        made["any-attribution"] = attribution(found["attribution"])
    return save(made, folder)


# -- states


def states(memories: Sequence[Found]) -> Any:
    """Norm and effective rank of each memory along a window: a line for each head, or for each of several memories."""
    memories = memories[:PANELS]
    rows = -(-len(memories) // 2)
    figure, panels = panel_grid(rows, 4, 15, 1 + 2.6 * rows)
    for axes in panels.flat[2 * len(memories) :]:
        axes.set_axis_off()
    for one, pair in zip(memories, panels.reshape(-1, 2)):
        several = one["memories"] > 1
        for axes, key, label in zip(pair, ("norm", "rank"), ("norm", f"effective rank, of {min(one['shape'])}")):
            values = floats(one[key])  # [places, M, H]
            lines = values.mean(2).T if several else values[:, 0].T
            for n, line in enumerate(lines):
                name = f"memory {n}" if several else f"head {n}"
                axes.plot(one["tokens"], line, color=shade(n, range(len(lines))), linewidth=1.3, label=name)
            axes.set(ylabel=label, xlabel="tokens read")
            start_at_zero(axes)
        pair[0].set_title(one["name"], fontsize=10, loc="left")
        if len(lines) <= LABELLED:
            pair[0].legend(frameon=False, fontsize=7)
    head(figure, "Recurrent memories along a text")
    return figure


# -- attention


def attention(layers: Sequence[Found]) -> Any:
    """Shares of each head's attention by distance; the last row is attention that is the same on every key in sight."""
    layers = layers[:PANELS]
    columns = min(3, len(layers))
    rows = -(-len(layers) // columns)
    heads = max(len(one["mass"]) for one in layers)
    figure, panels = panel_grid(rows, columns, 5.2 * columns + 1, rows * (2.2 + 0.16 * heads))
    for axes in panels.flat[len(layers) :]:
        axes.set_axis_off()
    for one, axes in zip(layers, panels.flat):
        bins = one["distances"]
        names = [str(a) if b == a + 1 else f"{a}-{b - 1}" for a, b in pairwise(bins)]
        values = np.vstack([floats(one["mass"]), floats(one["evenly"])])
        heat(axes, values, "share", [*map(str, range(len(values) - 1)), "even"], names, "sqrt")
        window = f", window {one['window']}" if one["window"] else ""
        axes.set_title(f"{one['name']}{window}", fontsize=10, loc="left")
        axes.set(xlabel="tokens back", ylabel="head")
    head(figure, "Attention by distance")
    return figure


# -- what parts report


def said(found: Found) -> Any:
    """What parts reported of each piece of the text: numbers with a line for each layer, lists with a panel for each layer."""
    single, several = defaultdict(dict), {}
    for name, one in found.items():
        _, layer, rest = name.split(".", 2)
        if one["value"] and isinstance(one["value"][0], list):
            several[name] = one
        else:
            single[rest][int(layer)] = one
    shown = [*sorted(single.items()), *several.items()][:PANELS]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure, panels = panel_grid(rows, columns, 5 * columns + 1, 1 + 2.8 * rows)
    for axes in panels.flat[len(shown) :]:
        axes.set_axis_off()
    for (name, one), axes in zip(shown, panels.flat):
        if "tokens" in one:
            lines = {f"{n}": (one["tokens"], line) for n, line in enumerate(_columns(one["value"]))}
        else:
            lines = {f"layer {n}": (one[n]["tokens"], floats(one[n]["value"])) for n in sorted(one)}
        for n, (label, (x, y)) in enumerate(lines.items()):
            axes.plot(x, y, color=shade(n, range(len(lines))), linewidth=1.3, label=label)
        axes.set_title(name, fontsize=10, loc="left")
        axes.set(xlabel="tokens read")
        if len(lines) <= LABELLED:
            axes.legend(frameon=False, fontsize=7, ncols=1 + len(lines) // 5)
    head(figure, "What the parts report along a text")
    return figure


def _columns(values: Sequence[Any]) -> list[np.ndarray]:
    """Of lists (also of lists) by place, one line for each number."""
    table = np.stack([floats(v).reshape(-1) for v in values])
    return list(table.T)


# -- attribution


def attribution(found: Found) -> Any:
    """Of each target: the text before it, blue where a token speaks for the target and red where against it by leave-one-out, and
    below it both attributions along the text."""
    targets = found["targets"]
    laid = [_lay(one, int(found["spaced"])) for one in targets]
    heights = [h for lines in laid for h in (0.5 + 0.24 * (1 + lines[-1][2]), 1.7)]
    figure = new_figure(15, 0.8 + sum(heights) + 0.5 * len(targets))
    grid = figure.subplots(2 * len(targets), 1, height_ratios=heights, squeeze=False)[:, 0]
    for one, words, above, below in zip(targets, laid, grid[::2], grid[1::2]):
        _text(above, one, words)
        _both(below, one)
    head(figure, "Which past tokens a prediction comes from")
    return figure


def _lay(one: Found, gap: int) -> list[tuple[str, int, int, float]]:
    """(token, column, line, leave-one-out) of the last tokens, ``gap`` columns apart; lines break where they are full and after the
    end of one."""
    found, column, line = [], 0, 0
    lost = lost_without(one)
    top = max((abs(a) for a in lost if a is not None), default=0) or 1.0
    for token, value in list(zip(one["tokens"], lost, strict=True))[-SHOWN:]:
        word = short(token)
        width = len(word.replace(r"\$", "$"))
        if column + width > COLUMNS:
            column, line = 0, line + 1
        found.append((word, column, line, number(value) / top))
        column += width + gap
        if token == "\\n":
            column, line = 0, line + 1
    return found


def _text(axes: Any, one: Found, words: Sequence[tuple[str, int, int, float]]) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    lines = 1 + words[-1][2]
    for word, column, line, value in words:
        if np.isfinite(value):
            color = colormaps["RdBu"](0.5 + 0.4 * value)
            axes.add_patch(Rectangle((column, line), len(word.replace(r"\$", "$")), 1, color=color, linewidth=0))
        axes.text(column, line + 0.78, word, family="monospace", fontsize=10.5)
    axes.set(xlim=(0, COLUMNS), ylim=(lines, 0))
    axes.set_axis_off()
    agreement = "none" if one["agreement"] is None else f"{one['agreement']:.2f}"
    said = (
        f"token {one['at']}, then «{short(one['target'])}»: loss {number(one['loss']):.3f} nats, agreement {agreement}"
    )
    axes.set_title(said, fontsize=11, loc="left")


def _both(axes: Any, one: Found) -> None:
    places = np.arange(len(one["attribution"]))
    axes.plot(places, floats(one["attribution"]), color="C0", linewidth=1.2, label="gradient x input")
    axes.plot(one["checked"], floats(one["left_out"]), ".", color="C1", markersize=5, label="leave-one-out")
    axes.axhline(0, color="0.5", linewidth=0.7)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel="token of the window", ylabel="nats", xlim=(-0.5, len(places) - 0.5))
    axes.legend(frameon=False, fontsize=8, loc="upper left")
