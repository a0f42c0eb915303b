"""Batches of a synthetic task, as a run takes them: the counterpart of a prepared corpus and its loader."""

from collections.abc import Iterator
from dataclasses import asdict

import numpy as np
import torch

from data.config import DataConfig
from data.errors import DataError
from data.stream import Batch, Stream
from data.synthetic.task import Rows, Task

PREFETCH = 2


class Synthetic:
    """The rows of `cfg.synthetic`. Training rows depend on the run's seed, validation rows on `cfg.split_seed` alone."""

    tokenizer = None  # there is no text

    def __init__(self, cfg: DataConfig):
        assert isinstance(cfg.synthetic, Task)
        self.task, self.seq_len, self.split_seed = cfg.synthetic, cfg.seq_len, cfg.split_seed

    @property
    def vocab_size(self) -> int:
        """Ids of the task."""
        return self.task.vocab_size

    def train(self, batch_size: int, seed: int, rank: int = 0, world: int = 1, prefetch: int = PREFETCH) -> Stream:
        """Endless training batches of one rank; `batch_size` is rows per rank and call."""
        if batch_size < 1 or seed < 0 or not 0 <= rank < world:
            raise DataError(f"loader: batch_size {batch_size}, seed {seed}, rank {rank} of {world} cannot be")
        producer = _Producer(self.task, self.seq_len, seed, (batch_size, rank, world))
        return Stream(
            producer, {"seed": seed, "seq_len": self.seq_len, "synthetic": self.record()["synthetic"]}, prefetch
        )

    def once(self, rows: int, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[Rows]:
        """The first `rows` of the validation split, once, in order; every rank gets the same number of batches.

        The last ones are filled up with rows that ask nothing.
        """
        step = batch_size * world
        for first in range(0, rows, step):
            numbers = np.arange(first, first + step)[rank * batch_size : (rank + 1) * batch_size]
            found = self.task.rows(numbers, self.seq_len, self.split_seed, "val")
            found.loss_mask[numbers >= rows] = False
            yield found

    def record(self) -> dict:
        """What the rows are made of: plain JSON."""
        return {"synthetic": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.task).items()}}


class _Producer:
    """Row numbers in order; the position is that of the next one over all ranks."""

    def __init__(self, task: Task, seq_len: int, seed: int, share: tuple[int, int, int]):
        self.task, self.seq_len, self.seed = task, seq_len, seed
        self.batch_size, self.rank, self.world = share
        self.row = 0

    def next(self) -> Batch:
        first = self.row + self.rank * self.batch_size
        self.row += self.batch_size * self.world
        return as_batch(self.task.rows(np.arange(first, first + self.batch_size), self.seq_len, self.seed, "train"))

    def position(self) -> dict:
        return {"row": self.row}

    def seek(self, position: dict) -> None:
        self.row = position["row"]


def as_batch(rows: Rows) -> Batch:
    """tokens, targets, positions int64 [B, T], loss_mask bool [B, T]; every row is one whole sequence, nothing is padding."""
    tokens = torch.from_numpy(rows.tokens)
    return {
        "tokens": tokens,
        "targets": torch.from_numpy(rows.targets),
        "loss_mask": torch.from_numpy(rows.loss_mask),
        "positions": torch.arange(tokens.shape[1]).expand_as(tokens),
        "cu_seqlens": None,
        "valid": None,
    }
