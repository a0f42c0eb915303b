"""Judge a run on lm-eval tasks and on suites: ``python -m eval RUN --tasks a,b --suite recall``."""

from __future__ import annotations

import argparse
import os

from eval.run import LoadedRun, open_run
from eval.suites import ROWS, SUITES, evaluate, lm_eval_tasks, suite, table
from models import UserError
from models.errors import guard

EXAMPLE = """examples:
  python -m eval runs/quickstart --tasks corpus
  python -m eval runs/quickstart --tasks sciq,copa --limit 100 --batch-size 32
  python -m eval runs/quickstart --suite recall,long
  python -m eval runs/quickstart --tasks corpus --suite recall
  python -m eval runs/quickstart --tasks my_task --include-path my_tasks/
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m eval", description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("run", help="a run folder, or a model exported in Hugging Face format")
    p.add_argument(
        "--tasks", help="names of lm-eval tasks, groups or globs, comma-separated; 'corpus': the run's own text"
    )
    p.add_argument("--suite", help=f"named sets of evaluations, comma-separated: {', '.join(SUITES)}")
    p.add_argument("--limit", type=float, help="items per task of lm-eval; below 1, a share of them")
    p.add_argument("--rows", type=int, default=ROWS, help="rows per synthetic task (default: %(default)s)")
    p.add_argument("--num-fewshot", type=int, help="examples in the prompt")
    p.add_argument(
        "--include-path", action="append", default=[], metavar="DIR", help="a folder with task YAMLs (repeatable)"
    )
    p.add_argument("--batch-size", default="auto", help="auto, or a number of rows")
    p.add_argument(
        "--max-length", type=int, help="longest context of lm-eval; longer requests are cut on the left, and counted"
    )
    p.add_argument(
        "--rolling", default="windows", help="documents in windows (as lm_eval --model hf), or 'carry' the state along"
    )
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", help="float32, bfloat16, float16; default: that of the weights")
    p.add_argument("--step", type=int, help="an older checkpoint")
    p.add_argument("--progress", type=float, metavar="P", help="as if training had come so far, 0 to 1 (temperatures)")
    p.add_argument("--out", metavar="FILE", help="lm-eval's results as JSON; default: RUN/eval/<name>_<step>.json")
    p.add_argument("--log-samples", action="store_true", help="also keep every request and answer")
    p.add_argument("--no-cache", action="store_true", help="neither use nor keep results of single requests")
    p.add_argument("--tables", metavar="KIND", help="where tables are kept: resident, host, or mmap (left in the file)")
    p.add_argument("--allow-foreign", action="store_true", help="let a config run code from outside this repository")
    return p


@guard
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    suites, tasks = {name: suite(name) for name in _words(args.suite)}, _words(args.tasks)
    if not tasks and not suites:
        raise UserError("give --tasks, --suite or both")
    if args.rows < 1:
        raise UserError(f"--rows must be at least 1, got {args.rows}")
    how = (args.device, args.dtype, args.step, args.allow_foreign, args.progress, args.tables)
    run = open_run(args.run, *how, tasks=not tasks)
    of_suites = {name: lm_eval_tasks(run, name) for name in suites}
    tasks += [task for asked, _ in of_suites.values() for task in asked]
    if tasks:
        _lm_eval(run, args, tasks)
    for name, one in suites.items():
        print(f"\nsuite {name}: {one.about}")
        print(table(evaluate(run, name, args.rows, left_out=of_suites[name][1])))
    return 0


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def _lm_eval(run: LoadedRun, args: argparse.Namespace, tasks: list[str]) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from eval.judge import evaluate, print_table

    results = evaluate(
        run,
        tasks,
        name=args.suite if not args.tasks else None,
        limit=int(args.limit) if args.limit is not None and args.limit >= 1 else args.limit,
        num_fewshot=args.num_fewshot,
        include_path=args.include_path,
        batch_size=_batch_size(args.batch_size),
        max_length=args.max_length,
        rolling=args.rolling,
        cache=not args.no_cache,
        out=args.out,
        log_samples=args.log_samples,
    )
    print_table(results)


def _batch_size(text: str) -> int | str:
    if text == "auto":
        return text
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"--batch-size must be 'auto' or a positive number, got '{text}'")
    return int(text)


if __name__ == "__main__":
    raise SystemExit(main())
