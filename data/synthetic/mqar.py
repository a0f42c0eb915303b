"""Multi-query associative recall (arXiv:2312.04927, section 4): pairs of key and value, then the keys again, in any order.

    tokens   . . k1 v1 k2 v2 k3 v3 . k2 . . . k1 . k3 . .         . is filler
    targets                          v2       v1   v3             the only places that count

Every key of a row is asked for once; keys and values of a row are distinct. After the pairs every second place is a slot for
a query, and the answer is not shown. Ids: 0 is the constant filler, then the keys, and the upper half are the values.
"""

from dataclasses import dataclass, replace

import numpy as np

from data.errors import DataError, choose
from data.synthetic.dice import Dice
from data.synthetic.layout import Several, at_most, check_several, option, several
from data.synthetic.task import NO_ANSWER, Rows, Task

FILLERS = ("constant", "random")
FILLER = 0


@dataclass(frozen=True)
class MQAR(Task):
    """`pairs` and `lead` are numbers, or lists from which one is drawn for each row.

    Pairs always come first, so a memory that keeps the earliest tokens is enough, above all where the filler is random: `lead`
    puts filler before them, in training or only when judging.
    """

    kind: str = "mqar"
    pairs: Several = 8
    # The chance of a slot falls as n^(power - 1) with its number n behind the pairs. 0.01 is the published choice: most
    # queries come early. 1: uniform.
    power: float = 0.01
    # "random": any tokens but the row's own keys; the published one may also repeat those, before or after they are asked for.
    filler: str = "constant"
    lead: Several = 0  # filler places before the pairs

    def __post_init__(self) -> None:
        super().__post_init__()
        check_several("pairs", self.pairs, 1)
        check_several("lead", self.lead, 0)
        choose("data.synthetic.filler", self.filler, FILLERS)
        if not 0 < self.power < float("inf"):
            raise DataError(f"data.synthetic.power must be a positive number, got {self.power!r}")
        if self.most > self.keys:
            raise DataError(
                f"data.synthetic.pairs: {self.most} pairs need as many keys, vocab_size {self.vocab_size} has {self.keys}; "
                f"give at least {2 * self.most + 2}"
            )

    @property
    def most(self) -> int:
        """Pairs of the fullest row."""
        return max(several(self.pairs))

    @property
    def keys(self) -> int:
        """How many ids are keys; they begin at 1."""
        return self.vocab_size // 2 - 1

    def check(self, seq_len: int) -> None:
        """Two places for every pair and two for every query."""
        need = 4 * self.most + max(several(self.lead))
        if seq_len < need:
            raise DataError(
                f"data.seq_len={seq_len} is too short for {self.most} pairs after {max(several(self.lead))} places of lead; "
                f"they need {need}"
            )

    def draw(self, dice: Dice, seq_len: int) -> Rows:
        """Row by row: how many pairs, which keys and values, in which slots they are asked for. P pairs at most."""
        pairs, lead = dice.choice(several(self.pairs)), dice.choice(several(self.lead))
        first_value = self.vocab_size // 2
        keys = dice.shuffled(self.keys, self.most)
        asks = keys[:, : self.most] + 1
        values = dice.shuffled(self.vocab_size - first_value, self.most)[:, : self.most] + first_value
        place = lead[:, None] + 2 * np.arange(self.most)  # of each key, its value behind it
        start = (lead + 2 * pairs)[:, None]
        asked = start + 2 * self._slots(dice, pairs, (seq_len - start) // 2, seq_len)

        held = np.arange(self.most) < pairs[:, None]
        every = np.arange(len(pairs))[:, None]

        def spread(*what: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
            """Zeros [R, T] with values [R, P] at places [R, P]; pairs that a row does not have go to a place that is cut off."""
            full = np.zeros((len(pairs), seq_len + 1), dtype=np.int64)
            for where, value in what:
                full[every, np.where(held, where, seq_len)] = value
            return full[:, :seq_len]

        tokens = meaning = spread((place, asks), (place + 1, values), (asked, asks))
        if self.filler == "random":
            tokens = self._filled(dice, tokens, keys, pairs)
        targets = spread((asked, values))
        mask = targets > 0
        slices = {
            "pairs": np.where(mask, option(self.pairs, pairs)[:, None], 0),
            "distance": np.where(
                mask, np.frexp(spread((asked, asked - place)))[1].astype(np.int64) - 2, 0
            ),  # floor(log2) - 1
        }
        return Rows(tokens, targets, mask, slices, meaning)

    def _slots(self, dice: Dice, pairs: np.ndarray, room: np.ndarray, seq_len: int) -> np.ndarray:
        """int64 [R, P]: distinct slots below `room` [R, 1], one for each pair of a row; which pair gets which is left to chance."""
        most = (seq_len - min(several(self.lead)) - 2 * min(several(self.pairs))) // 2
        number = np.arange(1, most + 1)
        drawn = dice.weighted(np.where(number <= room, number ** (self.power - 1), 0.0), self.most)
        held = np.arange(self.most) < pairs[:, None]
        order = np.argsort(np.where(held, dice.uniform(self.most), 1.0), axis=1)
        return np.take_along_axis(drawn, order, axis=1)

    def _filled(self, dice: Dice, tokens: np.ndarray, keys: np.ndarray, pairs: np.ndarray) -> np.ndarray:
        """Filler replaced by values and by keys that the row does not use; `keys` [R, all] from 0, the row's own first."""
        first_value = self.vocab_size // 2
        values = np.broadcast_to(np.arange(first_value, self.vocab_size), (len(keys), self.vocab_size - first_value))
        pool = np.concatenate([keys + 1, values], axis=1)
        own = pairs[:, None]
        drawn = own + dice.below(pool.shape[1] - own, tokens.shape[1])
        return np.where(tokens == FILLER, np.take_along_axis(pool, drawn, axis=1), tokens)

    def slices(self, seq_len: int) -> dict[str, tuple[str, ...]]:
        """By pairs of the row, and by places between a key and the question for it, in powers of two."""
        longest = (seq_len - 2).bit_length()
        distance = tuple(f"{1 << n}-{(2 << n) - 1}" for n in range(1, longest))
        return {"pairs": tuple(str(n) for n in several(self.pairs)), "distance": distance}

    def solve(self, tokens: np.ndarray) -> np.ndarray:
        """By a dictionary: what followed a key when it was first seen."""
        answers = np.full(tokens.shape, NO_ANSWER, dtype=np.int64)
        for row, found in zip(tokens.tolist(), answers):
            known: dict[int, int] = {}
            for t, token in enumerate(row):
                if t and 0 < row[t - 1] <= self.keys:
                    known.setdefault(row[t - 1], token)
                found[t] = known.get(token, NO_ANSWER)
        return answers

    def guess(self, seq_len: int) -> float:
        """Any value of the row. Rows with more pairs have more answers."""
        options = several(self.pairs)
        return len(options) / sum(options)

    def tiny(self) -> "MQAR":
        """At most four pairs."""
        return replace(self, pairs=at_most(self.pairs, 4), lead=at_most(self.lead, 8))
