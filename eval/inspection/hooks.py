"""What instruments share in changing a model from outside: attributes of its parts are replaced for a while, and named in words."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from models import UserError

P = TypeVar("P")


@contextlib.contextmanager
def changed(over: Iterable[P], method: str, change: Callable[[P, Any], Any]) -> Iterator[None]:
    """Inside, this method (or option) of these parts is what ``change`` makes of the part and the method as it was. Of nested
    changes the last made acts first."""
    before = [(part, vars(part).get(method)) for part in over]
    for part, _ in before:
        vars(part)[method] = change(part, getattr(part, method))
    try:
        yield
    finally:
        for part, old in before:
            if old is None:
                del vars(part)[method]
            else:
                vars(part)[method] = old


def one_of(spec: str, what: str, text: str, valid: Iterable[int]) -> int:
    """The number that ``text`` says. Raises UserError, about an ablation ``spec``, if it is none of the valid ones."""
    among = [*valid]
    if not text.isdigit() or int(text) not in among:
        shown = (
            f"{among[0]} to {among[-1]}" if among == [*range(among[0], among[-1] + 1)] else ", ".join(map(str, among))
        )
        raise UserError(f"--ablate {spec}: no {what} '{text}'; there are {shown}")
    return int(text)
