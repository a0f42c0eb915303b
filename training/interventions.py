"""Changes of model or optimizer that depend on the global step alone: applied at the start of every step, so that a resumed
run is in the same phase as an uninterrupted one. A run lists them under ``train.interventions``; usually there are none."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from models import zoo
from models.errors import UserError, nearest
from models.lm import LM
from models.parsing import from_dict
from training.optim import Optimizer

Intervention = Callable[[int, int, LM, Optimizer], None]  # (step, total, model, optimizer)


@dataclass(frozen=True)
class Unfreeze:
    """Parameters matching ``pattern`` learn only from step ``at`` on: first a new memory alone, then the whole model."""

    kind: str = "unfreeze"
    pattern: str = "*"
    at: int = 0

    def __call__(self, step: int, total: int, model: LM, optim: Optimizer) -> None:
        for name, p in model.named_parameters():
            if fnmatch(name, self.pattern):
                p.requires_grad_(step >= self.at)


KINDS: dict[str, type] = {"unfreeze": Unfreeze}


def build(configs: Sequence[Any]) -> list[Intervention]:
    """From plain data ``{kind: ..., ...}``; ``kind: "package.module:Class"`` needs the same opt-in as a foreign part."""
    made = []
    for i, raw in enumerate(configs):
        where = f"train.interventions.{i}"
        kind = raw.get("kind") if isinstance(raw, dict) else None
        if kind in KINDS:
            made.append(from_dict(KINDS[kind], raw, where))
        elif isinstance(kind, str) and ":" in kind and zoo.foreign_allowed():
            module, _, name = kind.partition(":")
            made.append(from_dict(getattr(importlib.import_module(module), name), raw, where))
        else:
            raise UserError(f"{where}: unknown intervention '{kind}'{nearest(kind, KINDS)}")
    return made


def freeze(model: LM, patterns: Sequence[str]) -> int:
    """Stop learning of parameters whose name matches a pattern; -> how many numbers are frozen."""
    names = dict(model.named_parameters())
    frozen = set()
    for pattern in patterns:
        hits = {n for n in names if fnmatch(n, pattern)}
        if not hits:
            raise UserError(f"freeze: no parameter matches '{pattern}'{nearest(pattern, names)}")
        frozen |= hits
    for name in frozen:
        names[name].requires_grad_(False)
    return sum(names[n].numel() for n in frozen)
