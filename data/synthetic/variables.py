"""Variable tracking (RULER, arXiv:2404.06654, section 3.2, on ids): names that stand for values, through chains of other names.

    tokens   LET a 7 . LET b a LET p 9 . LET q p ASK q ASK a ...      value: every name is asked for once
    targets                                          9     7
    tokens   LET a 7 . LET b a LET p 9 . LET q p ASK 7 a              names: all that stand for one value, in order
    targets                                          a b

`chains` of equal length are told interleaved, their statements scattered over the row. Ids: 0 is the blank, 1 LET, 2 ASK, then
the names, and the upper half are the values.
"""

from dataclasses import dataclass, replace

import numpy as np

from data.errors import DataError, at_least, choose
from data.synthetic.dice import Dice
from data.synthetic.layout import (
    Several,
    at_most,
    check_several,
    distinct,
    option,
    scattered,
    several,
    shuffled_groups,
    spread,
)
from data.synthetic.task import NO_ANSWER, Rows, Task

BLANK, LET, ASK, FIRST = range(4)
QUESTIONS = ("value", "names")


@dataclass(frozen=True)
class VariableTracking(Task):
    """A chain of h hops is h + 1 names: the first stands for the value, each other one for the name before it."""

    kind: str = "variable_tracking"
    chains: int = 2
    hops: Several = (1, 2, 3)
    question: str = "value"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("data.synthetic.chains", self.chains, 2)  # with one there is nothing to tell apart
        check_several("hops", self.hops, 0)
        choose("data.synthetic.question", self.question, QUESTIONS)
        if self.most > self.names:
            raise DataError(
                f"data.synthetic.hops: {self.most} statements need as many names, vocab_size {self.vocab_size} has "
                f"{self.names}; give at least {2 * (self.most + FIRST)}"
            )

    @property
    def links(self) -> int:
        """Names of the longest chain."""
        return max(several(self.hops)) + 1

    @property
    def most(self) -> int:
        """Statements of the fullest row."""
        return self.chains * self.links

    @property
    def first_value(self) -> int:
        """The ids from here on are values."""
        return self.vocab_size // 2

    @property
    def names(self) -> int:
        """How many ids are names; they begin at 3."""
        return self.first_value - FIRST

    def _questions(self, links: np.ndarray) -> np.ndarray:
        """Places of the questions, with chains of that many names."""
        return 2 * self.chains * links if self.question == "value" else 1 + links

    def check(self, seq_len: int) -> None:
        """Three places for a statement."""
        need = 3 * self.most + int(self._questions(np.array(self.links)))
        if seq_len < need:
            raise DataError(f"data.seq_len={seq_len} is too short for {self.most} statements; they need {need}")

    def draw(self, dice: Dice, seq_len: int) -> Rows:
        """Row by row: how long the chains are, which names and values, in what order. S statements at most."""
        hops = dice.choice(several(self.hops))
        links, count = hops + 1, self.chains * (hops + 1)
        room = seq_len - self._questions(links)
        values = distinct(dice, self.vocab_size - self.first_value, self.chains) + self.first_value
        names = distinct(dice, self.names, self.most) + FIRST
        places = scattered(dice, room, count, self.most, 3)
        chain = shuffled_groups(dice, self.chains, count, self.most)  # of each statement
        sources, hop = self._sources(chain, names, values)

        held = np.arange(self.most) < count[:, None]
        if self.question == "value":
            order = np.argsort(np.where(held, dice.uniform(self.most), 1.0), axis=1)  # in which they are asked for
            answers = np.take_along_axis(np.take_along_axis(values, chain, axis=1), order, axis=1)
            at = np.where(held, room[:, None] + 2 * np.arange(self.most) + 1, seq_len)
            asked = [(at - 1, ASK), (at, np.take_along_axis(names, order, axis=1))]
        else:
            order = np.argsort(np.where(held, chain, self.chains), axis=1, kind="stable")[:, : self.links]
            answers = np.take_along_axis(names, order, axis=1)
            number = np.arange(self.links)
            at = np.where(number < links[:, None], room[:, None] + 1 + number, seq_len)
            start = room[:, None]
            asked = [(start, ASK), (start + 1, values[:, :1]), (at + 1, answers)]
        statements = [(places, LET), (places + 1, names), (places + 2, sources)]
        tokens = spread(seq_len, statements + asked)
        targets = spread(seq_len, [(at, answers)])
        mask = targets > 0
        slices = {
            "hops": spread(seq_len, [(at, np.take_along_axis(hop, order, axis=1))]),
            "longest": np.where(mask, option(self.hops, hops)[:, None], 0),
        }
        return Rows(tokens, targets, mask, slices, tokens)

    def _sources(self, chain: np.ndarray, names: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """-> what each statement's name stands for [R, S], and how many names lie between it and the value [R, S]."""
        every = np.arange(len(chain))
        latest, depth = values.copy(), np.zeros_like(values)  # of each chain so far
        sources, hop = np.empty_like(names), np.empty_like(names)
        for n in range(self.most):
            which = chain[:, n]
            sources[:, n], hop[:, n] = latest[every, which], depth[every, which]
            latest[every, which] = names[:, n]
            depth[every, which] += 1
        return sources, hop

    def slices(self, seq_len: int) -> dict[str, tuple[str, ...]]:
        """By names between the one asked for, or answered, and the value, and by hops of the row's chains."""
        return {"hops": tuple(map(str, range(self.links))), "longest": tuple(map(str, several(self.hops)))}

    def solve(self, tokens: np.ndarray) -> np.ndarray:
        """By a dictionary of the names."""
        answers = np.full(tokens.shape, NO_ANSWER, dtype=np.int64)
        for row, found in zip(tokens.tolist(), answers):
            known: dict[int, int] = {}
            wanted: list[int] = []
            for t, token in enumerate(row):
                if t >= 2 and row[t - 2] == LET:
                    known[row[t - 1]] = known.get(token) or token
                if t and row[t - 1] == ASK:
                    by_value = self.question == "value"
                    wanted = [known[token]] if by_value else [name for name, value in known.items() if value == token]
                if wanted:
                    found[t] = wanted.pop(0)
        return answers

    def guess(self, seq_len: int) -> float:
        """Any value of the row; or the name that follows in the row, which is as often one of the same chain."""
        return 1 / self.chains

    def tiny(self) -> "VariableTracking":
        """At most two chains of three hops."""
        return replace(self, chains=min(self.chains, 2), hops=at_most(self.hops, 3))
