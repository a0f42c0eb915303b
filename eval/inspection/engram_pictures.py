"""Pictures of Engrams, from what `eval.inspection.engram` measured and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.inspection.figures import (
    LABELLED,
    Found,
    ablations,
    engineering,
    floats,
    head,
    heading,
    name_layers,
    new_figure,
    panel_grid,
    save,
    shade,
    short,
    start_at_zero,
    whole_numbers,
)

PANELS, LINES = 3, 40  # of the map of gates: tokens side by side, and below each other
OUTCOMES = {"first": ("first touch", "0.8"), "hit": ("same n-gram", "C2"), "different": ("another n-gram", "C3")}
LINE = {"whole": "C0", "without memory": "C3", "baseline": "0.4"}


def draw(found: Found, folder: Path) -> list[Path]:
    """PNG files in ``folder``: gates over the text, layers beside each other, tables, frequency, ablations, a baseline, training."""
    made = {"engram-gates": gates(found), "engram-layers": layers(found), "engram-rows": rows(found)}
    if found["frequency"] and any(found["frequency"].values()):
        made["engram-frequency"] = frequency(found["frequency"])
    if found["ablations"]:
        made["engram-ablations"] = ablations(found)
    if found["baseline"]:
        made["engram-cka"] = alignment(found)
    if found["training"]:
        made["engram-training"] = training(found["training"])
    return save(made, folder)


# -- gates over the text


def gates(found: Found) -> Any:
    """The first tokens of the text, each with its n-gram of the highest order, and the gate of every layer and branch."""
    alpha = np.concatenate([floats(layer["alpha"]) for layer in found["layers"]]).T
    columns = [_place(layer, m) for layer in found["layers"] for m in range(layer["branches"])]
    shown = min(len(alpha), PANELS * LINES)
    panels = -(-shown // LINES)
    figure = new_figure(panels * (3.6 + 0.32 * len(columns)), 11)
    scale, image = _range(alpha[:shown]), None
    for i, axes in enumerate(figure.subplots(1, panels, squeeze=False).flat):
        image = _gate_panel(axes, found, alpha, columns, slice(i * LINES, min((i + 1) * LINES, shown)), scale)
    figure.colorbar(image, ax=figure.axes, label="gate", shrink=0.5, pad=0.01)
    order = max(found["ngrams"], key=int)
    head(figure, f"gates: tokens on the left, the {order} canonical tokens that were looked up on the right")
    return figure


def _gate_panel(
    axes: Any, found: Found, alpha: np.ndarray, columns: Sequence[str], part: slice, scale: tuple[float, float]
) -> Any:
    grams = found["ngrams"][max(found["ngrams"], key=int)][part]
    tokens = [short(token) for token in found["tokens"][part]]
    image = axes.imshow(
        alpha[part], cmap="viridis", aspect="auto", interpolation="nearest", vmin=scale[0], vmax=scale[1]
    )
    axes.set_yticks(range(len(tokens)), tokens, fontsize=8, family="monospace")
    axes.set_xticks(range(len(columns)), columns, fontsize=8, rotation=90)
    axes.set_ylim(LINES - 0.5, -0.5)
    axes.set_xlabel(_layer_axis(found))
    right = axes.secondary_yaxis("right")
    right.set_yticks(
        range(len(grams)), [" ".join(map(short, g.split(" "))) for g in grams], fontsize=8, family="monospace"
    )
    return image


def _range(values: np.ndarray) -> tuple[float, float]:
    """Of what is finite."""
    some = values[np.isfinite(values)]
    return (float(some.min()), float(some.max())) if some.size else (0.0, 1.0)


def _place(layer: Found, branch: int) -> str:
    """How a layer, or a branch of it, is called on an axis."""
    return f"{layer['layer']}.{branch}" if layer["branches"] > 1 else str(layer["layer"])


# -- all layers


def layers(found: Found) -> Any:
    """What gates let in, how much that is, what rows look like, how deep predictions are made."""
    figure, panels = panel_grid(2, 3, 17, 9.5)
    a = panels.flat
    _spread(a[0], found, "alpha", "gate", "after the sigmoid")
    _spread(a[1], found, "added", "what is added, beside the stream", "|y| / |H|", log=True)
    _spread(a[2], found, "conv", "convolution, beside the gated value", "|silu(conv)| / |gate value|", log=True)
    _row_sizes(a[3], found)
    _lens(a[4], found)
    _shares(a[5], found)
    head(figure, heading(found))
    return figure


def _spread(axes: Any, found: Found, name: str, title: str, unit: str, log: bool = False) -> None:
    """Quantiles of each layer and branch: 5 to 95 % thin, 25 to 75 % thick, the median a dot."""
    places, colors = [], []
    for i, layer in enumerate(found["layers"]):
        for m, some in enumerate(layer["quantiles"][name] or []):
            x, (low, first, middle, third, high) = len(places), floats(some)
            axes.vlines(x, low, high, color=f"C{i}", linewidth=1.5)
            axes.vlines(x, first, third, color=f"C{i}", linewidth=6, alpha=0.6)
            axes.plot(x, middle, "o", color="black", markersize=4)
            places.append(_place(layer, m))
            colors.append(f"C{i}")
    axes.set(title=title, ylabel=unit, xlabel=_layer_axis(found))
    if not places:
        axes.text(0.5, 0.5, "there is none", ha="center", transform=axes.transAxes)
        return
    axes.set_xticks(range(len(places)), places, rotation=90 if len(places) > 8 else 0)
    axes.set_xlim(-0.5, len(places) - 0.5)
    if log and 0 < axes.dataLim.y0 < np.inf:
        axes.set_yscale("log")


def _layer_axis(found: Found) -> str:
    return "layer.branch" if any(layer["branches"] > 1 for layer in found["layers"]) else "layer"


def _row_sizes(axes: Any, found: Found) -> None:
    for i, table in enumerate(found["tables"]):
        values = table["values"]
        for name, style in (("all", "-"), ("touched", "-"), ("never", ":")):
            some = values["rms"].get(name)
            if some and some["histogram"]:
                label = f"layer {table['layer']}" + {"all": "", "touched": ", touched", "never": ", never"}[name]
                counts = floats(some["histogram"])
                edges = np.linspace(0, values["top"], len(counts) + 1)
                axes.stairs(counts, edges, color=f"C{i}", linestyle=style, linewidth=1.5, label=label)
    axes.set(title="RMS of rows, touched in training or not", xlabel="RMS", ylabel="rows", yscale="log")
    axes.set_ylim(bottom=0.5)
    axes.legend(frameon=False, fontsize=8)


def _lens(axes: Any, found: Found) -> None:
    curves = {"this model": found["lens"]}
    if found["baseline"]:
        curves["baseline"] = found["baseline"]["lens"]
    for (name, values), style in zip(curves.items(), ("o-", "s--")):
        axes.plot(
            range(len(values)), floats(values), style, color=LINE["whole" if name == "this model" else name], label=name
        )
    for layer in found["layers"]:
        axes.axvline(layer["layer"], color="C1", linestyle=":", linewidth=1)
    axes.plot([], [], ":", color="C1", label="Engram before the layer")
    axes.set(title="LogitLens: KL(last layer || layer)", xlabel="layer", ylabel="nats per token")
    start_at_zero(axes)
    whole_numbers(axes, np.arange(max(map(len, curves.values()))))
    axes.legend(frameon=False, fontsize=9)


def _shares(axes: Any, found: Found) -> None:
    tables = found["tables"]
    bars = {
        "touched in training": [t["values"]["touched"] for t in tables],
        "looked up in what was counted": [t["values"]["looked_up"] for t in tables],
        "distinct rows per lookup in a batch": [t["unique"] for t in tables],
        "gates without slope": [layer["numbers"]["flat"] for layer in found["layers"]],
    }
    width = 0.8 / len(bars)
    for i, (name, values) in enumerate(bars.items()):
        x = np.arange(len(tables)) + (i - (len(bars) - 1) / 2) * width
        axes.bar(x, floats(values), width, label=name, color=f"C{i}")
    axes.set_xticks(range(len(tables)), [str(t["layer"]) for t in tables])
    axes.set(title="shares", xlabel="layer", ylabel="share", ylim=(0, 1.55))
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.legend(frameon=False, fontsize=8, loc="upper left")


# -- tables


def rows(found: Found) -> Any:
    """How n-grams share rows, what a cache of them would be worth, how often they come."""
    figure, panels = panel_grid(2, 3, 18, 10)
    a = panels.flat
    _occupancy(a[0], found["tables"])
    _collisions(a[1], found["tables"], "token")
    _collisions(a[2], found["tables"], "type")
    _caches(a[3], found["tables"])
    _zipf(a[4], found["zipf"])
    _unique(a[5], found["tables"])
    counted = found["counted"]
    head(figure, f"rows on {counted['tokens']:,} tokens: {counted['source']}")
    return figure


def _occupancy(axes: Any, tables: Sequence[Found]) -> None:
    loads = [x for t in tables for o in t["orders"] for x in o["load"]]
    x = np.linspace(0, 1.1 * max(loads), 200)
    axes.plot(x, 1 - np.exp(-x), color="0.5", label="a random function")
    for i, table in enumerate(tables):
        for o, marker in zip(table["orders"], "osd^v"):
            label = f"layer {table['layer']}, order {o['order']}"
            axes.plot(o["load"], o["occupied"], marker, color=f"C{i}", markersize=6, alpha=0.6, label=label)
    axes.set(title="occupied rows of each head", xlabel="load: n-grams per row", ylabel="share of rows")
    axes.legend(frameon=False, fontsize=8)
    start_at_zero(axes)


def _collisions(axes: Any, tables: Sequence[Found], weight: str) -> None:
    """What a token finds in its rows; the marks are for any head and for all heads at once."""
    cases = [(f"{t['layer']}: {o['order']}", o["collisions"][weight]) for t in tables for o in t["orders"]]
    x, bottom = np.arange(len(cases)), np.zeros(len(cases))
    for name, (label, color) in OUTCOMES.items():
        height = np.array([np.mean(floats(c[name])) for _, c in cases])
        axes.bar(x, height, 0.6, bottom=bottom, color=color, label=label, alpha=0.8)
        bottom += height
    for name, marker in (("any", "^"), ("all", "v")):
        heads = f"another n-gram in {name} head{'s' if name == 'all' else ''}"
        axes.plot(x, [c[name] for _, c in cases], marker, color="black", markersize=7, label=heads)
    axes.set_xticks(x, [name for name, _ in cases], rotation=90 if len(cases) > 8 else 0)
    axes.set(
        title=f"last in the row, by {weight} (mean over heads)", xlabel="layer: order", ylabel="share", ylim=(0, 1.5)
    )
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)


def _caches(axes: Any, tables: Sequence[Found]) -> None:
    for i, table in enumerate(tables):
        c = table["caches"]
        for policy, style in (("best", ":"), ("lru", "o-"), ("lfu", "s--")):
            label = f"layer {table['layer']}, {'most frequent' if policy == 'best' else policy.upper()}"
            axes.plot(c["rows"], c[policy], style, color=f"C{i}", markersize=4, label=label)
        axes.axhline(c["ceiling"], color=f"C{i}", linestyle="-.", linewidth=1)
    axes.plot([], [], "-.", color="0.3", label="room for everything")
    lookups = tables[0]["caches"]["lookups"]
    axes.set(title=f"hit rate of a cache ({lookups:,} lookups)", xlabel="rows of the cache", ylabel="share of lookups")
    axes.set(xscale="log", ylim=(0, 1))
    axes.legend(frameon=False, fontsize=8)


def _zipf(axes: Any, orders: Found) -> None:
    for i, (order, found) in enumerate(orders.items()):
        s = found["exponent"]
        fit = "no exponent" if s is None else f"exponent {s:.2f} over {found['ranks']:,} ranks"
        axes.plot(*found["curve"], color=f"C{i}", label=f"order {order}: {fit}")
    axes.set(title="n-grams by their number", xlabel="rank", ylabel="times", xscale="log", yscale="log")
    axes.legend(frameon=False, fontsize=8)


def _unique(axes: Any, tables: Sequence[Found]) -> None:
    cases = [(f"{t['layer']}: {o['order']}", o["unique"]) for t in tables for o in t["orders"]]
    bars = axes.bar(range(len(cases)), [u for _, u in cases], 0.6, color="C0")
    axes.bar_label(bars, [f"{1 / u:.1f}×" for _, u in cases], padding=3, fontsize=9)
    axes.set_xticks(range(len(cases)), [name for name, _ in cases], rotation=90 if len(cases) > 8 else 0)
    axes.set(title="distinct rows per lookup in a batch (above: saved by it)", xlabel="layer: order", ylabel="share")
    axes.margins(y=0.15)


# -- by frequency


def frequency(orders: Found) -> Any:
    """Loss and gate by how often an n-gram was seen in training, one row of panels for each order."""
    known = {order: buckets for order, buckets in orders.items() if buckets}
    figure, panels = panel_grid(len(known), 3, 17, 4.4 * len(known))
    for (order, buckets), (left, middle, right) in zip(known.items(), panels, strict=True):
        about = f"last {order} tokens, times in {buckets['tokens_counted']:,} tokens of training"
        names = [f"{name}\n{n:,}" for name, n in zip(buckets["names"], buckets["tokens"], strict=True)]
        losses = {name: floats(values) for name, values in buckets["losses"].items()}
        _by_bucket(left, names, losses, lambda name: LINE[name])
        left.set(title=f"loss, order {order}", ylabel="nats per token", xlabel=about)
        more = {name: values - losses["whole"] for name, values in losses.items() if name != "whole"}
        _by_bucket(middle, names, more, lambda name: LINE[name])
        middle.axhline(0, color="0.3", linewidth=0.8)
        middle.set(
            title="loss above that of this model", ylabel="nats per token", xlabel="times, and tokens of the text"
        )
        gate = {f"layer {layer}": floats(values) for layer, values in buckets["gates"].items()}
        _by_bucket(right, names, gate, lambda name, of=list(gate): f"C{of.index(name)}")
        right.set(title="gate, mean over branches", ylabel="after the sigmoid", xlabel="times, and tokens of the text")
    return figure


def _by_bucket(axes: Any, names: Sequence[str], curves: dict[str, np.ndarray], color: Callable[[str], str]) -> None:
    for name, values in curves.items():
        axes.plot(range(len(names)), values, "o-", color=color(name), label=name)
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.legend(frameon=False, fontsize=9)


# -- beside a baseline


def alignment(found: Found) -> Any:
    """CKA of every layer with every layer of the baseline, and where each layer stands among those."""
    other = found["baseline"]
    similarity = floats(other["cka"])
    figure = new_figure(8.5, 7)
    axes = figure.add_subplot()
    image = axes.imshow(similarity.T, cmap="viridis", origin="lower", aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=axes, label="CKA, unbiased")
    own = range(len(similarity))
    axes.plot(own, floats(other["alignment"]), "o-", color="C3", label="soft alignment, of the best 5 layers")
    depths = min(similarity.shape) - 1
    axes.plot([0, depths], [0, depths], ":", color="white", linewidth=1.5, label="the same depth")
    axes.set(xlabel=f"layer of {found['run']}", ylabel=f"layer of {other['run']}", title="which layers are alike")
    axes.set_xlim(-0.5, len(similarity) - 0.5)
    axes.set_ylim(-0.5, similarity.shape[1] - 0.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=9, loc="lower right")
    return figure


# -- over training


def training(curves: Found) -> Any:
    """The loss, and each number that a layer logs, one curve for each layer."""
    stats = curves["stats"]
    known = sorted({int(n) for stat in stats.values() for n in stat})
    crowded = len(known) > LABELLED
    columns = 1 + len(stats) + crowded
    figure, panels = panel_grid(1, columns, 6 * columns, 4.5)
    x, a = floats(curves["tokens"]), panels.flat
    a[0].plot(x, floats(curves["losses"]["lm"]), color="C0", alpha=0.7, label="training")
    if curves["validation"]:
        a[0].plot(*floats(curves["validation"]).T, "o--", color="C1", markersize=4, label="validation")
    a[0].set(title="loss", ylabel="nats per token")
    a[0].legend(frameon=False, fontsize=9)
    for axes, (name, by_layer) in zip(a[1:], stats.items()):
        for n in known:
            axes.plot(x, floats(by_layer[str(n)]), color=shade(n, known), linewidth=1.2, label=f"layer {n}")
        axes.set(title=name, ylabel="mean over tokens and branches")
        if not crowded:
            axes.legend(frameon=False, fontsize=9)
    for axes in a[: 1 + len(stats)]:
        axes.set(xlabel="training tokens")
        axes.xaxis.set_major_formatter(engineering())
    if crowded:
        name_layers(figure, a[-1], known)
    return figure
