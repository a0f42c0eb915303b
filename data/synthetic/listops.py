"""ListOps (arXiv:1804.06028): the value of nested lists of digits under MAX, MIN, MED and SM.

    tokens   [MAX 2 9 [MIN 4 7 ] 0 ] . .          . is filler
    targets                        9

SM is the sum modulo 10, MED the median, rounded down where it lies between two digits. A row is one expression, and its value is
asked for at the bracket that closes it. Ids: 0 the filler, 1 to 10 the digits, 11 to 14 the operators with the brackets that open
their lists, 15 the closing bracket.
"""

from dataclasses import dataclass, replace
from functools import cache
from statistics import median

import numpy as np

from data.errors import DataError, at_least
from data.synthetic.dice import Dice
from data.synthetic.task import NO_ANSWER, Rows, Task

OPERATORS = ("MAX", "MIN", "MED", "SM")
FILLER, FIRST_DIGIT, FIRST_OPERATOR, CLOSE = 0, 1, 11, 15
FEWEST = 2  # arguments
LIST = FEWEST + 1  # places that the shortest list takes beyond those of the digit in whose stead it stands
_SAMPLE = 4096  # rows, to estimate what a guess can reach


@dataclass(frozen=True)
class ListOps(Task):
    """`depth`: lists inside one another, a number, or a list of numbers from which one is drawn for each row; every row reaches
    its depth, as far as `seq_len` has room for no more than that. `inner`: every closing bracket asks for the value of its list."""

    kind: str = "listops"
    vocab_size: int = 16
    depth: tuple[int, ...] | int = (1, 2, 3, 4)
    arguments: int = 5  # at most, of one list
    nest: float = 0.25  # the chance of an argument to be a list, where it may be one
    inner: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("data.synthetic.vocab_size", self.vocab_size, CLOSE + 1)
        at_least("data.synthetic.arguments", self.arguments, FEWEST)
        if not self.depths:
            raise DataError("data.synthetic.depth is an empty list")
        for depth in self.depths:
            at_least("data.synthetic.depth", depth, 1)
        if not 0 <= self.nest <= 1:
            raise DataError(f"data.synthetic.nest must lie in [0, 1], got {self.nest!r}")

    @property
    def depths(self) -> tuple[int, ...]:
        """What is drawn from."""
        return self.depth if isinstance(self.depth, tuple) else (self.depth,)

    def check(self, seq_len: int) -> None:
        """Lists of two arguments, the last of them a list."""
        need = 1 + LIST * max(self.depths)
        if seq_len < need:
            raise DataError(
                f"data.seq_len={seq_len} is too short for lists of depth {max(self.depths)}; they need {need}"
            )

    def draw(self, dice: Dice, seq_len: int) -> Rows:
        """All rows at once, place by place."""
        depth = dice.choice(self.depths)
        writer = _Writer(depth, self.arguments, seq_len)
        for _ in range(seq_len):
            nest = dice.uniform(1)[:, 0] < self.nest
            many = FEWEST + dice.below(self.arguments - FEWEST + 1, 1)[:, 0]
            writer.place(nest, many, dice.below(len(OPERATORS), 1)[:, 0], dice.below(10, 1)[:, 0])
        mask = writer.tokens == CLOSE
        if not self.inner:
            mask &= writer.height == depth[:, None]
        slices = {
            "depth": np.where(mask, writer.height - 1, 0),
            "operator": np.where(mask, writer.operator, 0),
        }
        return Rows(writer.tokens, np.where(mask, writer.value + FIRST_DIGIT, 0), mask, slices, writer.tokens.copy())

    def slices(self, seq_len: int) -> dict[str, tuple[str, ...]]:
        """By how many lists are inside one another in the list asked for, itself included, and by its operator."""
        return {"depth": tuple(str(n + 1) for n in range(max(self.depths))), "operator": OPERATORS}

    def solve(self, tokens: np.ndarray) -> np.ndarray:
        """By a stack of open lists."""
        answers = np.full(tokens.shape, NO_ANSWER, dtype=np.int64)
        for row, found in zip(tokens.tolist(), answers):
            lists: list[list[int]] = []
            for t, token in enumerate(row):
                if FIRST_OPERATOR <= token < CLOSE:
                    lists.append([token - FIRST_OPERATOR])
                elif token != FILLER:
                    value = _value(*lists.pop()) if token == CLOSE else token - FIRST_DIGIT
                    if token == CLOSE:
                        found[t] = value + FIRST_DIGIT
                    if lists:
                        lists[-1].append(value)
        return answers

    def guess(self, seq_len: int) -> float:
        """The commonest value of each operator's lists, counted in many rows."""
        return _by_operator(self)

    def tiny(self) -> "ListOps":
        """At most four lists inside one another."""
        return replace(self, depth=tuple(dict.fromkeys(min(n, 4) for n in self.depths)))


def _value(operator: int, *arguments: int) -> int:
    """Of one list of digits."""
    match OPERATORS[operator]:
        case "MAX":
            return max(arguments)
        case "MIN":
            return min(arguments)
        case "SM":
            return sum(arguments) % 10
        case _:
            return int(median(arguments))


class _Writer:
    """Writes R expressions, each of its own depth [R], into T places, side by side.

    Every row has a stack of open lists, from level 1. Room is kept back for what is open and for the depth that is still to be
    reached. The first list of a level does not end before one has been opened inside it, so that every row reaches its depth.
    """

    def __init__(self, depth: np.ndarray, arguments: int, places: int):
        self.depth, self.places = depth, places
        self.every, self.t = np.arange(len(depth)), 0
        shape = (len(depth), places)
        self.tokens, self.value, self.height, self.operator = (np.zeros(shape, dtype=np.int64) for _ in range(4))
        levels = (len(depth), int(depth.max(initial=1)) + 1)  # of the stack; level 0 takes the value of the whole
        self.level, self.reached = np.zeros((2, len(depth)), dtype=np.int64)
        self.planned, self.done, self.doing, self.high = (np.zeros(levels, dtype=np.int64) for _ in range(4))
        self.planned[:, 0] = 1
        self.held = np.zeros((*levels, arguments), dtype=np.int64)
        self.owed = np.full(len(depth), 1)  # places for what is open if only digits come: level 0 wants one

    def place(self, nest: np.ndarray, many: np.ndarray, operator: np.ndarray, digit: np.ndarray) -> None:
        """The next token of every row, by chance: `nest` [R] where an argument should be a list of `many` [R] arguments."""
        level, done, planned = self.level, self._top(self.done), self._top(self.planned)
        argument = done < planned
        close = ~argument & (level > 0)
        first = level == self.reached  # a list opened now is the first of its level
        below = level < self.depth
        room = self.places - self.t - self.owed - LIST * (self.depth - self.reached) + LIST * (first & below)
        many = np.minimum(many, room - 1)
        must = first & (done == planned - 1)
        opens = argument & below & (many >= FEWEST) & (nest | must)
        self._close(close)
        self._give(argument & ~opens, digit)
        self._open(opens, many, operator)
        self.tokens[:, self.t] = np.select(
            [opens, close, argument], [operator + FIRST_OPERATOR, CLOSE, digit + FIRST_DIGIT], FILLER
        )
        self.t += 1

    def _top(self, stack: np.ndarray) -> np.ndarray:
        """[R, levels] -> [R]: at each row's level."""
        return stack[self.every, self.level]

    def _open(self, rows: np.ndarray, many: np.ndarray, operator: np.ndarray) -> None:
        """Instead of a digit, an opening bracket, `many` arguments and a closing one."""
        self.owed += np.where(rows, many, 0)
        self.level = self.level + rows
        self.reached = np.maximum(self.reached, self.level)
        at = self.every[rows], self.level[rows]
        self.planned[at], self.doing[at], self.done[at], self.high[at] = many[rows], operator[rows], 0, 1

    def _give(self, rows: np.ndarray, value: np.ndarray) -> None:
        """An argument for the innermost list."""
        at = self.every[rows], self.level[rows]
        self.held[(*at, self.done[at])] = value[rows]
        self.done[at] += 1
        self.owed -= rows

    def _close(self, rows: np.ndarray) -> None:
        """The innermost list gives its value, whose place is accounted for, to the one around it."""
        at = self.every[rows], self.level[rows]
        value = np.zeros(len(rows), dtype=np.int64)
        value[rows] = _values(self.doing[at], self.held[at], self.done[at])
        height = self.high[at]
        self.value[:, self.t] = value
        self.height[rows, self.t], self.operator[rows, self.t] = height, self.doing[at]
        self.level = self.level - rows
        around = self.every[rows], self.level[rows]
        self.high[around] = np.maximum(self.high[around], height + 1)
        self._give(rows, value)


def _values(operator: np.ndarray, arguments: np.ndarray, count: np.ndarray) -> np.ndarray:
    """int64 [N]: of N lists at once, of which `arguments` [N, A] holds `count` [N] digits each."""
    here = np.arange(arguments.shape[1]) < count[:, None]
    ordered = np.sort(np.where(here, arguments, 10), axis=1)

    def nth(n: np.ndarray) -> np.ndarray:
        return np.take_along_axis(ordered, n[:, None], axis=1)[:, 0]

    middle = (nth((count - 1) // 2) + nth(count // 2)) // 2
    total = np.where(here, arguments, 0).sum(axis=1) % 10
    return np.choose(operator, [nth(count - 1), ordered[:, 0], middle, total])


@cache
def _by_operator(task: ListOps) -> float:
    found = task.draw(Dice(np.arange(_SAMPLE), 0), max(64, 1 + 2 * LIST * max(task.depths)))
    counts = np.zeros((len(OPERATORS), 10))
    np.add.at(counts, (found.slices["operator"][found.loss_mask], found.targets[found.loss_mask] - FIRST_DIGIT), 1)
    return float(counts.max(axis=1).sum() / counts.sum())
