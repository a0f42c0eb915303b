"""Pictures of memory cells, from what `eval.inspection.gmt` measured and nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.inspection.numbers import number

SOURCE, TARGET, THIRD = "C0", "C1", "C2"
SHOWN = 24  # slots on either side of a flow, the most used ones
LABELLED = 12  # layers that a legend can hold; more get a colour bar
LONGEST = 12  # characters of a token on an axis
TICKS = 40  # labels on an axis of a map

Found = dict[str, Any]


def draw(found: Found, folder: Path) -> list[Path]:
    """PNG files in ``folder``: all layers beside each other, a page for each layer, ablations, and the training if it is known."""
    made = {"gmt-layers": overview(found)}
    for layer in found["layers"]:
        made[f"gmt-layer-{layer['layer']:02d}"] = page(layer)
    if found["ablations"]:
        made["gmt-ablations"] = ablations(found)
    if found["training"]:
        made["gmt-training"] = training(found["training"])
    paths = []
    for name, figure in made.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(str(paths[-1]))
    return paths


# -- all layers


def overview(found: Found) -> Any:
    """One panel for each number, layers along x; bands hold the middle 80 % of the tokens."""
    layers = found["layers"]
    x = np.array([layer["layer"] for layer in layers])
    figure, panels = _panels(4, 3, 15, 13)

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
            _from_zero(axes)
        _whole_numbers(axes, x)
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
    _head(figure, _heading(found))
    return figure


def ablations(found: Found) -> Any:
    """What the loss on the text gains or loses without something."""
    names = [a["name"] for a in found["ablations"]]
    change = _floats([a["loss"] for a in found["ablations"]]) - number(found["loss"])
    figure = _figure(9, 1.6 + 0.34 * len(names))
    axes = figure.add_subplot()
    bars = axes.barh(names, change, color=["C3" if c > 0 else THIRD for c in change])
    axes.bar_label(bars, [f"{c:+.4f}" for c in change], padding=4, fontsize=9)
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.margins(x=0.2)
    axes.invert_yaxis()
    axes.set(xlabel="change of the loss (nats per token); above zero: it was of use", title=_heading(found))
    _plain_axes(axes)
    return figure


# -- one layer


def page(layer: Found) -> Any:
    """Usage, entropies and edges; where tokens go, which slot is whose, how slots stand to each other."""
    figure, panels = _panels(2, 3, 19, 12.5)
    by_source = np.argsort(-_floats(layer["usage"]["source"]), kind="stable")
    by_target = np.argsort(-_floats(layer["usage"]["target"]), kind="stable")
    _usage(panels[0, 0], layer)
    _entropies(panels[0, 1], layer)
    _edges(panels[0, 2], layer, by_source, by_target)
    _flow(panels[1, 0], layer)
    _affinity(panels[1, 1], layer)
    _cosines(panels[1, 2], layer)
    _head(figure, f"layer {layer['layer']}: {layer['slots']} slots, {len(layer['per_token']['nearest']):,} tokens")
    return figure


def _usage(axes: Any, layer: Found) -> None:
    labels = {"source": "source, on this text", "target": "target, on this text", "training": "source, in training"}
    rank = np.arange(1, layer["slots"] + 1)
    for (key, label), color in zip(labels.items(), (SOURCE, TARGET, THIRD), strict=True):
        axes.plot(rank, -np.sort(-_floats(layer["usage"][key])), color=color, marker=".", label=label)
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
    edges = _floats(layer["edges"])[rows][:, columns]
    _heat(axes, edges, "probability (square-root scale)", [str(i) for i in rows], [str(i) for i in columns], "sqrt")
    axes.set(title="edges", xlabel="to slot, by falling target usage", ylabel="from slot, by falling source usage")


def _flow(axes: Any, layer: Found) -> None:
    counts = np.zeros((layer["slots"], layer["slots"]))
    for i, j, n in layer["flow"]:
        counts[i, j] = n
    rows, columns = _largest(counts.sum(1)), _largest(counts.sum(0))
    shown = counts[rows][:, columns]
    names = {s["slot"]: s for s in layer["lists"]}
    _heat(
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
    tokens, slots = [_label(t) for t in found["tokens"]], [str(s) for s in found["slots"]]
    _heat(axes, _floats(found["weight"]), "mean source weight", tokens, slots)
    axes.set(title="affinity of tokens and slots", xlabel="slot, by tokens nearest to it", ylabel="frequent tokens")


def _cosines(axes: Any, layer: Found) -> None:
    counts = _floats(layer["cosines"])
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
    return " ".join(_label(token) for token, _ in counted[:2])


def _heat(
    axes: Any, values: np.ndarray, unit: str, rows: Sequence[str], columns: Sequence[str], scale: str = "linear"
) -> None:
    from matplotlib.colors import LogNorm, Normalize, PowerNorm

    top = float(np.max(values, where=np.isfinite(values), initial=0.0)) or 1.0
    norms = {"linear": Normalize(0, top), "sqrt": PowerNorm(0.5, 0, top), "log": LogNorm(1, max(top, 2))}
    image = axes.imshow(values, cmap="viridis", aspect="auto", interpolation="nearest", norm=norms[scale])
    axes.figure.colorbar(image, ax=axes, label=unit, pad=0.02)
    axes.grid(visible=False)
    for ticks, labels, rotation in ((axes.yaxis, rows, 0), (axes.xaxis, columns, 90)):
        step = -(-len(labels) // TICKS)
        ticks.set_ticks(range(0, len(labels), step), labels[::step], fontsize=8, rotation=rotation)


# -- over training


def training(curves: Found) -> Any:
    """Losses, and each number that a cell logs, one curve for each layer."""
    figure, panels = _panels(4, 3, 15, 13)
    x = _floats(curves["tokens"])
    layers = sorted({int(n) for stat in curves["stats"].values() for n in stat})
    a = panels.flat
    a[0].plot(x, _floats(curves["losses"]["lm"]), color=SOURCE, alpha=0.7, label="training")
    if curves["validation"]:
        a[0].plot(*_floats(curves["validation"]).T, "o--", color=TARGET, markersize=4, label="validation")
    a[0].set(title="loss", ylabel="nats per token")
    a[0].legend(frameon=False, fontsize=9)
    for i, (name, raw) in enumerate((n, v) for n, v in curves["losses"].items() if n.startswith("gmt.")):
        values = _floats(raw)
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
                axes.plot(x, _floats(values), color=_shade(n, layers), linewidth=1.2, label=str(n))
        axes.set(title=title, ylabel=unit)
        if stat in ("dead_slots", "at_floor"):
            _from_zero(axes)
    _name_layers(figure, a[11], layers)
    for axes in a[:11]:
        axes.set(xlabel="training tokens")
        axes.xaxis.set_major_formatter(_engineering())
    return figure


def _name_layers(figure: Any, axes: Any, layers: Sequence[int]) -> None:
    """A legend in a panel of its own, or a colour bar."""
    axes.set_axis_off()
    if len(layers) > LABELLED:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        shades = ScalarMappable(Normalize(layers[0], layers[-1]), "viridis")
        figure.colorbar(shades, ax=axes, label="layer", orientation="horizontal")
        return
    for n in layers:
        axes.plot([], [], color=_shade(n, layers), label=f"layer {n}")
    axes.legend(frameon=False, loc="center")


def _shade(layer: int, layers: Sequence[int]) -> Any:
    from matplotlib import colormaps

    span = layers[-1] - layers[0]
    return colormaps["viridis"](0.9 * (layer - layers[0]) / span if span else 0.0)


# -- axes


def _panels(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    figure = _figure(width, height)
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        _plain_axes(axes)
    return figure, panels


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _head(figure: Any, text: str) -> None:
    figure.suptitle(text, fontsize=14, fontweight="bold")


def _plain_axes(axes: Any) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _from_zero(axes: Any) -> None:
    """Also where everything is zero, or not finite."""
    top = axes.dataLim.y1
    axes.set_ylim(0, 1.08 * top if np.isfinite(top) and top > 0 else 1)


def _whole_numbers(axes: Any, x: np.ndarray) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(x.min() - 0.5, x.max() + 0.5)


def _engineering() -> Any:
    from matplotlib.ticker import EngFormatter

    return EngFormatter()


def _heading(found: Found) -> str:
    what = f"{found['run']}, step {found['step']:,}: {len(found['tokens']):,} tokens"
    return f"{what}, loss {number(found['loss']):.4f} nats per token"


def _number(layer: Found, key: str) -> float:
    return number(layer["numbers"][key])


def _tokens(layer: Found, key: str) -> np.ndarray:
    return _floats(layer["per_token"][key])


def _floats(values: Sequence[Any]) -> np.ndarray:
    """None, which stands for what is no number, as NaN."""
    return np.array(values, dtype=np.float64)


def _label(token: str) -> str:
    """A token as an axis can show it: short, in letters that every font has, and no formula."""
    token = re.sub(r"(.)\1{3,}", lambda run: f"{run[1]}×{len(run[0])}", token)
    if len(token) > LONGEST:
        token = token[: LONGEST - 1] + "…"
    letters = (c if ord(c) < 0x250 or c in "␣…" else c.encode("unicode_escape").decode() for c in token)
    return "".join(letters).replace("$", r"\$")
