"""What can be said of any model, whatever its parts: states and gates over time, what parts report, attention by distance,
attribution.

An instrument like the others (`eval.inspect.Instrument`), for models that have no other and beside those that have one: what
`measure_all` finds is stored as ``any`` in ``inspect.json``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from eval.inspection import attention, attribution, gates, states
from eval.inspection.anypart_pictures import draw, draw_all
from eval.inspection.beside import Beside
from eval.inspection.numbers import plain
from eval.inspection.text import Text, loss
from eval.run import LoadedRun
from eval.scoring import pad
from eval.tables import markdown
from models import LM, Batch, UserError
from models.errors import nearest
from models.types import Part, Stat

__all__ = [
    "ABLATIONS",
    "ablate",
    "changes",
    "check",
    "draw",
    "draw_all",
    "history",
    "lists",
    "measure",
    "measure_all",
    "more",
    "standard",
    "summary",
    "summary_all",
]

ABLATIONS = {"zero:LAYER.SLOT": "a part adds nothing, e.g. zero:0.mixer"}
STANDARD = 32  # parts that are taken away one by one when nothing is asked for, at most
LONGEST_STAT = 64  # numbers of one stat that are stored


# -- every model


def measure_all(model: LM, text: Text, at: Sequence[int] = ()) -> dict[str, Any]:
    """Everything that needs no instrument of its own, as plain JSON. The model is not changed."""
    return {
        "kinds": {f"layers.{n}.{slot}": part.cfg.kind for n, slot, part in model.parts()},
        **states.measure(model, text),
        "gates": gates.measure(model, text),
        "stats": whole(model, text),
        "attention": attention.measure(model, text),
        "attribution": attribution.measure(model, text, at),
    }


@torch.no_grad()
def whole(model: LM, text: Text) -> dict[str, Any]:
    """What the parts said of the text, by name, as they say it to a log in training: means over tokens, sums and maxima."""
    said: dict[str, list[tuple[int, Stat]]] = {}
    for windows in text.batches():
        tokens, valid = pad([w[:-1] for w in windows], model.embed.weight.device)
        _, _, aux = model.features(Batch(tokens, valid=valid))
        for name, stat in aux.stats.items():
            if stat.value.numel() <= LONGEST_STAT:
                said.setdefault(name, []).append((sum(len(w) - 1 for w in windows), stat))
    return {name: plain(_reduced(found).tolist()) for name, found in said.items()}


def _reduced(said: Sequence[tuple[int, Stat]]) -> Tensor:
    values = torch.stack([stat.value.double().cpu() for _, stat in said])
    how = said[0][1].reduce
    if how != "mean":
        return values.sum(0) if how == "sum" else values.amax(0)
    weight = torch.tensor([n for n, _ in said], dtype=torch.float64)
    return (values * weight.view(-1, *[1] * (values.ndim - 1))).sum(0) / weight.sum()


def summary_all(found: dict[str, Any]) -> str:
    """Tables of what `measure_all` found, in Markdown; only those that have rows."""
    tables = []
    if found["states"]:
        rows = [
            (
                one["name"],
                found["kinds"].get(f"layers.{one['layer']}.{one['slot']}", ""),
                f"{one['memories']} x {one['heads']} x {one['shape'][0]} x {one['shape'][1]}",
                _mean(one["norm"][-1]),
                _mean(one["rank"][-1]),
                min(one["shape"]),
            )
            for one in found["states"]
        ]
        headers = ("state", "part", "memories, heads, K, V", "norm at the end", "effective rank", "of")
        tables.append(markdown(headers, rows))
    if found["gates"]["parts"]:
        tables.append(gates.table(found["gates"]))
    if found["attention"]:
        rows = [
            (
                one["name"],
                one["window"],
                _mean([one["distance"]]),
                _mean([one["entropy"]]),
                one["evenly_entropy"],
                _mean([one["first"]]),
            )
            for one in found["attention"]
        ]
        headers = ("attention", "window", "tokens back", "entropy", "if even", "on the first token")
        tables.append(markdown(headers, rows))
    if found["attribution"]["targets"]:
        rows = [
            (one["at"], one["target"], one["loss"], one["gain"], len(one["checked"]), one["agreement"])
            for one in found["attribution"]["targets"]
        ]
        headers = ("after token", "predicted", "loss", "saved by far order", "tokens left out", "agreement")
        tables.append(markdown(headers, rows))
    return "\n\n".join(tables)


def _mean(values: Sequence[Sequence[float | None]]) -> float | None:
    known = [v for row in values for v in row if v is not None]
    return sum(known) / len(known) if known else None


# -- the instrument of models that have no other


def measure(model: LM, text: Text) -> dict[str, Any]:
    """The loss on the text and its tokens."""
    return {"loss": plain(loss(model, text), 12), "tokens": [text.shown(i) for i in text.ids]}


def more(run: LoadedRun, text: Text, beside: Beside) -> dict[str, Any]:
    """Nothing. Raises UserError where there is something to compare with."""
    if beside.baseline is not None:
        raise UserError("--baseline: a model without a part that has an instrument is not compared with another run")
    return {}


@torch.no_grad()
def changes(earlier: LM, model: LM, text: Text) -> dict[str, Any]:
    """Between two checkpoints: ``parts``, how far the parameters of each have moved, as a share of their length before."""
    before = {(n, slot): part for n, slot, part in earlier.parts()}
    moved = {f"{n}.{slot}": _moved(before[n, slot], part) for n, slot, part in model.parts()}
    return {"parts": plain(moved)}


def _moved(before: Part, after: Part) -> float:
    old = torch.cat([p.double().flatten() for p in before.parameters()])
    new = torch.cat([p.double().flatten() for p in after.parameters()])
    return ((new - old).norm() / old.norm()).item()


def history(model: LM, records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """None: the report of a run has its curves."""
    return None


def standard(model: LM) -> list[str]:
    """Each part, of models with few."""
    specs = [f"zero:{n}.{slot}" for n, slot, _ in model.parts()]
    return specs if len(specs) <= STANDARD else []


def check(model: LM, spec: str) -> None:
    """Raise UserError for an ablation that cannot be made."""
    for one in spec.split("+"):
        _part_of(model, one)


def _part_of(model: LM, spec: str) -> Part:
    verb, _, where = spec.partition(":")
    among = {f"{n}.{slot}": part for n, slot, part in model.parts()}
    if verb != "zero" or not where:
        raise UserError(f"--ablate {spec}: not of the form zero:LAYER.SLOT{nearest(verb, ['zero'])}")
    if where not in among:
        raise UserError(f"--ablate {spec}: no part '{where}'{nearest(where, among)}")
    return among[where]


@contextlib.contextmanager
def ablate(model: LM, spec: str) -> Iterator[None]:
    """Inside, these parts add nothing."""
    with contextlib.ExitStack() as stack:
        for one in spec.split("+"):
            part = _part_of(model, one)
            handle = part.register_forward_hook(lambda _, __, output: (torch.zeros_like(output[0]), *output[1:]))
            stack.callback(handle.remove)
        yield


def summary(found: dict[str, Any]) -> str:
    """What has changed since an older checkpoint, if one was given."""
    if not found["since"]:
        return ""
    rows = list(found["since"]["parts"].items())
    return f"since step {found['since']['step']}:\n\n{markdown(('part', 'parameters moved, of their length'), rows)}"


def lists(found: dict[str, Any]) -> str:
    """Nothing that a picture cannot say."""
    return ""
