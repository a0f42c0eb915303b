"""Does a longer context help, also beyond the length trained at? ``python -m eval.length RUN --lengths 256,1024,8192``.

The first tokens of long held-out documents are scored again and again, cut into pieces of each length: the same targets each time,
with more or less before them. A model that makes use of what lies far back has less loss the longer the pieces are; one that
breaks down where no training row has been has more. At the longest length also loss by position: where it breaks.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from data import Corpus
from data.tokenizer import Tokenizer
from eval.corpus_tasks import open_run_corpus
from eval.run import LoadedRun, open_run
from eval.tables import markdown
from models import LM, Batch, UserError, zoo
from models.config import ModelConfig
from models.errors import guard
from training.runfolder import write_whole

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
DOCUMENTS = 16
BATCH_TOKENS = 8192  # in one forward, or one row of the length where that is more
EDGE = 256  # positions below it are one bucket; from there on powers of two


def long_documents(documents: Iterator[list[int]], tokenizer: Tokenizer, length: int, most: int) -> Tensor:
    """The beginnings of the first ``most`` documents of at least ``length`` tokens -> int64 [documents, length + 1]: a beginning
    of text, then tokens; inputs are all but the last, targets all but the first. Raises UserError when there is none."""
    found: list[list[int]] = []
    longest = 0
    for tokens in documents:
        longest = max(longest, len(tokens))
        if len(tokens) >= length:
            found.append([tokenizer.bos_id, *tokens[:length]])
        if len(found) == most:
            break
    if not found:
        raise UserError(f"no held-out document has {length} tokens, the longest has {longest}")
    return torch.tensor(found)


@torch.no_grad()
def token_losses(model: LM, rows: Tensor, length: int) -> Tensor:
    """rows int64 [R, N + 1] -> loss of each of the N targets in nats, fp64 [R, N], every ``length`` tokens being a sequence alone.
    N is a multiple of it."""
    device = model.embed.weight.device
    tokens, targets = (x.reshape(-1, length) for x in (rows[:, :-1], rows[:, 1:]))
    step = max(1, BATCH_TOKENS // length)
    found = []
    for first in range(0, len(tokens), step):
        h, _, _ = model.features(Batch(tokens[first : first + step].to(device)))
        nll, _ = model.token_nll(h, targets[first : first + step].to(device))
        found.append(nll.double().cpu())
    return torch.cat(found).view(len(rows), -1)


def by_position(losses: Tensor) -> list[dict[str, Any]]:
    """losses [R, N] by position -> per bucket its first position and mean loss."""
    edges = [0]
    while (edges[-1] or EDGE // 2) * 2 < losses.shape[1]:
        edges.append((edges[-1] or EDGE // 2) * 2)
    return [
        {"from": first, "to": stop, "loss": losses[:, first:stop].mean().item()}
        for first, stop in zip(edges, [*edges[1:], losses.shape[1]], strict=True)
    ]


def measure(model: LM, rows: Tensor, lengths: Sequence[int]) -> dict[str, Any]:
    """-> {"lengths": [{"length", "loss", "ppl"}], "positions": `by_position` at the longest}."""
    found = []
    losses = torch.empty(0)
    for length in tqdm(sorted(lengths), "context lengths", leave=False, disable=None):
        losses = token_losses(model, rows, length)
        mean = losses.mean().item()
        found.append({"length": length, "loss": mean, "ppl": math.exp(min(mean, 700))})
    return {"lengths": found, "positions": by_position(losses)}


def evaluate(
    run: LoadedRun, lengths: Sequence[int] = LENGTHS, documents: int = DOCUMENTS, text: Path | None = None
) -> dict[str, Any]:
    """`measure` on the run's held-out documents, or on a file's text as one document cut into pieces of the longest length ->
    results, laid out as lm-eval's and written to ``RUN/eval/length_<step>.json``. Raises UserError."""
    check(run.model.cfg, lengths)
    longest, tokenizer = max(lengths), run.tokenizer
    if text is None:
        val = open_run_corpus(run.dir).val
        rows = long_documents((val.read(doc).tolist() for doc in range(len(val))), tokenizer, longest, documents)
    else:
        rows = long_documents(_pieces(text, tokenizer, longest), tokenizer, longest, documents)
    found = measure(run.model, rows, lengths)
    losses = {f"loss_{one['length']},none": one["loss"] for one in found["lengths"]}
    losses |= {f"loss_at_{one['from']},none": one["loss"] for one in found["positions"]}
    results = {
        "results": {"length": {"alias": "length", **losses}},
        "n-samples": {"length": {"original": len(rows), "effective": len(rows)}},
        "config": {"step": run.step, "trained_length": run.trained_length, "tokens": len(rows) * longest},
        **found,
    }
    target = run.dir / "eval" / f"length_{run.step}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, json.dumps(results, indent=1) + "\n")
    return results


def reach(model: ModelConfig, corpus: Corpus) -> tuple[int, str]:
    """-> (the longest length in tokens that a model and its held-out documents allow, what ends it there)."""
    longest = int(corpus.val.lengths.max(initial=0))
    if model.learned_positions and model.max_seq_len < longest:
        return model.max_seq_len, f"the model has only {model.max_seq_len} learned positions"
    return longest, f"the longest held-out document has {longest} tokens"


def check(model: ModelConfig, lengths: Sequence[int]) -> None:
    """Raise UserError for lengths that the model or the measure cannot take."""
    for length in lengths:
        if length < 2 or max(lengths) % length:
            raise UserError(f"lengths: {length} does not divide the longest, {max(lengths)}, into pieces of 2 or more")
    if model.learned_positions and max(lengths) > model.max_seq_len:
        raise UserError(f"lengths: {max(lengths)} is longer than the learned positions, {model.max_seq_len}")


def _pieces(text: Path, tokenizer: Tokenizer, length: int) -> Iterator[list[int]]:
    try:
        tokens = tokenizer.encode(text.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text: cannot read '{text}': {error}") from error
    for start in range(0, max(1, len(tokens) - length + 1), length):
        yield list(tokens[start : start + length])


def table(results: dict[str, Any]) -> str:
    """Loss by length of the context, and by position at the longest."""
    trained = results["config"]["trained_length"]
    rows = [
        (f"{one['length']}{' (trained at)' if one['length'] == trained else ''}", one["loss"], one["ppl"])
        for one in results["lengths"]
    ]
    places = [(f"{one['from']} to {one['to'] - 1}", one["loss"]) for one in results["positions"]]
    longest = results["lengths"][-1]["length"]
    return (
        f"{markdown(('pieces of', 'loss (nats)', 'perplexity'), rows)}\n\n"
        f"{markdown((f'position in {longest}', 'loss (nats)'), places)}"
    )


@guard
def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m eval.length",
        description="Loss of the same held-out tokens with more or less context, also beyond the length trained at.",
        epilog="example: python -m eval.length runs/quickstart --lengths 256,1024,4096",
    )
    p.add_argument("run", help="a run folder, or a model in Hugging Face format")
    p.add_argument(
        "--lengths",
        default=",".join(map(str, LENGTHS)),
        help="tokens of a piece; each divides the longest (default: %(default)s)",
    )
    p.add_argument("--documents", type=int, default=DOCUMENTS, help="at most (default: %(default)s)")
    p.add_argument("--text", type=Path, metavar="FILE", help="another text than the run's held-out documents")
    p.add_argument("--device", default="auto")
    p.add_argument("--step", type=int, help="an older checkpoint")
    p.add_argument("--allow-foreign", action="store_true", help="let a config run code from outside this repository")
    args = p.parse_args(argv)
    if args.documents < 1:
        raise UserError(f"--documents must be at least 1, got {args.documents}")
    words = [word.strip() for word in args.lengths.split(",")]
    if not all(word.isdigit() for word in words):
        raise UserError(f"--lengths: expected numbers with commas between them, got '{args.lengths}'")
    zoo.allow_foreign(args.allow_foreign)
    run = open_run(args.run, args.device, step=args.step)
    print(table(evaluate(run, [int(word) for word in words], args.documents, args.text)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
