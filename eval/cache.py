"""Results of single requests on disk, so that an interrupted evaluation goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from models import UserError

VERSION = 1  # raised when the same request would get another number


class ResultCache:
    """An append-only JSON-lines file per (weights, tokenizer, settings). Without a path it only remembers."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.known: dict[str, Any] = {}
        self.hits = 0
        self._stream = None
        if path is not None and path.is_file():
            self._read(path)

    def _read(self, path: Path) -> None:
        """Lines that an interruption tore are left out; a later write starts on a line of its own."""
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                key, value = json.loads(line)
            except ValueError:
                continue
            self.known[key] = value

    def get(self, key: str) -> Any | None:
        found = self.known.get(key)
        self.hits += found is not None
        return found

    def put(self, items: Iterable[tuple[str, Any]]) -> None:
        """Remember and append; on disk when this returns."""
        items = list(items)
        self.known.update(items)
        if self.path is None or not items:
            return
        try:
            if self._stream is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                torn = (
                    self.path.is_file() and not self.path.read_bytes().endswith(b"\n") and self.path.stat().st_size > 0
                )
                self._stream = self.path.open("a", encoding="utf-8")
                if torn:
                    self._stream.write("\n")
            self._stream.write("".join(json.dumps(item) + "\n" for item in items))
            self._stream.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}; --no-cache does without") from error

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def cache_key(*settings: object) -> str:
    """The file name of everything that decides a result besides the request."""
    return hashlib.sha256(json.dumps([VERSION, *map(str, settings)]).encode()).hexdigest()[:20]


def request_key(kind: str, *parts: Sequence[int] | str) -> str:
    """Names one request: its kind, its ids and its options."""
    digest = hashlib.blake2b(kind.encode(), digest_size=16)
    for part in parts:
        raw = part.encode() if isinstance(part, str) else array("q", part).tobytes()
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()
