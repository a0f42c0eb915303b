"""Synthetic tasks of states and of weights: word problems, flip-flops, ListOps, path-stars, words known by context or by weight."""

from __future__ import annotations

import re
import time
from itertools import pairwise, permutations

import numpy as np
import pytest

from data import DataConfig, DataError
from data.synthetic.dice import Dice
from data.synthetic.dual_process import COP, TESTS, DualProcess
from data.synthetic.flip_flop import IGNORE, READ, WRITE, FlipFlop
from data.synthetic.listops import CLOSE, FIRST_DIGIT, FIRST_OPERATOR, OPERATORS, ListOps
from data.synthetic.path_star import FIRST_NODE, IN, OUT, PARTS, PATH, PAUSE, PathStar
from data.synthetic.task import SPLITS, Rows, Task, octave, octaves
from data.synthetic.word_problem import WordProblem

SEQ_LEN = 48
VARIANTS: dict[str, Task] = {
    "S5": WordProblem(),
    "A5, few": WordProblem(group="A5", moves="few"),
    "S3, few": WordProblem(group="S3", moves="few", vocab_size=6),
    "Z7": WordProblem(group="Z7", vocab_size=9),
    "flip_flop": FlipFlop(),
    "flip_flop, values": FlipFlop(vocab_size=12, ignore=0.1),
    "listops": ListOps(),
    "listops, inner": ListOps(depth=(2, 6), inner=True),
    "listops, full": ListOps(depth=15, nest=1.0, arguments=9),
    "path_star": PathStar(),
    "path_star, first": PathStar(degree=20, length=3, answers="first", graph_seed=4),
    "path_star, edges": PathStar(recipe="edges"),
    "path_star, paths": PathStar(recipe="paths", vocab_size=400, degree=30, length=9, held_out=0.01),
    **{f"dual_process, {test}": DualProcess(test=test, ambiguous=0.5) for test in TESTS},
    "dual_process, uniform": DualProcess(alpha=0.0, vocab_size=1003, ambiguous=0.0),
}
# Where answers are as likely as one another and independent, those of other rows are right as often as a guess.
UNIFORM = ("S5", "A5, few", "S3, few", "Z7", "flip_flop", "flip_flop, values")


@pytest.fixture(params=VARIANTS)
def task(request: pytest.FixtureRequest) -> Task:
    return VARIANTS[request.param]


def rows(task: Task, n: int = 200, seed: int = 0, split: str = "train", first: int = 0, seq_len: int = SEQ_LEN) -> Rows:
    return task.rows(np.arange(first, first + n), seq_len, seed, split)


def answers(found: Rows) -> np.ndarray:
    return found.targets[found.loss_mask]


# -- what holds for all of them


@pytest.mark.parametrize("seq_len", [SEQ_LEN, SEQ_LEN + 1])
def test_a_program_knows_every_answer(task: Task, seq_len: int):
    """Asked for in every row, and nothing is said where nothing is asked."""
    task.check(seq_len)
    for split in SPLITS:
        found = rows(task, split=split, seq_len=seq_len)
        assert np.array_equal(task.solve(found.tokens)[found.loss_mask], answers(found))
        assert found.loss_mask.any(axis=1).all()
        assert not found.targets[~found.loss_mask].any()
        assert 0 <= found.tokens.min() <= max(found.tokens.max(), found.targets.max()) < task.vocab_size
        for name, labels in task.slices(seq_len).items():
            index = found.slices[name][found.loss_mask]
            assert 0 <= index.min() <= index.max() < len(labels)


def test_the_program_looks_only_back(task: Task):
    found = rows(task, 20)
    whole = task.solve(found.tokens)
    for cut in (1, 3, 6, 30):
        assert np.array_equal(task.solve(found.tokens[:, :cut]), whole[:, :cut])


def test_the_guess_of_few_moves():
    """The likeliest element of each place, as counted; none is likelier where all elements are moves."""
    task = WordProblem(group="Z64", moves="few")
    targets = rows(task, 4000).targets
    counted = np.mean([np.bincount(at).max() / len(at) for at in targets.T])
    assert task.guess(SEQ_LEN) == pytest.approx(counted, abs=0.01)
    assert task.guess(SEQ_LEN) > 0.15
    assert WordProblem(group="S3", moves="few").guess(1) == pytest.approx(1 / 3)
    assert WordProblem(group="S5").guess(SEQ_LEN) == 1 / 120


@pytest.mark.parametrize("name", VARIANTS)
def test_answers_of_other_rows_are_guesses(name: str):
    """With the targets of the row before, the program is right about as often as `guess` says, or less."""
    task = VARIANTS[name]
    found = rows(task, 1500)
    order = np.roll(np.arange(len(found.tokens)), 1)
    both = found.loss_mask & found.loss_mask[order]
    if name.startswith(("S", "A", "Z")):
        both[:, :20] = False  # few moves need time to reach every element
    if name.startswith("path_star"):
        both[:, [0, 1, 2]] = False  # the root is always the same, and edges of all arms are asked alike
        both[:, 4:] = False
    right = (task.solve(found.tokens) == found.targets[order])[both]
    if name == "path_star, edges":
        assert not len(right)
        return
    guess = 1 / task.order if isinstance(task, WordProblem) else task.guess(SEQ_LEN)
    tolerance = 4 * (guess / len(right)) ** 0.5
    assert right.mean() < guess + tolerance
    if name in UNIFORM or name == "path_star":
        assert right.mean() > guess - tolerance


def test_a_row_is_a_function_of_its_number(task: Task):
    whole = rows(task, 120)
    part = rows(task, 50, first=40)
    for old, new in zip(
        (*whole[:3], whole.meaning, *whole.slices.values()), (*part[:3], part.meaning, *part.slices.values())
    ):
        assert np.array_equal(old[40:90], new)
    assert (rows(task, 120, seed=1).tokens != whole.tokens).any()


def test_splits_do_not_meet():
    """Tasks so small that every row is drawn; of a path-star see below."""
    small = [
        (WordProblem(group="Z3", vocab_size=3), 4),
        (FlipFlop(), 7),
        (ListOps(depth=1, arguments=2), 4),
        (DualProcess(vocab_size=26, holdout=2, alpha=0.0), 6),
        (DualProcess(test="holdout", holdout=9), 6),
    ]
    for task, seq_len in small:
        meanings = [
            {tuple(m) for m in rows(task, 2000, seed, split, seq_len=seq_len).meaning}
            for split in SPLITS
            for seed in (0, 3)
        ]
        assert not (meanings[0] | meanings[1]) & (meanings[2] | meanings[3])
        assert len(meanings[0]) > 10
        assert 0.5 < len(meanings[0]) / len(meanings[2]) < 2


def test_octaves():
    assert octaves(1) == ("1",)
    assert octaves(9) == ("1", "2-3", "4-7", "8-15")
    numbers = np.arange(1, 70)
    for number, index in zip(numbers, octave(numbers)):
        low, _, high = octaves(69)[index].partition("-")
        assert int(low) <= number <= int(high or low)


GOLDEN = {
    "S5": (
        [[65, 80, 62, 119, 87, 79, 74, 72, 45], [11, 25, 69, 21, 38, 14, 93, 13, 20]],
        [65, 52, 35, 84, 107, 58, 53, 41, 115, 11, 33, 106, 46, 90, 43, 101, 52, 51],
    ),
    "A5, few": (
        [[15, 4, 0, 1, 15, 0, 4, 0, 4], [1, 0, 1, 1, 4, 1, 0, 4, 15]],
        [15, 30, 30, 45, 46, 46, 22, 22, 35, 1, 1, 2, 0, 4, 8, 8, 2, 17],
    ),
    "flip_flop, values": ([[0, 3, 2, 3, 2, 3, 0, 6, 2], [0, 6, 2, 6, 2, 6, 2, 6, 2]], [3, 3, 6, 6, 6, 6, 6]),
    "listops": (
        [
            [14, 4, 7, 8, 12, 10, 5, 5, 14, 8, 7, 5, 9, 8, 15, 15, 15, 0, 0, 0],
            [11, 2, 2, 5, 6, 15, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ],
        [9, 6],
    ),
    "listops, inner": (
        [
            [11, 11, 1, 13, 5, 14, 12, 12, 3, 4, 15, 9, 15, 6, 15, 15, 15, 8, 10, 15],
            [11, 11, 2, 5, 6, 3, 6, 15, 9, 10, 6, 15, 0, 0, 0, 0, 0, 0, 0, 0],
        ],
        [3, 3, 8, 6, 6, 10, 6, 10],
    ),
    "path_star": (
        [[3, 39, 4, 5, 52, 37, 53, 0, 0], [3, 39, 4, 5, 52, 37, 53, 0, 0]],
        [5, 52, 37, 53, 39, 5, 52, 37, 53, 39],
    ),
    "dual_process, none": ([[1, 52, 5, 5, 52, 5, 0, 0, 0], [1, 53, 4, 53, 53, 53, 0, 0, 0]], [52, 5, 5, 53, 53, 53]),
    "dual_process, tail_switch": (
        [[98, 1, 49, 49, 49, 49, 0, 0, 0], [101, 1, 47, 47, 47, 47, 0, 0, 0]],
        [49, 49, 49, 47, 47, 47],
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_rows(name: str):
    """Fixed for ever by the seed: a run of today can be repeated tomorrow."""
    found = rows(VARIANTS[name], 2, 7, "val", 1000, seq_len=20 if "listops" in name else 9)
    assert (found.tokens.tolist(), answers(found).tolist()) == GOLDEN[name]


@pytest.mark.parametrize("name", ["S5", "flip_flop", "listops", "path_star", "dual_process, none"])
def test_seconds_for_many_rows(name: str):
    """100,000 rows of 128 places take seconds; some hundredths of them are drawn here."""
    start = time.process_time()
    rows(VARIANTS[name], 4000, seq_len=128)
    assert time.process_time() - start < 2


# -- word problems


def compose(first: tuple[int, ...], then: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(then[x] for x in first)


@pytest.mark.parametrize(
    ("group", "order"), [("S2", 2), ("S3", 6), ("S4", 24), ("A3", 3), ("A4", 12), ("A5", 60), ("Z5", 5)]
)
def test_groups(group: str, order: int):
    """The right size; 0 changes nothing; everything can be undone; the few generate all; some things do not commute."""
    task = WordProblem(group=group)
    assert task.order == order
    pairs = np.array([(a, b) for a in range(order) for b in range(order)])
    product = task.solve(pairs)[:, 1].reshape(order, order)
    assert (product[0] == np.arange(order)).all()
    assert (np.sort(product, axis=0) == np.arange(order)[:, None]).all()
    assert (product == product.T).all() == (group in ("S2", "A3", "Z5"))
    few = np.unique(rows(WordProblem(group=group, moves="few")).tokens)
    reached, new = {0}, {0}
    while new:
        new = {int(product[a, b]) for a in reached for b in few} - reached
        reached |= new
    assert len(reached) == order
    assert len(few) <= 5


def test_what_a_permutation_is():
    """Ids in the order of the alphabet; the earlier one acts first."""
    elements = list(permutations(range(5)))
    found = rows(WordProblem(), 20)
    for row, wanted in zip(found.tokens.tolist(), found.targets.tolist()):
        held = elements[0]
        for token, target in zip(row, wanted):
            held = compose(held, elements[token])
            assert elements[target] == held


def test_longer_rows_begin_as_shorter_ones_might():
    """Every place is asked, at any length, and the slices tell the places apart."""
    found = rows(WordProblem(group="Z2", vocab_size=2), 5, seq_len=300)
    assert found.loss_mask.all()
    assert np.array_equal(found.targets, np.cumsum(found.tokens, axis=1) % 2)
    assert octaves(300)[found.slices["position"][0, 299]] == "256-511"
    assert found.slices["position"][0, :4].tolist() == [0, 1, 1, 2]


# -- flip-flops


def test_flip_flops_are_what_they_say():
    for ignore in (0.1, 0.8):
        task = FlipFlop(ignore=ignore)
        found = rows(task, 2000)
        does, shown = found.tokens[:, ::2], found.tokens[:, 1::2]
        assert (does[:, 0] == WRITE).all()
        assert (does[:, -1] == READ).all()
        shares = [(does[:, 1:-1] == kind).mean() for kind in (IGNORE, WRITE, READ)]
        assert np.abs(np.array(shares) - [ignore, (1 - ignore) / 2, (1 - ignore) / 2]).max() < 0.01
        assert np.array_equal(found.loss_mask[:, ::2], does == READ)
        assert (shown[does == READ] == answers(found)).all()
        assert np.abs(np.bincount(shown[does == IGNORE], minlength=5)[3:] / (does == IGNORE).sum() - 0.5).max() < 0.02
        labels = task.slices(SEQ_LEN)["distance"]
        for r, t in np.argwhere(found.loss_mask)[:500]:
            back = next(n for n in range(1, SEQ_LEN) if found.tokens[r, t - 2 * n] == WRITE)
            low, _, high = labels[found.slices["distance"][r, t]].partition("-")
            assert int(low) <= back <= int(high or low)


# -- ListOps


def text(row: np.ndarray) -> str:
    """As Python would compute it."""
    written = ""
    for token in row:
        if FIRST_DIGIT <= token < FIRST_OPERATOR:
            written += f"{token - FIRST_DIGIT},"
        elif FIRST_OPERATOR <= token < CLOSE:
            written += f"{OPERATORS[token - FIRST_OPERATOR]}(["
        elif token == CLOSE:
            written += "]),"
    return written.rstrip(",")


FUNCTIONS = {"MAX": max, "MIN": min, "SM": lambda x: sum(x) % 10, "MED": lambda x: int(np.median(x))}


@pytest.mark.parametrize("name", [name for name in VARIANTS if "listops" in name])
def test_listops_are_what_they_say(name: str):
    """One expression a row, which Python computes too; each of exactly the depth that was drawn, within its bounds."""
    task = VARIANTS[name]
    assert isinstance(task, ListOps)
    found = rows(task, 400)
    depths = []
    for row, mask, targets, height, operator in zip(
        *found[:1], found.loss_mask, found.targets, found.slices["depth"], found.slices["operator"]
    ):
        expression = text(row)
        assert eval(expression, dict(FUNCTIONS)) == targets[mask][-1] - FIRST_DIGIT
        end = np.flatnonzero(row == CLOSE)[-1]
        assert not row[end + 1 :].any()
        assert np.array_equal(np.flatnonzero(mask), np.flatnonzero(row == CLOSE) if task.inner else [end])
        level = np.cumsum((row >= FIRST_OPERATOR) & (row < CLOSE)) - np.cumsum(row == CLOSE)
        assert (level[:end] > 0).all()
        assert level[end] == 0
        depths.append(int(level.max()))
        assert height[end] + 1 == depths[-1]
        assert OPERATORS[operator[end]] == expression[:3].rstrip("(")
        for t in np.flatnonzero(mask):
            start = max(i for i in range(t) if level[i] == level[t] + 1 and FIRST_OPERATOR <= row[i] < CLOSE)
            assert height[t] + 1 == level[start:t].max() - level[t]
            many = (level[start + 1 : t] == level[t] + 1).sum()  # digits and closing brackets of its own arguments
            assert 2 <= many <= task.arguments
    assert set(depths) == set(task.depths)
    assert np.bincount(depths)[list(task.depths)].min() > 0.7 * len(depths) / len(task.depths)


def test_the_guess_of_listops_by_hand():
    """Lists of two digits: the greatest is 9 in 19 of 100, the smallest 0 as often, sums are uniform, medians best guessed 4."""
    found = ListOps(depth=1, arguments=2).guess(64)
    middle = max(np.bincount([(a + b) // 2 for a in range(10) for b in range(10)]))
    assert found == pytest.approx((0.19 + 0.19 + 0.1 + middle / 100) / 4, abs=0.02)


# -- path-stars


def test_a_path_star():
    """One root, arms of distinct nodes, the same for every seed of the run and another for every seed of the graph."""
    for task in (PathStar(), PathStar(degree=64, length=5, vocab_size=262)):
        paths = task.paths
        assert task.nodes == len(np.unique(paths)) == task.degree * (task.length - 1) + 1
        assert len(np.unique(paths[:, 0])) == 1
        assert paths.min() >= FIRST_NODE
        assert paths.max() < task.vocab_size
        assert 0 < task.trained < task.degree
        assert np.array_equal(paths, PathStar(task.kind, task.vocab_size, task.degree, task.length, held_out=0.5).paths)
        other = PathStar(task.kind, task.vocab_size, task.degree, task.length, graph_seed=1).paths
        assert (other != paths).mean() > 0.9
    assert PathStar(vocab_size=50_006, degree=10_000, length=6).nodes == 50_001


def test_paths_of_other_leaves_and_edges_of_all():
    """No held-out path occurs in training, of which every edge does; the shares are what the settings say."""
    task = PathStar(degree=12, edges=0.3)
    assert task.trained == 9
    seen = {split: rows(task, 4000, split=split) for split in SPLITS}
    leaves = {s: set(f.tokens[f.tokens[:, 0] == PATH, 1].tolist()) for s, f in seen.items()}
    assert leaves["train"] == set(task.paths[:9, -1].tolist())
    assert leaves["val"] == set(task.paths[9:, -1].tolist())
    inward = {(b, a) for path in task.paths.tolist() for a, b in pairwise(path)}
    outward = {(a, b) for b, a in inward if a != task.paths[0, 0]}
    for found in seen.values():
        kind = found.tokens[:, 0]
        assert (kind != PATH).mean() == pytest.approx(0.3, abs=0.03)
        for marker, edges in ((IN, inward), (OUT, outward)):
            asked = kind == marker
            assert set(zip(found.tokens[asked, 1].tolist(), found.targets[asked, 1].tolist())) == edges
            assert asked.sum() / (kind != PATH).sum() == pytest.approx(len(edges) / len(inward | outward), abs=0.03)
        assert not (found.tokens[kind != PATH, 2:]).any()


def test_path_rows_are_what_they_say():
    task = PathStar(recipe="paths", degree=9, length=6)
    arms = {int(path[-1]): path for path in task.paths}
    found, first = rows(task), rows(PathStar(recipe="paths", degree=9, length=6, answers="first"))
    for row, targets, part in zip(found.tokens, found.targets, found.slices["part"]):
        path = arms[int(row[1])]
        assert row[:8].tolist() == [PATH, path[-1], PAUSE, *path[:-1]]
        assert targets[2:8].tolist() == path.tolist()
        assert [PARTS[p] for p in part[2:8]] == ["root", "first", *["rest"] * 4]
    assert np.array_equal(first.tokens, found.tokens)
    assert np.flatnonzero(first.loss_mask.any(axis=0)).tolist() == [3]
    assert np.array_equal(first.targets[:, 3], found.targets[:, 3])


# -- words known from the context or from the weights


def classes(task: DualProcess, words: np.ndarray) -> np.ndarray:
    """0 noun, 1 adjective, 2 of the holdout."""
    return np.where(words >= task.vocab_size - task.holdout, 2, (words - 2) // task.words)


@pytest.mark.parametrize("test", TESTS)
def test_words_are_what_they_say(test: str):
    """Both patterns, both questions, words of the right class and frequency."""
    task = DualProcess(test=test, ambiguous=0.0)
    found = task.draw(
        Dice(np.arange(4000), 0), SEQ_LEN
    )  # not parted: the commonest pairs alone are a quarter of all rows
    cop = (found.tokens[:, :3] == COP).argmax(axis=1)
    every = np.arange(len(cop))
    assert set(cop) == {0, 1}
    adjective, noun = found.tokens[every, cop + 1], found.tokens[every, np.where(cop == 0, 2, 0)]
    query = found.tokens[:, 3]
    assert ((query == adjective) | (query == noun)).all()
    assert (query == noun).mean() == pytest.approx(0.5, abs=0.03)
    assert np.array_equal(found.targets[:, 3:6], np.stack([adjective, query, query], axis=1))
    assert np.array_equal(found.tokens[:, 4:6], found.targets[:, 3:5])
    assert not found.tokens[:, 6:].any()
    labels = task.slices(SEQ_LEN)["answer"]
    first = [labels[i] for i in found.slices["answer"][:, 3]]
    differ = adjective != noun
    assert [f for f, d in zip(first, differ) if d] == [
        "first-noun" if q == n else "first-adjective" for q, n, d in zip(query, noun, differ) if d
    ]
    wanted = {"none": (1, 0), "switch": (0, 1), "tail": (1, 0), "tail_switch": (0, 1), "holdout": (2, 2)}[test]
    assert (classes(task, adjective) == wanted[0]).all()
    assert (classes(task, noun) == wanted[1]).all()
    ranks = np.concatenate([adjective - 2, noun - 2]) % task.words
    if test.startswith("tail"):
        assert set(ranks) == set(range(45, 50))
    elif test == "holdout":
        assert len(np.unique(adjective)) == task.holdout
        assert differ.all()
        assert {task.slices(9)["rank"][i] for i in found.slices["rank"][:, 3]} == {"unseen"}
    else:
        weights = np.arange(1, task.words + 1) ** -1.5
        assert np.abs(np.bincount(ranks, minlength=task.words) / len(ranks) - weights / weights.sum()).max() < 0.015


def test_ambiguous_words_stand_for_the_other_class_half_of_the_time():
    task = DualProcess(alpha=0.0, ambiguous=0.2, vocab_size=128)
    found = rows(task, 20_000)
    cop = (found.tokens[:, :3] == COP).argmax(axis=1)
    adjective = found.tokens[np.arange(len(cop)), cop + 1]
    switched = classes(task, adjective) == 0
    assert switched.mean() == pytest.approx(0.1, abs=0.02)
    ranks = (adjective - 2) % task.words
    share = np.array([switched[ranks == r].mean() for r in range(task.words)])
    ambiguous = np.flatnonzero(share)
    assert np.array_equal(ambiguous, np.arange(4, 50, 5))
    assert np.abs(share[ambiguous] - 0.5).max() < 0.15


def test_the_holdout_is_never_trained():
    found = rows(DualProcess(ambiguous=1.0), 3000)
    assert found.tokens.max() < 102


def test_the_two_words_differ():
    """Also where every word may be either: of a word beside itself nothing could be asked."""
    found = rows(DualProcess(ambiguous=1.0), 2000)
    words = [[token for token in row if token != COP] for row in found.tokens[:, :3].tolist()]
    assert all(len(set(two)) == 2 for two in words)


def test_guessing_is_repeating_the_question():
    """Right for half of the first answers and for all others."""
    task = DualProcess(alpha=0.0)
    found = rows(task, 20_000)
    asked = np.broadcast_to(found.tokens[:, 3:4], found.tokens.shape)
    assert (asked == found.targets)[found.loss_mask].mean() == pytest.approx(task.guess(64), abs=0.01)


# -- settings


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WordProblem(group="D4"), "'D4' is no group"),
        (lambda: WordProblem(group="S7"), "'S7', but there are S2 to S6"),
        (lambda: WordProblem(group="A2"), "'A2', but there are A3 to A6"),
        (lambda: WordProblem(group="Z1"), "'Z1', but there are Z2 to Z1024"),
        (lambda: WordProblem(group="S5", vocab_size=64), "S5 has 120 elements"),
        (lambda: WordProblem(moves="some"), "data.synthetic.moves: unknown value 'some'"),
        (lambda: FlipFlop(vocab_size=4), "data.synthetic.vocab_size must be an integer of at least 5"),
        (lambda: FlipFlop(ignore=1.0), "data.synthetic.ignore must lie in [0, 1)"),
        (lambda: ListOps(vocab_size=15), "data.synthetic.vocab_size must be an integer of at least 16"),
        (lambda: ListOps(depth=()), "data.synthetic.depth is an empty list"),
        (lambda: ListOps(depth=(1, 0)), "data.synthetic.depth must be an integer of at least 1"),
        (lambda: ListOps(arguments=1), "data.synthetic.arguments must be an integer of at least 2"),
        (lambda: ListOps(nest=1.5), "data.synthetic.nest must lie in [0, 1]"),
        (lambda: DataConfig(synthetic=ListOps(depth=5), seq_len=15), "too short for lists of depth 5; they need 16"),
        (lambda: PathStar(recipe="staged"), "data.synthetic.recipe: unknown value 'staged'"),
        (lambda: PathStar(answers="one"), "data.synthetic.answers: unknown value 'one'"),
        (lambda: PathStar(degree=16), "65 nodes need at least 70 ids"),
        (lambda: PathStar(degree=1), "data.synthetic.degree must be an integer of at least 2"),
        (lambda: PathStar(held_out=0.0), "data.synthetic.held_out must lie between 0 and 1"),
        (lambda: DataConfig(synthetic=PathStar(), seq_len=6), "too short for paths of 5 nodes; they need 7"),
        (lambda: DualProcess(test="tial"), "data.synthetic.test: unknown value 'tial'; did you mean 'tail'"),
        (lambda: DualProcess(vocab_size=47), "vocab_size=47 is too small; give at least 48"),
        (lambda: DualProcess(alpha=-1.0), "data.synthetic.alpha must not be negative"),
        (lambda: DualProcess(ambiguous=2.0), "data.synthetic.ambiguous must lie in [0, 1]"),
        (lambda: DataConfig(synthetic=DualProcess(), seq_len=5), "data.seq_len must be an integer of at least 6"),
        (lambda: DataConfig(synthetic=FlipFlop(), seq_len=2), "data.seq_len must be an integer of at least 3"),
    ],
)
def test_refused(make, message: str):
    with pytest.raises(DataError, match=re.escape(message)):
        make()
