"""Each synthetic task, trained by a model that is known to solve it: a task that nothing learns tests nothing.

The runs are made by `train.py`, one after the other, in a folder of their own: what is finished is not repeated, what was cut short
goes on. Beside each accuracy, on validation rows, stands what is reached without the task's idea: by the best answer that looks
nothing up, and by a program that knows all answers when those are shuffled.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from bench.recall import summarize
from configs import schema
from configs.schema import RunConfig
from data.synthetic.task import Task
from eval import ablation_queue as queue
from eval.recall import validation_rows
from models.errors import UserError, nearest

FOLDER = Path("runs/tasks")
ROOT = Path(__file__).resolve().parent.parent
ENOUGH = 0.01  # of all answers, for a slice to count
RECALL = "configs/recall.yaml"


@dataclass(frozen=True)
class Recipe:
    """How a task is trained: a config of the project and overrides."""

    known: str  # why this model should solve it
    config: str = RECALL
    changes: tuple[str, ...] = ()

    def load(self, tiny: bool = False) -> RunConfig:
        """The run's config; `tiny`: shrunk to two steps."""
        cfg = schema.load(ROOT / self.config, self.changes)
        return schema.shrink(cfg) if tiny else cfg


# To add a task: add its line here. A name begins with the kind of its task.
RECIPES = {
    "common_words": Recipe(
        "attention counts by averaging (arXiv:2106.06981)",
        changes=("data.synthetic={kind: common_words}", "model.d_model=128", "optim.lr=5e-3", "train.steps=400"),
    ),
    "copying": Recipe("attention (arXiv:2402.01032)", changes=("data.synthetic={kind: copying}",)),
    "dual_process": Recipe("attention (arXiv:2406.00053)", "configs/dual-process.yaml"),
    "flip_flop": Recipe(
        "recurrent gates (arXiv:2306.00946)",
        changes=(
            "data.synthetic={kind: flip_flop}",
            "model.blocks.base.mixer={kind: gated_delta, heads: 2, head_dim: 16, conv: 4, gate: false}",
            "data.seq_len=128",
            "train.batch_size=32",
        ),
    ),
    "frequent_words": Recipe(
        "attention counts by averaging (arXiv:2106.06981)", changes=("data.synthetic={kind: frequent_words}",)
    ),
    "induction": Recipe("two layers of attention (arXiv:2209.11895)", changes=("data.synthetic={kind: induction}",)),
    "listops": Recipe(
        "attention, some layers for each level of the lists (arXiv:1804.06028)",
        changes=(
            "data.synthetic={kind: listops, depth: [1, 2], arguments: 2, inner: true}",
            "data.seq_len=12",
            "model.n_layers=4",
            "model.d_model=128",
            "model.blocks.base.channel.hidden=256",
            "optim.lr=5e-3",
            "train.batch_size=128",
            "train.steps=1000",
        ),
    ),
    "mqar": Recipe(
        "attention with a short convolution (arXiv:2312.04927)",
        "configs/mqar.yaml",
        (
            "model.blocks.base.mixer={kind: attention, heads: 2, token_shift: 4}",
            "train.batch_size=32",
            "train.steps=400",
        ),
    ),
    "needle": Recipe("two layers of attention (arXiv:2209.11895)"),
    "path_star": Recipe("a geometry of the embeddings (arXiv:2510.26745)", "configs/path-star.yaml"),
    "selective_copying": Recipe(
        "attention (arXiv:2402.01032)",
        changes=("data.synthetic={kind: selective_copying}", "model.d_model=128", "optim.lr=5e-3", "train.steps=600"),
    ),
    "variable_tracking": Recipe(
        "two layers of attention: name by name, each asks for the next (arXiv:2209.11895)",
        changes=("data.synthetic={kind: variable_tracking, question: names}",),
    ),
    "word_problem": Recipe(
        "one delta rule with negative eigenvalues swaps two things at a place (arXiv:2411.12537)",
        changes=(
            "data.synthetic={kind: word_problem, moves: few}",
            "model.n_layers=1",
            "model.blocks.base.mixer={kind: gated_delta, heads: 4, head_dim: 16, expand_v: 1.0, conv: 0, "
            "allow_neg_eigval: true, gate: false}",
        ),
    ),
}


def run(names: Sequence[str], seeds: int, folder: Path = FOLDER, tiny: bool = False) -> list[dict[str, Any]]:
    """Train what is missing of these tasks, all by default, with seeds 0 to `seeds` - 1 -> a row of `table` for each run.

    Raises UserError for an unknown task, for runs in the folder that have other settings, and when a run failed.
    """
    for name in names:
        if name not in RECIPES:
            raise UserError(f"no recipe for the task '{name}'{nearest(name, RECIPES)}")
    configs = {name: RECIPES[name].load(tiny) for name in names or RECIPES}
    runs = queue.plan(configs, range(seeds), folder)
    place = queue.places_for(1, queue.visible_gpus(list(configs.values())), queue.cores())
    queue.train_all(runs, queue.Means(place, deadline=float("inf"), retry=True, flags=[]))
    for one in runs:
        if not one.is_finished():
            raise UserError(f"{one.name} is not finished, see {one.note('log')}; the same command goes on")
    return [judge(one.folder, name) for name in configs for one in runs if one.name.startswith(f"{name}-s")]


def judge(folder: Path, name: str) -> dict[str, Any]:
    """What one finished run was and reached, and the controls on the same rows."""
    row, cfg = summarize(folder), schema.load(folder / "config.yaml")
    task = cfg.data.synthetic
    assert task is not None
    judged = json.loads((folder / "eval" / f"{task.kind}_{cfg.train.steps}.json").read_text())
    asked = task.rows(np.arange(validation_rows(cfg)), cfg.data.seq_len, cfg.data.split_seed, "val")
    known, right = task.solve(asked.tokens)[asked.loss_mask], asked.targets[asked.loss_mask]
    slices = judged["by"].items()
    labels = {
        f"{by} {n}": one
        for by, found in slices
        for n, one in found.items()
        if one["answers"] >= ENOUGH * judged["answers"]
    }
    worst = min(labels, key=lambda n: labels[n]["accuracy"], default="")
    return row | {
        "task": name,
        "settings": settings(task),
        "places": cfg.data.seq_len,
        "model": describe(cfg),
        "known": RECIPES[name].known,
        "batch_size": cfg.train.batch_size,
        "answers": judged["answers"],
        "worst": {"slice": worst, "accuracy": labels[worst]["accuracy"]} if worst else None,
        "guess": task.guess(cfg.data.seq_len),
        "oracle": float((known == right).mean()),
        "shuffled": float((known == np.random.default_rng(0).permutation(right)).mean()),
    }


def settings(task: Task) -> str:
    """All of the task's own."""
    return _words((f.name, getattr(task, f.name)) for f in fields(task) if f.name != "kind")


def describe(cfg: RunConfig) -> str:
    """The mixers of a model and what is not their default."""
    blocks = [block.mixer for block in cfg.model.layers()]
    parts = []
    for mixer in dict.fromkeys(blocks):
        own = _words((f.name, getattr(mixer, f.name)) for f in fields(mixer) if getattr(mixer, f.name) != f.default)
        parts.append(f"{blocks.count(mixer)} x {mixer.kind} ({own})")
    return f"{' + '.join(parts)}, width {cfg.model.d_model}"


def _words(settings: Iterable[tuple[str, Any]]) -> str:
    """`pairs` 4/8, `filler` constant."""
    plain = ((name, value if isinstance(value, tuple) else (value,)) for name, value in settings)
    return ", ".join(f"{name} {'/'.join(map(str, value)).lower()}" for name, value in plain)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per run."""
    head = ["task", "settings", "places", "model", "known from", "parameters", "steps of rows", "minutes", "seed"]
    head += ["accuracy", "worst slice", "looks nothing up", "program, answers shuffled"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for r in rows:
        worst = f"{r['worst']['accuracy']:.3f} ({r['worst']['slice']})" if r["worst"] else ""
        cells = [r["task"], r["settings"], r["places"], r["model"], r["known"], f"{r['parameters']:,}"]
        cells += [f"{r['steps']:,} of {r['batch_size']}", f"{r['minutes']:.1f}", r["seed"]]
        cells += [f"{r['accuracy']:.4f}", worst, f"{r['guess']:.3f}", f"{r['shuffled']:.3f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)
