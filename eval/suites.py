"""Named sets of evaluations, and what one costs a run: lm-eval tasks, long contexts and needles on runs of text; synthetic tasks of
any run, also of one that was never trained on them, with all the ids that its model has."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from data import DataConfig, DataError
from data.synthetic.feed import Synthetic
from eval import corpus_tasks, length, needle, recall
from eval.run import LoadedRun
from eval.tables import markdown
from models import LM, UserError
from models.config import ModelConfig
from models.errors import nearest
from models.parsing import from_dict
from training.parallel import World
from training.runfolder import write_whole

ROWS = 512  # of each synthetic task, after the fact
Task = tuple[int, Mapping[str, Any]]  # length of a row, and data.synthetic


@dataclass(frozen=True)
class Suite:
    """``tasks`` are lm-eval's; ``lengths`` those of `eval.length`, ``needles`` of `eval.needle`, in tokens, as far as the run's
    held-out documents and learned positions reach. These three are of text. ``synthetic``: by name."""

    about: str
    tasks: tuple[str, ...] = ()
    synthetic: Mapping[str, Task] = field(default_factory=dict)
    lengths: tuple[int, ...] = ()
    needles: tuple[int, ...] = ()


SUITES: dict[str, Suite] = {
    "smoke": Suite("the run's own text, and one repetition", ("corpus",), {"induction": (64, {"kind": "induction"})}),
    "recall": Suite(
        "finds again what stands in the context",
        synthetic={
            "induction": (64, {"kind": "induction"}),
            "copying": (64, {"kind": "copying", "span": [4, 8, 16]}),
            "selective_copying": (64, {"kind": "selective_copying", "span": [4, 8]}),
            "mqar": (64, {"kind": "mqar", "pairs": [2, 4, 8], "power": 1.0}),
            "needle": (64, {"kind": "needle"}),
            "variable_tracking": (64, {"kind": "variable_tracking", "hops": [1, 2]}),
        },
    ),
    "long": Suite(
        "makes use of what lies far back",
        lengths=(256, 1024, 4096),
        needles=(512, 2048),
        synthetic={
            "mqar": (1024, {"kind": "mqar", "pairs": 8, "power": 1.0}),
            "induction": (1024, {"kind": "induction"}),
            "needle": (1024, {"kind": "needle"}),
            "needles": (1024, {"kind": "needle", "keys": 4, "queries": 2}),
        },
    ),
    "memory": Suite(
        "keeps track of a state, and counts",
        synthetic={
            "flip_flop": (128, {"kind": "flip_flop"}),
            "counter": (128, {"kind": "word_problem", "group": "Z5"}),
            "S5": (128, {"kind": "word_problem", "group": "S5"}),
            "listops": (64, {"kind": "listops"}),
            "common_words": (128, {"kind": "common_words"}),
            "frequent_words": (128, {"kind": "frequent_words"}),
        },
    ),
}
FIXED = ("flip_flop", "word_problem", "listops")  # their ids have meanings of their own; the others take what there is


def suite(name: str) -> Suite:
    """UserError names the nearest for an unknown one."""
    if name not in SUITES:
        raise UserError(f"unknown suite '{name}'{nearest(name, SUITES)}")
    return SUITES[name]


# -- synthetic tasks of any model


def ask(
    model: LM,
    name: str,
    rows: int,
    autocast: Callable[[], Any] = nullcontext,
    w: World | None = None,
    bar: bool = False,
) -> dict[str, dict[str, Any]]:
    """Every synthetic task of a suite, ``rows`` validation rows of each, the same ones every time -> by name `recall.measure` with
    ``guess``; ``{"skipped": why}`` of a task that does not fit the model. The model is in eval mode."""
    found: dict[str, dict[str, Any]] = {}
    for task in tqdm(suite(name).synthetic, f"suite {name}", leave=False, disable=None if bar else True):
        try:
            data = feed(model.cfg, *suite(name).synthetic[task])
        except DataError as error:
            found[task] = {"skipped": str(error)}
            continue
        size = (1, 0) if w is None else (w.size, w.rank)
        batch = max(1, min(-(-rows // size[0]), recall.BATCH_TOKENS // data.seq_len))
        measured = recall.measure(model, data, data.once(rows, batch, size[1], size[0]), autocast, w)
        found[task] = {**measured, "guess": data.task.guess(data.seq_len)}
    return found


def feed(model: ModelConfig, seq_len: int, settings: Mapping[str, Any]) -> Synthetic:
    """A task with all the ids of a model. Raises DataError where these, or its learned positions, are too few."""
    raw = dict(settings) if settings["kind"] in FIXED else {**settings, "vocab_size": model.vocab_size}
    data = Synthetic(from_dict(DataConfig, {"seq_len": seq_len, "synthetic": raw}))
    if data.vocab_size > model.vocab_size:
        raise DataError(f"the task has {data.vocab_size} ids, the model only {model.vocab_size}")
    if model.learned_positions and seq_len > model.max_seq_len:
        raise DataError(f"its rows have {seq_len} places, the model only {model.max_seq_len} learned positions")
    return data


# -- while a run trains


def during(
    model: LM, names: Sequence[str], rows: int, autocast: Callable[[], Any] = nullcontext, w: World | None = None
) -> dict[str, dict[str, float]]:
    """Accuracy by task of each suite, ``rows`` over all tasks of one -> plain numbers. The model comes back in training mode."""
    model.eval()
    found = {}
    for name in names:
        each = -(-rows // max(1, len(suite(name).synthetic)))
        measured = ask(model, name, each, autocast, w)
        found[name] = {task: one["accuracy"] for task, one in measured.items() if "accuracy" in one}
    model.train()
    return found


# -- when it is finished


def lm_eval_tasks(run: LoadedRun, name: str) -> tuple[list[str], dict[str, str]]:
    """The lm-eval tasks of a suite -> (those to ask of a run, why each of the others is left out): without its corpus, as a model in
    Hugging Face format is, a run is not asked the tasks made from it; a run on a task is asked none, and none is missed."""
    if run.task is not None:
        return [], {}
    tasks = suite(name).tasks
    own = [task for task in tasks if task in corpus_tasks.NAMES]
    try:
        if own:
            corpus_tasks.corpus_tasks(run.dir)
    except (UserError, DataError) as error:
        return [task for task in tasks if task not in own], dict.fromkeys(own, str(error))
    return list(tasks), {}


def evaluate(
    run: LoadedRun, name: str, rows: int = ROWS, bar: bool = True, left_out: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """A suite but for its lm-eval tasks, on a run of text or on a task, or an exported model -> results laid out as lm-eval's and
    written to ``RUN/eval/suite-<name>_<step>.json``; tasks are called ``<suite>.<task>``. ``left_out``: of `lm_eval_tasks`, to be
    said with what else is. Raises UserError."""
    wanted = suite(name)
    asked = ask(run.model, name, rows, bar=bar)
    results: dict[str, Any] = {
        "results": {},
        "n-samples": {},
        "config": {"step": run.step, "suite": name},
        "tasks": asked | {task: {"skipped": why} for task, why in (left_out or {}).items()},
    }
    for task, one in asked.items():
        if "accuracy" in one:
            label = f"{name}.{task}"
            results["results"][label] = {"alias": label, "acc,none": one["accuracy"], "nll,none": one["loss"]}
            results["n-samples"][label] = {"original": rows, "effective": rows}
    if run.task is None:
        for module, lengths in ((length, wanted.lengths), (needle, wanted.needles)):
            if lengths:
                _of_text(results, name, module, run, lengths)
    target = run.dir / "eval" / f"suite-{name}_{run.step}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, json.dumps(results, indent=1) + "\n")
    return results


def _of_text(results: dict[str, Any], name: str, module: Any, run: LoadedRun, lengths: Sequence[int]) -> None:
    """Add what `eval.length` or `eval.needle` finds at the lengths in reach; what is out of reach is said and passed over."""
    label = module.__name__.rpartition(".")[2]
    try:
        longest, why = module.reach(run.model.cfg, corpus_tasks.open_run_corpus(run.dir))
        results["tasks"] |= {f"text {label} {n}": {"skipped": why} for n in lengths if n > longest}
        fitting = [n for n in lengths if n <= longest]
        if not fitting:
            return
        found = module.evaluate(run, fitting)
    except (UserError, DataError) as error:
        results["tasks"][f"text {label}"] = {"skipped": str(error)}
        return
    for task, metrics in found["results"].items():
        key = f"{name}.text_{task}"
        results["results"][key] = {**metrics, "alias": key}
        results["n-samples"][key] = found["n-samples"][task]


def table(results: dict[str, Any]) -> str:
    """Every task: its accuracy or loss, beside what guessing gives; below it what was left out, and why."""
    name, tasks, rows = results["config"]["suite"], results["tasks"], []
    for label, metrics in results["results"].items():
        guess = tasks.get(label.removeprefix(f"{name}."), {}).get("guess")
        shown = [m for m in metrics if m != "alias" and "_stderr" not in m]
        for metric in [m for m in shown if guess is None or m == "acc,none"]:
            rows.append(
                (label, metric.partition(",")[0], metrics[metric], guess, results["n-samples"][label]["effective"])
            )
    said = [f"{name}.{task} was left out: {one['skipped']}" for task, one in tasks.items() if "skipped" in one]
    return "\n".join([markdown(("task", "metric", "value", "guessing", "rows"), rows), *said])
