"""Pictures of B'MOJO's memories, from what `eval.inspection.bmojo` measured and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.inspection.figures import (
    Found,
    ablations,
    engineering,
    floats,
    head,
    heading,
    heat,
    name_layers,
    new_figure,
    panel_grid,
    plain_axes,
    save,
    shade,
    short,
    start_at_zero,
    whole_numbers,
)

COLORS = ("C0", "C2", "C1")  # of the window, fading and eidetic keys
KEPT, READ, EVEN = "C1", "C3", "0.5"
SHOWN = 1024  # tokens of the text that are drawn, whole windows as long as they fit
COLUMNS = 130  # characters in a line of text


def draw(found: Found, folder: Path) -> list[Path]:
    """PNG files in ``folder``: all layers beside each other, a page for each, recall, ablations, and the training if it is known."""
    made = {"bmojo-layers": overview(found)}
    for layer in found["layers"]:
        made[f"bmojo-layer-{layer['layer']:02d}"] = page(found, layer)
    if found["recall"]:
        made["bmojo-recall"] = recall(found["recall"])
    if found["ablations"]:
        made["bmojo-ablations"] = ablations(found)
    if found["training"]:
        made["bmojo-training"] = training(found["training"])
    return save(made, folder)


# -- all layers


def overview(found: Found) -> Any:
    """Shares of attention by layer and head and along a window; ages, turnover and scores of what is kept, where something is."""
    layers = found["layers"]
    kept = [layer for layer in layers if layer["kept"]]
    figure, panels = panel_grid(2 if kept else 1, 3, 16, 10 if kept else 5)
    a = panels.flat
    _shares_by_layer(a[0], layers)
    _heads(a[1], layers, 2 if kept else 1)
    _along(a[2], layers, 2 if kept else 1)
    if kept:
        _ages_by_layer(a[3], kept)
        for layer in kept:
            _turnover(a[4], layer, shade(layer["layer"], _numbers(kept)), f"layer {layer['layer']}")
        _finish_turnover(a[4], kept)
        _scores_by_layer(a[5], kept)
    head(figure, heading(found))
    return figure


def _numbers(layers: Sequence[Found]) -> list[int]:
    return [layer["layer"] for layer in layers]


def _shares_by_layer(axes: Any, layers: Sequence[Found]) -> None:
    x, width = np.arange(len(layers)), 0.38
    for key, offset, alpha in (("shares", -width / 2, 1.0), ("even", width / 2, 0.35)):
        below = np.zeros(len(layers))
        for n, (kind, color) in enumerate(zip(layers[0]["kinds"], COLORS, strict=True)):
            value = np.array([floats(layer[key])[n] for layer in layers])
            label = kind if key == "shares" else None
            axes.bar(x + offset, value, width * 0.95, bottom=below, color=color, alpha=alpha, label=label)
            below = below + value
    axes.set_xticks(x, [str(n) for n in _numbers(layers)])
    axes.set(
        title="attention on kinds of keys (pale: if all keys were alike)", xlabel="layer", ylabel="share", ylim=(0, 1)
    )
    _legend_below(axes)


def _legend_below(axes: Any) -> None:
    """Where bars leave no room."""
    axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=3)


def _heads(axes: Any, layers: Sequence[Found], kind: int) -> None:
    most = max(len(layer["shares_by_head"]) for layer in layers)
    values = np.full((len(layers), most), np.nan)
    for row, layer in zip(values, layers, strict=True):
        row[: len(layer["shares_by_head"])] = floats(layer["shares_by_head"])[:, kind]
    heat(axes, values, "share", [str(n) for n in _numbers(layers)], [str(h) for h in range(most)])
    axes.set(title=f"attention on {layers[0]['kinds'][kind]} keys", xlabel="head", ylabel="layer")


def _along(axes: Any, layers: Sequence[Found], kind: int) -> None:
    for layer in layers:
        share = floats(layer["shares_by_chunk"])[:, kind]
        color = shade(layer["layer"], _numbers(layers))
        axes.plot(np.arange(len(share)), share, color=color, marker=".", label=f"layer {layer['layer']}")
    start_at_zero(axes)
    axes.set(title=f"attention on {layers[0]['kinds'][kind]} keys along a window", xlabel="chunk", ylabel="share")
    _legend(axes, layers)


def _ages_by_layer(axes: Any, kept: Sequence[Found]) -> None:
    x = floats(_numbers(kept))
    for name, label, color in (
        ("kept", "kept", KEPT),
        ("read", "as attention reads them", READ),
        ("even", "if drawn evenly", EVEN),
    ):
        low, middle, high = floats([layer["kept"]["age"]["quantiles"][name] for layer in kept]).T
        axes.plot(x, middle, color=color, marker="o", markersize=4, label=label)
        axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    start_at_zero(axes)
    whole_numbers(axes, x)
    axes.set(title="age of kept tokens (median; band: middle 80 %)", xlabel="layer", ylabel="tokens")
    axes.legend(frameon=False, fontsize=9)


def _turnover(axes: Any, layer: Found, color: Any, label: str) -> None:
    share = floats(layer["kept"]["turnover"])
    axes.plot(np.arange(1, len(share) + 1), share, color=color, marker=".", label=label)


def _finish_turnover(axes: Any, kept: Sequence[Found]) -> None:
    chance = max((layer["kept"]["turnover_iid"] for layer in kept), key=len)
    axes.plot(np.arange(1, len(chance) + 1), chance, ":", color="0.3", label="scores without order: 1 / chunk")
    axes.set(
        title="turnover: slots with another token than a chunk before", xlabel="chunk", ylabel="share", ylim=(0, 1.05)
    )
    axes.legend(frameon=False, fontsize=9)


def _scores_by_layer(axes: Any, kept: Sequence[Found]) -> None:
    x = floats(_numbers(kept))
    for key, label, color in (("score", "all tokens", "C0"), ("score_kept", "kept in the end", KEPT)):
        rows = [layer["kept"][key] or [None] * 3 for layer in kept]
        low, middle, high = floats(rows).T
        axes.plot(x, middle, color=color, marker="o", markersize=4, label=label)
        axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    start_at_zero(axes)
    whole_numbers(axes, x)
    axes.set(title=f"score ({kept[0]['score']}; median; band: middle 80 %)", xlabel="layer", ylabel="score")
    axes.legend(frameon=False, fontsize=9)


def _legend(axes: Any, layers: Sequence[Found]) -> None:
    if len(layers) <= 12:
        axes.legend(frameon=False, fontsize=8, ncols=1 + len(layers) // 7)


# -- one layer


def page(found: Found, layer: Found) -> Any:
    """The text with what was kept, scores and shares along it; then heads, ages and turnover."""
    count = _shown(found["windows"])
    words = _laid(found, count) if layer["kept"] else []
    text = 0.6 + 0.22 * (1 + words[-1][2]) if words else 0.0
    heights = [*([text, 2.2] if words else []), 2.2, 4.0]
    figure = new_figure(17, 1.0 + sum(heights))
    grid = figure.add_gridspec(len(heights), 3, height_ratios=heights)
    if words:
        _text(figure.add_subplot(grid[0, :]), layer, words)
        _scores(figure.add_subplot(grid[1, :]), found, layer, count)
    _shares_along(figure.add_subplot(grid[-2, :]), found, layer, count)
    small = [figure.add_subplot(grid[-1, n]) for n in range(3)]
    _shares_by_head(small[0], layer)
    if layer["kept"]:
        _ages(small[1], layer["kept"]["age"])
        _turnover(small[2], layer, KEPT, "this layer")
        _finish_turnover(small[2], [layer])
    else:
        _along(small[1], [layer], 1)
        small[2].set_axis_off()
    for axes in small:
        plain_axes(axes)
    what = f"{layer['m_e']} eidetic tokens by '{layer['score']}', {layer['m_f']} fading ({layer['fading_mode']})"
    head(figure, f"layer {layer['layer']}: chunks of {layer['window']}, {what}")
    return figure


def _shown(windows: Sequence[int]) -> int:
    """Tokens of whole windows, or of a part of the first one."""
    ends = np.cumsum(windows)
    return int(ends[ends <= SHOWN][-1]) if ends[0] <= SHOWN else SHOWN


def _laid(found: Found, count: int) -> list[tuple[str, int, int, int]]:
    """(token, column, line, width) of the first tokens; lines break where they are full, after a line's end and after a window."""
    starts = {0, *np.cumsum(found["windows"]).tolist()}
    placed, column, line = [], 0, 0
    for n, token in enumerate(found["tokens"][:count]):
        word = short(token).replace("␣", " ")
        width = len(word.replace(r"\$", "$"))
        if column and (column + width > COLUMNS or n in starts):
            column, line = 0, line + 1
        placed.append((word, column, line, width))
        column += width + found["ids"]
        if token == "\\n":
            column, line = 0, line + 1
    return placed


def _text(axes: Any, layer: Found, words: Sequence[tuple[str, int, int, int]]) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    held, final = layer["per_token"]["held"], set(layer["kept"]["final"])
    scale = ScalarMappable(Normalize(0, max(1, *held)), colormaps["Oranges"])
    for n, (word, column, line, width) in enumerate(words):
        if held[n]:
            box = Rectangle((column, line + 0.04), width, 0.92, facecolor=scale.to_rgba(0.75 * held[n]), linewidth=0)
            axes.add_patch(box)
        if n in final:
            edge = Rectangle((column, line + 0.06), width, 0.88, fill=False, edgecolor="C3", linewidth=1.0)
            axes.add_patch(edge)
        axes.text(column, line + 0.76, word, family="monospace", fontsize=9)
    axes.set(xlim=(0, COLUMNS), ylim=(1 + words[-1][2], 0))
    axes.set_axis_off()
    said = f"kept tokens: darker, the more chunks they were kept for (at most {max(held)}); framed: kept in the end"
    axes.set_title(said, fontsize=11, loc="left")


def _scores(axes: Any, found: Found, layer: Found, count: int) -> None:
    score, bar = (floats(layer["per_token"][name])[:count] for name in ("score", "bar"))
    final = np.array([i for i in layer["kept"]["final"] if i < count], dtype=np.int64)
    axes.vlines(np.arange(count), 0, score, color="C0", linewidth=0.8)
    axes.plot(final, score[final], "o", color="C3", markersize=4, label="kept in the end")
    axes.plot(np.arange(count), bar, color=KEPT, linewidth=1.4, label="lowest score in a full set")
    axes.set_yscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    start_at_zero(axes)
    axes.set(title="score of each token (square-root scale)", ylabel=layer["score"])
    axes.legend(fontsize=8, loc="upper right")
    _windows(axes, found, count)


def _shares_along(axes: Any, found: Found, layer: Found, count: int) -> None:
    shares = floats(layer["per_token"]["shares"])[:, :count]
    axes.stackplot(np.arange(count), shares, colors=COLORS, labels=layer["kinds"], linewidth=0, step="mid")
    axes.set(title="attention on kinds of keys, mean over heads", ylabel="share", xlabel="token", ylim=(0, 1))
    axes.legend(fontsize=8, loc="lower right", framealpha=0.9)
    _windows(axes, found, count)


def _windows(axes: Any, found: Found, count: int) -> None:
    """Where windows begin."""
    plain_axes(axes)
    for start in np.cumsum(found["windows"])[:-1]:
        if start < count:
            axes.axvline(start - 0.5, color="k", linewidth=0.8)
    axes.set_xlim(-0.5, count - 0.5)


def _shares_by_head(axes: Any, layer: Found) -> None:
    rows = np.vstack([floats(layer["shares_by_head"]), floats(layer["even"])])
    names = [*(str(h) for h in range(len(rows) - 1)), "even"]
    left = np.zeros(len(rows))
    for n, color in enumerate(COLORS):
        axes.barh(np.arange(len(rows)), rows[:, n], left=left, color=color, label=layer["kinds"][n])
        left = left + rows[:, n]
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set(title="attention by head ('even': all keys alike)", xlabel="share", ylabel="head", xlim=(0, 1))


def _ages(axes: Any, age: Found) -> None:
    edges = floats(age["edges"])
    for name, label, color in (("kept", "kept", KEPT), ("read", "as attention reads them", READ)):
        axes.stairs(floats(age[name]) / np.diff(edges), edges, color=color, linewidth=1.6, label=label)
    axes.stairs(floats(age["even"]) / np.diff(edges), edges, color=EVEN, linestyle=":", label="if drawn evenly")
    start_at_zero(axes)
    axes.set(title="age of kept tokens, over all queries", xlabel="tokens", ylabel="density")
    axes.legend(frameon=False, fontsize=9)


# -- recall


def recall(found: Found) -> Any:
    """What was kept of what is asked for, beside chance; right answers with and without it."""
    layers = found["layers"]
    figure, (row,) = panel_grid(1, 3, 16, 5)
    x, width = np.arange(len(layers)), 0.25

    def bars(axes: Any, series: Sequence[tuple[str, str, str]], chances: Sequence[str | None]) -> None:
        for n, ((key, label, color), chance) in enumerate(zip(series, chances, strict=True)):
            place = x + (n - (len(series) - 1) / 2) * width
            axes.bar(place, floats([layer[key] for layer in layers]), width * 0.92, color=color, label=label)
            if chance:
                marks = floats([layer[chance] for layer in layers])
                axes.hlines(marks, place - width / 2, place + width / 2, color="k", linewidth=2)
        axes.set_xticks(x, [str(n) for n in _numbers(layers)])
        axes.set(xlabel="layer", ylim=(0, 1.02))
        _legend_below(axes)

    kept = [("key", "its key", "C0"), ("value", "its value", "C1"), ("carried", "a row that carries both", "C2")]
    bars(row[0], kept, ["one_by_chance", "one_by_chance", "carried_by_chance"])
    row[0].set(title="kept of the pair that is asked for (line: chance)", ylabel="share of questions")
    right = [
        ("right_if_kept", "carried", "C2"),
        ("right_if_not", "not carried", "C3"),
        ("right_in_window", "in the window", "C0"),
    ]
    bars(row[1], right, [None] * 3)
    row[1].set(title="right answers where the pair is", ylabel="share of questions")
    bars(row[2], [("kept_of_pairs", "of what is kept", "C1"), ("pairs_of_past", "of the past", "0.6")], [None] * 2)
    row[2].set(title="tokens of pairs", ylabel="share of tokens")
    head(
        figure,
        f"{found['questions']:,} questions, {found['right']:.1%} answered right; shares of those outside of the window",
    )
    return figure


# -- over training


def training(curves: Found) -> Any:
    """Losses, and what the layers log of their kept tokens, one curve for each layer."""
    figure, panels = panel_grid(1, 4, 18, 4.5)
    x = floats(curves["tokens"])
    layers = sorted({int(n) for stat in curves["stats"].values() for n in stat})
    a = panels.flat
    a[0].plot(x, floats(curves["losses"]["lm"]), color="C0", alpha=0.7, label="training")
    if curves["validation"]:
        a[0].plot(*floats(curves["validation"]).T, "o--", color="C1", markersize=4, label="validation")
    a[0].set(title="loss", ylabel="nats per token")
    a[0].legend(frameon=False, fontsize=9)
    titles = {
        "kept_age": ("age of kept tokens", "share of the past"),
        "kept_new": ("kept tokens from the last chunk", "share"),
    }
    for axes, (stat, (title, unit)) in zip(a[1:3], titles.items(), strict=True):
        for n in layers:
            axes.plot(x, floats(curves["stats"].get(stat, {}).get(str(n), [None] * len(x))), color=shade(n, layers))
        start_at_zero(axes)
        axes.set(title=title, ylabel=unit)
    for axes in a[:3]:
        axes.set(xlabel="training tokens")
        axes.xaxis.set_major_formatter(engineering())
    name_layers(figure, a[3], layers)
    return figure
