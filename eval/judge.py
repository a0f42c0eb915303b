"""Run lm-eval on a run: find the tasks, evaluate, keep the results in the run folder, print a table."""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from eval import corpus_tasks
from eval.run import LoadedRun, open_run
from eval.tables import markdown
from models import UserError
from models.errors import nearest

LOCAL_FORMATS = ("json", "csv", "parquet", "text", "arrow")
BOOTSTRAP = 1000  # resamples behind a standard error that has no formula


def evaluate(
    run: LoadedRun | Path | str,
    tasks: Sequence[str],
    *,
    name: str | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    include_path: Sequence[Path | str] = (),
    batch_size: int | str = "auto",
    max_length: int | None = None,
    rolling: str = "windows",
    cache: bool = True,
    out: Path | str | None = None,
    log_samples: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluate on lm-eval tasks or groups by name (``corpus``: the run's own held-out text) -> lm-eval's results.

    They are also written to ``out``, by default ``RUN/eval/<name>_<step>.json``, with a ``samples`` file per task
    beside it if asked for. Raises UserError for an unknown task (naming the nearest) or one whose data cannot be had.
    """
    run = run if isinstance(run, LoadedRun) else open_run(run)
    paths = [Path(p) for p in include_path]
    for path in paths:
        if not path.exists():
            raise UserError(f"--include-path: no folder '{path}'")
    if any(_matches(t, corpus_tasks.NAMES) for t in tasks):
        paths.append(corpus_tasks.corpus_tasks(run.dir))
    target = Path(out) if out else _target(run, tasks, name, limit, num_fewshot)
    with _quiet_data(offline=_all_local(tasks, paths)):
        manager, names = find_tasks(tasks, paths)
        from eval.harness import LociLM

        lm = LociLM(run, batch_size, max_length, rolling, cache, progress=progress)
        try:
            results = _run_harness(lm, manager, names, limit, num_fewshot, log_samples)
        finally:
            lm.cache.close()
    _store(results, target)
    return results


def find_tasks(tasks: Sequence[str], paths: Sequence[Path]) -> tuple[Any, list[str]]:
    """-> (lm-eval's task manager, the names that ``tasks``, globs included, stand for).

    Indexing lm-eval's own tasks takes many seconds, so they are only looked at when a name is not found without them.
    """
    from lm_eval.tasks import TaskManager

    include: Any = [str(p) for p in paths] or None
    manager = TaskManager(include_path=include, include_defaults=False)
    names, missing = _resolve(tasks, manager.all_tasks)
    if missing:
        manager = TaskManager(include_path=include)
        names, missing = _resolve(tasks, manager.all_tasks)
    if missing:
        raise UserError(f"unknown task '{missing[0]}'{_near(missing[0], [*manager.all_tasks, *corpus_tasks.NAMES])}")
    return manager, names


def _near(name: str, known: Sequence[str]) -> str:
    hint = nearest(name, known)
    return hint if "did you mean" in hint else "; `lm-eval ls tasks` lists them, and 'corpus' is this run's own"


def _resolve(tasks: Sequence[str], known: Sequence[str]) -> tuple[list[str], list[str]]:
    found: list[str] = []
    missing = []
    for task in tasks:
        if task.endswith((".yaml", ".yml")) and Path(task).is_file():
            hits = [task]
        else:
            hits = [k for k in known if _matches(task, [k])]
        found += [h for h in hits if h not in found]
        if not hits:
            missing.append(task)
    return found, missing


def _matches(pattern: str, names: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def _run_harness(
    lm: Any, manager: Any, names: list[str], limit: float | None, num_fewshot: int | None, log_samples: bool
) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate

    try:
        results = simple_evaluate(
            model=lm,
            tasks=list(names),
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=lm.batch_size,
            device=str(lm.model.embed.weight.device),
            bootstrap_iters=BOOTSTRAP,
            log_samples=log_samples,
        )
    except Exception as error:
        if getattr(error, "one_line", False) or not _about_data(error):
            raise
        first = (str(error).splitlines() or [""])[0]
        raise UserError(f"the data of {', '.join(names)} cannot be loaded: {type(error).__name__}: {first}") from error
    assert results is not None
    return dict(results)


def _about_data(error: BaseException) -> bool:
    """Did `datasets` or the hub fail to deliver?"""
    modules = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
    return bool(modules & {"datasets", "huggingface_hub", "httpx", "requests"}) or isinstance(
        error, ConnectionError | FileNotFoundError
    )


# -- offline


class _quiet_data:
    """While tasks are loaded: no hub if everything is local (unless the user has decided), no bars over local files."""

    NAMES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")

    def __init__(self, offline: bool) -> None:
        self.offline = offline

    def __enter__(self) -> None:
        self.set = [n for n in self.NAMES if self.offline and n not in os.environ]
        os.environ.update(dict.fromkeys(self.set, "1"))
        import datasets

        self.bars = datasets.are_progress_bars_disabled()
        if self.offline:
            datasets.disable_progress_bars()

    def __exit__(self, *_: object) -> None:
        import datasets

        for name in self.set:
            os.environ.pop(name, None)
        if not self.bars:
            datasets.enable_progress_bars()


class _TaskLoader(yaml.SafeLoader):
    """Reads task files without running their `!function`s."""


_TaskLoader.add_multi_constructor("!", lambda loader, suffix, node: None)


def _all_local(tasks: Sequence[str], paths: Sequence[Path]) -> bool:
    """Do all tasks come from these folders and read nothing but local files?"""
    local: dict[str, bool] = {}
    groups: dict[str, list[str]] = {}
    for file in (f for p in paths for f in sorted(p.glob("**/*.yaml"))):
        try:
            task = yaml.load(file.read_text(encoding="utf-8"), _TaskLoader)
        except (OSError, yaml.YAMLError):
            continue
        if not isinstance(task, dict):
            continue
        if "group" in task:
            children = task.get("task")
            groups[str(task["group"])] = (
                [c for c in children if isinstance(c, str)] if isinstance(children, list) else []
            )
        elif isinstance(task.get("task"), str):
            source = str(task.get("dataset_path"))
            local[task["task"]] = source in LOCAL_FORMATS or Path(source).is_dir()
    for name, children in groups.items():
        local[name] = bool(children) and all(local.get(c, False) for c in children)
    wanted, missing = _resolve(tasks, list(local))
    return not missing and all(local.get(name, False) for name in wanted)


# -- results


def _target(
    run: LoadedRun, tasks: Sequence[str], name: str | None, limit: float | None, num_fewshot: int | None
) -> Path:
    label = re.sub(r"[^\w.+-]+", "-", name or "+".join(Path(t).stem if t.endswith(".yaml") else t for t in tasks))[:80]
    label += f"_{num_fewshot}shot" if num_fewshot is not None else ""
    label += f"_limit{limit:g}" if limit is not None else ""
    at = "" if run.progress is None else f"_progress{run.progress:g}"
    return run.dir / "eval" / f"{label}_{run.step}{at}.json"


def _store(results: dict[str, Any], target: Path) -> None:
    """The results as JSON; samples, if there are any, as one JSON-lines file per task beside them."""
    from lm_eval.utils import handle_non_serializable

    def dump(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, default=handle_non_serializable, ensure_ascii=False, indent=indent)

    files = {target: dump({k: v for k, v in results.items() if k != "samples"}, 1) + "\n"}
    for task, samples in (results.get("samples") or {}).items():
        files[target.with_name(f"{target.stem}_samples_{task}.jsonl")] = "".join(dump(s) + "\n" for s in samples)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for path, text in files.items():
            temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error


def result_rows(results: dict[str, Any]) -> list[tuple[str, str, float, float | None, int | None]]:
    """lm-eval's results -> (task, metric, value, standard error, number of items), groups' own aggregates included."""
    rows = []
    for task, metrics in results["results"].items():
        counted = (results.get("n-samples") or {}).get(task, {}).get("effective")
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            shown = metric if kind == "none" else f"{metric} ({kind})"
            rows.append((task, shown, float(value), error if isinstance(error, float) else None, counted))
    return rows


def print_table(results: dict[str, Any]) -> None:
    """Tasks, metrics, values, standard errors; below it what was cut off, if anything was."""
    shots = results.get("n-shot") or {}
    rows = [
        (task, shots.get(task), metric, value, error, count)
        for task, metric, value, error, count in result_rows(results)
    ]
    print(markdown(("task", "shots", "metric", "value", "stderr", "items"), rows))
    config = results.get("config") or {}
    cut = config.get("truncation")
    if cut:
        from eval.harness import Truncation

        if line := Truncation(**cut).line():
            print(line)
