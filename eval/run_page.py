"""All that is known of one run, as one HTML file: what it is, how it trained, how it was judged, what was seen inside it."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from eval import history, html, needle
from eval.html import EMPTY, Markup, folded, joined, table, tag, text
from eval.inspection.attribution import lost_without
from eval.inspection.numbers import number
from eval.judge import result_rows
from models import ModelConfig, UserError, model_config
from models.folder import run_config
from models.summary import summary

NAME = "report.html"
INSPECTION = "inspection"  # a folder in a run's that is shown with it
LENGTH = 1024  # tokens, for the costs of a model that says no length of its own
ROWS = 200  # of a table of plain JSON
STRONGEST = 0.75  # opacity behind the token with the largest attribution


def write(
    run: Path, row: dict[str, Any], out: Path, inspections: Sequence[Path] = (), model: ModelConfig | None = None
) -> Path:
    """``out/report.html`` of a run folder, or of an exported model. ``row``: its line of the report (`eval.report.summary`), {}
    where there is none; ``inspections``: folders that `eval.inspect` wrote of it; ``model``: what an exported one is. Raises
    UserError when the disk refuses."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / NAME).write_text(page(run, row, inspections, model), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    return out / NAME


def page(run: Path, row: dict[str, Any], inspections: Sequence[Path] = (), model: ModelConfig | None = None) -> str:
    """The whole file. What a run does not have is left out."""
    config = _read(run / "config.yaml")
    environment = _json(run / "environment.json") or {}
    records = history.read_metrics(run) if (run / "metrics.jsonl").is_file() else []
    name = str(row.get("run") or run.resolve().name)
    return html.page(
        name,
        _lead(run, config, environment),
        [
            ("Summary", _summary(row, records)),
            ("Model", _model(run, config, model)),
            ("Training", _training(name, records)),
            ("Evaluation", joined([*map(_evaluation, sorted((run / "eval").glob("*.json")))])),
            ("Samples", _samples(_read(run / "samples.txt"))),
            ("Inspection", joined([_inspection(folder) for folder in inspections])),
            ("Environment", _environment(environment)),
            ("Configuration", folded("config.yaml", text("pre", config)) if config else EMPTY),
        ],
    )


def inspections_of(run: Path, among: Sequence[Path] = ()) -> list[Path]:
    """Folders that `eval.inspect` wrote of this run: the one in its own folder, and those of ``among`` that say its name."""
    found = [f for f in (run / INSPECTION,) if (f / "inspect.json").is_file()]
    return found + [
        f for f in among if (_json(f / "inspect.json") or {}).get("run") == run.resolve().name and f not in found
    ]


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _json(path: Path) -> Any:
    """None where there is none that can be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


# -- what it is


def _lead(run: Path, config: str, environment: dict[str, Any]) -> Markup:
    origin = re.search(r"^imported_from: (.+)$", config, re.MULTILINE)
    said = [text("span", f"imported from {origin[1]}", class_="badge")] if origin else []
    if not config:
        said.append(text("span", "an exported model", class_="badge"))
    if environment.get("commit"):
        changed = " with changes" if environment.get("uncommitted_changes") else ""
        said.append(text("span", f"commit {environment['commit'][:10]}{changed}", class_="badge"))
    if environment.get("finished") is False:
        said.append(text("span", "not finished", class_="badge"))
    return joined([text("p", run), tag("p", joined(said, " "))] if said else [text("p", run)])


def _summary(row: dict[str, Any], records: list[dict[str, Any]]) -> Markup:
    """The line of the report, and the last accuracy of a run on a task."""
    accuracy = [r["val"]["accuracy"] for r in records if "accuracy" in r.get("val", {})]
    known = [(k, v) for k, v in row.items() if k not in ("run", "eval") and v is not None]
    known += [("val accuracy", v) for v in accuracy[-1:]]
    return html.figures(known) if known else EMPTY


def _model(run: Path, config: str, model: ModelConfig | None) -> Markup:
    """The table that a run wrote when it started, or that of a model that was never trained here."""
    words = _read(run / "summary.txt")
    if not words:
        model = model_config(run_config(run)["model"]) if config else model
        words = "" if model is None else summary(model, min(n for n in (LENGTH, model.max_seq_len) if n))
    return text("pre", words) if words else EMPTY


def _environment(found: dict[str, Any]) -> Markup:
    if not found:
        return EMPTY
    plain = [(k, v) for k, v in found.items() if isinstance(v, str | int | float) and not isinstance(v, bool)]
    facts = [*plain, *(found.get("versions") or {}).items()]
    parts = [
        text("pre", " ".join(map(str, found.get("command") or [])), class_="wrap"),
        table(("what", "value"), [[k, str(v)] for k, v in facts]),
    ]
    ran = (found.get("kernels") or {}).get("ran") or {}
    rows = [
        (op, ", ".join(f"{k} {v:,}" for k, v in said.items() if isinstance(v, int)), said.get("reason", ""))
        for op, said in ran.items()
    ]
    if rows:
        parts += [text("h3", "Kernels"), table(("op", "calls by backend", "why not another"), rows)]
    return joined(parts)


# -- how it trained, and how it was judged


def _training(name: str, records: list[dict[str, Any]]) -> Markup:
    """Pictures of the log."""
    found, loss, more = [], io.BytesIO(), io.BytesIO()
    if any("loss" in r or "val" in r for r in records):
        history.plot({name: records}, loss)
        found.append(html.picture(loss.getvalue(), "Loss in training, and of the validation data", width=760))
    if history.panels(records, more):
        found.append(html.picture(more.getvalue(), "What else was logged, over training tokens"))
    return joined(found)


def _evaluation(path: Path) -> Markup:
    """One file of results: its metrics and slices where it has some, else its numbers as they are."""
    found = _json(path)
    if not isinstance(found, dict):
        return EMPTY
    try:
        rows = result_rows(found)
    except (KeyError, TypeError, AttributeError):
        rows = []
    if not rows:
        return folded(path.name, table(("what", "value"), list(_flat(found))[:ROWS]))
    parts = [text("h3", path.stem), table(("task", "metric", "value", "stderr", "items"), rows)]
    slices = [(f"by {k}", label, *v.values()) for k, by in (found.get("by") or {}).items() for label, v in by.items()]
    if slices and len({len(row) for row in slices}) == 1:
        names = next(iter(next(iter(found["by"].values())).values()))
        parts.append(table(("slice", "of", *names), slices))
    if "length-depth" in (found.get("by") or {}):
        drawn = io.BytesIO()
        needle.draw(found, drawn)
        parts.append(html.picture(drawn.getvalue(), "Accuracy by length and depth", width=520))
    return joined(parts)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, object]]:
    """Numbers and words in nested JSON, by path."""
    if isinstance(value, dict):
        for key, inside in value.items():
            yield from _flat(inside, f"{name}.{key}" if name else str(key))
    elif isinstance(value, str | int | float):
        yield name, value


def _samples(words: str) -> Markup:
    """The last sample, and those before it folded."""
    parts = re.split(r"^=== (step \d+)\n", words, flags=re.MULTILINE)[1:]
    shown = [
        (head, text("pre", body.rstrip(), class_="wrap")) for head, body in zip(parts[::2], parts[1::2], strict=True)
    ]
    if not shown:
        return EMPTY
    (head, last), earlier = shown[-1], shown[:-1]
    before = joined([joined([text("h3", h), body]) for h, body in reversed(earlier)])
    return joined([text("h3", head), last, folded(f"{len(earlier)} earlier ones", before) if earlier else EMPTY])


# -- what was seen inside


def _inspection(folder: Path) -> Markup:
    """What `eval.inspect` wrote, its pictures too, with attributions as text that says its numbers under the pointer."""
    found = _json(folder / "inspect.json") or {}
    traced = (found.get("any") or {}).get("attribution") or {"targets": []}
    marked = [_marked(one, " " if traced.get("spaced") else "") for one in traced["targets"]]
    if marked:
        about = (
            "Blue tokens speak for the predicted one, orange ones against it: what it loses, in nats, when the token gives way to "
            + " or ".join(f"«{t}»" for t in traced["fillers"])
            + ", tried of the tokens that matter most by gradient and of some others. Under the pointer: that number, and gradient "
            "times input."
        )
        marked = [text("h3", "Which past tokens a prediction comes from"), text("p", about), *marked]
    return joined([html.from_markdown(_read(folder / "inspect.md"), folder), *marked])


def _marked(one: dict[str, Any], between: str) -> Markup:
    """The text before a prediction, and the prediction."""
    lost = lost_without(one)
    top = max((abs(a) for a in lost if a is not None), default=0) or 1.0
    tokens = []
    for n, (token, value, slope) in enumerate(zip(one["tokens"], lost, one["attribution"], strict=True)):
        said = f"{n}: " + ("" if value is None else f"left out {_short(value)}, ") + f"gradient {_short(slope)}"
        kind = "for" if number(value) > 0 else "against"
        strength = 0.0 if value is None else STRONGEST * abs(value) / top
        tokens.append(text("span", token, class_=kind, style=f"--a:{strength:.3f}", title=said))
        if token == "\\n":
            tokens.append(Markup("\n"))
    agreement = "not defined" if one["agreement"] is None else f"{one['agreement']:.2f}"
    head = f"After token {one['at']}: loss {_short(one['loss'])} nats, agreement of both attributions {agreement}"
    body = tag("div", joined([joined(tokens, between), Markup(" → "), text("b", one["target"])], ""), class_="text")
    return joined([text("p", head), body])


def _short(value: float | None) -> str:
    return f"{number(value):.4g}"
