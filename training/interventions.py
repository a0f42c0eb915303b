"""Changes of model or optimizer that depend on the global step alone: applied at the start of every step, so that a
resumed run is in the same phase as an uninterrupted one. They are listed under ``train.interventions``."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from models import zoo
from models.errors import UserError, nearest
from models.lm import LM
from models.parsing import from_dict
from training.optim import Optimizer

Intervention = Callable[[int, int, LM, Optimizer], None]  # (step, total, model, optimizer)


@dataclass(frozen=True)
class Unfreeze:
    """What matches ``pattern`` learns only from step ``at`` on: first a new memory alone, then the whole model."""

    kind: str = "unfreeze"
    pattern: str = "*"
    at: int = 0

    def __call__(self, step: int, total: int, model: LM, optim: Optimizer) -> None:
        set_learning(optim, _matching(optim, self.pattern, "unfreeze"), step >= self.at)


KINDS: dict[str, type] = {"unfreeze": Unfreeze}


def build(configs: Sequence[Any]) -> list[Intervention]:
    """From plain data ``{kind: ..., ...}``; ``kind: "package.module:Class"`` needs the opt-in of foreign parts."""
    made = []
    for i, raw in enumerate(configs):
        where = f"train.interventions.{i}"
        kind = raw.get("kind") if isinstance(raw, dict) else None
        if isinstance(kind, str) and ":" in kind:
            cls = _foreign(kind, where)
        elif kind in KINDS:
            cls = KINDS[kind]
        else:
            raise UserError(f"{where}: unknown intervention '{kind}'{nearest(kind, KINDS)}")
        made.append(from_dict(cls, raw, where))
    return made


def _foreign(kind: str, where: str) -> type:
    if not zoo.foreign_allowed():
        raise UserError(f"{where}: '{kind}' is code from outside this repository; allow it with --allow-foreign")
    module, _, name = kind.partition(":")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{where}: cannot load '{kind}': {error}") from error
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise UserError(f"{where}: '{kind}' is not a dataclass")
    return cls


def freeze(optim: Optimizer, patterns: Sequence[str]) -> int:
    """Stop learning of parameters and tables whose name matches a pattern; -> how many numbers are frozen.

    Raises UserError for a pattern that matches nothing, or patterns that match everything.
    """
    frozen = {name for pattern in patterns for name in _matching(optim, pattern, "freeze")}
    if frozen == {*optim.params, *optim.tables}:
        raise UserError(f"freeze: nothing is left to learn with the patterns {', '.join(patterns)}")
    set_learning(optim, frozen, False)
    sizes = {n: p.numel() for n, p in optim.params.items()} | {n: t.rows * t.width for n, t in optim.tables.items()}
    return sum(sizes[name] for name in frozen)


def set_learning(optim: Optimizer, names: Iterable[str], yes: bool) -> None:
    """Let parameters and tables learn, or not."""
    for name in names:
        if name in optim.params:
            optim.params[name].requires_grad_(yes)
        elif yes:
            optim.frozen.discard(name)
        else:
            optim.frozen.add(name)


def _matching(optim: Optimizer, pattern: str, what: str) -> list[str]:
    names = [*optim.params, *optim.tables]
    hits = [n for n in names if fnmatchcase(n, pattern)]
    if not hits:
        raise UserError(f"{what}: no parameter matches '{pattern}'{nearest(pattern, names)}")
    return hits
