"""Where a memory cell can be watched and changed from outside: around `GMT.hop`, which turns tokens into where they stand and go.

A change is a function from one hop to another, so changes can be stacked, and measuring is one that changes nothing. Parameters,
buffers and code of the model are never touched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from eval.inspection import hooks
from kernels.gmt_cell import Hop
from models import LM, UserError
from models.channels.gmt import GMT, Tables
from models.errors import nearest

Hopper = Callable[[Tensor, Tables, Tensor], Hop]
Change = Callable[[Hopper], Hopper]
ABLATIONS = {
    "uniform_edges[@LAYER]": "a hop leads everywhere alike",
    "freeze_slot:N[@LAYER]": "slot N takes no part: nothing stands there, nothing goes there",
    "zero_block:LAYER": "the cell adds nothing",
}


def cells(model: LM) -> dict[int, GMT]:
    """By layer."""
    return {layer: part for layer, _, part in model.parts() if isinstance(part, GMT)}


@contextlib.contextmanager
def changed(over: Iterable[GMT], change: Change) -> Iterator[None]:
    """Inside, these cells hop as ``change`` makes it of the way they did. Of nested changes the last made acts first."""
    with hooks.changed(over, "hop", lambda _, hop: change(hop)):
        yield


def uniform_edges(hop: Hopper) -> Hopper:
    """The hop gives every target the same."""
    return lambda h, tables, temperature: hop(h, with_uniform_edges(tables), temperature)


def with_uniform_edges(tables: Tables) -> Tables:
    return tables._replace(edges=torch.full_like(tables.edges, 1 / len(tables.edges)))


def no_displacement(hop: Hopper) -> Hopper:
    def hopped(h: Tensor, tables: Tables, temperature: Tensor) -> Hop:
        found = hop(h, tables, temperature)
        return found._replace(y=torch.zeros_like(found.y))

    return hopped


def without_slot(slot: int) -> Change:
    """As if there were one slot less: the weights of the others, and their edges, sum to 1 again."""

    def change(hop: Hopper) -> Hopper:
        def hopped(h: Tensor, tables: Tables, temperature: Tensor) -> Hop:
            f = len(tables.points)
            keep = torch.tensor([i for i in range(f) if i != slot], device=h.device)
            found = hop(h, _rows(tables, keep), temperature)

            def back(weights: Tensor) -> Tensor:
                return weights.new_zeros(len(weights), f).index_copy_(1, keep, weights)

            nearest_slot = keep[found.nearest.long()].to(found.nearest.dtype)
            return found._replace(source=back(found.source), target=back(found.target), nearest=nearest_slot)

        return hopped

    return change


def _rows(tables: Tables, keep: Tensor) -> Tables:
    edges = tables.edges[keep][:, keep]
    return tables._replace(
        points=tables.points[keep],
        directions=tables.directions[keep],
        scores=tables.scores[keep],
        edges=edges / edges.sum(1, keepdim=True),
        values=tables.values[keep],
        gram=None if tables.gram is None else tables.gram[keep][:, keep],
    )


# -- by name


@contextlib.contextmanager
def ablate(model: LM, spec: str) -> Iterator[None]:
    """Inside, the model runs without what ``spec`` names: one of ABLATIONS, or several joined by ``+``. Raises UserError."""
    with contextlib.ExitStack() as stack:
        for change, over in [_parse(model, one) for one in spec.split("+")]:
            stack.enter_context(changed(over, change))
        yield


def check(model: LM, spec: str) -> None:
    """Raise UserError, one line, for what `ablate` would refuse."""
    for one in spec.split("+"):
        _parse(model, one)


def standard(model: LM) -> list[str]:
    """What is tried when nothing is asked for: the graph, and each cell."""
    return ["uniform_edges", *(f"zero_block:{layer}" for layer in cells(model))]


def _parse(model: LM, spec: str) -> tuple[Change, list[GMT]]:
    """-> (a change, the cells it is made to)."""
    here = cells(model)
    rest, at, where = spec.strip().partition("@")
    name, colon, value = rest.partition(":")
    known = [form.split("[")[0].split(":")[0] for form in ABLATIONS]
    if name not in known:
        raise UserError(f"--ablate {spec}: unknown ablation '{name}'{nearest(name, known)}")
    takes_value, takes_place = name != "uniform_edges", name != "zero_block"
    if bool(colon) != takes_value or (at and not takes_place):
        form = next(f for f in ABLATIONS if f.startswith(name))
        raise UserError(f"--ablate {spec}: write it as {form}")
    layer = where if at else value if name == "zero_block" else None
    over = list(here.values()) if layer is None else [here[hooks.one_of(spec, "layer", layer, here)]]
    if name == "uniform_edges":
        return uniform_edges, over
    if name == "zero_block":
        return no_displacement, over
    fewest = min(cell.cfg.slots for cell in over)
    if fewest < 3:
        raise UserError(f"--ablate {spec}: with {fewest} slots there is no graph left without one")
    return without_slot(hooks.one_of(spec, "slot", value, range(fewest))), over
