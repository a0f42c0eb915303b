"""Text as it stands, for Markdown: code whose fence is longer than any run of backticks in it (CommonMark 0.31, 4.5 and 6.1)."""

from __future__ import annotations

import re


def code(text: str) -> str:
    """Within a line. A space on both sides is taken off again by the reader; it parts backticks from the fence, and stands for a
    space that the text has there."""
    fence = "`" * (1 + _longest_run(text))
    touches = text.startswith("`") or text.endswith("`")
    spaced = text.startswith(" ") and text.endswith(" ") and text.strip(" ")
    pad = " " if touches or spaced else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def block(text: str) -> str:
    """Lines of their own."""
    fence = "`" * max(3, 1 + _longest_run(text))
    return f"{fence}text\n{text}\n{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
