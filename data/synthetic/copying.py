"""Copying: tokens, a separator, then the same tokens again.

    copying             a b c . . S a b .        selective_copying    . a . . b . c . S a b
    targets                       a b c                                               a b c

Plain (arXiv:1511.06464, section 5.1): a span in one piece, and maybe a `delay`. Selective (arXiv:2312.00752, section 4.1): the
tokens lie scattered, so counting places is not enough. Ids: 0 is the blank, 1 the separator, then the symbols.
"""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from data.errors import DataError, at_least
from data.synthetic.dice import Dice
from data.synthetic.layout import (
    Several,
    at_most,
    check_several,
    option,
    scattered,
    several,
    spread,
)
from data.synthetic.task import NO_ANSWER, Rows, Task, octave, octaves

BLANK, SEPARATOR, FIRST = 0, 1, 2


@dataclass(frozen=True)
class _Copy(Task):
    """`span` symbols are copied, drawn with repetition."""

    span: Several = (4, 8, 16)
    # Whether each answer is fed at the next place, as in language. If not, blanks are, as in arXiv:1511.06464: then a model
    # must know how many answers it gave.
    shown: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_several("span", self.span, 1)
        if self.symbols < 2:
            raise DataError(
                f"data.synthetic.vocab_size: {self.vocab_size} ids leave {self.symbols} symbols; 2 are needed"
            )

    @property
    def most(self) -> int:
        """Symbols of the longest span."""
        return max(several(self.span))

    @property
    def symbols(self) -> int:
        """How many ids are symbols; they begin at 2."""
        return self.vocab_size - FIRST

    def _layout(self, dice: Dice, span: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        """-> places of the symbols [R, P], those a row does not have beyond it, and of the separator [R]."""
        raise NotImplementedError

    def _noise(self, dice: Dice, tokens: np.ndarray, separator: np.ndarray) -> np.ndarray:
        """The tokens with noise among them."""
        return tokens

    def draw(self, dice: Dice, seq_len: int) -> Rows:
        """Row by row: how many symbols, which, and where. P symbols at most."""
        span = dice.choice(several(self.span))
        symbols = dice.below(self.symbols, self.most) + FIRST
        places, separator = self._layout(dice, span, seq_len)
        number = np.arange(self.most)
        asked = np.where(number < span[:, None], separator[:, None] + number, seq_len)
        parts = [(places, symbols), (separator[:, None], SEPARATOR)]
        shown = [(np.where(number < span[:, None] - 1, asked + 1, seq_len), symbols)] if self.shown else []
        tokens = spread(seq_len, parts + shown)
        targets = spread(seq_len, [(asked, symbols)])
        mask = targets > 0
        slices = {
            "span": np.where(mask, option(self.span, span)[:, None], 0),
            "place": spread(seq_len, [(asked, octave(number + 1))]),
        }
        meaning = np.concatenate([places, np.where(number < span[:, None], symbols, 0), separator[:, None]], axis=1)
        return Rows(self._noise(dice, tokens, separator), targets, mask, slices, meaning)

    def slices(self, seq_len: int) -> dict[str, tuple[str, ...]]:
        """By symbols of the span, and by which answer of the copy it is, from 1, in powers of two."""
        return {"span": tuple(map(str, several(self.span))), "place": octaves(self.most)}

    def solve(self, tokens: np.ndarray) -> np.ndarray:
        """By a list of the symbols before the separator."""
        answers = np.full(tokens.shape, NO_ANSWER, dtype=np.int64)
        for row, found in zip(tokens.tolist(), answers):
            held: list[int] = []
            given: int | None = None  # answers so far, from the separator on
            for t, token in enumerate(row):
                if token == SEPARATOR:
                    given = 0
                if given is None:
                    held += [token] if FIRST <= token < FIRST + self.symbols else []
                elif given < len(held):
                    found[t] = held[given]
                    given += 1
        return answers

    def guess(self, seq_len: int) -> float:
        """Any symbol of the span: the right one, or another that happens to be equal."""
        spans = several(self.span)
        return sum(1 + (n - 1) / self.symbols for n in spans) / sum(spans)

    def tiny(self) -> Self:
        """At most eight symbols."""
        return replace(self, span=at_most(self.span, 8))


@dataclass(frozen=True)
class Copying(_Copy):
    """The span begins the row; `delay` blanks lie between it and the separator."""

    kind: str = "copying"
    delay: Several = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_several("delay", self.delay, 0)

    def check(self, seq_len: int) -> None:
        """The span twice, the delay, and the separator in the place of the last answer, which is not fed."""
        need = 2 * self.most + max(several(self.delay))
        if seq_len < need:
            raise DataError(
                f"data.seq_len={seq_len} is too short for a span of {self.most} and a delay of "
                f"{max(several(self.delay))}; they need {need}"
            )

    def _layout(self, dice: Dice, span: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        number = np.arange(self.most)
        return np.where(number < span[:, None], number, seq_len), span + dice.choice(several(self.delay))

    def tiny(self) -> Self:
        """At most eight symbols and a delay of 16."""
        return replace(super().tiny(), delay=at_most(self.delay, 16))


@dataclass(frozen=True)
class SelectiveCopying(_Copy):
    """The symbols lie anywhere before the separator, and the copy ends the row. The last `noise` ids are no symbols but are
    drawn between these; 0: blanks lie there."""

    kind: str = "selective_copying"
    noise: int = 0

    def __post_init__(self) -> None:
        at_least("data.synthetic.noise", self.noise, 0)
        super().__post_init__()

    @property
    def symbols(self) -> int:
        """How many ids are symbols; they begin at 2."""
        return self.vocab_size - FIRST - self.noise

    def check(self, seq_len: int) -> None:
        """The symbols twice, with the separator in the place of the last answer, which is not fed."""
        if seq_len < 2 * self.most:
            raise DataError(f"data.seq_len={seq_len} is too short for a span of {self.most}; it needs {2 * self.most}")

    def _layout(self, dice: Dice, span: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        return scattered(dice, seq_len - span, span, self.most, 1), seq_len - span

    def _noise(self, dice: Dice, tokens: np.ndarray, separator: np.ndarray) -> np.ndarray:
        if not self.noise:
            return tokens
        seq_len = tokens.shape[1]
        drawn = self.vocab_size - self.noise + dice.below(self.noise, seq_len)
        return np.where((tokens == BLANK) & (np.arange(seq_len) < separator[:, None]), drawn, tokens)
