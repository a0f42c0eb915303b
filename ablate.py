"""Answer a question by training: python ablate.py configs/ablations/QUESTION.py [key=value ...]

  1. The question's variants become configs: its base, then the command line, then the variant's changes and budget.
  2. Where the question has a sweep, every variant is trained with each value of a setting first, on other seeds, and gets its best.
  3. Every variant is trained with every seed, each run by `train.py` in a process of its own, some at a time. A seed gives
     all variants the same data in the same order. A run that is there is not repeated, one that was cut short is resumed.
  4. The report is made from the run folders alone.

A question's folder holds a run folder VARIANT-sSEED for each run, `queue/` with each one's config, log and how it ended,
`sweep/` with such a folder for each value, and `report/`. This process may be killed at any moment: the same command goes on. A
run whose own process was killed or crashed has failed: --retry goes on with it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from configs import schema
from configs.question import Question, Sweep, load_question, resolve
from configs.schema import RunConfig
from eval.ablation import answer
from eval.ablation_queue import Means, Run, cores, places_for, plan, train_all, visible_gpus
from eval.ablation_report import write_report
from eval.ablation_runs import last_step, run_name
from eval.ablation_sweep import read_sweep, sweep_folder
from models import UserError, zoo
from models.errors import guard


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ablate.py",
        usage="ablate.py QUESTION.py [key=value ...] [options]",
        description="Train every variant of a question with every seed, and say what differs; where the question has a sweep, "
        "first choose for each variant the value that suits it. The same command goes on with what is left; what is finished "
        "is not repeated.",
        epilog="example: python ablate.py configs/ablations/mixers_mqar.py --seeds 5 --jobs 2 --minutes 30",
    )
    flag = partial(parser.add_argument, action="store_true")
    parser.add_argument("question", metavar="QUESTION.py")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for all variants")
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds 0 to N-1; decide on N before looking at results")
    parser.add_argument("--minutes", type=float, metavar="M", help="stop after so long, with everything saved")
    parser.add_argument("--jobs", type=int, metavar="J", help="runs at a time; default: one per GPU, one on a CPU")
    parser.add_argument("--out", metavar="DIR", help="the question's folder; default: runs/QUESTION")
    flag("--retry", help="try failed runs again, from their last checkpoint")
    flag("--report", help="train nothing: read the run folders as they are")
    flag("--tiny", help="shrunk models and two steps: does this question work?")
    flag("--allow-foreign", help="permit kind: package.module:Class (runs that code)")
    args = parser.parse_intermixed_args(argv)
    for name, low in (("seeds", 1), ("minutes", 0), ("jobs", 1)):
        if getattr(args, name) is not None and getattr(args, name) < low:
            raise UserError(f"--{name} must be at least {low}, got {getattr(args, name)}")
    return args


def plan_sweep(question: Question, sweep: Sweep, configs: dict[str, RunConfig], folder: Path) -> list[Run]:
    """All runs of the sweep, value by value."""
    tried = {v: configs[v] for v in question.tried()}
    return [
        run
        for value in sweep.values
        for run in plan(
            {v: sweep.at(c, value) for v, c in tried.items()}, sweep.seeds, sweep_folder(folder, sweep, value)
        )
    ]


def choose(
    question: Question, tried: Sequence[Run], configs: dict[str, RunConfig], folder: Path, means: Means
) -> dict[str, RunConfig]:
    """Train the sweep -> the configs with each variant's best value; of none while a run of the sweep is open."""
    if any(run.is_open(means.retry) for run in tried):
        print(f"first, {len(tried)} runs choose the settings of the variants", file=sys.stderr, flush=True)
        names = [(c, run_name(v, seed)) for v, c in configs.items() for seed in question.all_seeds()]
        later = sum(c.train.steps - last_step(folder / name) for c, name in names)
        if train_all(tried, means, later):
            return {}
    found, sweep = read_sweep(question, folder), question.sweep
    if found is None or sweep is None or any(run.is_open(retry=False) for run in tried):
        return {}
    if failed := sum(run.has_failed() for run in tried):
        print(f"{failed} of these runs failed: what is chosen now is chosen without them", file=sys.stderr, flush=True)
    best = {variant: found.best(variant) for variant in configs}
    for variant in (v for v, i in best.items() if i is None):
        print(f"{variant} is left out: not one value of {sweep.key} gave a result", file=sys.stderr, flush=True)
    return {v: sweep.at(configs[v], sweep.values[i]) for v, i in best.items() if i is not None}


@guard
def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    zoo.allow_foreign(args.allow_foreign)
    question = load_question(args.question)
    if args.seeds:
        question = replace(question, seeds=args.seeds)
    seeds = question.all_seeds()
    name = question.name + ("-tiny" if args.tiny else "")
    folder = Path(args.out or f"{schema.load(question.base, args.overrides).out_dir}/{name}")
    if args.report:
        if not folder.is_dir():
            raise UserError(f"no folder '{folder}' to report on; --out names another one")
    else:
        configs = resolve(question, args.overrides, args.tiny)
        deadline = time.monotonic() + 60 * args.minutes if args.minutes is not None else float("inf")
        places = places_for(args.jobs, visible_gpus(list(configs.values())), cores())
        means = Means(places, deadline, args.retry, ["--allow-foreign"] if args.allow_foreign else [])
        tried = plan_sweep(question, question.sweep, configs, folder) if question.sweep else []
        runs = plan(configs, seeds, folder) if not tried else []
        print(question.text, file=sys.stderr, flush=True)
        if tried:
            runs = plan(choose(question, tried, configs, folder, means), seeds, folder)
        if runs:
            train_all(runs, means)
    found = answer(question, folder, seeds)
    print(write_report(found, folder / "report"))
    print(f"\n{folder / 'report'}/: {', '.join(sorted(p.name for p in (folder / 'report').iterdir()))}")
    failed = sum(r.state == "failed" for r in found.all_runs())
    if failed:
        print(f"{failed} runs failed; --retry tries them again", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
