"""Loss by how often a token's n-gram was seen in training: ``python -m eval.frequency RUN``.

The n-gram of a position is its last ``order`` tokens, the current one included: what a memory addressed by n-grams looks up there,
and what the model predicts the next token from. Bucket 0
holds n-grams that the training text does not have, the others powers of ten.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from configs import schema
from data import Corpus, iterate_once
from eval.corpus_tasks import open_run_corpus
from eval.run import LoadedRun, open_run
from eval.tables import markdown
from models import Batch, UserError, zoo
from models.errors import guard
from training.runfolder import write_whole

EDGES = (0, 1, 10, 100, 1000)  # the least count of each bucket
TRAIN_TOKENS = 64 << 20  # of the training text that are counted
BATCH_TOKENS = 8192


class Counts(NamedTuple):
    """How often each n-gram stands in a text."""

    codes: np.ndarray  # int64, sorted
    times: np.ndarray
    order: int
    vocab_size: int
    tokens: int  # that were counted

    def of(self, codes: np.ndarray) -> np.ndarray:
        """-> how often these n-grams were seen."""
        place = np.searchsorted(self.codes, codes).clip(max=len(self.codes) - 1)
        return np.where(self.codes[place] == codes, self.times[place], 0)


def encode(windows: np.ndarray, vocab_size: int) -> np.ndarray:
    """windows [..., order] of token ids -> one int64 each, oldest token first."""
    code = np.zeros(windows.shape[:-1], dtype=np.int64)
    for i in range(windows.shape[-1]):
        code = code * vocab_size + windows[..., i]
    return code


def count(corpus: Corpus, order: int, limit: int = TRAIN_TOKENS) -> Counts:
    """The n-grams of the training documents, from the first source on, of at most ``limit`` tokens; a document begins with its
    first token's sign, as it does for the model. Raises UserError where an n-gram does not fit in 63 bits."""
    size, codes, seen = corpus.vocab_size, [], 0
    if order < 1 or size**order >= 2**63:
        most = int(63 / np.log2(size))
        raise UserError(f"order must lie between 1 and {most} with {size} ids, got {order}")
    for document in _documents(corpus):
        tokens = np.concatenate([[corpus.tokenizer.bos_id], document]).astype(np.int64)
        if len(tokens) >= order:
            codes.append(encode(np.lib.stride_tricks.sliding_window_view(tokens, order), size))
        seen += len(document)
        if seen >= limit:
            break
    found, times = np.unique(np.concatenate(codes), return_counts=True)
    return Counts(found, times, order, size, seen)


def _documents(corpus: Corpus) -> Iterator[np.ndarray]:
    for shards, _ in corpus.train:
        for doc in range(len(shards)):
            yield shards.read(doc)


def seen_in_training(batch: Batch, counts: Counts) -> Tensor:
    """-> int64 [B, T]: how often the n-gram that ends at each token was seen; -1 where its row begins within the n-gram."""
    tokens, back = batch.tokens, counts.order - 1
    padded = torch.nn.functional.pad(tokens, (back, 0))
    windows = padded.unfold(1, counts.order, 1).numpy()
    times = torch.from_numpy(counts.of(encode(windows, counts.vocab_size)))
    place = torch.arange(tokens.shape[1]).expand_as(tokens) if batch.positions is None else batch.positions
    return times.masked_fill(place < back, -1)


@torch.no_grad()
def measure(run: LoadedRun, corpus: Corpus, counts: Counts) -> list[dict[str, Any]]:
    """-> per bucket that is not empty: its edges, targets and mean loss in nats, on the text that the run validates on."""
    cfg, model = schema.load(run.dir / "config.yaml"), run.model
    d, limit, device = cfg.data, cfg.train.val_tokens or None, model.embed.weight.device
    edges = torch.tensor([-1, *EDGES])
    sums, numbers = (torch.zeros(len(edges), dtype=torch.float64) for _ in range(2))
    rows = max(1, BATCH_TOKENS // d.seq_len)
    for fields in iterate_once(
        corpus.val, corpus.tokenizer, d.seq_len, rows, d.packing, d.max_docs_per_row, limit_tokens=limit
    ):
        batch: Any = Batch(**fields)  # pyright: ignore[reportArgumentType]
        bucket = torch.bucketize(seen_in_training(batch, counts), edges, right=True) - 1
        moved = batch.to(device)
        h, _, _ = model.features(moved)
        nll, _ = model.token_nll(h[moved.loss_mask][None], moved.targets[moved.loss_mask][None])
        chosen = bucket[batch.loss_mask]
        sums.index_add_(0, chosen, nll[0].double().cpu())
        numbers.index_add_(0, chosen, torch.ones_like(chosen, dtype=torch.float64))
    names = ["start", *map(str, EDGES)]
    return [
        {"bucket": name, "targets": int(n), "loss": s / n}
        for name, s, n in zip(names, sums.tolist(), numbers.tolist(), strict=True)
        if n
    ]


def run_frequency(path: Path | str, order: int, device: str = "auto") -> dict[str, Any]:
    """`measure` of a run's newest checkpoint -> results, laid out as lm-eval's and written to ``RUN/eval/frequency.json``."""
    path = Path(path)
    corpus, run = open_run_corpus(path), open_run(path, device)
    counts = count(corpus, order)
    buckets = measure(run, corpus, counts)
    losses = {f"loss_{b['bucket']},none": b["loss"] for b in buckets}
    targets = sum(b["targets"] for b in buckets)
    results = {
        "results": {"frequency": {"alias": "frequency", **losses}},
        "n-samples": {"frequency": {"original": targets, "effective": targets}},
        "config": {"step": run.step, "order": order, "train_tokens": counts.tokens},
        "buckets": buckets,
    }
    target = path / "eval" / "frequency.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, json.dumps(results, indent=1) + "\n")
    return results


def table(results: dict[str, Any]) -> str:
    """Bucket, targets and loss."""
    order, names = (
        results["config"]["order"],
        {"start": "row begins", "0": "never", str(EDGES[-1]): f"{EDGES[-1]} or more"},
    )
    names |= {str(low): f"{low} to {high - 1}" for low, high in pairwise(EDGES[1:])}
    rows = [(names[b["bucket"]], b["targets"], b["loss"]) for b in results["buckets"]]
    return markdown((f"last {order} tokens seen in training", "targets", "loss (nats)"), rows)


@guard
def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m eval.frequency",
        description="Validation loss of a run by how often the last tokens were seen together in training.",
        epilog="example: python -m eval.frequency runs/quickstart --order 3",
    )
    p.add_argument("run", help="a run folder")
    p.add_argument("--order", type=int, default=2, help="tokens in an n-gram (default: %(default)s)")
    p.add_argument("--device", default="auto")
    p.add_argument("--allow-foreign", action="store_true", help="let a config run code from outside this repository")
    args = p.parse_args(argv)
    zoo.allow_foreign(args.allow_foreign)
    print(table(run_frequency(args.run, args.order, args.device)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
