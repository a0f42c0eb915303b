"""python -m bench kernels|train|decode|context|tables|eval|suites|recall|tasks [--out FILE]: ratios to peers in one run; readme.

`bench kernels --compile-only` measures nothing: it compiles every kernel configuration, and exits with 1 if one fails the gate.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from bench import (
    cells,
    context,
    decode,
    evaluation,
    floors,
    gpu_layers,
    gpu_memories,
    gpu_scans,
    kept_rows,
    kernels,
    readme,
    recall,
    scans,
    suites,
    tables,
    tasks,
    train,
)
from bench import compile as ahead
from kernels.compilation import GATED, TARGETS
from models.errors import UserError, guard, nearest
from training.runfolder import environment


def run_train(args: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    known = train.SHAPES if args.device == "cpu" else train.GPU_SHAPES
    shapes = args.shapes or list(known)
    for shape in shapes:
        if shape not in known:
            raise UserError(f"no shape '{shape}'; valid: {', '.join(known)}")
    rows = []
    for shape in shapes:
        for precision in args.precisions:
            for mode in args.modes:
                rows.append(train.measure(shape, precision, mode, args.pairs, args.device, args.rows))
                print(train.table(rows[-1:]).splitlines()[-1], file=sys.stderr)
    return rows, train.table(rows)


def run_decode(args: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    shapes = args.shapes or list(train.SHAPES if args.device == "cpu" else train.GPU_SHAPES)
    rows = [decode.measure(s, n, args.pairs, args.device) for s in shapes for n in decode.CONTEXTS]
    return rows, decode.table(rows)


def run_kernels(args: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    cases = [*kernels.cases(args.device)]
    cases += [case for bench in (scans, cells, kept_rows) for case in bench.cases(args.device, args.tiny)]
    if args.ops:
        names = [case.op for case in cases]
        for op in args.ops:
            if not any(name.startswith(op) for name in names):
                raise UserError(f"no op '{op}'{nearest(op, names)}")
        cases = [case for case in cases if case.op.startswith(tuple(args.ops))]
    rows = [kernels.measure(case, args.pairs) for case in cases]
    text = kernels.table(rows)
    if args.device == "cuda" or args.tiny:
        limits = floors.peaks(args.device, args.tiny)
        for bench in (gpu_scans, gpu_layers, gpu_memories, cells, kept_rows):
            more, table = bench.run(limits, args.device, args.pairs, args.tiny)
            rows, text = rows + more, f"{text}\n\n{table}"
        text += f"\n\nmeasured peaks: {limits.flops / 1e12:.3g} TFLOP/s in bf16, {limits.bandwidth / 1e12:.3g} TB/s"
    return rows, text


def run_context(args: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    names = args.shapes or list(context.MIXERS)
    for name in names:
        if name not in context.MIXERS:
            raise UserError(f"no mixer '{name}'; valid: {', '.join(context.MIXERS)}")
    rows = [row for name in names for row in context.measure(name, args.pairs, args.device)]
    return rows, context.table(rows)


def run_tables(args: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    return tables.run(args.pairs, args.tiny)


def run_eval(args: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    rows = [evaluation.measure(width, 4, args.pairs, batch=16) for width in (128, 256)]
    return rows, evaluation.table(rows)


def run_suites(args: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    rows = [suites.measure(config, args.pairs, args.device) for config in args.shapes or suites.CONFIGS]
    return rows, suites.table(rows)


def run_recall(args: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    rows = [recall.summarize(run) for run in args.runs or ()]
    if not rows:
        raise UserError("recall makes a table of finished runs: give --runs RUN [RUN ...]")
    return rows, recall.table(rows)


def run_tasks(args: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    rows = tasks.run(args.tasks, args.seeds, args.folder, args.tiny)
    return rows, tasks.table(rows)


BENCHES = {
    "train": run_train,
    "decode": run_decode,
    "context": run_context,
    "kernels": run_kernels,
    "tables": run_tables,
    "eval": run_eval,
    "suites": run_suites,
    "recall": run_recall,
    "tasks": run_tasks,
}


@guard
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Ratios against peers in the same run: above 1, ours is faster.",
        epilog="example: python -m bench train --shapes 1M 8M --precisions fp32 --out bench/results/train-cpu.md",
    )
    parser.add_argument("what", choices=(*BENCHES, "readme"))
    parser.add_argument(
        "--shapes", nargs="+", metavar="NAME", help="with context: mixers, with suites: configs; default: all"
    )
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--modes", nargs="+", choices=("eager", "compiled"), default=["eager", "compiled"])
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--rows", type=int, help="rows in a training step; default: the shape's own")
    parser.add_argument("--threads", type=int, help="CPU threads; default: all cores")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="also write the table, and a .json beside it")
    parser.add_argument(
        "--tiny", action="store_true", help="small: with kernels what a GPU runs, with tables, with tasks two steps"
    )
    parser.add_argument(
        "--compile-only", action="store_true", help="with kernels: ahead of time, for GPUs that are not here"
    )
    parser.add_argument("--targets", nargs="+", metavar="NAME", help=f"with --compile-only: of {', '.join(TARGETS)}")
    parser.add_argument(
        "--ops", nargs="+", metavar="NAME", help="with kernels: those whose names begin so; default: all"
    )
    parser.add_argument("--sample", action="store_true", help=f"one configuration per kernel on targets but {GATED}")
    parser.add_argument("--runs", nargs="+", type=Path, metavar="RUN", help="with recall: finished runs on a task")
    parser.add_argument("--tasks", nargs="+", default=(), metavar="NAME", help="with tasks: which; default: all")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="with tasks: seeds 0 to N-1; default: 1")
    parser.add_argument(
        "--folder", type=Path, default=tasks.FOLDER, help="with tasks: of the runs; default: %(default)s"
    )
    parser.add_argument("--run", type=Path, help="with readme: take the figures of this finished quick start first")
    args = parser.parse_args(argv)
    if args.what == "readme":
        readme.update(args.run)
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    failed: list[str] = []
    if args.what == "kernels" and args.compile_only:
        compiled = ahead.survey(args.targets, args.ops, args.sample)
        rows, text, failed = ahead.rows(compiled), ahead.table(compiled), ahead.failures(compiled)
    else:
        rows, text = BENCHES[args.what](args)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        about: dict[str, Any] = environment()
        about |= {"command": ["python", "-m", "bench", *sys.argv[1:]]}  # without this machine's paths
        versions = ", ".join(f"{name} {about['versions'][name]}" for name in ("torch", "triton"))
        head = f"`python -m bench {' '.join(sys.argv[1:])}` on {about['device']}, {versions}\n\n"
        args.out.write_text(head + text + "\n")
        args.out.with_suffix(".json").write_text(json.dumps({"environment": about, "rows": rows}, indent=1) + "\n")
    for line in failed:
        print(f"fails the gate: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
