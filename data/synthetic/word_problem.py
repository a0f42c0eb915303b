"""The word problem of a finite group (arXiv:2404.08819, section 4): at every place, the product of all elements so far.

    tokens   x1 x2    x3       ...
    targets  x1 x1 x2 x1 x2 x3 ...        x1 x2: first x1, then x2

What must be remembered is one element, but it changes at every place. The groups: `S<n>`, all permutations of n things, which
from n = 5 on no fixed depth of attention or of diagonal recurrences follows at every length; `A<n>`, the even ones; `Z<n>`,
counting modulo n. Ids are the elements: the permutations in the order of the alphabet, or the numbers; 0 changes nothing.
"""

import math
import re
from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np

from data.errors import DataError, at_least, choose
from data.synthetic.dice import Dice
from data.synthetic.task import Rows, Task, octave, octaves

MOVES = ("all", "few")
SIZES = {"S": (2, 6), "A": (3, 6), "Z": (2, 1024)}  # the table of products is quadratic in the number of elements
Permutation = tuple[int, ...]


@dataclass(frozen=True)
class WordProblem(Task):
    """`moves`: which elements are inputs: all, or a few that generate the group, and the one that changes nothing. The few are
    swaps of two neighbours in S, turns of three neighbours in A, and 1 in Z."""

    kind: str = "word_problem"
    vocab_size: int = 128
    group: str = "S5"
    moves: str = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("data.synthetic.moves", self.moves, MOVES)
        family, n = _parse(self.group)
        low, high = SIZES[family]
        if not low <= n <= high:
            raise DataError(f"data.synthetic.group: {self.group!r}, but there are {family}{low} to {family}{high}")
        if self.order > self.vocab_size:
            raise DataError(f"data.synthetic.vocab_size={self.vocab_size}: {self.group} has {self.order} elements")

    @property
    def order(self) -> int:
        """Elements of the group."""
        family, n = _parse(self.group)
        return n if family == "Z" else math.factorial(n) // (1 if family == "S" else 2)

    def check(self, seq_len: int) -> None:
        """Two places are the shortest product."""
        at_least("data.seq_len", seq_len, 2)

    def draw(self, dice: Dice, seq_len: int) -> Rows:
        """Inputs are independent and uniform."""
        inputs = np.array(_few(self.group)) if self.moves == "few" else np.arange(self.order)
        tokens = inputs[dice.below(len(inputs), seq_len)]
        table = _products(self.group)
        targets = tokens.copy()
        for t in range(1, seq_len):
            targets[:, t] = table[targets[:, t - 1], tokens[:, t]]
        position = np.broadcast_to(octave(np.arange(1, seq_len + 1)), tokens.shape)
        return Rows(tokens, targets, np.ones(tokens.shape, dtype=bool), {"position": position.copy()}, tokens.copy())

    def slices(self, seq_len: int) -> dict[str, tuple[str, ...]]:
        """By the number of elements multiplied, in powers of two."""
        return {"position": octaves(seq_len)}

    def solve(self, tokens: np.ndarray) -> np.ndarray:
        """By doing one permutation after the other; by adding up."""
        family, n = _parse(self.group)
        if family == "Z":
            return np.cumsum(tokens, axis=1) % n
        elements = _permutations(self.group)
        number = {p: i for i, p in enumerate(elements)}
        answers = np.empty(tokens.shape, dtype=np.int64)
        for row, found in zip(tokens.tolist(), answers):
            held = list(range(n))
            for t, token in enumerate(row):
                held = [elements[token][x] for x in held]
                found[t] = number[tuple(held)]
        return answers

    def guess(self, seq_len: int) -> float:
        """The likeliest element at each place: any, but of few moves, which have not yet reached them all."""
        if self.moves == "all":
            return 1 / self.order
        few, table = list(_few(self.group)), _products(self.group)
        chance, likeliest = np.zeros(self.order), []
        chance[0] = 1.0
        for _ in range(seq_len):
            chance = np.bincount(table[:, few].ravel(), chance.repeat(len(few)) / len(few), self.order)
            likeliest.append(chance.max())
        return float(np.mean(likeliest))

    def tiny(self) -> "WordProblem":
        """Fits as it is."""
        return self


def _parse(group: str) -> tuple[str, int]:
    found = re.fullmatch(r"([SAZ])(\d{1,9})", group)
    if not found:
        raise DataError(
            f"data.synthetic.group: {group!r} is no group; there is: S5, A5, Z7 and others of these families"
        )
    return found[1], int(found[2])


def _permutations(group: str) -> list[Permutation]:
    """All of S<n>, or the even ones."""
    family, n = _parse(group)
    return [p for p in permutations(range(n)) if family == "S" or not _odd(p)]


def _odd(p: Permutation) -> bool:
    return sum(p[i] > p[j] for j in range(len(p)) for i in range(j)) % 2 == 1


def _few(group: str) -> list[int]:
    """The numbers of the element that changes nothing and of the generators."""
    family, n = _parse(group)
    if family == "Z":
        return [0, 1]
    number = {p: i for i, p in enumerate(_permutations(group))}
    size = 2 if family == "S" else 3
    same = tuple(range(n))
    turned = [(*same[:i], *same[i + 1 : i + size], i, *same[i + size :]) for i in range(n - size + 1)]
    return [0, *(number[p] for p in turned)]


@cache
def _products(group: str) -> np.ndarray:
    """int64 [order, order]: at [a, b] the element that does a first, then b."""
    family, n = _parse(group)
    if family == "Z":
        return (np.arange(n)[:, None] + np.arange(n)) % n
    elements = np.array(_permutations(group))
    after = elements[np.arange(len(elements))[None, :, None], elements[:, None, :]]  # [a, b, x]: b of a of x
    digits = n ** np.arange(n - 1, -1, -1)
    return np.searchsorted(elements @ digits, after @ digits)
