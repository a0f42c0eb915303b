"""A table of finished runs on a synthetic task, from their folders alone: accuracy beside the bytes that the mixers remember."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs import schema
from eval.report import read_metrics
from models.errors import UserError
from models.folder import run_config
from models.lm import meta_model
from models.types import count_params


def summarize(run: Path) -> dict[str, Any]:
    """What one run was and reached. Raises UserError for a folder that is not a finished run on a task."""
    run_config(run)
    cfg = schema.load(run / "config.yaml")
    if cfg.data.synthetic is None:
        raise UserError(f"{run}: not trained on a synthetic task")
    kind, steps = cfg.data.synthetic.kind, cfg.train.steps
    try:
        judged = json.loads((run / "eval" / f"{kind}_{steps}.json").read_text())
        environment = json.loads((run / "environment.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{run}: not a finished run ({error})") from error
    model = meta_model(cfg.model)
    logged = [m for m in read_metrics(run) if m.get("tokens_per_s")]
    before = [0, *(m["tokens"] for m in logged)]
    seconds = sum((m["tokens"] - b) / m["tokens_per_s"] for m, b in zip(logged, before, strict=False))
    state = sum(part.cost(cfg.data.seq_len).state_bytes for _, slot, part in model.parts() if slot == "mixer")
    return {
        "model": cfg.name,
        "task": f"{kind}, T={cfg.data.seq_len}",
        "seed": cfg.seed,
        "lr": cfg.optim.lr,
        "parameters": count_params(model),
        "state_bytes": state,
        "steps": steps,
        "minutes": seconds / 60,
        "threads": environment["threads"],
        "device": environment["device"],
        "accuracy": judged["accuracy"],
        "by": {name: {k: one["accuracy"] for k, one in labels.items()} for name, labels in judged["by"].items()},
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One table per task: a line per run, accuracy in all and by the task's first slice."""
    parts = []
    for task in dict.fromkeys(r["task"] for r in rows):
        own = [r for r in rows if r["task"] == task]
        slice_ = next(iter(own[0]["by"]))
        labels = list(own[0]["by"][slice_])
        lines = [
            f"| {task} | seed | learning rate | parameters | state of the mixers, bytes | steps | minutes | accuracy | "
            + " | ".join(f"{slice_} {label}" for label in labels)
            + " |",
            "| --- " * (8 + len(labels)) + "|",
        ]
        for r in own:
            cells = [r["model"], r["seed"], f"{r['lr']:g}", f"{r['parameters']:,}", f"{r['state_bytes']:,}", r["steps"]]
            cells += [f"{r['minutes']:.1f}", f"{r['accuracy']:.3f}", *(f"{r['by'][slice_][n]:.3f}" for n in labels)]
            lines.append(f"| {' | '.join(map(str, cells))} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
