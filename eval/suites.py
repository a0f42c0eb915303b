"""Named sets of evaluations."""

from __future__ import annotations

from models import UserError
from models.errors import nearest

SUITES: dict[str, list[str]] = {
    "smoke": ["corpus"],
}


def suite(name: str) -> list[str]:
    """The tasks of a suite; UserError names the nearest for an unknown one."""
    if name not in SUITES:
        raise UserError(f"unknown suite '{name}'{nearest(name, SUITES)}")
    return SUITES[name]
