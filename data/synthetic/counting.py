"""Counting (RULER, arXiv:2404.06654, section 3.3, on ids): which ids came most often.

    tokens   c a b a . c a c ASK a          2 answers
    targets                  a   c          the most frequent id first; of equally frequent ones the one that came first

Common words: some come `often`, all others equally rarely. Frequent words: chances fall as a power of the rank (Zipf), and which id
has which rank is drawn for each row. Ids: 0 is the blank, 1 ASK, then the words.
"""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from data.errors import DataError, at_least
from data.synthetic.dice import Dice
from data.synthetic.layout import distinct, spread
from data.synthetic.task import NO_ANSWER, Rows, Task, octaves

BLANK, ASK, FIRST = 0, 1, 2


@dataclass(frozen=True)
class _Counting(Task):
    """`answers` words are asked for, each fed when it was answered; a row with fewer different words asks for those it has."""

    answers: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("data.synthetic.answers", self.answers, 1)

    def _words(self, dice: Dice, room: int) -> tuple[np.ndarray, np.ndarray]:
        """-> ids of the words [R, W], and which of them stands at each of `room` places [R, `room`]; W: a blank."""
        raise NotImplementedError

    def draw(self, dice: Dice, seq_len: int) -> Rows:
        """Row by row: which words, and how often each. W words."""
        room = seq_len - self.answers
        words, stream = self._words(dice, room)
        ids = np.concatenate([words, np.full((len(words), 1), BLANK)], axis=1)
        counts, first = _counts(stream, words.shape[1])
        order = np.argsort(first - counts * (room + 1), axis=1)[:, : self.answers + 1]
        counts = np.take_along_axis(counts, order, axis=1)
        top = np.where(counts > 0, np.take_along_axis(words, order, axis=1), BLANK)[:, : self.answers]
        at = np.broadcast_to(room + np.arange(self.answers), top.shape)
        text = np.take_along_axis(ids, stream, axis=1)
        tokens = np.concatenate([text, np.full((len(text), 1), ASK), top[:, :-1]], axis=1)
        targets = spread(seq_len, [(at, top)])
        mask = targets > 0
        margin = np.frexp(counts[:, :-1] - counts[:, 1:])[1].astype(np.int64)
        rank = np.broadcast_to(np.arange(self.answers), top.shape)
        slices = {name: spread(seq_len, [(at, label)]) for name, label in (("rank", rank), ("margin", margin))}
        return Rows(tokens, targets, mask, {name: np.where(mask, x, 0) for name, x in slices.items()}, tokens)

    def slices(self, seq_len: int) -> dict[str, tuple[str, ...]]:
        """By rank of the answer, and by how many times more it came than the next word, in powers of two."""
        return {"rank": tuple(str(n + 1) for n in range(self.answers)), "margin": ("0", *octaves(seq_len))}

    def solve(self, tokens: np.ndarray) -> np.ndarray:
        """By counting."""
        answers = np.full(tokens.shape, NO_ANSWER, dtype=np.int64)
        for row, found in zip(tokens.tolist(), answers):
            end = row.index(ASK) if ASK in row else len(row)
            counts: dict[int, int] = {}
            for token in row[:end]:
                if token != BLANK:
                    counts[token] = counts.get(token, 0) + 1
            best = sorted(counts, key=lambda word: -counts[word])  # of equal ones, the one that came first
            given = min(self.answers, len(best), len(row) - end)
            found[end : end + given] = best[:given]
        return answers


def _counts(stream: np.ndarray, words: int) -> tuple[np.ndarray, np.ndarray]:
    """stream int64 [R, N] of word numbers below W, or W -> how often each of the W words comes [R, W], and where first, N if it
    does not."""
    rows, room = stream.shape
    every = np.arange(rows)[:, None]
    counts = np.bincount((every * (words + 1) + stream).ravel(), minlength=rows * (words + 1)).reshape(rows, -1)
    first = np.full((rows, words + 1), room)
    np.minimum.at(first, (every, stream), np.arange(room))
    return counts[:, :words], first[:, :words]


@dataclass(frozen=True)
class CommonWords(_Counting):
    """`answers` words come `often` times, `rare_words` others `rarely` times; blanks fill the row, all in a random order."""

    kind: str = "common_words"
    often: int = 6
    rarely: int = 2
    rare_words: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("data.synthetic.rarely", self.rarely, 1)
        at_least("data.synthetic.rare_words", self.rare_words, 1)
        at_least("data.synthetic.often", self.often, self.rarely + 1)
        if self.vocab_size < FIRST + self.answers + self.rare_words:
            raise DataError(
                f"data.synthetic.vocab_size: {self.vocab_size} ids are too few for {self.answers + self.rare_words} words; "
                f"give at least {FIRST + self.answers + self.rare_words}"
            )

    def check(self, seq_len: int) -> None:
        """Every word as often as it comes, and the questions."""
        need = self.answers * (self.often + 1) + self.rare_words * self.rarely
        if seq_len < need:
            raise DataError(f"data.seq_len={seq_len} is too short for {need} words and questions")

    def _words(self, dice: Dice, room: int) -> tuple[np.ndarray, np.ndarray]:
        count = self.answers + self.rare_words
        words = distinct(dice, self.vocab_size - FIRST, count) + FIRST
        times = np.where(np.arange(count) < self.answers, self.often, self.rarely)
        stream = np.full(room, count)
        stream[: times.sum()] = np.arange(count).repeat(times)
        return words, stream[np.argsort(dice.uniform(room), axis=1)]

    def guess(self, seq_len: int) -> float:
        """The next different word of the row, which is one of those that come often with a chance that follows from how many of
        both kinds are left. Any word of the row is no better."""
        return sum(_next_is_common(self.answers, self.often, self.rare_words, self.rarely)) / self.answers

    def tiny(self) -> Self:
        """At most two answers that come six times, twelve rare words twice."""
        small = {"answers": min(self.answers, 2), "often": min(self.often, 6), "rarely": min(self.rarely, 2)}
        return replace(self, rare_words=min(self.rare_words, 12), **small)


def _next_is_common(common: int, often: int, rare: int, rarely: int) -> list[float]:
    """In the order in which different words first come: the chance that the next one after the n-th common word (n = 0: the first
    of all) is common too. Of the words that have not come yet each is next with a chance as its count."""
    chances = []
    seen = np.zeros(rare + 1)  # how many rare words came before the n-th common one: the chance of each number
    seen[0] = 1.0
    gone = np.arange(rare + 1)
    for n in range(common):
        left = (common - n) * often
        step = left / (left + (rare - gone) * rarely)
        chances.append(float(seen @ step))
        for u in range(rare):  # rare words come before the next common one
            seen[u + 1] += seen[u] * (1 - step[u])
        seen *= step
    return chances


@dataclass(frozen=True)
class FrequentWords(_Counting):
    """Every place holds one of `words`, the one of rank r with a chance as r^-`power`."""

    kind: str = "frequent_words"
    words: int = 16
    power: float = 1.5

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("data.synthetic.words", self.words, self.answers + 1)
        if not 0 < self.power < float("inf"):
            raise DataError(f"data.synthetic.power must be a positive number, got {self.power!r}")
        if self.vocab_size < FIRST + self.words:
            raise DataError(
                f"data.synthetic.vocab_size: {self.vocab_size} ids are too few for {self.words} words; "
                f"give at least {FIRST + self.words}"
            )

    @property
    def chances(self) -> np.ndarray:
        """Of each rank, float64 [W]."""
        weights = np.arange(1, self.words + 1) ** -self.power
        return weights / weights.sum()

    def check(self, seq_len: int) -> None:
        """A word and a question for every answer."""
        if seq_len < 2 * self.answers:
            raise DataError(
                f"data.seq_len={seq_len} is too short for {self.answers} answers; they need {2 * self.answers}"
            )

    def _words(self, dice: Dice, room: int) -> tuple[np.ndarray, np.ndarray]:
        words = distinct(dice, self.vocab_size - FIRST, self.words) + FIRST
        edges = np.cumsum(self.chances)[:-1]
        return words, np.searchsorted(edges, dice.uniform(room), side="right")

    def guess(self, seq_len: int) -> float:
        """A word of the row, any that was not answered yet: the one of rank r as often as it comes."""
        chances = self.chances[: self.answers]
        return float((chances / (1 - np.cumsum(chances) + chances)).mean())

    def tiny(self) -> Self:
        """At most eight words and two answers."""
        return replace(self, words=min(self.words, 8), answers=min(self.answers, 2))
