"""Flip-flop language modelling (arXiv:2306.00946): a register that is written, left alone, and read.

    tokens   write 1 ignore 0 read 1 ignore 1 ignore 0 read 1 ...        every instruction has a value behind it
    targets                   1                        1                 the value last written; nothing else counts

Ids: 0 write, 1 ignore, 2 read, then the values. The first instruction writes, the last one reads.
"""

from dataclasses import dataclass

import numpy as np

from data.errors import DataError, at_least
from data.synthetic.dice import Dice
from data.synthetic.task import NO_ANSWER, Rows, Task, octave, octaves

WRITE, IGNORE, READ, FIRST_VALUE = range(4)


@dataclass(frozen=True)
class FlipFlop(Task):
    """`ignore` is the chance of an instruction that leaves the register alone; the others are as likely to write as to read. The
    paper trains at 0.8 and judges at 0.98 (far back) and 0.1 (much in between) as well."""

    kind: str = "flip_flop"
    vocab_size: int = 5
    ignore: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("data.synthetic.vocab_size", self.vocab_size, FIRST_VALUE + 2)
        if not 0 <= self.ignore < 1:
            raise DataError(f"data.synthetic.ignore must lie in [0, 1), got {self.ignore!r}")

    @property
    def values(self) -> int:
        """Different contents of the register."""
        return self.vocab_size - FIRST_VALUE

    def check(self, seq_len: int) -> None:
        """To write, and to read."""
        at_least("data.seq_len", seq_len, 3)

    def draw(self, dice: Dice, seq_len: int) -> Rows:
        """I instructions, at every second place."""
        count = (seq_len + 1) // 2
        chance = dice.uniform(count)
        write = (1 + self.ignore) / 2
        does = np.select([chance < self.ignore, chance < write], [IGNORE, WRITE], READ)  # [R, I]
        does[:, 0], does[:, -1] = WRITE, READ
        shown = dice.below(self.values, count) + FIRST_VALUE
        step = np.arange(count)
        last = np.maximum.accumulate(np.where(does == WRITE, step, 0), axis=1)
        held = np.take_along_axis(shown, last, axis=1)
        asked = does == READ

        def spread(instructions: np.ndarray, values: np.ndarray | None = None) -> np.ndarray:
            full = np.zeros((len(does), seq_len), dtype=np.int64)
            full[:, ::2] = instructions
            if values is not None:
                full[:, 1::2] = values[:, : seq_len // 2]
            return full

        tokens = spread(does, np.where(asked, held, shown))
        slices = {
            "distance": spread(np.where(asked, octave(step - last), 0)),
            "position": spread(np.where(asked, octave(2 * step + 1), 0)),
        }
        meaning = spread(does, np.where(does == WRITE, shown, 0))
        return Rows(tokens, spread(np.where(asked, held, 0)), spread(asked) > 0, slices, meaning)

    def slices(self, seq_len: int) -> dict[str, tuple[str, ...]]:
        """By instructions since the register was written, and by place in the row, in powers of two."""
        return {"distance": octaves((seq_len - 1) // 2), "position": octaves(seq_len)}

    def solve(self, tokens: np.ndarray) -> np.ndarray:
        """By keeping a register."""
        answers = np.full(tokens.shape, NO_ANSWER, dtype=np.int64)
        for row, found in zip(tokens.tolist(), answers):
            register = NO_ANSWER
            for t, token in enumerate(row):
                if t and row[t - 1] == WRITE:
                    register = token
                if token == READ:
                    found[t] = register
        return answers

    def guess(self, seq_len: int) -> float:
        """Any value."""
        return 1 / self.values

    def tiny(self) -> "FlipFlop":
        """Fits as it is."""
        return self
