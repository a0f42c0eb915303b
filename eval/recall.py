"""Accuracy at the answers of a synthetic task: while a run trains, when it ends, and later on other settings of the task."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from configs import schema
from data.synthetic.feed import Synthetic, as_batch
from data.synthetic.task import Rows
from eval.run import pick_device
from eval.tables import markdown
from models import LM, Batch, UserError, zoo
from models.errors import guard
from models.folder import load_model, run_config
from models.parsing import from_dict, set_key, to_dict
from training.parallel import World, all_reduce

BATCH_TOKENS = 1 << 15  # in one forward, when a finished run is judged


class Tally:
    """Answers, right ones and their loss: in all, and by every label of every slice."""

    def __init__(self, slices: Mapping[str, Sequence[str]]) -> None:
        self.slices = slices
        self.nll = torch.zeros(1, dtype=torch.float64)
        labels = 1 + sum(map(len, slices.values()))  # the first: all answers
        self.right, self.count = torch.zeros(2, labels, dtype=torch.float64)

    def add(self, nll: Tensor, right: Tensor, rows: Rows) -> None:
        """nll float [n] in nats and right bool [n], of the answers of ``rows`` in order."""
        self.nll += nll.double().sum().cpu()
        found, first = right.double().cpu(), 1
        labels = [torch.zeros(len(found), dtype=torch.int64)]
        for name, names in self.slices.items():
            labels.append(first + torch.from_numpy(rows.slices[name][rows.loss_mask]))
            first += len(names)
        for label in labels:
            self.right.index_add_(0, label, found)
            self.count.index_add_(0, label, torch.ones_like(found))

    def result(self, w: World | None = None) -> dict[str, Any]:
        """-> {"loss", "accuracy", "answers", "by": {slice: {label: {"accuracy", "answers"}}}}, over all ranks."""
        sums = torch.cat((self.nll, self.right, self.count))
        if w is not None:
            sums = all_reduce(sums.to(w.device), w).cpu()
        (nll,), right, count = sums.split((1, len(self.right), len(self.count)))
        accuracy = (right / count.clamp(min=1)).tolist()
        answers = [int(n) for n in count.tolist()]
        by, at = {}, 1
        for name, labels in self.slices.items():
            found = zip(labels, accuracy[at : at + len(labels)], answers[at : at + len(labels)], strict=True)
            by[name] = {label: {"accuracy": a, "answers": n} for label, a, n in found if n}
            at += len(labels)
        return {"loss": nll.item() / max(1, answers[0]), "accuracy": accuracy[0], "answers": answers[0], "by": by}


@torch.no_grad()
def measure(
    model: LM,
    data: Synthetic,
    batches: Iterable[Rows],
    autocast: Callable[[], Any] = nullcontext,
    w: World | None = None,
) -> dict[str, Any]:
    """Of a model in eval mode; `Tally.result`."""
    tally = Tally(data.task.slices(data.seq_len))
    device = model.embed.weight.device
    for rows in batches:
        batch = Batch(**cast(Any, as_batch(rows))).to(device)
        assert batch.targets is not None
        mask = batch.loss_mask
        with autocast():
            h, _, _ = model.features(batch)
            nll, right = model.token_nll(h[mask][None], batch.targets[mask][None])
        tally.add(nll[0], right[0], rows)
    return tally.result(w)


def validation_rows(cfg: schema.RunConfig) -> int:
    """How many rows of the validation split ``train.val_tokens`` are."""
    return max(1, cfg.train.val_tokens // cfg.data.seq_len)


def evaluate(
    run: Path | str, changes: Sequence[str] = (), rows: int | None = None, device: str = "auto", step: int | None = None
) -> dict[str, Any]:
    """Judge a run on its task's validation rows, by default as many as its validation had -> results, laid out as lm-eval's and
    written to ``RUN/eval/<task>_<step>.json``.

    ``changes``: settings of the data section that differ from the run's, ``data.synthetic.lead=16``. Raises UserError for a run
    that has no task and for changes that are none of these.
    """
    run = Path(run)
    run_config(run)
    trained = schema.load(run / "config.yaml")
    if trained.data.synthetic is None:
        raise UserError(f"{run}: not trained on a synthetic task")
    cfg = changed(trained, changes)
    model, folder = load_model(run, pick_device(device), step=step)
    data = Synthetic(cfg.data)
    if data.vocab_size > model.cfg.vocab_size:
        raise UserError(f"the task has {data.vocab_size} ids, the model only {model.cfg.vocab_size}")
    count = rows or validation_rows(trained)
    found = measure(model, data, data.once(count, max(1, BATCH_TOKENS // data.seq_len)))
    name = re.sub(r"[^\w.+-]+", "-", "_".join((data.task.kind, *(c.removeprefix("data.") for c in changes))))
    at = int(folder.name.removeprefix("step_"))
    results = {
        "results": {name: {"alias": name, "acc,none": found["accuracy"], "nll,none": found["loss"]}},
        "n-samples": {name: {"original": count, "effective": count}},
        "config": {"step": at, "seq_len": data.seq_len, "split_seed": cfg.data.split_seed, **data.record()},
        "guess": data.task.guess(data.seq_len),
        **found,
    }
    _store(results, run / "eval" / f"{name}_{at}.json")
    return results


def changed(cfg: schema.RunConfig, changes: Sequence[str]) -> schema.RunConfig:
    """A run's config with other settings of its task. Raises UserError for changes that cannot be."""
    raw = to_dict(cfg)
    for change in changes:
        if not change.startswith("data."):
            raise UserError(f"'{change}': only settings of the data section can differ, e.g. data.synthetic.lead=16")
        set_key(raw, change)
    found = from_dict(schema.RunConfig, raw)
    if found.data.synthetic is None:
        raise UserError("a run on a synthetic task is judged on one")
    return found


def _store(results: dict[str, Any], target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
        temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        temporary.replace(target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error


def table(results: dict[str, Any]) -> str:
    """Accuracy in all and by slice, and what guessing would give."""
    (name,) = results["results"]
    rows = [(name, "all", results["accuracy"], results["answers"])]
    rows += [
        (f"by {slice_}", label, one["accuracy"], one["answers"])
        for slice_, labels in results["by"].items()
        for label, one in labels.items()
    ]
    head = markdown(("task", "answers", "accuracy", "count"), rows)
    return f"{head}\nguessing one of the right kind: {results['guess']:.4f}; loss {results['loss']:.4f} nats per answer"


@guard
def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m eval.recall",
        description="Accuracy of a run on its synthetic task, also on other settings of the task than it was trained on.",
        epilog="example: python -m eval.recall runs/mqar data.seq_len=256 data.synthetic.lead=32",
    )
    p.add_argument("run", help="a run folder")
    p.add_argument("changes", nargs="*", metavar="key=value", help="settings of the data section to change")
    p.add_argument("--rows", type=int, help="rows of the validation split; default: as many as the run's validation")
    p.add_argument("--device", default="auto")
    p.add_argument("--step", type=int, help="an older checkpoint")
    p.add_argument("--allow-foreign", action="store_true", help="let a config run code from outside this repository")
    args = p.parse_intermixed_args(argv)
    if args.rows is not None and args.rows < 1:
        raise UserError(f"--rows must be at least 1, got {args.rows}")
    zoo.allow_foreign(args.allow_foreign)
    print(table(evaluate(args.run, args.changes, args.rows, args.device, args.step)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
