"""Induction: what followed the special token when it last came (arXiv:2209.11895; as a task, arXiv:2312.00752, section 4.1).

    tokens   d a S c b b a S c d S        asks: 2
    targets                c     c        the only places that count

Ids: 0 is the special token, all others are both values and noise.
"""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from data.errors import DataError
from data.synthetic.dice import Dice
from data.synthetic.layout import Several, at_most, check_several, option, scattered, several, spread
from data.synthetic.task import NO_ANSWER, Rows, Task, octave, octaves

SPECIAL = 0
_SAMPLE = 1024  # rows, to estimate what a guess can reach


@dataclass(frozen=True)
class Induction(Task):
    """`asks` times the special token comes again, the last time at the row's end; its value follows it every time."""

    kind: str = "induction"
    asks: Several = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_several("asks", self.asks, 1)
        if self.vocab_size < 3:
            raise DataError("data.synthetic.vocab_size must be at least 3: the special token and two values")

    @property
    def most(self) -> int:
        """Questions of the fullest row."""
        return max(several(self.asks))

    def check(self, seq_len: int) -> None:
        """Two places each time but the last."""
        if seq_len < 2 * self.most + 1:
            raise DataError(
                f"data.seq_len={seq_len} is too short for {self.most} questions; they need {2 * self.most + 1}"
            )

    def draw(self, dice: Dice, seq_len: int) -> Rows:
        """Row by row: how many questions, the value, where they lie, and the noise."""
        asks = dice.choice(several(self.asks))
        value = dice.below(self.vocab_size - 1, 1) + 1
        noise = dice.below(self.vocab_size - 1, seq_len) + 1
        last = np.full((len(asks), 1), seq_len - 1)
        # The special token, rising; places of questions that a row does not have come after its last one.
        places = np.concatenate([scattered(dice, seq_len - 1, asks, self.most, 2), last], axis=1)
        places = np.sort(np.where(places < seq_len, places, 2 * seq_len), axis=1)
        tokens = spread(seq_len, [(places + 1, value), (places, SPECIAL)], noise)
        targets = spread(seq_len, [(places[:, 1:], value)])
        mask = targets > 0
        slices = {
            "asks": np.where(mask, option(self.asks, asks)[:, None], 0),
            "distance": spread(seq_len, [(places[:, 1:], octave(np.diff(places)))]),
        }
        return Rows(tokens, targets, mask, slices, np.concatenate([places, value], axis=1))

    def slices(self, seq_len: int) -> dict[str, tuple[str, ...]]:
        """By questions of the row, and by places since the special token last came, in powers of two."""
        return {"asks": tuple(map(str, several(self.asks))), "distance": octaves(seq_len - 1)}

    def solve(self, tokens: np.ndarray) -> np.ndarray:
        """By the token behind the special one when it first came."""
        answers = np.full(tokens.shape, NO_ANSWER, dtype=np.int64)
        for row, found in zip(tokens.tolist(), answers):
            value = NO_ANSWER
            for t, token in enumerate(row):
                if t and row[t - 1] == SPECIAL and value == NO_ANSWER:
                    value = token
                if token == SPECIAL:
                    found[t] = value
        return answers

    def guess(self, seq_len: int) -> float:
        """What came most often in the row so far, counted in many rows: the value comes once more with every question."""
        return _by_counting(self, seq_len)

    def tiny(self) -> "Induction":
        """At most eight questions."""
        return replace(self, asks=at_most(self.asks, 8))


@cache
def _by_counting(task: Induction, seq_len: int) -> float:
    found = task.draw(Dice(np.arange(_SAMPLE), 0), seq_len)
    right = []
    for tokens, targets in zip(found.tokens, found.targets, strict=True):
        for at in np.flatnonzero(targets):
            ids, counts = np.unique(tokens[:at], return_counts=True)
            right.append(ids[np.where(ids == SPECIAL, 0, counts).argmax()] == targets[at])
    return float(np.mean(right))
