"""Pictures of an answer: quality against its price, along the settings of a curve, and over training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eval.ablation import Answer
from eval.ablation_runs import run_name
from eval.history import SMOOTH, read_metrics, smooth
from eval.inspection.figures import new_figure, plain_axes
from eval.tables import cell

COLORS = 10  # of matplotlib's cycle, C0 to C9
MARKERS, DASHES = "os^DvP<X>*", ("-", "--", ":", "-.")
PRICES = {"params": "parameters", "state_bytes": "state (bytes)", "flops_per_token": "FLOPs per token"}


class Look(NamedTuple):
    """How a variant is drawn."""

    family: str
    color: str
    marker: str
    dashes: str


def looks(variants: Sequence[str]) -> dict[str, Look]:
    """A color for each; where there are too few, one for all whose names differ in the last word alone, told apart by markers and
    dashes."""
    family = {variant: variant for variant in variants}
    if len(variants) > COLORS:
        stems = [variant.rpartition("_")[0] for variant in variants]
        shared = {stem for stem in stems if stem and 1 < stems.count(stem) <= len(DASHES)}
        family = {v: stem if stem in shared else v for v, stem in zip(variants, stems, strict=True)}
    order, found = list(dict.fromkeys(family.values())), dict[str, Look]()
    for variant in variants:
        color = f"C{order.index(family[variant]) % COLORS}"
        place = sum(look.color == color for look in found.values())
        found[variant] = Look(family[variant], color, MARKERS[place % len(MARKERS)], DASHES[place % len(DASHES)])
    return found


def plot_quality(found: Answer, path: Path) -> None:
    """The first metric against parameters, state and compute: the mean of each variant between its lowest and its highest run, thin
    lines through variants that are drawn as one family."""
    metric = found.lines[0].metric
    known = {
        line.variant: (line.values, costs)
        for line in found.lines
        if line.metric is metric and line.values and (costs := found.costs(line.variant))
    }
    look_of = looks(list(found.question.variants))
    figure = new_figure(14, 4.5)
    panels = figure.subplots(1, len(PRICES), sharey=True)
    for axes, (key, label) in zip(panels, PRICES.items(), strict=True):
        at = {variant: getattr(costs, key) for variant, (_, costs) in known.items()}
        for variant, (values, _) in known.items():
            _draw(axes, [at[variant]], [values], look_of[variant], variant, dashes="")
        for family in dict.fromkeys(look_of[v].family for v in known):
            members = sorted((v for v in known if look_of[v].family == family), key=at.__getitem__)
            means = [np.mean(known[v][0]) for v in members]
            axes.plot([at[v] for v in members], means, color=look_of[members[0]].color, linewidth=0.8, alpha=0.6)
        axes.set(xlabel=label)
        plain_axes(axes)
        _scale(axes, list(at.values()))
    panels[0].set(ylabel=f"{metric.path} ({metric.direction})")
    _legend(figure, panels[0])
    figure.savefig(str(path))


def plot_curves(found: Answer, path: Path) -> None:
    """A panel for each curve, a line for each variant: the mean between its lowest and its highest run."""
    curves, look_of = found.question.curves, looks(list(found.question.variants))
    figure = new_figure(2.5 + 5 * len(curves), 4.5)
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, curve in zip(panels, curves, strict=True):
        places = [x for x in curve.over if not isinstance(x, str)]
        if words := len(places) < len(curve.over):
            places = list(range(len(curve.over)))
        for variant, look in look_of.items():
            along = {x: v for x, v in zip(places, found.along(curve, variant), strict=True) if v}
            if along:
                _draw(axes, list(along), list(along.values()), look, variant, look.dashes)
        axes.set(xlabel=curve.label, ylabel=curve.metrics()[0].direction)
        axes.set_title(curve.path, fontsize="medium")
        plain_axes(axes)
        if not words:
            _scale(axes, places)
        axes.set_xticks(places, map(cell, curve.over), fontsize="small")
    _legend(figure, panels[0])
    figure.savefig(str(path))


def plot_losses(found: Answer, folder: Path, path: Path) -> None:
    """Training loss against tokens: the mean over the finished runs of a variant, between the lowest and the highest."""
    from matplotlib.ticker import EngFormatter

    look_of = looks(list(found.question.variants))
    figure = new_figure(10, 5)
    axes = figure.add_subplot()
    for variant, look in look_of.items():
        runs = [run_name(variant, r.seed) for r in found.runs if r.variant == variant and r.costs]
        curves = [dict(_losses(folder / run)) for run in runs]
        shared = sorted(set.intersection(*map(set, curves))) if curves else []
        if not shared:
            continue
        losses = np.array([[curve[t] for t in shared] for curve in curves])
        width = max(1, round(SMOOTH * len(shared)))
        losses = np.stack([smooth(row, width) for row in losses])
        mark = look.marker if len(shared) == 1 else None
        label = f"{variant}, n={len(curves)}"
        axes.plot(shared, losses.mean(0), color=look.color, linestyle=look.dashes, marker=mark, label=label)
        shade = 0.2 if len(look_of) <= COLORS else 0.07
        axes.fill_between(shared, losses.min(0), losses.max(0), color=look.color, alpha=shade, linewidth=0)
    axes.set(xlabel="training tokens", ylabel="training loss (nats)")
    plain_axes(axes)
    axes.xaxis.set_major_formatter(EngFormatter())
    _legend(figure, axes)
    figure.savefig(str(path))


def _losses(run: Path) -> Iterator[tuple[int, float]]:
    """(tokens, loss) as logged."""
    for m in read_metrics(run):
        if isinstance(m.get("loss"), int | float) and "tokens" in m:
            yield m["tokens"], float(m["loss"])


def _draw(
    axes: Any, x: Sequence[float], values: Sequence[Sequence[float]], look: Look, label: str, dashes: str
) -> None:
    """Means with bars from the lowest to the highest of the values at each x."""
    mean = np.array([np.mean(v) for v in values])
    bars = [mean - [min(v) for v in values], [max(v) for v in values] - mean]
    axes.errorbar(
        *(x, mean, np.maximum(bars, 0)),
        color=look.color,
        marker=look.marker,
        linestyle=dashes,
        markersize=5,
        capsize=2,
        elinewidth=0.8,
        label=label,
    )


def _legend(figure: Any, axes: Any) -> None:
    """Beside the panels: in them it would hide what is drawn."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, frameon=False, fontsize="small", loc="outside right upper")


def _scale(axes: Any, values: Sequence[float]) -> None:
    """A few readable numbers on the x axis, logarithmic where the values are far apart."""
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

    if values and min(values) > 0 and max(values) > 4 * min(values):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(EngFormatter())
