"""What it costs to ask the recall suite twenty times while a run trains, beside its training steps."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from bench.pairs import alternate
from bench.train import ours_step
from configs import schema
from configs.question import with_vocabulary
from eval import suites
from models import build
from training.dryrun import random_batch

TIMES, ROWS = 20, 512  # as `eval.suites` does by itself
CONFIGS = ("configs/mqar.yaml", "configs/quickstart.yaml", "configs/cpu-8m.yaml")
BLOCK = 8  # steps that are timed together
ROOT = Path(__file__).resolve().parent.parent


def measure(config: str, pairs: int, device: str, rows: int = ROWS) -> dict[str, Any]:
    """The share of training time that a whole run of this config spends on asking. The steps are on random tokens, with all that
    a step of the run does but for reading data; ``ratio``: so many of them last as long as asking once."""
    cfg = schema.load(ROOT / config)
    model = build(dataclasses.replace(cfg.model, vocab_size=with_vocabulary(cfg).vocab_size), device=device)
    t, seq_len = cfg.train, cfg.data.seq_len
    batch = random_batch(t.batch_size, seq_len, model.cfg.vocab_size, "stream", 1)
    step = ours_step(model, batch.tokens.to(device), None)

    def steps() -> None:
        for _ in range(BLOCK):
            step()

    ratio = alternate(lambda: suites.during(model, ["recall"], rows), steps, pairs, config)
    found = {"config": config, "layers": model.cfg.n_layers, "parameters": sum(p.numel() for p in model.parameters())}
    found |= {"steps": t.steps, "tokens_per_step": t.batch_size * seq_len, "pairs": pairs}
    share, low, high = (TIMES * BLOCK / (one * t.steps) for one in (ratio.median, ratio.high, ratio.low))
    return {**found, "steps_per_asking": BLOCK / ratio.median, "share": share, "low": low, "high": high}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"| {TIMES} times {ROWS} rows of the recall suite | layers | parameters | steps of tokens | asking once lasts as long as "
        "| share of the training time (95 % interval) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r['config']} | {r['layers']} | {r['parameters']:,} | {r['steps']:,} of {r['tokens_per_step']:,} "
        f"| {r['steps_per_asking']:.2f} steps | {r['share']:.1%} [{r['low']:.1%}, {r['high']:.1%}] |"
        for r in rows
    ]
    return "\n".join(lines)
