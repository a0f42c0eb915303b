"""Compare runs, from their folders alone: ``python -m eval.report RUN [RUN ...] --out DIR``."""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval import run_page
from eval.history import finite, plot, read_metrics
from eval.judge import result_rows
from eval.tables import markdown
from models import UserError, model_config, zoo
from models.errors import guard
from models.folder import run_config
from models.lm import meta_model
from models.types import count_params

COLUMNS = ("run", "params", "step", "tokens", "train loss", "val loss", "val ppl", "val bpb", "tokens/s")
WANTED = ("acc_norm", "acc", "exact_match", "bits_per_byte", "word_perplexity")  # at most the first two that a task has


def summary(run: Path | str) -> dict[str, Any]:
    """One row of the table, by column name, and ``eval``: {task/metric: value} of the newest step of each task."""
    run = Path(run)
    config = run_config(run)
    metrics = logged(run, config)
    train = [m for m in metrics if finite(m.get("loss"))]
    val = [m for m in metrics if "val" in m]
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {"run": run.resolve().name, "params": _params(config)}
    if metrics:
        row["step"] = metrics[-1]["step"]
        row["tokens"] = max((m["tokens"] for m in metrics if "tokens" in m), default=None)
    if train:
        last = train[-max(1, len(train) // 50) :]
        row["train loss"] = float(np.mean([m["loss"] for m in last]))
        speeds = [m["tokens_per_s"] for m in train if m.get("tokens_per_s")]
        row["tokens/s"] = int(np.median(speeds)) if speeds else None
    if val:
        row |= {"val loss": val[-1]["val"].get("loss"), "val ppl": val[-1]["val"].get("ppl")}
        row["val bpb"] = val[-1]["val"].get("bpb")
    row["eval"] = eval_results(run)
    return row


def logged(run: Path, config: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``; none of a model that was imported and never trained here."""
    if config.get("imported_from") and not (run / "metrics.jsonl").exists():
        return []
    return read_metrics(run)


def eval_results(run: Path) -> dict[str, float]:
    """From ``RUN/eval/*.json``: the metrics that matter of each task, the newest step's where there are several."""
    newest: dict[str, tuple[tuple[int, float], float]] = {}
    for path in sorted((run / "eval").glob("*.json")):
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            rows = result_rows(results)
            age = (int(results["config"].get("step") or 0), path.stat().st_mtime)
        except (ValueError, KeyError, TypeError, AttributeError, OSError):
            continue  # not a result of lm-eval
        for task in dict.fromkeys(row[0] for row in rows):
            here = {metric: value for name, metric, value, _, _ in rows if name == task}
            for metric in [w for w in WANTED if w in here][:2] or list(here)[:1]:
                key = f"{task}/{metric}"
                if key not in newest or newest[key][0] <= age:
                    newest[key] = (age, here[metric])
    return {key: value for key, (_, value) in sorted(newest.items())}


def _params(config: dict[str, Any]) -> int | None:
    try:
        return count_params(meta_model(model_config(config["model"])))
    except UserError:  # foreign parts that are not allowed here; the rest of the row is still worth showing
        return None


# -- files


def report(runs: Sequence[Path | str], out: Path | str, inspections: Sequence[Path] = ()) -> str:
    """Write ``report.md``, ``report.csv``, ``report.json``, ``loss.png`` and the pages of the runs (`pages`) into ``out``
    -> the Markdown table. ``inspections``: folders that `eval.inspect` wrote, shown with the runs of their names."""
    rows = [summary(run) for run in runs]
    names = _distinct([Path(r) for r in runs])
    for row, name in zip(rows, names):
        row["run"] = name
    extra = sorted({key for row in rows for key in row["eval"]})
    headers = [*COLUMNS, *extra]
    cells = [[*(row[c] for c in COLUMNS), *(row["eval"].get(k) for k in extra)] for row in rows]
    text = markdown(headers, cells)
    sheet = io.StringIO()
    writer = csv.writer(sheet, lineterminator="\n")
    writer.writerows([headers, *cells])
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.md").write_text(f"{text}\n\n![loss](loss.png)\n", encoding="utf-8")
        (out / "report.csv").write_text(sheet.getvalue(), encoding="utf-8")
        (out / "report.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        plot({name: logged(Path(run), run_config(Path(run))) for name, run in zip(names, runs)}, out / "loss.png")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    for run, row, target in zip(runs, rows, pages(names, out), strict=True):
        run_page.write(Path(run), row, target.parent, run_page.inspections_of(Path(run), inspections))
    return text


def pages(names: Sequence[str], out: Path) -> list[Path]:
    """Where the page of each run is written: ``report.html``, of several runs in a folder for each."""
    folders = [out] if len(names) == 1 else [out / name.replace("/", "-") for name in names]
    return [folder / run_page.NAME for folder in folders]


def _distinct(runs: Sequence[Path]) -> list[str]:
    """Folder names, with as much of their parents as it takes to tell them apart."""
    parts = [r.resolve().parts for r in runs]
    depth = 1
    while len({p[-depth:] for p in parts}) < len({*parts}) and depth < max(map(len, parts)):
        depth += 1
    return ["/".join(p[-depth:]) for p in parts]


@guard
def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m eval.report",
        description="Compare runs: a table (Markdown, CSV, JSON) and loss curves (PNG), from the run folders alone; and of each run "
        "one page that stands alone: report.html, of several runs in a folder for each.",
        epilog="example: python -m eval.report runs/quickstart runs/other --out report",
    )
    p.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    p.add_argument("--out", required=True, metavar="DIR")
    p.add_argument(
        "--inspection",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="what eval.inspect wrote, for the page of the run of its name (repeatable); RUN/inspection is always looked for",
    )
    p.add_argument(
        "--allow-foreign", action="store_true", help="count parameters of parts from outside this repository"
    )
    args = p.parse_args(argv)
    if args.allow_foreign:
        zoo.allow_foreign()
    for folder in args.inspection:
        if not (folder / "inspect.json").is_file():
            raise UserError(f"--inspection: no inspect.json in '{folder}'")
    print(report(args.runs, args.out, args.inspection))
    written = [p.relative_to(args.out) for p in pages(_distinct([Path(r) for r in args.runs]), Path(args.out))]
    print(f"\n{Path(args.out)}/: report.md, report.csv, report.json, loss.png, {', '.join(map(str, written))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
