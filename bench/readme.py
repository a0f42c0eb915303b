"""The tables of the README, made from what runs and benches left under ``bench/results``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from configs.question import MIN_SEEDS
from eval.tables import cell
from models.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def summarize_run(run: Path) -> dict[str, Any]:
    """What a finished quick start says of itself: text models on the same text, lm-eval results, cost."""
    from eval.report import read_metrics

    try:
        baselines = json.loads((run / "eval" / "baselines.json").read_text())
        environment = json.loads((run / "environment.json").read_text())
        judged = [json.loads(p.read_text()) for p in sorted((run / "eval").glob("corpus_*.json"))]
    except (OSError, ValueError) as error:
        raise UserError(f"{run}: not a finished quick start ({error})") from error
    metrics = read_metrics(run)
    rates = [m["tokens_per_s"] for m in metrics if "tokens_per_s" in m]
    steps = [m for m in metrics if "loss" in m]
    return {
        "device": environment["device"],
        "threads": environment["threads"],
        "torch": environment["versions"]["torch"],
        "tokens": steps[-1]["tokens"],
        "training_minutes": steps[-1]["tokens"] / (sum(rates) / len(rates)) / 60,
        "bits_per_byte": {
            "this model": baselines["ours"]["bpb"],
            **{f"counts, {order} bytes of context": one["bpb"] for order, one in baselines["orders"].items()},
            "xz -9e": baselines["xz"],
        },
        "lm_eval": judged[-1]["results"] if judged else {},
    }


def quickstart_table() -> str:
    found = json.loads((RESULTS / "quickstart.json").read_text())
    rows = sorted(found["bits_per_byte"].items(), key=lambda row: -row[1])
    lines = ["| model of the validation text | bits per byte |", "| --- | --- |"]
    lines += [f"| {f'**{name}**' if name == 'this model' else name} | {value:.3f} |" for name, value in rows]
    lines += ["", "| lm-eval task from the same text | metric | value |", "| --- | --- | --- |"]
    for task, values in found["lm_eval"].items():
        for key, value in values.items():
            metric, _, rest = key.partition(",")
            if rest and isinstance(value, float) and not metric.endswith("_stderr"):
                lines.append(f"| {task} | {metric} | {value:.3f} |")
    cost = f"{found['tokens'] / 1e6:.1f}M tokens, {found['training_minutes']:.1f} minutes of training"
    return "\n".join([*lines, "", f"({cost} on {found['threads']} threads of {found['device']}.)"])


def ratio_table() -> str:
    """One line per shape from the training benches, in fp32 without compilation."""
    lines = [
        "| training step, CPU, fp32, eager | speed ours / transformers' Llama | peak memory |",
        "| --- | --- | --- |",
    ]
    for r in json.loads((RESULTS / "train-cpu.json").read_text())["rows"]:
        if (r["precision"], r["mode"]) == ("fp32", "eager"):
            interval = f"{r['ratio']:.2f} [{r['low']:.2f}, {r['high']:.2f}]"
            lines.append(f"| {r['params'] / 1e6:.1f}M parameters | {interval} | {r['peak_memory_ratio']:.2f} |")
    return "\n".join(lines)


def question_table(name: str) -> str:
    """What `ablate.py` found by its first metric, a line per variant that has runs, and in words; of other metrics the means."""
    found = json.loads((RESULTS / f"{name}.json").read_text())
    first, *others = dict.fromkeys(r["metric"] for r in found["results"])
    question = found["question"]
    how = f"`ablate.py configs/ablations/{question}.py`{name.removeprefix(question).replace('_', ', ')}"
    sweep = found.get("sweep")
    head = [how, "parameters", "FLOPs per token", "state bytes", *([sweep["key"]] if sweep else []), f"{first} ± sd"]
    head += [f"difference to {found['baseline']} [interval]", *others]
    mean = {(r["variant"], r["metric"]): r["mean"] for r in found["results"]}
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for r in (r for r in found["results"] if r["metric"] == first and r["n"]):
        cost, c = found["costs"][r["variant"]], r["comparison"]
        cells = [r["variant"], f"{cost['params']:,}", f"{cost['flops_per_token']:,.0f}", f"{cost['state_bytes']:,.0f}"]
        cells += [_chosen(sweep, r["variant"])] if sweep else []
        spread = "" if r["sd"] is None else f" ± {r['sd']:.3f}"
        cells += [f"{r['mean']:.3f}{spread} (n={r['n']})"]
        cells += [f"{c['mean']:+.3f} [{c['low']:+.3f}, {c['high']:+.3f}]" if c else ""]
        cells += [_short(mean[r["variant"], metric]) for metric in others]
        lines.append(f"| {' | '.join(cells)} |")
    said = [r["sentence"] for r in found["results"] if r["metric"] == first and r["sentence"] and r["comparison"]]
    if all(r["verdict"] in ("", "no difference shown") for r in found["results"] if r["metric"] == first):
        few = f": with {len(found['seeds'])} seeds nothing is claimed" if len(found["seeds"]) < MIN_SEEDS else ""
        said = [f"no difference shown{few}"]
    ended = sum(run["state"] == "finished" for run in found["runs"])
    if ended < len(found["runs"]):
        said.append(f"{ended} of {len(found['runs'])} runs are finished")
    if lost := sum(first not in run["values"] for run in found["runs"] if run["state"] == "finished"):
        said.append(f"{lost} of {len(found['runs'])} runs ended without a number")
    compared = sum(r["comparison"] is not None for r in found["results"])
    said.append(f"intervals: paired by seed, t, as Holm's procedure tested them among {compared} comparisons")
    tables = [curve_table(curve, (v for v, c in found["costs"].items() if c)) for curve in found.get("curves", ())]
    return "\n".join([*lines, "", *(f"- {sentence}" for sentence in said), *tables])


def _chosen(sweep: dict[str, Any], variant: str) -> str:
    """What the sweep gave a variant, and whether nothing was tried beyond it."""
    value, tried = sweep["chosen"][variant], sweep["values"]
    end = {tried[0]: " (first tried)", tried[-1]: " (last tried)"}
    return cell(value) + end.get(value, "")


def curve_table(curve: dict[str, Any], variants: Iterable[str]) -> str:
    """The means of each variant at each setting."""
    lines = [f"\n| {curve['path']} over {curve['label']} | {' | '.join(map(cell, curve['over']))} |"]
    lines += [f"|{' --- |' * (1 + len(curve['over']))}"]
    for variant in variants:
        lines.append(f"| {variant} | {' | '.join(map(_short, curve['means'][variant]))} |")
    return "\n".join(lines)


def _short(mean: float | None) -> str:
    return "" if mean is None else f"{mean:.3f}"


def render(text: str) -> str:
    """The README with its tables replaced: of the results, and of every question that has a place in it."""
    questions = [name for name in re.findall(r"<!-- (\w+): begin -->", text) if (RESULTS / f"{name}.json").is_file()]
    places = [
        (f"<!-- {name}: begin -->", f"<!-- {name}: end -->", question_table(name))
        for name in questions
        if name != "results"
    ]
    for begin, end, tables in ((BEGIN, END, f"{quickstart_table()}\n\n{ratio_table()}"), *places):
        whole = f"{begin}\n{tables}\n{end}"
        text = re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _, whole=whole: whole, text, flags=re.DOTALL)
    return text


def update(run: Path | None) -> None:
    """Write the README; first take the figures of a finished quick start if one is given."""
    if run is not None:
        (RESULTS / "quickstart.json").write_text(json.dumps(summarize_run(run), indent=1) + "\n")
    readme = ROOT / "README.md"
    readme.write_text(render(readme.read_text(encoding="utf-8")), encoding="utf-8")
