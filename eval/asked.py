"""What the `eval` section of a run asks for: refused before the run trains, or answered when it ends."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from configs.schema import RunConfig
from data import Corpus
from eval import recall, suites
from eval.run import open_run
from models.errors import UserError


def check(cfg: RunConfig) -> None:
    """Raise UserError now for what `answer` could not do when the run ends."""
    for changes in cfg.eval.recall:
        recall.changed(cfg, changes.split())
    for name in cfg.eval.suites:
        suites.suite(name)
    if cfg.eval.length:
        from eval import length

        length.check(cfg.model, cfg.eval.length)
    if cfg.eval.needle:
        from eval import needle

        needle.check(cfg.model, cfg.eval.needle)
    if not cfg.eval.tasks:
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("eval.tasks needs the package lm-eval, which is not installed; eval.tasks=[] goes without")
    from eval.corpus_tasks import NAMES

    others = [task for task in cfg.eval.tasks if task not in NAMES]
    if others:
        from eval.judge import find_tasks

        find_tasks(others, [])


def check_text(cfg: RunConfig, corpus: Corpus) -> None:
    """Raise UserError now for what the held-out text is too short for."""
    if (longest := max(cfg.eval.length, default=0)) > (held := max(corpus.val.lengths)):
        raise UserError(f"eval.length: no held-out document has {longest} tokens, the longest has {held}")
    if cfg.eval.needle:
        from eval import needle

        try:
            needle.questions(corpus.tokenizer, needle.held_out(corpus), cfg.eval.needle)
        except UserError as error:
            raise UserError(f"eval.needle: {error}") from error


def answer(cfg: RunConfig, folder: Path) -> None:
    """The last sample, and what the run's `eval` section asks for, on the finished run; of a synthetic task its accuracy."""
    for name in cfg.eval.suites:
        print(suites.table(suites.evaluate(open_run(folder, cfg.train.device, tasks=True), name)))
    if cfg.data.synthetic is not None:
        for changes in ("", *cfg.eval.recall):
            print(recall.table(recall.evaluate(folder, changes.split(), device=cfg.train.device)))
        return
    if (folder / "samples.txt").is_file():
        print("sample at step", (folder / "samples.txt").read_text(encoding="utf-8").rpartition("=== step ")[2])
    if cfg.eval.baselines:
        from eval.baselines import run_baselines, table

        print(table(run_baselines(folder)))
    if cfg.eval.frequency:
        from eval import frequency

        print(frequency.table(frequency.run_frequency(folder, cfg.eval.frequency, cfg.train.device)))
    if cfg.eval.length:
        from eval import length

        print(length.table(length.evaluate(open_run(folder, cfg.train.device), cfg.eval.length)))
    if cfg.eval.needle:
        from eval import needle

        print(needle.table(needle.evaluate(open_run(folder, cfg.train.device), cfg.eval.needle)))
    if cfg.eval.tasks:
        from eval.judge import evaluate, print_table

        print_table(evaluate(folder, list(cfg.eval.tasks), limit=cfg.eval.limit))
