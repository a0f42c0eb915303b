"""A needle in a haystack (RULER, arXiv:2404.06654, section 3.1, on ids): keys with values lie hidden among other ids.

    tokens   h h k1 v1 h h h k2 v2 h ... h ASK k2 .        h is haystack, one of two needles is asked for
    targets                                    v2          the only place that counts

More needles than are asked for (`keys` > `queries`) are the paper's multi-key, a key that comes more than once (`values` > 1)
multi-value, and several questions multi-query. Ids: 0 is the blank behind rows that are shorter than others, 1 ASK; all others are
keys, values and haystack alike, but the keys of a row are nothing else in it.
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
    others,
    scattered,
    several,
    shuffled_groups,
    spread,
)
from data.synthetic.task import NO_ANSWER, Rows, Task

BLANK, ASK, FIRST = 0, 1, 2
HAYSTACKS = ("random", "repeated")
PERIOD = 16  # of a repeated haystack
DEPTHS = 10


@dataclass(frozen=True)
class Needle(Task):
    """Every question is ASK and a key, and the values follow as they are answered, in the order of the row."""

    kind: str = "needle"
    keys: int = 1  # different ones in the haystack
    queries: int = 1  # how many of them are asked for
    values: int = 1  # times that each key comes, each time with a value
    digits: int = 1  # ids of a value
    # "random", or "repeated": the same few ids over and over, as the paper's easiest, where all that is new is needle.
    haystack: str = "random"
    length: Several = 0  # places of haystack and questions together; 0: the whole row

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("keys", "queries", "values", "digits"):
            at_least(f"data.synthetic.{name}", getattr(self, name), 1)
        choose("data.synthetic.haystack", self.haystack, HAYSTACKS)
        check_several("length", self.length, 0)
        if self.queries > self.keys:
            raise DataError(f"data.synthetic.queries: {self.queries} of {self.keys} keys cannot be asked for")
        if self.ordinary < self.keys + 2:
            raise DataError(
                f"data.synthetic.vocab_size: {self.vocab_size} ids are too few for {self.keys} keys; "
                f"give at least {self.keys + 2 + FIRST}"
            )

    @property
    def ordinary(self) -> int:
        """How many ids are keys, values and haystack; they begin at 2."""
        return self.vocab_size - FIRST

    @property
    def answer(self) -> int:
        """Answers to one question."""
        return self.values * self.digits

    @property
    def questions(self) -> int:
        """Places of all questions; the last answer is not fed."""
        return self.queries * (2 + self.answer) - 1

    def check(self, seq_len: int) -> None:
        """All needles and all questions."""
        need = self.keys * self.values * (1 + self.digits) + self.questions
        given = [length for length in several(self.length) if length]
        if min(given, default=seq_len) < need or seq_len < max(given, default=need):
            raise DataError(
                f"data.seq_len={seq_len}, data.synthetic.length={self.length}: needles and questions need {need} places"
            )

    def draw(self, dice: Dice, seq_len: int) -> Rows:
        """Row by row: how long, which keys and values, where they lie. N needles of 1 + `digits` places."""
        length = dice.choice(several(self.length))
        whole = np.where(length > 0, length, seq_len)
        room = whole - self.questions
        needles, width = self.keys * self.values, 1 + self.digits
        keys = distinct(dice, self.ordinary, self.keys)
        values = others(dice, self.ordinary, keys, needles * self.digits) + FIRST
        places = scattered(dice, room, np.full(len(room), needles), needles, width)
        owner = shuffled_groups(dice, self.keys, np.full(len(room), needles), needles)  # the key of each needle
        named = np.take_along_axis(keys, owner, axis=1) + FIRST
        inside = (places[:, :, None] + np.arange(1, width)).reshape(values.shape)  # of each digit
        hidden = [(places, named), (inside, values)]

        # The needles key by key, the earlier one first; those of the first keys are asked for.
        asked = np.argsort(owner, axis=1, kind="stable")[:, : self.queries * self.values]
        answers = values.reshape(len(values), needles, self.digits)
        answers = np.take_along_axis(answers, asked[:, :, None], axis=1).reshape(len(values), -1)
        start = room[:, None] + (2 + self.answer) * np.arange(self.queries)
        at = (start[:, :, None] + 1 + np.arange(self.answer)).reshape(answers.shape)
        shown = np.where(at + 1 < whole[:, None], at + 1, seq_len)
        questions = [(start, ASK), (start + 1, keys[:, : self.queries] + FIRST), (shown, answers)]

        tokens = spread(seq_len, hidden + questions, self._haystack(dice, keys, seq_len, room))
        targets = spread(seq_len, [(at, answers)])
        mask = targets > 0
        depth = DEPTHS * np.take_along_axis(places, asked, axis=1) // (room - width + 1)[:, None]
        slices = {
            "depth": spread(seq_len, [(at, depth.repeat(self.digits, axis=1))]),
            "length": np.where(mask, option(self.length, length)[:, None], 0),
        }
        meaning = np.concatenate([whole[:, None], places, named, values, keys[:, : self.queries]], axis=1)
        return Rows(tokens, targets, mask, slices, meaning)

    def _haystack(self, dice: Dice, keys: np.ndarray, seq_len: int, room: np.ndarray) -> np.ndarray:
        """int64 [R, T]: ids that are none of the row's keys; blanks from the questions on."""
        count = PERIOD if self.haystack == "repeated" else seq_len
        drawn = others(dice, self.ordinary, keys, count) + FIRST
        place = np.arange(seq_len)
        return np.where(place < room[:, None], drawn[:, place % count], BLANK)

    def slices(self, seq_len: int) -> dict[str, tuple[str, ...]]:
        """By how deep in the haystack the needle lies, in tenths from the row's beginning, and by the row's length."""
        depth = tuple(f"{100 * n // DEPTHS}-{100 * (n + 1) // DEPTHS}%" for n in range(DEPTHS))
        return {"depth": depth, "length": tuple(str(n or seq_len) for n in several(self.length))}

    def solve(self, tokens: np.ndarray) -> np.ndarray:
        """By a search of the haystack for the key, and of what follows it."""
        answers = np.full(tokens.shape, NO_ANSWER, dtype=np.int64)
        for row, found in zip(tokens.tolist(), answers):
            end = row.index(ASK) if ASK in row else len(row)
            wanted: list[int] = []
            for t in range(end + 1, len(row)):
                if row[t - 1] == ASK:
                    hits = [n for n in range(end) if row[n] == row[t]]
                    wanted = [token for n in hits for token in row[n + 1 : n + 1 + self.digits]]
                if row[t] != ASK and wanted:
                    found[t] = wanted.pop(0)
        return answers

    def guess(self, seq_len: int) -> float:
        """Any id of the haystack that is no key: the right one, or another that happens to be equal; where the haystack repeats
        itself, any id of any needle."""
        if self.haystack == "repeated":
            return 1 / (self.keys * self.answer)
        options = [(length or seq_len) - self.questions - self.keys * self.values for length in several(self.length)]
        return sum((1 + (n - 1) / (self.ordinary - self.keys)) / n for n in options) / len(options)

    def tiny(self) -> "Needle":
        """At most four keys, two queries, two values of two ids each."""
        keys, queries = min(self.keys, 4), min(self.queries, 2)
        values, digits = min(self.values, 2), min(self.digits, 2)
        length = at_most(self.length, 64)
        return replace(self, keys=keys, queries=queries, values=values, digits=digits, length=length)
