"""What a run logged of its parts while it trained, as curves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from eval.inspection.numbers import plain

POINTS = 1000  # of a curve over training


def curves(records: Sequence[dict[str, Any]], prefixes: Mapping[int, str]) -> dict[str, Any] | None:
    """Lines of ``metrics.jsonl`` -> ``losses`` by name and ``stats`` by name and layer, each a list beside ``tokens`` (trained on),
    and ``validation``, pairs of tokens and loss. ``prefixes``: of the names of a layer's stats. None if none of these was logged."""
    lines = [r for r in records if "losses" in r and _under(prefixes.values(), r)]
    if not lines:
        return None
    lines = lines[:: -(-len(lines) // POINTS)]
    names = sorted({name.rpartition(".")[2] for name in _under(prefixes.values(), lines[-1])})
    return {
        "tokens": [r["tokens"] for r in lines],
        "losses": {name: plain([r["losses"].get(name) for r in lines]) for name in lines[-1]["losses"]},
        "stats": {
            name: {str(n): plain([r["stats"].get(prefix + name) for r in lines]) for n, prefix in prefixes.items()}
            for name in names
        },
        "validation": [[r["tokens"], plain(r["val"].get("loss"))] for r in records if "val" in r and "tokens" in r],
    }


def _under(prefixes: Iterable[str], record: dict[str, Any]) -> list[str]:
    return [name for name in record.get("stats", {}) if name.startswith(tuple(prefixes))]
