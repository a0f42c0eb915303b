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

from eval.judge import result_rows
from eval.tables import markdown
from models import UserError, model_config, zoo
from models.errors import guard
from models.folder import run_config
from models.lm import meta_model
from models.types import count_params

COLUMNS = ("run", "params", "step", "tokens", "train loss", "val loss", "val ppl", "val bpb", "tokens/s")
SMOOTH = 0.02  # of a curve's length: the width of the running mean over training losses
WANTED = ("acc_norm", "acc", "exact_match", "bits_per_byte", "word_perplexity")  # at most the first two that a task has


def read_metrics(run: Path | str) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``; a line that was torn at the end is left out.

    After a resume the same steps may be logged again: the later lines replace the earlier ones.
    """
    path = Path(run) / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{run}: no metrics.jsonl, so there is nothing to report") from error
    found: dict[tuple[int, bool], dict[str, Any]] = {}
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            key = (record["step"], "val" in record)
            found[key] = {**found.pop(key, {}), **record}
    return sorted(found.values(), key=lambda r: (r["step"], "val" in r))


def summary(run: Path | str) -> dict[str, Any]:
    """One row of the table, by column name, and ``eval``: {task/metric: value} of the newest step of each task."""
    run = Path(run)
    config = run_config(run)
    metrics = read_metrics(run)
    train = [m for m in metrics if _finite(m.get("loss"))]
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


def report(runs: Sequence[Path | str], out: Path | str) -> str:
    """Write ``report.md``, ``report.csv``, ``report.json`` and ``loss.png`` into ``out`` -> the Markdown table."""
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
        plot({name: read_metrics(run) for name, run in zip(names, runs)}, out / "loss.png")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    return text


def _distinct(runs: Sequence[Path]) -> list[str]:
    """Folder names, with as much of their parents as it takes to tell them apart."""
    parts = [r.resolve().parts for r in runs]
    depth = 1
    while len({p[-depth:] for p in parts}) < len({*parts}) and depth < max(map(len, parts)):
        depth += 1
    return ["/".join(p[-depth:]) for p in parts]


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Centered running mean over ``width`` values [n] -> [n]; at the ends over what is there."""
    half = width // 2
    total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def plot(metrics: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Loss against training tokens: the smoothed training curve and the validation points of every run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ends: list[float] = []
    for i, (name, records) in enumerate(metrics.items()):
        color = f"C{i % 10}"
        train = [(m.get("tokens", m["step"]), m["loss"]) for m in records if _finite(m.get("loss"))]
        tokens_at = {m["step"]: m["tokens"] for m in records if "tokens" in m}
        val = [
            (m.get("tokens", tokens_at.get(m["step"], m["step"])), m["val"]["loss"])
            for m in records
            if _finite(m.get("val", {}).get("loss"))
        ]
        if train:
            x, y = np.array(train, dtype=np.float64).T
            mean = smooth(y, max(1, round(SMOOTH * len(y))))
            if len(metrics) == 1:
                axes.plot(x, y, color=color, alpha=0.2, linewidth=0.8)
            axes.plot(x, mean, color=color, linewidth=1.4, label=f"{name}, training")
            ends += [float(v) for v in mean[len(mean) // 20 :]]
        if val:
            x, y = np.array(val, dtype=np.float64).T
            axes.plot(
                x, y, color=color, linestyle="--", linewidth=0.8, marker="o", markersize=4, label=f"{name}, validation"
            )
            ends += [float(v) for v in y[1:]] or [float(y[0])]
    if ends:  # the first steps fall from ln V and would flatten everything that follows
        low, high = min(ends), max(ends)
        margin = 0.05 * (high - low) or 0.1
        axes.set_ylim(low - margin, high + margin)
    axes.set(xlabel="training tokens", ylabel="loss (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if ends:
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(str(path))


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))


@guard
def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m eval.report",
        description="Compare runs: a table (Markdown, CSV, JSON) and loss curves (PNG), from the run folders alone.",
        epilog="example: python -m eval.report runs/quickstart runs/other --out report",
    )
    p.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    p.add_argument("--out", required=True, metavar="DIR")
    p.add_argument(
        "--allow-foreign", action="store_true", help="count parameters of parts from outside this repository"
    )
    args = p.parse_args(argv)
    if args.allow_foreign:
        zoo.allow_foreign()
    print(report(args.runs, args.out))
    print(f"\n{Path(args.out)}/: report.md, report.csv, report.json, loss.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
