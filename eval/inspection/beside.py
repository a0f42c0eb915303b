"""What an instrument may look at beside a text: the data that the run was trained on, and another run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from configs import schema
from data import Corpus, DataError, Loader
from eval.corpus_tasks import open_run_corpus
from eval.inspection.text import Text
from eval.run import LoadedRun
from eval.scoring import pad
from models import Batch, UserError

TRAIN_TOKENS = 1 << 20


class Beside(NamedTuple):
    train_tokens: int = TRAIN_TOKENS  # of the training data, at most; 0: none
    baseline: LoadedRun | None = None  # with the same tokenizer


def corpus_of(run: LoadedRun) -> tuple[Corpus | None, str]:
    """-> (what the run was trained on, or why that is not there)."""
    try:
        return open_run_corpus(run.dir), ""
    except (UserError, DataError) as error:
        return None, str(error)


def batches_of(run: LoadedRun, corpus: Corpus) -> Iterator[Batch]:
    """What the run was trained on, step by step: all rows of a step in one batch."""
    cfg = schema.load(run.dir / "config.yaml")
    d, rows = cfg.data, cfg.train.batch_size
    options: Any = {"packing": d.packing, "max_docs_per_row": d.max_docs_per_row, "prefetch": 0}
    loader = Loader(corpus.train, corpus.tokenizer, d.seq_len, rows, cfg.seed, **options)
    for _ in range(run.step):
        yield Batch(**loader.next())  # pyright: ignore[reportArgumentType]


def batches_of_text(text: Text) -> Iterator[Batch]:
    """As `eval.inspection.text.read` forms them, on the CPU."""
    for windows in text.batches():
        tokens, valid = pad([w[:-1] for w in windows], torch.device("cpu"))
        yield Batch(tokens, valid=valid)
