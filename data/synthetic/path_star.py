"""Paths in a graph that is kept in the weights (arXiv:2510.26745): it is never in the context.

The graph: a root with `degree` arms, each a path, their nodes numbered at random. One example a row:

    tokens   [OUT] u        [IN] v        [PATH] leaf [PAUSE] root n1 n2 ... .     . is filler
    targets        v             u                    root    n1   n2 ...    leaf

An edge is learned in both directions, with a marker for each, so that it has one answer; out of the root no single edge leads, and
none is asked. The edges of all arms are trained, but the paths of three quarters of the leaves alone: validation asks for those
of the others. Their first node, n1, is the hardest: it follows from `degree` nodes alike unless the arm is known as a whole.

Ids: 0 filler, 1 to 4 the markers, then the nodes.
"""

from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

import numpy as np

from data.errors import DataError, at_least, choose
from data.synthetic.dice import Dice
from data.synthetic.task import NO_ANSWER, Rows, Task

RECIPES = ("mixed", "edges", "paths")
ANSWERS = ("all", "first")
FILLER, OUT, IN, PATH, PAUSE, FIRST_NODE = range(6)
FIRST = 3  # the place that asks for the first node behind the root
PARTS = ("out", "in", "root", "first", "rest")
_GRAPH = 8  # what the draws of a graph are for, beside those of rows


@dataclass(frozen=True)
class PathStar(Task):
    """`length`: nodes of a path, root and leaf included. `recipe`: edges and paths together, or only one of the two (edges first,
    then paths from the weights of that run, is the staged recipe). `answers`: of a path everything, or its first node behind the
    root alone. `edges`: how many examples of the mixed recipe are edges, in validation too; at a half each path is seen
    several times as often as each edge, and is learned by heart rather than from the edges."""

    kind: str = "path_star"
    degree: int = 12
    length: int = 5
    graph_seed: int = 0
    recipe: str = "mixed"
    answers: str = "all"
    edges: float = 0.5
    held_out: float = 0.25  # of the leaves

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("data.synthetic.recipe", self.recipe, RECIPES)
        choose("data.synthetic.answers", self.answers, ANSWERS)
        for name, low in (("degree", 2), ("length", 3), ("graph_seed", 0)):
            at_least(f"data.synthetic.{name}", getattr(self, name), low)
        for name in ("edges", "held_out"):
            if not 0 < getattr(self, name) < 1:
                raise DataError(f"data.synthetic.{name} must lie between 0 and 1, got {getattr(self, name)!r}")
        if self.vocab_size < FIRST_NODE + self.nodes:
            raise DataError(
                f"data.synthetic.vocab_size={self.vocab_size}: {self.nodes} nodes need at least {FIRST_NODE + self.nodes} ids"
            )

    @property
    def nodes(self) -> int:
        """Of the graph."""
        return self.degree * (self.length - 1) + 1

    @property
    def trained(self) -> int:
        """Arms whose paths are trained: the first ones."""
        return min(self.degree - 1, max(1, round(self.degree * (1 - self.held_out))))

    def check(self, seq_len: int) -> None:
        """Markers, leaf and path, or a marker and a node."""
        need = 2 if self.recipe == "edges" else self.length + 2
        if seq_len < need:
            raise DataError(f"data.seq_len={seq_len} is too short for paths of {self.length} nodes; they need {need}")

    @property
    def paths(self) -> np.ndarray:
        """int64 [degree, length]: the ids of each arm's nodes, from the root to the leaf."""
        return _graph(self.degree, self.length, self.vocab_size - FIRST_NODE, self.graph_seed)

    def candidates(self, dice: Dice, seq_len: int, split: str) -> tuple[Rows, np.ndarray]:
        """Edges of any arm and paths of the split's own."""
        share = {"mixed": self.edges, "edges": 1.0, "paths": 0.0}[self.recipe]
        is_edge = dice.uniform(1) < share  # [R, 1]
        width = max(seq_len, self.length + 2)
        drawn = np.where(is_edge, self._edges(dice, width), self._paths(dice, width, split))
        tokens, targets, part = drawn[:, :, :seq_len]
        return Rows(tokens, targets, targets > 0, {"part": part}, tokens[:, :2].copy()), np.full(len(tokens), True)

    def _edges(self, dice: Dice, width: int) -> np.ndarray:
        """int64 [3, R, width], tokens, targets and parts of an edge each: any inward one, or an outward one not of the root."""
        arm, number = dice.below(np.array([self.degree, 2 * self.length - 3]), 2).T
        inward = number < self.length - 1
        near = np.where(inward, number, number - self.length + 2)  # of the two nodes, counted from the root
        ends = self.paths[arm, near], self.paths[arm, near + 1]
        found = np.zeros((3, len(arm), width), dtype=np.int64)
        found[0, :, 0] = np.where(inward, IN, OUT)
        found[0, :, 1], found[1, :, 1] = np.where(inward, ends[::-1], ends)
        found[2, :, 1] = inward
        return found

    def _paths(self, dice: Dice, width: int, split: str) -> np.ndarray:
        """The same of a path each, one of the split's."""
        low, high = (0, self.trained) if split == "train" else (self.trained, self.degree)
        path = self.paths[low + dice.below(high - low, 1)[:, 0]]
        end = self.length + 2
        found = np.zeros((3, len(path), width), dtype=np.int64)
        found[0, :, 0], found[0, :, 1], found[0, :, 2] = PATH, path[:, -1], PAUSE
        found[0, :, 3:end] = path[:, :-1]
        found[1, :, 2:end] = path
        found[2, :, 2:end] = [2, 3, *[4] * (self.length - 2)]
        if self.answers == "first":
            found[1:, :, np.arange(width) != FIRST] = 0
        return found

    def slices(self, seq_len: int) -> dict[str, tuple[str, ...]]:
        """Edges outward and inward; of a path the root, which is always the same, the first node behind it, and the rest."""
        return {"part": PARTS}

    def solve(self, tokens: np.ndarray) -> np.ndarray:
        """From the tokens and the list of all edges, those of the arms whose paths are held out among them: from the leaf inward to
        the root, and the same way back."""
        inward = {child: parent for path in self.paths.tolist() for parent, child in pairwise(path)}
        outward = {parent: child for child, parent in inward.items()}  # of the root one of many; not asked
        answers = np.full(tokens.shape, NO_ANSWER, dtype=np.int64)
        for row, found in zip(tokens.tolist(), answers):
            if len(row) < 2:
                continue
            marker, node = row[:2]
            if marker == IN:
                found[1] = inward.get(node, NO_ANSWER)
            elif marker == OUT:
                found[1] = outward.get(node, NO_ANSWER)
            elif marker == PATH:
                back = [node]
                while back[-1] in inward:
                    back.append(inward[back[-1]])
                found[2 : 2 + len(back)] = back[::-1][: len(row) - 2]
        return answers

    def guess(self, seq_len: int) -> float:
        """Of the first node behind the root: any of them. The other answers have many that are no better."""
        return 1 / self.degree

    def tiny(self) -> "PathStar":
        """Fits unless its paths are long."""
        return replace(self, length=min(self.length, 62))


@cache
def _graph(degree: int, length: int, ids: int, seed: int) -> np.ndarray:
    nodes = degree * (length - 1) + 1
    order = Dice(np.zeros(1, dtype=np.int64), seed, _GRAPH).shuffled(ids, nodes)[0, :nodes]
    drawn = order.astype(np.int64) + FIRST_NODE
    return np.concatenate([np.full((degree, 1), drawn[0]), drawn[1:].reshape(degree, length - 1)], axis=1)
