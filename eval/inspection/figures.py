"""What pictures share: figures without a window, axes, legends, maps, and text that an axis can show."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.inspection.numbers import number

LABELLED = 12  # layers that a legend can hold; more get a colour bar
LONGEST = 12  # characters of a token on an axis
TICKS = 40  # labels on an axis of a map

Found = dict[str, Any]


def save(figures: dict[str, Any], folder: Path) -> list[Path]:
    """PNG files by name."""
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(str(paths[-1]))
    return paths


def ablations(found: Found) -> Any:
    """What the loss on the text gains or loses without something."""
    names = [a["name"] for a in found["ablations"]]
    change = floats([a["loss"] for a in found["ablations"]]) - number(found["loss"])
    figure = new_figure(9, 1.6 + 0.34 * len(names))
    axes = figure.add_subplot()
    bars = axes.barh(names, change, color=["C3" if c > 0 else "C2" for c in change])
    axes.bar_label(bars, [f"{c:+.4f}" for c in change], padding=4, fontsize=9)
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.margins(x=0.2)
    axes.invert_yaxis()
    axes.set(xlabel=f"change of the loss (nats per {_per(found)}); above zero: it was of use", title=heading(found))
    plain_axes(axes)
    return figure


def heat(
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


def name_layers(figure: Any, axes: Any, layers: Sequence[int]) -> None:
    """A legend in a panel of its own, or a colour bar."""
    axes.set_axis_off()
    if len(layers) > LABELLED:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        shades = ScalarMappable(Normalize(layers[0], layers[-1]), "viridis")
        figure.colorbar(shades, ax=axes, label="layer", orientation="horizontal")
        return
    for n in layers:
        axes.plot([], [], color=shade(n, layers), label=f"layer {n}")
    axes.legend(frameon=False, loc="center")


def shade(layer: int, layers: Sequence[int]) -> Any:
    from matplotlib import colormaps

    span = layers[-1] - layers[0]
    return colormaps["viridis"](0.9 * (layer - layers[0]) / span if span else 0.0)


def panel_grid(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    figure = new_figure(width, height)
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        plain_axes(axes)
    return figure, panels


def new_figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def head(figure: Any, text: str) -> None:
    figure.suptitle(text, fontsize=14, fontweight="bold")


def plain_axes(axes: Any) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def start_at_zero(axes: Any) -> None:
    """Also where everything is zero, or not finite."""
    top = axes.dataLim.y1
    axes.set_ylim(0, 1.08 * top if np.isfinite(top) and top > 0 else 1)


def whole_numbers(axes: Any, x: np.ndarray) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(x.min() - 0.5, x.max() + 0.5)


def engineering() -> Any:
    from matplotlib.ticker import EngFormatter

    return EngFormatter()


def heading(found: Found) -> str:
    what = f"{found['run']}, step {found['step']:,}: {len(found['tokens']):,} tokens"
    return f"{what}, loss {number(found['loss']):.4f} nats per {_per(found)}"


def _per(found: Found) -> str:
    return found.get("per", "token")


def floats(values: Sequence[Any]) -> np.ndarray:
    """None, which stands for what is no number, as NaN."""
    return np.array(values, dtype=np.float64)


def short(token: str) -> str:
    """A token as an axis can show it: short, in letters that every font has, and no formula."""
    token = re.sub(r"(.)\1{3,}", lambda run: f"{run[1]}×{len(run[0])}", token)
    if len(token) > LONGEST:
        token = token[: LONGEST - 1] + "…"
    letters = (c if ord(c) < 0x250 or c in "␣…" else c.encode("unicode_escape").decode() for c in token)
    return "".join(letters).replace("$", r"\$")
