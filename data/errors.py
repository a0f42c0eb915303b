"""The one exception a user of this room can cause."""

import difflib
from collections.abc import Iterable


class DataError(ValueError):
    """Bad input to the data room: one line that names the bad thing and, where there is one, the nearest good one."""

    one_line = True


def nearest(word: str, options: Iterable[str], limit: int = 8) -> str:
    """A clause for an error message: the closest of `options` to `word`, or the first few of them."""
    known = sorted(set(options))
    if not known:
        return "there are none"
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    more = ", ..." if len(known) > limit else ""
    return "there is: " + ", ".join(known[:limit]) + more


def choose(what: str, value: str, options: Iterable[str]) -> None:
    """Raise unless `value` is one of `options`."""
    options = tuple(options)
    if value not in options:
        raise DataError(f"{what}: unknown value {value!r}; {nearest(str(value), options)}")


def at_least(what: str, value: int, low: int) -> None:
    """Raise unless `value` is an integer of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise DataError(f"{what} must be an integer of at least {low}, got {value!r}")
