"""Look at what the memory of a run does with a text: ``python -m eval.inspect RUN --out DIR``."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, cast

from tqdm import tqdm

from eval import run_page
from eval.history import read_metrics
from eval.inspection import anypart
from eval.inspection.attribution import target_at
from eval.inspection.beside import TRAIN_TOKENS, Beside
from eval.inspection.numbers import number, plain
from eval.inspection.text import Text, loss, text_of
from eval.report import summary as report_row
from eval.run import LoadedRun, open_run
from eval.tables import markdown
from models import LM, UserError
from models.errors import guard, nearest

ANY = "any"  # stands for a model without a part that has an instrument
INSTRUMENTS = {  # kind of part -> module
    "gmt": "eval.inspection.gmt",
    "engram": "eval.inspection.engram",
    "bmojo": "eval.inspection.bmojo",
    ANY: "eval.inspection.anypart",
}
EXAMPLE = """examples:
  python -m eval.inspect runs/gmt --out inspection
  python -m eval.inspect runs/gmt --text story.txt --out inspection --ablate uniform_edges+zero_block:2 --ablate freeze_slot:7@0
  python -m eval.inspect runs/engram --baseline runs/dense --out inspection --ablate one_order:2+mean_gate@1
"""


class Instrument(Protocol):
    """What a module in INSTRUMENTS has. ``found`` is plain JSON: what `measure` and `more` gave, with what `look` added."""

    ABLATIONS: Mapping[str, str]  # what --ablate can be given, and what it does

    def measure(self, model: LM, text: Text) -> dict[str, Any]:
        """Of the parts of its kind, on the text; ``loss``: the mean over its tokens. The model is not changed."""
        ...

    def more(self, run: LoadedRun, text: Text, beside: Beside) -> dict[str, Any]:
        """What takes more than the text: the data that the run was trained on, another run. Raises UserError."""
        ...

    def changes(self, earlier: LM, model: LM, text: Text) -> dict[str, Any]:
        """Between two checkpoints of a run."""
        ...

    def history(self, model: LM, records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        """From the lines of ``metrics.jsonl``."""
        ...

    def standard(self, model: LM) -> list[str]:
        """Ablations that are made when none is asked for."""
        ...

    def check(self, model: LM, spec: str) -> None:
        """Raise UserError for an ablation that cannot be made."""
        ...

    def ablate(self, model: LM, spec: str) -> AbstractContextManager[None]:
        """Inside, the model runs without it."""
        ...

    def summary(self, found: dict[str, Any]) -> str:
        """A Markdown table."""
        ...

    def lists(self, found: dict[str, Any]) -> str:
        """The longer Markdown: what a picture cannot say."""
        ...

    def draw(self, found: dict[str, Any], folder: Path) -> list[Path]:
        """Write PNG files."""
        ...


def instrument(kind: str) -> Instrument:
    """The instrument for parts of this kind, one of INSTRUMENTS."""
    return cast(Instrument, importlib.import_module(INSTRUMENTS[kind]))


def kind_of(model: LM, wanted: str | None = None) -> str:
    """The wanted kind, or the first kind of part in the model that has an instrument, or `ANY`. Raises UserError for a wanted one
    that is not there."""
    kinds = dict.fromkeys(part.cfg.kind for _, _, part in model.parts())
    known = [*(kind for kind in kinds if kind in INSTRUMENTS), ANY]
    if wanted and wanted not in known:
        raise UserError(f"--part {wanted}: the model has no such part with an instrument{nearest(wanted, known)}")
    return wanted or known[0]


def look(
    run: LoadedRun,
    text: Text,
    ablations: Sequence[str] | None = None,
    earlier: LoadedRun | None = None,
    beside: Beside | None = None,
    part: str | None = None,
    at: Sequence[int] = (),
) -> dict[str, Any]:
    """Everything that there is to say, as plain JSON: of the parts of one kind, and under ``any`` of the model whatever its parts.

    ``ablations``: None for the standard ones; ``earlier``: an older checkpoint, to compare with; ``part``: the kind that is looked
    at; ``at``: the tokens behind which a prediction is traced back. Raises UserError."""
    model, kind = run.model, kind_of(run.model, part)
    tool = instrument(kind)
    wanted = tool.standard(model) if ablations is None else ablations
    for spec in wanted:
        tool.check(model, spec)
    for token in at:
        target_at(text, token)
    found = {"run": run.name, "step": run.step, "checkpoint": run.checkpoint, "kind": kind, "text": text.source}
    found["per"] = "token" if text.answers is None else "answer"  # what a loss is a mean over
    found["imported_from"] = run.config.get("imported_from")
    found |= tool.measure(model, text)
    found[ANY] = anypart.measure_all(model, text, at)
    found |= tool.more(run, text, beside or Beside())
    bar = tqdm(wanted, "ablations", unit="pass", leave=False, disable=None)
    found["ablations"] = [{"name": spec, "loss": _loss_without(tool, model, spec, text)} for spec in bar]
    found["since"] = {"step": earlier.step, **tool.changes(earlier.model, model, text)} if earlier else None
    logged = (run.dir / "metrics.jsonl").is_file()
    found["training"] = tool.history(model, read_metrics(run.dir)) if logged else None
    return found


def _loss_without(tool: Instrument, model: LM, spec: str, text: Text) -> float | None:
    with tool.ablate(model, spec):
        return plain(loss(model, text), 12)


def write(found: dict[str, Any], out: Path) -> list[Path]:
    """``inspect.json``, ``inspect.md`` and pictures. -> what was written. Raises UserError when the disk refuses."""
    tool = instrument(found["kind"])
    numbers, words = out / "inspect.json", out / "inspect.md"
    try:
        out.mkdir(parents=True, exist_ok=True)
        numbers.write_text(json.dumps(found, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        pictures = [*tool.draw(found, out), *anypart.draw_all(found[ANY], out)]
        shown = "\n\n".join(f"![{p.stem}]({p.name})" for p in pictures)
        words.write_text(f"{summary(found)}\n\n{shown}\n\n{tool.lists(found)}\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    return [numbers, words, *pictures]


def write_page(run: LoadedRun, out: Path) -> Path:
    """``report.html``: the run, and what was just written about it in ``out``."""
    return run_page.write(run.dir, report_row(run.dir) if is_logged(run) else {}, out, [out], run.model.cfg)


def is_logged(run: LoadedRun) -> bool:
    """Whether there is a line of a report to be had of it."""
    return bool(run.config.get("imported_from")) or (run.dir / "metrics.jsonl").is_file()


def summary(found: dict[str, Any]) -> str:
    """What was read, a row for each part, a row for each ablation: Markdown."""
    what = f"{found['run']}, step {found['step']}: {len(found['tokens']):,} tokens of {found['text']}"
    before = number(found["loss"])
    origin = f", imported from {found['imported_from']}" if found["imported_from"] else ""
    tables = (instrument(found["kind"]).summary(found), anypart.summary_all(found[ANY]))
    text = "\n\n".join((f"{what}{origin}, loss {before:.4f} nats per {found['per']}", *filter(None, tables)))
    if found["ablations"]:
        rows = [(a["name"], a["loss"], number(a["loss"]) - before) for a in found["ablations"]]
        text += f"\n\n{markdown(('without', 'loss', 'change'), rows)}"
    return text


# -- the command


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m eval.inspect",
        description=__doc__,
        epilog=EXAMPLE + _ablations(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("run", help="a run folder of any model, or a model exported in Hugging Face format")
    p.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="for inspect.json, inspect.md, pictures, and report.html, a page of them all",
    )
    p.add_argument("--text", metavar="FILE", help="what is read; default: the start of the run's validation data")
    p.add_argument("--tokens", type=int, default=2048, help="of the text, at most (default: 2048)")
    p.add_argument(
        "--ablate",
        action="append",
        metavar="WHAT",
        help="also the loss without this (repeatable; a+b: without both); default: those that say most; 'none': nothing",
    )
    p.add_argument(
        "--part",
        metavar="KIND",
        help=f"what is looked at, of {', '.join(INSTRUMENTS)}; default: the first in the model",
    )
    p.add_argument(
        "--at",
        type=int,
        action="append",
        default=[],
        metavar="N",
        help="trace back the prediction after token N of the text, from 0 (repeatable); default: those that far context helps most",
    )
    p.add_argument(
        "--baseline",
        metavar="RUN",
        help="another run with the same tokenizer, to compare with (engram)",
    )
    p.add_argument(
        "--train-tokens",
        type=int,
        default=TRAIN_TOKENS,
        help="of the training data that are counted (engram); 0: none (default: %(default)s)",
    )
    p.add_argument("--since", type=int, metavar="STEP", help="also what has changed since this older checkpoint")
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", help="float32, bfloat16, float16; default: that of the weights")
    p.add_argument("--tables", metavar="KIND", help="where tables are kept: resident, host, or mmap (left in the file)")
    p.add_argument("--step", type=int, help="an older checkpoint")
    p.add_argument("--allow-foreign", action="store_true", help="let a config run code from outside this repository")
    return p


def check_beside(run: LoadedRun, beside: Beside) -> None:
    """Raise UserError for what does not fit."""
    if beside.train_tokens < 0:
        raise UserError(f"--train-tokens must not be negative, got {beside.train_tokens}")
    other = beside.baseline
    if other is not None and other.tokenizer.fingerprint != run.tokenizer.fingerprint:
        raise UserError(
            f"--baseline: {other.name} has another tokenizer than {run.name}, so their tokens are not the same"
        )


def _ablations() -> str:
    lines = ["", "what --ablate takes away:"]
    for kind in INSTRUMENTS:
        lines += [f"  {kind + ':':<8}{form:<26}{what}" for form, what in instrument(kind).ABLATIONS.items()]
    return "\n".join(lines)


@guard
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)

    def opened(path: str, step: int | None = None) -> LoadedRun:
        return open_run(path, args.device, args.dtype, step, args.allow_foreign, tables=args.tables, tasks=True)

    run, earlier = opened(args.run, args.step), None if args.since is None else opened(args.run, args.since)
    kind_of(run.model, args.part)  # before a text is read for nothing
    beside = Beside(args.train_tokens, None if args.baseline is None else opened(args.baseline))
    check_beside(run, beside)
    wanted = [] if args.ablate == ["none"] else args.ablate
    found = look(run, text_of(run, args.text, args.tokens), wanted, earlier, beside, args.part, args.at)
    files = [*write(found, Path(args.out)), write_page(run, Path(args.out))]
    print(summary(found))
    print(f"\n{Path(args.out)}/: {', '.join(p.name for p in files)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
