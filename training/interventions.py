"""Changes of model or optimizer that depend on the global step alone: applied at the start of every step, so that a
resumed run is in the same phase as an uninterrupted one. They are listed under ``train.interventions``."""

from __future__ import annotations

import dataclasses
import importlib
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from models import zoo
from models.channels.structured import Guide, Structured
from models.errors import UserError, nearest
from models.lm import LM
from models.parsing import choice, from_dict
from models.types import ParamMeta, normal_
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


@dataclass(frozen=True)
class SelfGuided:
    """Structured matrices learn beside a dense one that fades out (self-guided training, arXiv:2406.16450).

    In step t of the first ``T = until``, every structured matrix S computes a W x + (1 - a) S x, a = (1 + cos(pi t / T)) / 2, with a
    dense W that learns and starts as S. In step T the dense matrices leave, their moments with them. They belong to training,
    not to the model: until then they are kept in the optimizer's part of a checkpoint, and whoever loads the model gets the
    structured matrices alone. A dense matrix learns when its structured one does.

    ``reduce_flop``: W takes part only with probability a, otherwise the output is S x. It is drawn for each matrix and step, alike
    for all micro-batches and ranks (the paper draws in every forward); a compiled model is compiled anew for each new draw.
    """

    kind: str = "self_guided"
    until: float = 0.5  # steps, or a share of the run when below 1
    reduce_flop: bool = False

    def __post_init__(self) -> None:
        if self.until <= 0:
            raise UserError(f"until must be above 0, got {self.until:g}")

    def steps(self, total: int) -> int:
        """The number T of guided steps. Raises UserError unless steps without guidance follow them."""
        steps = max(1, round(self.until * total)) if self.until < 1 else round(self.until)
        if steps >= total:
            raise UserError(
                f"self_guided: {steps} guided steps leave none for the structured matrices alone in {total}"
            )
        return steps

    def __call__(self, step: int, total: int, model: LM, optim: Optimizer) -> None:
        maps, steps = _structured(model), self.steps(total)
        if step >= steps:
            optim.leave(f"{name}.guide" for name in maps)
            for m in maps.values():
                m.guide = None
            return
        _guide({name: m for name, m in maps.items() if m.guide is None}, optim)
        share = (1 + math.cos(math.pi * step / steps)) / 2
        for name, m in maps.items():
            assert m.guide is not None
            m.guide.share.fill_(share)
            m.guide.used = not self.reduce_flop or random.Random(f"{step} {name}").random() < share
            m.guide.weight.requires_grad_(m.guide.used and any(p.requires_grad for p in m.parameters()))

    def note(self, total: int, model: LM) -> str:
        """What it costs, beside the model's own summary."""
        sizes = [m.d_in * m.d_out for m in _structured(model).values()]
        steps = self.steps(total)
        mean = (2 * sum(sizes) * steps / total) * (0.5 if self.reduce_flop else 1.0)
        return (
            f"self_guided  {len(sizes)} dense matrices of {sum(sizes):,} parameters in the first {steps} of {total} steps: "
            f"{2 * sum(sizes) / 1e6:.4g} MFLOP per token forward while used, {mean / 1e6:.4g} in the mean of the run"
        )


def _structured(model: LM) -> dict[str, Structured]:
    """Every structured matrix of a model by name. Raises UserError if there is none."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, Structured)}
    if not found:
        raise UserError("self_guided: no structured matrix in this model; a channel of kind structured_ffn has some")
    return found


@torch.no_grad()
def _guide(maps: dict[str, Structured], optim: Optimizer) -> None:
    """Put a dense matrix, equal to it, beside each structured one; or the one that a checkpoint holds."""
    if not maps:
        return
    weights = {f"{name}.guide": nn.Parameter(m.dense()) for name, m in maps.items()}
    optim.join(weights, dict.fromkeys(weights, ParamMeta()))
    for name, m in maps.items():
        weight: Tensor = weights[f"{name}.guide"]
        m.guide = Guide(weight, torch.ones_like(weight[0, 0]))


@dataclass(frozen=True)
class Forgetting:
    """Token embeddings are drawn anew, from their law at the start, before every ``every``-th step: active forgetting
    (arXiv:2307.01163), or temporary forgetting where it ends before step ``until`` (arXiv:2406.00053). Their moments and the step
    count of their bias correction go with them; everything else goes on.

    ``tied``: what to do where the head is the embedding: ``reset`` both, which are one matrix, or ``skip`` the model. What is drawn
    depends on ``seed`` and on the step alone; runs with other seeds for their weights and data forget into the same draws
    unless it is changed with them.
    """

    kind: str = "forgetting"
    every: int = 1000
    until: float = 0.0  # steps, or a share of the run when below 1; 0: the whole run
    tied: str | None = None  # reset | skip; must be given where the head is tied
    seed: int = 0

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError(f"every must be at least 1, got {self.every}")
        if self.until < 0:
            raise UserError(f"until must not be negative, got {self.until:g}")
        if self.tied is not None:
            choice("tied", self.tied, ("reset", "skip"))

    def end(self, total: int) -> int:
        """The first step before which nothing is forgotten any more."""
        if not self.until:
            return total
        return min(total, round(self.until * total) if self.until < 1 else round(self.until))

    def times(self, step: int, total: int) -> int:
        """How often embeddings have been drawn anew when ``step`` steps are done."""
        return max(0, min(step, self.end(total)) - 1) // self.every

    def __call__(self, step: int, total: int, model: LM, optim: Optimizer) -> None:
        if not self._applies(model) or not 0 < step < self.end(total) or step % self.every:
            return
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed} {step}").getrandbits(63))
        normal_(model.embed.weight, model.cfg.init_std, generator)
        optim.forget("embed.weight")

    def _applies(self, model: LM) -> bool:
        """Raises UserError where the setting for a tied head is missing."""
        if model.cfg.tied and self.tied is None:
            raise UserError("forgetting: the head is the embedding; say tied: reset to forget both, or tied: skip")
        return not (model.cfg.tied and self.tied == "skip")

    def report(self, step: int, total: int, model: LM) -> dict[str, float]:
        """How often it has been done."""
        return {"forgotten": self.times(step, total) if self._applies(model) else 0}

    def note(self, total: int, model: LM) -> str:
        """What is forgotten and how often. Raises UserError for embeddings that do not learn."""
        if not self._applies(model):
            return "forgetting  nothing: the head is the embedding (tied: skip)"
        weight = model.embed.weight
        if not weight.requires_grad:
            raise UserError("forgetting: embed.weight is frozen; what is drawn anew would stay as it is drawn")
        which = "embeddings and head" if model.cfg.tied else "embeddings"
        return (
            f"forgetting  {which}, {weight.shape[0]:,} x {weight.shape[1]}, drawn anew {self.times(total, total)} times: "
            f"every {self.every} of the first {self.end(total)} of {total} steps"
        )


KINDS: dict[str, type] = {"unfreeze": Unfreeze, "self_guided": SelfGuided, "forgetting": Forgetting}


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


def notes(changes: Sequence[Intervention], total: int, model: LM) -> list[str]:
    """What interventions have to say before a run of ``total`` steps. Raises UserError for one that cannot do its work."""
    return [note(total, model) for change in changes if (note := getattr(change, "note", None))]


def reports(changes: Sequence[Intervention], step: int, total: int, model: LM) -> dict[str, float]:
    """Numbers for the log when ``step`` of ``total`` steps are done: pure functions of the step, as the changes are."""
    found: dict[str, float] = {}
    for change in changes:
        report = getattr(change, "report", None)
        found |= report(step, total, model) if report else {}
    return found


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
