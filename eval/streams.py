"""Ids to text as they come: whole characters only, and stop strings wherever token boundaries fall."""

from __future__ import annotations

from collections.abc import Sequence

from data.tokenizer import Tokenizer

HOLE = "\ufffd"
HELD = 8  # tokens; a character is at most 4 bytes, so more than this is not the beginning of one


class TextStream:
    """The text of a growing sequence of ids, never a part of a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.text = ""
        self._ids: list[int] = []  # a decoder may treat the first token of a text specially: keep the one before
        self._shown = 0  # how many of them are part of `text`

    def push(self, token: int) -> str:
        """-> the text that became certain with this token, possibly nothing."""
        self._ids.append(token)
        if not self._tail(len(self._ids)).endswith(HOLE):
            return self._emit(len(self._ids))
        if len(self._ids) - self._shown > HELD:  # bytes that are no text: let go of all that cannot begin a character
            return self._emit(len(self._ids) - 3)
        return ""

    def flush(self) -> str:
        """-> what is left at the end."""
        return self._emit(len(self._ids))

    def _tail(self, end: int) -> str:
        before = self.tokenizer.decode(self._ids[: self._shown])
        return self.tokenizer.decode(self._ids[:end])[len(before) :]

    def _emit(self, end: int) -> str:
        new = self._tail(end)
        self.text += new
        keep = max(0, end - 4)
        self._ids, self._shown = self._ids[keep:], end - keep
        return new


class StopStrings:
    """Called with (row, ids so far) after each token: has the text of the row met one of the strings?"""

    def __init__(self, tokenizer: Tokenizer, strings: Sequence[str]) -> None:
        self.strings = [s for s in strings if s]
        self._tokenizer = tokenizer
        self._longest = max(map(len, self.strings), default=0)
        self._streams: dict[int, TextStream] = {}

    def __call__(self, row: int, ids: Sequence[int]) -> bool:
        if not self.strings:
            return False
        stream = self._streams.setdefault(row, TextStream(self._tokenizer))
        new = stream.push(ids[-1])
        tail = stream.text[-(len(new) + self._longest) :]
        return bool(new) and any(s in tail for s in self.strings)


def cut_at(text: str, strings: Sequence[str]) -> str:
    """The text before the first of the strings."""
    ends = [at for s in strings if s and (at := text.find(s)) >= 0]
    return text[: min(ends)] if ends else text
