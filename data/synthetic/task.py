"""What a synthetic task is: rows drawn from numbers, with the places that count, and answers that a program can find.

A row is a pure function of (task, seq_len, seed, split, row number). Training and validation rows cannot meet, whatever the
seeds: what a row means is hashed, one half of all meanings is for training, the other for validation (a task may part them
in another way), and a row that falls on the wrong side is drawn again. R rows, T places in a row.
"""

from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np

from data.errors import DataError, at_least
from data.synthetic.dice import Dice, hashed

SPLITS = ("train", "val")
NO_ANSWER = -1
_TASK, _CHUNK, _ATTEMPTS = (
    6,
    4096,
    64,
)  # a row is redrawn with probability 1/2, so 64 times never happens to a real task


class Rows(NamedTuple):
    tokens: np.ndarray  # int64 [R, T]
    targets: np.ndarray  # int64 [R, T], 0 where nothing is asked
    loss_mask: np.ndarray  # bool [R, T], where an answer is asked
    slices: dict[str, np.ndarray]  # int64 [R, T] for each of Task.slices: the label of each answer, by its index
    meaning: np.ndarray  # int64 [R, N]: equal for rows that ask the same; noise that does not matter is left out


@dataclass(frozen=True)
class Task:
    """A task's own settings, as `data.synthetic` in a run's config. Bad values raise DataError.

    A new task is one file with a subclass, and one line in `data.synthetic.TASKS`.
    """

    kind: str = ""
    vocab_size: int = 64

    def __post_init__(self) -> None:
        at_least("data.synthetic.vocab_size", self.vocab_size, 2)

    def check(self, seq_len: int) -> None:
        """Raise DataError when a row does not fit into `seq_len` places."""
        raise NotImplementedError

    def draw(self, dice: Dice, seq_len: int) -> Rows:
        """One row for each row of the dice."""
        raise NotImplementedError

    def candidates(self, dice: Dice, seq_len: int, split: str) -> tuple[Rows, np.ndarray]:
        """One row for each row of the dice, and bool [R]: which of them are of the split. The others are drawn again.

        A task whose splits differ in what they ask, not in a hash, overrides this and draws from the split's own.
        """
        rows = self.draw(dice, seq_len)
        return rows, hashed(rows.meaning) & np.uint64(1) == SPLITS.index(split)

    def slices(self, seq_len: int) -> dict[str, tuple[str, ...]]:
        """By what accuracy is reported: name -> labels in order."""
        return {}

    def solve(self, tokens: np.ndarray) -> np.ndarray:
        """int [R, T] -> int64 [R, T]: the answer at every place that could ask for one, else NO_ANSWER. A plain program that
        reads nothing but the tokens, and only those up to the place."""
        raise NotImplementedError

    def guess(self, seq_len: int) -> float:
        """The accuracy of the best answer that looks nothing up, in rows of that length."""
        raise NotImplementedError

    def tiny(self) -> Self:
        """Fits into 64 places."""
        raise NotImplementedError

    def rows(self, numbers: np.ndarray, seq_len: int, seed: int, split: str) -> Rows:
        """The rows with these numbers [R]."""
        parts = [self._rows(numbers[at : at + _CHUNK], seq_len, seed, split) for at in range(0, len(numbers), _CHUNK)]
        if len(parts) == 1:
            return parts[0]
        tokens, targets, loss_mask, slices, meaning = zip(*parts)
        joined = {name: np.concatenate([one[name] for one in slices]) for name in slices[0]}
        tokens, targets, loss_mask, meaning = map(np.concatenate, (tokens, targets, loss_mask, meaning))
        return Rows(tokens, targets, loss_mask, joined, meaning)

    def _rows(self, numbers: np.ndarray, seq_len: int, seed: int, split: str) -> Rows:
        side = SPLITS.index(split)
        found: Rows | None = None
        pending = np.arange(len(numbers))
        for attempt in range(_ATTEMPTS):
            drawn, right = self.candidates(Dice(numbers[pending], seed, _TASK, side, attempt), seq_len, split)
            if found is None:
                found = drawn
            else:
                _replace(found, pending, drawn, right)
            pending = pending[~right]
            if not len(pending):
                return found
        raise DataError(f"data.synthetic: {self.kind} has too few different rows to tell validation from training")


def octaves(longest: int) -> tuple[str, ...]:
    """Labels for the numbers from 1 to `longest`, in powers of two: 1, 2-3, 4-7, ..."""
    return ("1", *(f"{1 << n}-{(2 << n) - 1}" for n in range(1, longest.bit_length())))


def octave(numbers: np.ndarray) -> np.ndarray:
    """The label of each number in `octaves`, by its index; 0 for 0."""
    return np.maximum(np.frexp(numbers)[1].astype(np.int64) - 1, 0)


def _replace(rows: Rows, at: np.ndarray, new: Rows, keep: np.ndarray) -> None:
    """Write those of the `new` rows that are to be kept at the places `at`."""
    pairs = [(rows.tokens, new.tokens), (rows.targets, new.targets), (rows.loss_mask, new.loss_mask)]
    pairs += [(rows.meaning, new.meaning), *((old, new.slices[name]) for name, old in rows.slices.items())]
    for old, drawn in pairs:
        old[at[keep]] = drawn[keep]
