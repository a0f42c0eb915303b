"""sha256 of files, remembered for large ones by size and time stamp, so that a start need not read a big corpus."""

import contextlib
import json
import os
import time
from pathlib import Path

from data.sources import file_sha256

LARGE = 64 << 20
# A file changed this recently may change again without its time stamp showing it.
_SETTLED_SECONDS = 2.0


class HashCache:
    """Callable path -> sha256 (hex). The memory is a JSON file; losing it costs only time."""

    def __init__(self, store: Path, large: int = LARGE):
        self.store, self.large = store, large
        try:
            self._known = json.loads(store.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._known = {}

    def __call__(self, path: Path) -> str:
        status = path.stat()
        if status.st_size < self.large:
            return file_sha256(path)
        key, stamp = str(path.resolve()), [status.st_size, status.st_mtime_ns]
        entry = self._known.get(key)
        if entry and entry[:2] == stamp:
            return entry[2]
        digest = file_sha256(path)
        if time.time() - status.st_mtime > _SETTLED_SECONDS:
            self._known[key] = [*stamp, digest]
            self._write()
        return digest

    def _write(self) -> None:
        temp = self.store.with_name(f"{self.store.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            self.store.parent.mkdir(parents=True, exist_ok=True)
            temp.write_text(json.dumps(self._known), encoding="utf-8")
            temp.replace(self.store)
