"""lm-eval tasks made from the held-out documents of a run's corpus: ``corpus`` = ``corpus_ppl`` + ``corpus_choice``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from data.corpus import Corpus, open_corpus
from data.tokenizer import Tokenizer
from models import UserError
from training.runfolder import write_whole

NAMES = ("corpus", "corpus_ppl", "corpus_choice")
TEMPLATES = Path(__file__).parent / "tasks"
VERSION = 1  # raised when the same corpus would give other items
PPL_DOCUMENTS, PPL_BYTES = 64, 2048
ITEMS, CHOICES, CONTEXT_BYTES, CHOICE_BYTES = 200, 4, 192, 32
SEED = 0


def corpus_tasks(run: Path) -> Path:
    """Write ``RUN/eval/tasks/`` (JSON lines and the YAMLs that point to them) once per corpus -> that folder.

    The items are a function of the held-out text alone. Raises UserError if the run does not say what its corpus is, or
    if that is gone or too small.
    """
    folder = run / "eval" / "tasks"
    about = corpus_record(run)
    mark = {"version": VERSION, "corpus": about["manifest"].get("fingerprint")}
    if _read(folder / "made_from.json") == mark:
        _write_yamls(folder)  # a run folder may have moved since
        return folder
    corpus = open_run_corpus(run)
    texts = list(documents(corpus.val, corpus.tokenizer))
    pages = [{"text": head} for text in texts[:PPL_DOCUMENTS] if (head := _bytes(text.encode(), 0, PPL_BYTES))]
    items = choice_items(texts)
    if not pages or not items:
        raise UserError(f"{corpus.dir}: the held-out text is too small to make tasks from")
    folder.mkdir(parents=True, exist_ok=True)
    _lines(folder / "corpus_ppl.jsonl", pages)
    _lines(folder / "corpus_choice.jsonl", items)
    _write_yamls(folder)
    write_whole(folder / "made_from.json", json.dumps(mark))
    return folder


def corpus_record(run: Path) -> dict[str, Any]:
    """``data.json`` of a run: the prepared corpus folder and its manifest."""
    record = _read(run / "data.json")
    if not record or "dir" not in record:
        raise UserError(f"{run}: no data.json that names the corpus it was trained on")
    return {"manifest": {}, **record}


def open_run_corpus(run: Path) -> Corpus:
    """The prepared corpus that a run was trained on; UserError or DataError if it is gone, corrupt or another one."""
    record = corpus_record(run)
    corpus = open_corpus(record["dir"])
    if record["manifest"].get("fingerprint", corpus.fingerprint) != corpus.fingerprint:
        raise UserError(f"{record['dir']} is not the corpus of {run}: its fingerprint differs")
    return corpus


def documents(shards: Any, tokenizer: Tokenizer) -> Iterator[str]:
    """The text of each document, in order."""
    for doc in range(len(shards)):
        yield tokenizer.decode(shards.read(doc).tolist())


def choice_items(texts: Sequence[str], seed: int = SEED) -> list[dict[str, Any]]:
    """Up to ITEMS of {context, choices, label}: places spread over the text, wrong choices from other places.

    Every choice has about CHOICE_BYTES bytes and is no prefix of another one, so that none is right by accident.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    raw = [text.encode() for text in texts]
    room = np.array([max(0, len(r) - CONTEXT_BYTES - CHOICE_BYTES) for r in raw])
    if not room.any():
        return []
    total, starts = int(room.sum()), np.cumsum(room) - room

    def passage(place: int) -> tuple[str, str]:
        doc = int(np.searchsorted(starts, place, side="right")) - 1
        at = place - int(starts[doc])
        context = _bytes(raw[doc], at, CONTEXT_BYTES)
        return context, _bytes(raw[doc], at + len(context.encode()) + _skip(raw[doc], at), CHOICE_BYTES)

    items = []
    for place in np.unique(np.linspace(0, total - 1, ITEMS).astype(np.int64)):
        context, truth = passage(int(place))
        choices = [truth]
        for other in generator.integers(0, total, size=16 * CHOICES):
            wrong = passage(int(other))[1]
            if not any(wrong.startswith(c) or c.startswith(wrong) for c in choices):
                choices.append(wrong)
            if len(choices) == CHOICES:
                break
        if len(choices) < CHOICES or not context.strip() or not truth.strip():
            continue
        order = generator.permutation(CHOICES)
        shuffled = [choices[i] for i in order]
        items.append({"context": context, "choices": shuffled, "label": int(np.flatnonzero(order == 0)[0])})
    return items


def _skip(raw: bytes, at: int) -> int:
    """Bytes from ``at`` to the next beginning of a character."""
    n = 0
    while at + n < len(raw) and raw[at + n] & 0xC0 == 0x80:
        n += 1
    return n


def _bytes(raw: bytes, start: int, size: int) -> str:
    """About ``size`` bytes of UTF-8 text from byte ``start`` on, whole characters only."""
    start += _skip(raw, start)
    return raw[start : start + size].decode("utf-8", "ignore")


def _write_yamls(folder: Path) -> None:
    for template in TEMPLATES.glob("*.yaml"):
        task = yaml.safe_load(template.read_text())
        if "task" in task and isinstance(task["task"], str):
            data = str((folder / f"{task['task']}.jsonl").resolve())
            cache = str((folder.parent / "cache" / "datasets").resolve())
            task["dataset_kwargs"] = {"data_files": {"test": data}, "cache_dir": cache}
        write_whole(folder / template.name, yaml.safe_dump(task, sort_keys=False))


def _lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
