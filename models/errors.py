"""Errors that a user can cause: one line, exit code 2, nothing half-written."""

from __future__ import annotations

import difflib
import functools
import sys
from collections.abc import Callable, Iterable


class UserError(ValueError):
    """A mistake in the input. The message is one line that names the bad thing and, where there is one, the nearest good one."""

    one_line = True


def nearest(name: object, valid: Iterable[object]) -> str:
    """``"; did you mean 'x'?"``, or the list of valid names when none is near."""
    names = sorted(str(v) for v in valid)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; valid: {', '.join(names)}" if names else ""


def guard(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wrap a command's ``main``: an error marked ``one_line`` becomes one line on stderr and exit code 2."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except Exception as error:
            if not getattr(error, "one_line", False):
                raise
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2

    return wrapped
