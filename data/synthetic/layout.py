"""What tasks share: settings that are one number or several, ids without repetition, and where the blocks of a row lie.

R rows, T places in a row, N blocks or ids of a row, M places or ids to draw from.
"""

from collections.abc import Iterable

import numpy as np

from data.errors import DataError, at_least
from data.synthetic.dice import Dice

BEYOND = 1 << 40  # a place of no row

Several = tuple[int, ...] | int  # a number, or a list from which one is drawn for each row


def several(value: Several) -> tuple[int, ...]:
    """The options, also of one number."""
    return value if isinstance(value, tuple) else (value,)


def check_several(name: str, value: Several, low: int) -> None:
    """Raise DataError unless `value` has options, all of them integers of at least `low`."""
    if not several(value):
        raise DataError(f"data.synthetic.{name} is an empty list")
    for one in several(value):
        at_least(f"data.synthetic.{name}", one, low)


def at_most(value: Several, high: int) -> Several:
    """The options cut to `high`, each once."""
    cut = tuple(dict.fromkeys(min(one, high) for one in several(value)))
    return cut if isinstance(value, tuple) else cut[0]


def option(value: Several, drawn: np.ndarray) -> np.ndarray:
    """drawn int [R] -> which of the options each is, int64 [R]."""
    return (drawn[:, None] == np.array(several(value))).argmax(axis=1)


def subset(dice: Dice, high: int | np.ndarray, count: int | np.ndarray, most: int) -> np.ndarray:
    """int64 [R, most]: `count` numbers of range(`high`), all different, every set as likely as any other, in rising order.

    `high` and `count` <= `most` are numbers or [R]; columns that a row does not have are a number beyond every row. Floyd's
    algorithm (doi:10.1145/30401.315746): one draw for each number, whatever `high` is.
    """
    first = np.asarray(high - count)
    leap = dice.uniform(most)
    found = np.empty_like(leap, dtype=np.int64)
    for n in range(most):
        last = first + n
        drawn = (leap[:, n] * (last + 1)).astype(np.int64)
        seen = (found[:, :n] == drawn[:, None]).any(axis=1)
        found[:, n] = np.where(seen, last, drawn)
    found[np.arange(most) >= np.broadcast_to(count, len(found))[:, None]] = BEYOND
    return np.sort(found, axis=1)


def distinct(dice: Dice, high: int, count: int) -> np.ndarray:
    """int64 [R, count]: different numbers of range(`high`) in a random order."""
    found = subset(dice, high, count, count)
    return np.take_along_axis(found, np.argsort(dice.uniform(count), axis=1), axis=1)


def others(dice: Dice, high: int, taken: np.ndarray, count: int) -> np.ndarray:
    """int64 [R, count]: numbers of range(`high`) that are none of `taken` [R, N], which are different ones; they may repeat."""
    found = dice.below(high - taken.shape[1], count)
    for column in np.sort(taken, axis=1).T:  # in rising order each makes room for itself
        found += found >= column[:, None]
    return found


def scattered(dice: Dice, room: int | np.ndarray, count: int | np.ndarray, most: int, width: int) -> np.ndarray:
    """int64 [R, most]: first places of `count` blocks of `width` places in `room` places, in rising order and without overlap;
    every layout is as likely as any other. Blocks that a row does not have are beyond it."""
    return subset(dice, room - count * (width - 1), count, most) + np.arange(most) * (width - 1)


def shuffled_groups(dice: Dice, groups: int, count: np.ndarray, most: int) -> np.ndarray:
    """int64 [R, most]: to which of `groups` each of the first `count` [R] places belongs, in a random order, each to equally
    many."""
    chance = np.where(np.arange(most) < count[:, None], dice.uniform(most), 1.0)
    return np.argsort(np.argsort(chance, axis=1), axis=1) % groups


def spread(
    seq_len: int, parts: Iterable[tuple[np.ndarray, np.ndarray | int]], under: np.ndarray | None = None
) -> np.ndarray:
    """`under` int64 [R, T], by default zeros, with values (a number, [R, 1] or [R, N]) at places [R, N], part after part; what
    lies beyond the row is left out."""
    parts = list(parts)
    full = np.zeros((len(parts[0][0]), seq_len + 1), dtype=np.int64)
    if under is not None:
        full[:, :seq_len] = under
    for places, values in parts:
        np.put_along_axis(full, np.minimum(places, seq_len), np.broadcast_to(values, places.shape), axis=1)
    return full[:, :seq_len]
