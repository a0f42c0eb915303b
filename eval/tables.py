"""Tables as Markdown, aligned so that they read well in a terminal too."""

from __future__ import annotations

from collections.abc import Sequence


def cell(value: object) -> str:
    """Numbers short and without noise; nothing as a dash."""
    if value is None or value == "":
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e-3 or abs(value) >= 1e4 else f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def markdown(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; columns that hold only numbers are right-aligned."""
    text = [[cell(v).replace("|", "\\|").replace("\n", " ") for v in row] for row in rows]
    widths = [max(3, len(h), *(len(row[i]) for row in text), 0) for i, h in enumerate(headers)]
    right = [
        bool(rows) and all(row[i] is None or isinstance(row[i], int | float) for row in rows)
        for i in range(len(headers))
    ]

    def line(cells: Sequence[str]) -> str:
        padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right)]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right)) + "|"
    return "\n".join([line(headers), rule, *(line(row) for row in text)])
