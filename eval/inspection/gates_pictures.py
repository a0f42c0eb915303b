"""Pictures of gates, from what `eval.inspection.gates` measured and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.inspection.figures import Found, floats, head, heat, new_figure, panel_grid, short
from eval.inspection.gates import BAND

PANELS = 24  # parts in a picture, the first ones
GATES = {"decay": ("share kept", "C0"), "write": ("write strength", "C1")}


def along(found: Found) -> Any:
    """Decay and write strength of each part along a window: the mean over heads, and a band that holds most of them."""
    parts = found["parts"][:PANELS]
    rows = -(-len(parts) // 2)
    figure, panels = panel_grid(rows, 4, 15, 1 + 2.6 * rows)
    for axes in panels.flat[2 * len(parts) :]:
        axes.set_axis_off()
    for one, pair in zip(parts, panels.reshape(-1, 2)):
        for axes, (gate, (label, color)) in zip(pair, GATES.items()):
            if one[gate] is None:
                _nothing(axes, gate)
                continue
            low, _, high = floats(one[gate]["band"])
            axes.fill_between(found["places"], low, high, color=color, alpha=0.25, linewidth=0)
            axes.plot(found["places"], floats(one[gate]["along"]), color=color, linewidth=1.3)
            axes.set(xlabel="token of the window", ylabel=label)
        pair[0].set_title(f"{one['name']}, {one['kind']}", fontsize=10, loc="left")
    head(figure, f"Gates along a text: mean, and {BAND[0]:.0%} to {BAND[-1]:.0%} of heads")
    return figure


def _nothing(axes: Any, gate: str) -> None:
    said = {"decay": "no decay", "write": "no gate on what is written"}
    axes.text(0.5, 0.5, said[gate], ha="center", va="center", color="0.5", transform=axes.transAxes)
    axes.set_axis_off()


def tokens(found: Found) -> Any:
    """The first tokens of the text, and what each head forgets and writes at them; blank where a token does not go to a memory."""
    parts = found["parts"][:PANELS]
    names = [short(token) for token in found["tokens"]]
    heights = [1.6 + 0.14 * max(4, len(one["shown"])) for one in parts]
    figure = new_figure(4 + 0.36 * max(24, len(names)), 0.8 + sum(heights))
    grid = figure.subplots(len(parts), 2, height_ratios=heights, squeeze=False)
    for one, (left, right) in zip(parts, grid):
        for axes, gate, label in ((left, "decay", "forgotten: 1 - decay"), (right, "write", "write strength")):
            if one[gate] is None:
                _nothing(axes, gate)
            else:
                _map(axes, one, gate, label, names)
        left.set_title(f"{one['name']}, {one['kind']}", fontsize=10, loc="left")
    head(figure, "Gates at the first tokens (square-root scale)")
    return figure


def _map(axes: Any, one: Found, gate: str, label: str, names: Sequence[str]) -> None:
    values = floats(one[gate]["first"]).T
    heat(axes, 1 - values if gate == "decay" else values, label, one["shown"], names, "sqrt")
    axes.set_xticks(range(len(names)), names, fontsize=10, rotation=90, family="monospace")
    axes.set_ylabel("memory.head" if one["memories"] > 1 else "head")
