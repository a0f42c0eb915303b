"""The report of a question: Markdown, CSV, JSON and plots, made of what `eval.ablation` read from the run folders."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from configs import schema
from configs.question import MAY_DIFFER, MIN_SEEDS, Curve
from eval.ablation import Answer, Line
from eval.ablation_plots import plot_curves, plot_losses, plot_quality
from eval.ablation_runs import Costs, run_name
from eval.ablation_sweep import Swept
from eval.statistics import mean_and_sd
from eval.tables import cell, markdown
from models.errors import UserError
from models.match import BUDGETS
from models.parsing import to_dict
from models.summary import describe

DATA = ("data", "train.batch_size")  # with the seed, all that the order of the data depends on


def render(found: Answer) -> str:
    """The whole report as Markdown."""
    question = found.question
    parts = [f"# {question.name}", question.text, _protocol(found)]
    if found.swept:
        parts += [f"## What was chosen: {found.swept.sweep.key}", _sweep_table(found, found.swept)]
    for metric in dict.fromkeys(line.metric for line in found.lines):
        lines = [line for line in found.lines if line.metric is metric]
        parts += [f"## {metric.path}, {metric.direction}", _quality(found, lines)]
        parts.append("\n".join(f"- {line.sentence}" for line in lines if line.sentence))
    for curve in question.curves:
        parts += [f"## {curve.path}, {curve.metrics()[0].direction}", _curve_table(found, curve)]
    parts += ["## What it costs", _cost_table(found)]
    parts += [f"Changes to the baseline:\n\n{_changes(found)}"]
    if trouble := _trouble(found):
        parts += ["## Runs that are not in the tables", trouble]
    return "\n\n".join(p for p in parts if p)


def _protocol(found: Answer) -> str:
    finished = sum(r.state == "finished" for r in found.runs)
    count = sum(line.comparison is not None for line in found.lines)
    level = f"{100 * (1 - found.question.alpha):g}%"
    return (
        f"{finished} of {len(found.runs)} runs finished: {len(found.question.variants)} variants, seeds "
        f"{', '.join(map(str, found.seeds))}. A seed gives every variant the same data in the same order{_but_for(found)}. "
        f"Differences are to {found.question.baseline}, paired by seed; p is of paired t tests, corrected by Holm's procedure for "
        f"{count} comparisons, and each interval (±) has the level at which that procedure tested it, {level} or more: the chance "
        f"that any of them excludes zero where nothing differs is {found.question.alpha:g}. d is the mean difference in standard "
        f"deviations of the differences. A difference is claimed from {MIN_SEEDS} seeds on, where its interval excludes zero, "
        "unless runs of the better one gave no number; that holds for a number of seeds that was fixed beforehand."
    )


def _but_for(found: Answer) -> str:
    """Variants that see other data than the baseline, as a clause."""
    configs = found.configs()
    base = configs.get(found.question.baseline)
    others = [
        v
        for v, cfg in configs.items()
        if base and any(schema.is_under(k, DATA) for k, _, _ in schema.differences(base, cfg))
    ]
    return f", but for {', '.join(others)}, whose settings of the data differ" if others else ""


def _sweep_table(found: Answer, swept: Swept) -> str:
    """A row for every variant: the result at each value, the chosen one marked, and whether the best may lie beyond."""
    sweep, last = swept.sweep, len(swept.sweep.values) - 1
    seeds = ", ".join(map(str, sweep.seeds))
    text = (
        f"Every variant has the value of {sweep.key} at which its {swept.metric.path} is best on seed {seeds}, which is in no "
        "comparison. Where that is the first or the last value, there may be a better one beyond."
    )
    rows = []
    for variant in found.question.variants:
        has, best = found.chosen(variant), swept.best(variant)
        results = [f"**{cell(r)}**" if i == has else cell(r) for i, r in enumerate(swept.results(variant))]
        as_other = f"as {swept.tuned_as[variant]}" if swept.tuned_as[variant] != variant else None
        note = as_other or ("at the end" if has in (0, last) else None)
        if None not in (has, best) and has != best:
            note = "chosen when another result was missing"
        rows.append((variant, *results, note))
    return f"{text}\n\n{markdown((f'{sweep.key}', *map(cell, sweep.values), 'note'), rows)}"


def _quality(found: Answer, lines: Sequence[Line]) -> str:
    rows = []
    for line in lines:
        mean, sd = mean_and_sd(line.values) if line.values else (None, None)
        row: list[Any] = [line.variant, len(line.values), mean, sd]
        c = line.comparison
        if c is not None:
            row += [f"{c.mean:+.4g} ± {c.half:.2g}", f"{c.effect:+.2f}", f"{c.p_holm:.2g}", line.verdict]
        else:
            row += [None, None, None, "baseline" if line.variant == found.question.baseline else None]
        rows.append(row)
    return markdown(("variant", "n", "mean", "sd", "difference", "effect (d)", "p, corrected", "verdict"), rows)


def _curve_table(found: Answer, curve: Curve) -> str:
    """A row for every variant: means over its finished runs."""
    rows = [(variant, *found.means(curve, variant)) for variant in found.question.variants]
    return markdown((curve.label, *map(cell, curve.over)), rows)


def _cost_table(found: Answer) -> str:
    head = ("variant", "parameters", "active", "FLOPs/token", "state bytes", "tokens", "training FLOPs")
    rows: list[list[Any]] = []
    for variant in found.question.variants:
        c = found.costs(variant)
        if c is None:
            rows.append([variant, *[None] * 10])
            continue
        counts = [c.params, c.active_params, round(c.flops_per_token), round(c.state_bytes), c.tokens]
        speed = c.tokens_per_s and round(c.tokens_per_s)
        memory = c.peak_memory_bytes and c.peak_memory_bytes / 2**20
        where = f"{c.device}, {c.threads} threads"
        rows.append(
            [
                variant,
                *counts,
                f"{c.training_flops:.3g}",
                speed,
                memory and round(memory),
                where,
                _matched(found, variant),
            ]
        )
    return markdown((*head, "tokens/s", "peak MiB", "on", "matched"), rows)


def _matched(found: Answer, variant: str) -> str | None:
    """What was made equal, and by how much it misses."""
    rule, own = found.question.variants[variant], found.costs(variant)
    to = found.costs(rule.to) if rule.to else None
    if own is None or to is None:
        return None
    a, b = (getattr(c, BUDGETS[rule.on]) for c in (own, to))
    return f"{rule.on} of {rule.to} by {rule.vary}: {100 * (a / b - 1):+.2f}%" if b else None


def _changes(found: Answer) -> str:
    """What the configs of the runs say: every setting in which a variant differs from the baseline."""
    configs = found.configs()
    base = configs.get(found.question.baseline)
    lines = []
    for variant, own in configs.items() if base else ():
        if variant != found.question.baseline:
            settings = [
                f"`{key}`: {value}" for key, value in _settings(base, own) if not schema.is_under(key, MAY_DIFFER)
            ]
            lines.append(f"- {variant}: {'; '.join(settings) or 'none'}")
    return "\n".join(sorted(lines)) or "- not known yet"


def _settings(base: Any, own: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """(key path, new value) of two trees of dataclasses; a part of another kind is one value."""
    if is_dataclass(base) and type(base) is type(own):
        pairs = {f.name: (getattr(base, f.name), getattr(own, f.name)) for f in fields(base)}
    elif isinstance(base, dict) and isinstance(own, dict):
        pairs = {key: (base.get(key), own.get(key)) for key in {**base, **own}}
    else:
        if base != own:
            yield where, describe(own) if hasattr(own, "kind") else json.dumps(to_dict(own))
        return
    for key, (old, new) in pairs.items():
        yield from _settings(old, new, f"{where}.{key}" if where else str(key))


def _trouble(found: Answer) -> str:
    swept = found.swept
    tried = zip(swept.sweep.values, swept.runs, strict=True) if swept else ()
    named = [(f"{swept.sweep.folder(value)}/", r) for value, runs in tried for r in runs] if swept else []
    rows = [
        (f"{where}{run_name(r.variant, r.seed)}", r.state, r.why)
        for where, r in (*named, *(("", r) for r in found.runs))
        if r.state != "finished" or r.why
    ]
    notes = [markdown(("run", "state", "why"), rows)] if rows else []
    if found.not_counted:
        notes.append(f"Of seeds that were not asked for, so not counted: {', '.join(found.not_counted)}.")
    return "\n\n".join(notes)


# -- files


def write_report(found: Answer, out: Path) -> str:
    """``report.md``, ``report.csv``, ``report.json`` and, with finished runs, ``quality.png``, ``loss.png`` and, where there are
    curves, ``curve.png`` -> the Markdown."""
    text = render(found)
    drawn = any(r.costs for r in found.runs)
    names = ("quality", *(("curve",) if found.question.curves else ()), "loss") if drawn else ()
    pictures = "".join(f"\n\n![{name}]({name}.png)" for name in names)
    if names:
        pictures = f"\n\n## Pictures\n\nMeans over seeds; bars and bands from the lowest to the highest.{pictures}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.md").write_text(f"{text}{pictures}\n", encoding="utf-8")
        (out / "report.csv").write_text(_sheet(found), encoding="utf-8")
        (out / "report.json").write_text(json.dumps(_plain(found), indent=1) + "\n", encoding="utf-8")
        if drawn:
            plot_quality(found, out / "quality.png")
            plot_losses(found, out.parent, out / "loss.png")
        if "curve" in names:
            plot_curves(found, out / "curve.png")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    return text


def _sheet(found: Answer) -> str:
    """A row for every metric and variant: quality, then costs."""
    statistics_ = ("mean_difference", "sd_of_differences", "effect", "p", "p_holm", "low", "high")
    costs = tuple(Costs.__dataclass_fields__)
    sheet = io.StringIO()
    writer = csv.writer(sheet, lineterminator="\n")
    writer.writerow(("metric", "variant", "n", "mean", "sd", *statistics_, "verdict", *costs))
    for line in found.lines:
        mean, sd = mean_and_sd(line.values) if line.values else (None, None)
        compared = line.comparison[1:] if line.comparison else [None] * len(statistics_)
        known = found.costs(line.variant)
        spent = asdict(known).values() if known else [None] * len(costs)
        writer.writerow([line.metric.path, line.variant, len(line.values), mean, sd, *compared, line.verdict, *spent])
    return sheet.getvalue()


def _plain(found: Answer) -> dict[str, Any]:
    question = found.question
    return {
        "question": question.name,
        "text": question.text,
        "baseline": question.baseline,
        "alpha": question.alpha,
        "seeds": list(found.seeds),
        "sweep": _plain_sweep(found, found.swept) if found.swept else None,
        "results": [
            {
                "metric": line.metric.path,
                "variant": line.variant,
                "n": len(line.values),
                "mean": mean_and_sd(line.values)[0] if line.values else None,
                "sd": mean_and_sd(line.values)[1] if line.values else None,
                "comparison": _finite(line.comparison._asdict()) if line.comparison else None,
                "verdict": line.verdict,
                "sentence": line.sentence,
            }
            for line in found.lines
        ],
        "curves": [
            {"path": c.path, "label": c.label, "over": list(c.over)}
            | {"means": {v: found.means(c, v) for v in question.variants}}
            for c in question.curves
        ],
        "costs": {v: asdict(c) if (c := found.costs(v)) else None for v in question.variants},
        "matched": {v: _matched(found, v) for v in question.variants},
        "runs": [
            {"run": run_name(r.variant, r.seed), **{k: getattr(r, k) for k in ("state", "why", "values")}}
            | {"variant": r.variant, "seed": r.seed}
            for r in found.runs
        ],
    }


def _plain_sweep(found: Answer, swept: Swept) -> dict[str, Any]:
    values = swept.sweep.values
    chosen = {v: found.chosen(v) for v in found.question.variants}
    return {
        "key": swept.sweep.key,
        "values": list(values),
        "seeds": list(swept.sweep.seeds),
        "metric": swept.metric.path,
        "results": {v: swept.results(v) for v in chosen},
        "chosen": {v: None if i is None else values[i] for v, i in chosen.items()},
        "without_result": [
            {"run": f"{swept.sweep.folder(value)}/{run_name(r.variant, r.seed)}", "state": r.state, "why": r.why}
            for value, at_value in zip(values, swept.runs, strict=True)
            for r in at_value
            if r.state != "finished" or r.why
        ],
    }


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no infinity."""
    return {k: v if math.isfinite(v) else None for k, v in values.items()}
