"""Pictures of memory cells, from what `eval.inspection.gmt` measured and nothing else."""

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
    panel_grid,
    save,
    shade,
    short,
    start_at_zero,
    whole_numbers,
)
from eval.inspection.numbers import number

SOURCE, TARGET, THIRD = "C0", "C1", "C2"
SHOWN = 24  # slots on either side of a flow, the most used ones


def draw(found: Found, folder: Path) -> list[Path]:
    """PNG files in ``folder``: all layers beside each other, a page for each layer, ablations, and the training if it is known."""
    made = {"gmt-layers": overview(found)}
    for layer in found["layers"]:
        made[f"gmt-layer-{layer['layer']:02d}"] = page(layer)
    if found["ablations"]:
        made["gmt-ablations"] = ablations(found)
    if found["training"]:
        made["gmt-training"] = training(found["training"])
    return save(made, folder)


# -- all layers


def overview(found: Found) -> Any:
    """One panel for each number, layers along x; bands hold the middle 80 % of the tokens."""
    layers = found["layers"]
    x = np.array([layer["layer"] for layer in layers])
    figure, panels = panel_grid(4, 3, 15, 13)

    def line(axes: Any, key: str, label: str, color: str, style: str = "-") -> None:
        axes.plot(
            x, [_number(layer, key) for layer in layers], style, color=color, marker="o", markersize=4, label=label
        )

    def band(axes: Any, key: str, color: str) -> None:
        low, high = np.array([np.percentile(_tokens(layer, key), (10, 90)) for layer in layers]).T
        axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)

    def panel(axes: Any, title: str, unit: str, from_zero: bool = True, legend: bool = True) -> None:
        axes.set(title=title, ylabel=unit, xlabel="layer")
        if from_zero:
            start_at_zero(axes)
        whole_numbers(axes, x)
        if legend:
            axes.legend(frameon=False, fontsize=9)

    a = panels.flat
    line(a[0], "source_slots", "source", SOURCE)
    line(a[0], "target_slots", "target", TARGET)
    a[0].plot(x, [layer["slots"] for layer in layers], ":", color="0.5", label="all slots")
    panel(a[0], "effective slots, exp H(mean weight)", "slots")
    line(a[1], "distinct_sources", "nearest to some token", SOURCE)
    line(a[1], "distinct_targets", "goal of some token", TARGET)
    line(a[1], "dead_slots", "dead in training", "C3")
    panel(a[1], "slots in use and dead slots", "slots")
    line(a[2], "top_source", "source", SOURCE)
    line(a[2], "top_target", "target", TARGET)
    panel(a[2], "tokens on the most popular slot", "share of tokens")
    for key, color in (("source", SOURCE), ("target", TARGET)):
        line(a[3], f"{key}_entropy", key, color)
        band(a[3], f"{key}_entropy", color)
    line(a[3], "largest_entropy", "ln F", "0.5", ":")
    panel(a[3], "entropy of a token's weights", "nats")
    line(a[4], "displacement", "before its norm", SOURCE)
    band(a[4], "displacement", SOURCE)
    line(a[4], "displacement_floor", "where the norm's eps takes over", "0.5", ":")
    a[4].set_yscale("log")
    panel(a[4], "displacement |(w_tgt - w_src) C'|", "length", from_zero=False)
    if all(layer["numbers"]["memory_fraction"] is not None for layer in layers):
        line(a[5], "memory_fraction", "", SOURCE)
        band(a[5], "memory_fraction", SOURCE)
    panel(a[5], "memory fraction |y| / (|y| + |mixer|)", "share", legend=False)
    line(a[6], "edge_influence", "", SOURCE)
    band(a[6], "edge_influence", SOURCE)
    panel(a[6], "edge influence, KL(target || uniform edges)", "nats", legend=False)
    line(a[7], "at_floor", "", SOURCE)
    panel(a[7], "tokens within the floor of a slot", "share of tokens", legend=False)
    line(a[8], "gate", "gate", SOURCE)
    line(a[8], "write_momentum", "write momentum", TARGET)
    panel(a[8], "gate and write momentum", "after the sigmoid")
    line(a[9], "edge_entropy", "mean", SOURCE)
    line(a[9], "edge_entropy_floor", "pressed up to", "0.5", ":")
    panel(a[9], "entropy of a slot's edges", "nats")
    line(a[10], "largest_edge", "largest edge of a slot", SOURCE)
    line(a[10], "edge_similarity", "cosine of two slots' edges", TARGET)
    panel(a[10], "edges, means over slots", "probability; cosine")
    line(a[11], "slot_cosine", "cosine of two slots", SOURCE)
    line(a[11], "coverage", "coverage: 1 - cosine to the next", TARGET)
    panel(a[11], "where slots stand, means over slots", "cosine; 1 - cosine", from_zero=False)
    head(figure, heading(found))
    return figure


# -- one layer


def page(layer: Found) -> Any:
    """Usage, entropies and edges; where tokens go, which slot is whose, how slots stand to each other."""
    figure, panels = panel_grid(2, 3, 19, 12.5)
    by_source = np.argsort(-floats(layer["usage"]["source"]), kind="stable")
    by_target = np.argsort(-floats(layer["usage"]["target"]), kind="stable")
    _usage(panels[0, 0], layer)
    _entropies(panels[0, 1], layer)
    _edges(panels[0, 2], layer, by_source, by_target)
    _flow(panels[1, 0], layer)
    _affinity(panels[1, 1], layer)
    _cosines(panels[1, 2], layer)
    head(figure, f"layer {layer['layer']}: {layer['slots']} slots, {len(layer['per_token']['nearest']):,} tokens")
    return figure


def _usage(axes: Any, layer: Found) -> None:
    labels = {"source": "source, on this text", "target": "target, on this text", "training": "source, in training"}
    rank = np.arange(1, layer["slots"] + 1)
    for (key, label), color in zip(labels.items(), (SOURCE, TARGET, THIRD), strict=True):
        axes.plot(rank, -np.sort(-floats(layer["usage"][key])), color=color, marker=".", label=label)
    axes.axhline(1 / layer["slots"], color="0.5", linestyle=":", label="all alike")
    axes.axhline(_number(layer, "dead_below"), color="C3", linestyle=":", label="dead below")
    axes.set_yscale("log")
    axes.set(title="usage", xlabel="slots, each curve by falling usage", ylabel="mean weight")
    axes.legend(frameon=False, fontsize=9)


def _entropies(axes: Any, layer: Found) -> None:
    most = _number(layer, "largest_entropy")
    for key, color in (("source", SOURCE), ("target", TARGET)):
        found = _tokens(layer, f"{key}_entropy")
        axes.hist(found[np.isfinite(found)], np.linspace(0, most, 49), color=color, alpha=0.6, label=key)
    axes.axvline(most, color="0.5", linestyle=":", label="ln F")
    axes.set(title="entropy of a token's weights", xlabel="nats", ylabel="tokens")
    axes.legend(frameon=False, fontsize=9)


def _edges(axes: Any, layer: Found, rows: np.ndarray, columns: np.ndarray) -> None:
    edges = floats(layer["edges"])[rows][:, columns]
    heat(axes, edges, "probability (square-root scale)", [str(i) for i in rows], [str(i) for i in columns], "sqrt")
    axes.set(title="edges", xlabel="to slot, by falling target usage", ylabel="from slot, by falling source usage")


def _flow(axes: Any, layer: Found) -> None:
    counts = np.zeros((layer["slots"], layer["slots"]))
    for i, j, n in layer["flow"]:
        counts[i, j] = n
    rows, columns = _largest(counts.sum(1)), _largest(counts.sum(0))
    shown = counts[rows][:, columns]
    names = {s["slot"]: s for s in layer["lists"]}
    heat(
        axes,
        np.where(shown > 0, shown, np.nan),
        "tokens",
        [f"{i} [{_kinds(names[i]['near_tokens'])}]" for i in rows],
        [f"{j} [{_kinds(names[j]['going_tokens'])}]" for j in columns],
        "log",
    )
    share = shown.sum() / counts.sum()
    axes.set(
        title=f"flow of tokens ({share:.0%} of them shown)",
        xlabel="mostly goes to slot [tokens that do]",
        ylabel="nearest to slot [tokens that are]",
    )


def _affinity(axes: Any, layer: Found) -> None:
    found = layer["affinity"]
    tokens, slots = [short(t) for t in found["tokens"]], [str(s) for s in found["slots"]]
    heat(axes, floats(found["weight"]), "mean source weight", tokens, slots)
    axes.set(title="affinity of tokens and slots", xlabel="slot, by tokens nearest to it", ylabel="frequent tokens")


def _cosines(axes: Any, layer: Found) -> None:
    counts = floats(layer["cosines"])
    edges = np.linspace(-1, 1, len(counts) + 1)
    axes.stairs(counts / 2, edges, fill=True, color=SOURCE, alpha=0.6)
    axes.axvline(_number(layer, "slot_cosine"), color="0.3", linestyle=":", label="mean")
    nearest = 1 - _number(layer, "coverage")
    axes.axvline(nearest, color=TARGET, linestyle=":", label=f"nearest slot, mean (coverage {1 - nearest:.3f})")
    axes.set(title="cosine of two slots", xlabel="cosine", ylabel="pairs of slots")
    axes.margins(y=0.2)  # for the legend
    axes.legend(frameon=False, fontsize=9)


def _largest(totals: np.ndarray) -> np.ndarray:
    order = np.argsort(-totals, kind="stable")[:SHOWN]
    return order[totals[order] > 0]


def _kinds(counted: Sequence[tuple[str, int]]) -> str:
    return " ".join(short(token) for token, _ in counted[:2])


# -- over training


def training(curves: Found) -> Any:
    """Losses, and each number that a cell logs, one curve for each layer."""
    figure, panels = panel_grid(4, 3, 15, 13)
    x = floats(curves["tokens"])
    layers = sorted({int(n) for stat in curves["stats"].values() for n in stat})
    a = panels.flat
    a[0].plot(x, floats(curves["losses"]["lm"]), color=SOURCE, alpha=0.7, label="training")
    if curves["validation"]:
        a[0].plot(*floats(curves["validation"]).T, "o--", color=TARGET, markersize=4, label="validation")
    a[0].set(title="loss", ylabel="nats per token")
    a[0].legend(frameon=False, fontsize=9)
    for i, (name, raw) in enumerate((n, v) for n, v in curves["losses"].items() if n.startswith("gmt.")):
        values = floats(raw)
        label = name.partition(".")[2] + ("" if values.any() else " (zero)")
        a[1].plot(x, np.where(values > 0, values, np.nan), color=f"C{i}", label=label)
    a[1].set(title="losses of the cells, mean over layers", ylabel="before their weights", yscale="log")
    a[1].legend(frameon=False, fontsize=8)
    titles = {
        "temperature": ("routing of the source", "temperature"),
        "source_slots": ("effective slots, source", "slots"),
        "target_slots": ("effective slots, target", "slots"),
        "dead_slots": ("dead slots", "slots"),
        "gate": ("gate", "after the sigmoid"),
        "write_momentum": ("write momentum", "after the sigmoid"),
        "displacement": ("displacement before its norm", "length"),
        "at_floor": ("tokens within the floor of a slot", "share of tokens"),
        "edge_entropy": ("entropy of a slot's edges", "nats"),
    }
    for axes, (stat, (title, unit)) in zip(a[2:], titles.items()):
        for n in layers:
            values = curves["stats"].get(stat, {}).get(str(n))
            if values is not None:
                axes.plot(x, floats(values), color=shade(n, layers), linewidth=1.2, label=str(n))
        axes.set(title=title, ylabel=unit)
        if stat in ("dead_slots", "at_floor"):
            start_at_zero(axes)
    name_layers(figure, a[11], layers)
    for axes in a[:11]:
        axes.set(xlabel="training tokens")
        axes.xaxis.set_major_formatter(engineering())
    return figure


# -- numbers of a layer


def _number(layer: Found, key: str) -> float:
    return number(layer["numbers"][key])


def _tokens(layer: Found, key: str) -> np.ndarray:
    return floats(layer["per_token"][key])
