"""Words known from the context or from the weights (arXiv:2406.00053, section 4): which of two words is the adjective?

    tokens   cop quick fox fox quick fox        or  fox cop quick ...; then one of the two again, then the answer
    targets                quick fox fox        if the noun was repeated; three times the adjective if that was

What `cop` stands before is the adjective, so the context says it, for words never seen too. But half of all words are nouns, the
other half adjectives, so the weights can say it as well. The settings of `test` tell the two apart in a model that was trained
without: where nouns stand for adjectives, a model that goes by the context is right and one that goes by the word is wrong.

The first answer depends on it, the other two are the word that was repeated. Ids: 0 filler, 1 `cop`, then the nouns and the
adjectives, each by falling frequency, and the words of the holdout. This is the causal form: the paper masks the answers, here
they are appended.
"""

from dataclasses import dataclass

import numpy as np

from data.errors import DataError, at_least, choose
from data.synthetic.dice import Dice
from data.synthetic.task import NO_ANSWER, Rows, Task, octave, octaves

TESTS = ("none", "switch", "tail", "tail_switch", "holdout")
FILLER, COP, FIRST_WORD = range(3)
RARE = 10  # the tail is one word of so many


@dataclass(frozen=True)
class DualProcess(Task):
    """`alpha`: of Zipf's law, the chance of the n-th word of a class falls as n^-alpha; 0: uniform. `ambiguous`: the share of words
    that stand for one of the other class half of the time. `test`: other rows than those of training: classes switched, the
    rarest words (each as likely as the other), both, or words of the holdout; no word is ambiguous in them."""

    kind: str = "dual_process"
    vocab_size: int = 128
    holdout: int = 26  # words that are never trained
    alpha: float = 1.5
    ambiguous: float = 0.1
    test: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("data.synthetic.test", self.test, TESTS)
        at_least("data.synthetic.holdout", self.holdout, 2)
        if self.words < RARE:
            least = FIRST_WORD + 2 * RARE + self.holdout
            raise DataError(f"data.synthetic.vocab_size={self.vocab_size} is too small; give at least {least}")
        if not 0 <= self.alpha < float("inf"):
            raise DataError(f"data.synthetic.alpha must not be negative, got {self.alpha!r}")
        if not 0 <= self.ambiguous <= 1:
            raise DataError(f"data.synthetic.ambiguous must lie in [0, 1], got {self.ambiguous!r}")

    @property
    def words(self) -> int:
        """Of each class."""
        return (self.vocab_size - FIRST_WORD - self.holdout) // 2

    def check(self, seq_len: int) -> None:
        """Three words, the question and two answers; what comes after them is filler."""
        at_least("data.seq_len", seq_len, 6)

    def draw(self, dice: Dice, seq_len: int) -> Rows:
        """Of the two words each, the adjective first."""
        adjective, noun = self._pair(dice)
        front, asks_noun = (dice.below(2, 2) == 0).T
        cop = np.full_like(noun, COP)
        query = np.where(asks_noun, noun, adjective)
        sentence = np.where(front, [cop, adjective, noun], [noun, cop, adjective])
        tokens, targets = np.zeros((2, len(noun), seq_len), dtype=np.int64)
        tokens[:, :6] = np.stack([*sentence, query, adjective, query], axis=1)
        targets[:, 3:6] = np.stack([adjective, query, query], axis=1)
        mask = np.zeros(tokens.shape, dtype=bool)
        mask[:, 3:6] = True
        answer, rank = np.zeros_like(tokens), np.zeros_like(tokens)
        answer[:, 3:6] = np.stack([asks_noun, np.full_like(noun, 2), np.full_like(noun, 3)], axis=1)
        rank[:, 3:6] = self._rank(adjective)[:, None]
        return Rows(tokens, targets, mask, {"answer": answer, "rank": rank}, tokens[:, :4].copy())

    def candidates(self, dice: Dice, seq_len: int, split: str) -> tuple[Rows, np.ndarray]:
        """Two different words: of an ambiguous one beside itself nothing could be asked."""
        rows, is_of_split = super().candidates(dice, seq_len, split)
        first, middle, last = rows.tokens[:, :3].T
        return rows, is_of_split & (first != last) & (middle != last)

    def _pair(self, dice: Dice) -> np.ndarray:
        """int64 [2, R]: the ids of an adjective and a noun, or of what stands for them."""
        if self.test == "holdout":
            first, other = dice.below(np.array([self.holdout, self.holdout - 1]), 2).T
            return np.stack([first, other + (other >= first)]) + self.vocab_size - self.holdout
        if self.test in ("tail", "tail_switch"):
            ranks = self.words - 1 - dice.below(self.words // RARE, 2).T
        else:
            chance = np.cumsum(np.arange(1, self.words + 1) ** -self.alpha)
            ranks = np.searchsorted(chance, dice.uniform(2).T * chance[-1], side="right")
        switched = np.full(ranks.shape, self.test in ("switch", "tail_switch"))
        if self.test == "none":
            switched = self._is_ambiguous(ranks) & (dice.below(2, 2).T == 0)
        adjectives = np.array([[True], [False]]) ^ switched
        return FIRST_WORD + ranks + np.where(adjectives, self.words, 0)

    def _is_ambiguous(self, rank: np.ndarray) -> np.ndarray:
        """Whether the words of these ranks, from 0, are: the same share of all frequencies."""
        return np.floor((rank + 1) * self.ambiguous) > np.floor(rank * self.ambiguous)

    def _rank(self, word: np.ndarray) -> np.ndarray:
        """The label of each word's rank in its class."""
        unseen = word >= self.vocab_size - self.holdout
        return np.where(unseen, len(octaves(self.words)), octave((word - FIRST_WORD) % self.words + 1))

    def slices(self, seq_len: int) -> dict[str, tuple[str, ...]]:
        """By the answer, the first one by what was repeated; and by the rank of the adjective in its class, in powers of two."""
        return {
            "answer": ("first-adjective", "first-noun", "second", "third"),
            "rank": (*octaves(self.words), "unseen"),
        }

    def solve(self, tokens: np.ndarray) -> np.ndarray:
        """By the context alone: the word behind `cop`, then twice the one that was repeated."""
        answers = np.full(tokens.shape, NO_ANSWER, dtype=np.int64)
        for row, found in zip(tokens.tolist(), answers):
            if len(row) > 3:
                found[3] = row[row.index(COP) + 1]
                found[4:6] = row[3]
        return answers

    def guess(self, seq_len: int) -> float:
        """By repeating the question: right for one half of the first answers, and for all others."""
        return 5 / 6

    def tiny(self) -> "DualProcess":
        """Fits as it is."""
        return self
