"""Token files on disk: documents end to end in .bin files, an index of their ends, and a manifest with checksums.

Documents are stored without beginning and end tokens. No document straddles two files.
"""

import contextlib
import json
import os
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data.errors import DataError

FILE_BYTES = 256 << 20
MANIFEST = "manifest.json"
_CHUNK = 8 << 20


def write_json(path: Path, value: object) -> None:
    """Write JSON and flush it to the disk."""
    with path.open("w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=1, ensure_ascii=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_manifest(folder: Path) -> dict:
    """The manifest of a folder; DataError if it is missing or not one."""
    try:
        value = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except OSError as err:
        raise DataError(f"{folder}: no {MANIFEST}, so this is not a finished prepared folder") from err
    except ValueError as err:
        raise DataError(f"{folder / MANIFEST}: damaged, not valid JSON") from err
    if not isinstance(value, dict):
        raise DataError(f"{folder / MANIFEST}: damaged, not an object")
    return value


class ShardWriter:
    """Appends documents to a new folder; `close` writes the index and, last, the manifest."""

    def __init__(self, folder: Path, vocab_size: int, file_bytes: int = FILE_BYTES):
        folder.mkdir(parents=True)
        self.folder = folder
        self.dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self.limit = file_bytes // self.dtype.itemsize
        self.files: list[dict] = []
        self.ends: list[int] = []
        self.tokens = 0
        self.bytes = 0
        self._stream = None
        self._crc = 0
        self._in_file = 0

    @property
    def documents(self) -> int:
        """How many documents were added."""
        return len(self.ends)

    def add(self, ids: np.ndarray, text_bytes: int) -> None:
        """Append one document [n] of n >= 1 tokens that stands for `text_bytes` bytes of text."""
        if self._stream and self._in_file + len(ids) > self.limit:
            self._finish_file()
        if self._stream is None:
            self._stream = (self.folder / f"tokens-{len(self.files):05d}.bin").open("wb")
        raw = ids.astype(self.dtype).tobytes()
        self._stream.write(raw)
        self._crc = zlib.crc32(raw, self._crc)
        self._in_file += len(ids)
        self.tokens += len(ids)
        self.bytes += text_bytes
        self.ends.append(self.tokens)

    def _finish_file(self) -> None:
        if self._stream is None:
            return
        self._stream.flush()
        os.fsync(self._stream.fileno())
        name = Path(self._stream.name).name
        self._stream.close()
        self.files.append({"name": name, "bytes": self._in_file * self.dtype.itemsize, "crc32": self._crc})
        self._stream, self._crc, self._in_file = None, 0, 0

    def close(self) -> dict:
        """Finish the folder and return its manifest."""
        self._finish_file()
        raw = np.array(self.ends, dtype="<i8").tobytes()
        with (self.folder / "ends.bin").open("wb") as stream:
            stream.write(raw)
            stream.flush()
            os.fsync(stream.fileno())
        manifest = {
            "dtype": self.dtype.str,
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "index": {"name": "ends.bin", "bytes": len(raw), "crc32": zlib.crc32(raw)},
            "files": self.files,
        }
        write_json(self.folder / MANIFEST, manifest)
        return manifest

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._stream is not None:
            with contextlib.suppress(OSError):
                self._stream.close()


class Shards:
    """Read-only documents of a folder, memory-mapped. `verify` compares every byte with the manifest's checksums."""

    def __init__(self, folder: str | Path, verify: bool = True):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        try:
            dtype = np.dtype(self.manifest["dtype"])
            entries = [self.manifest["index"], *self.manifest["files"]]
            self.documents, self.tokens = int(self.manifest["documents"]), int(self.manifest["tokens"])
            self.bytes = int(self.manifest["bytes"])
            _check(self.folder, entries, verify)
            sizes = [entry["bytes"] // dtype.itemsize for entry in self.manifest["files"]]
        except (KeyError, TypeError, ValueError) as err:
            if isinstance(err, DataError):
                raise
            raise DataError(f"{self.folder / MANIFEST}: damaged, {type(err).__name__} {err}") from err
        self.ends = np.fromfile(self.folder / "ends.bin", dtype="<i8")
        if len(self.ends) != self.documents or not self.documents or self.ends[-1] != sum(sizes) != self.tokens:
            raise DataError(f"{self.folder}: index and token files disagree")
        self._maps = [np.memmap(self.folder / e["name"], dtype=dtype, mode="r") for e in self.manifest["files"]]
        self._file_starts = np.cumsum([0, *sizes[:-1]])
        self.starts = np.concatenate([[0], self.ends[:-1]])
        self._file_of = np.searchsorted(self._file_starts, self.starts, side="right") - 1

    @property
    def lengths(self) -> np.ndarray:
        """int64 [documents]: tokens of each document."""
        return self.ends - self.starts

    @property
    def fingerprint(self) -> str:
        """Names the content: the checksums of index and token files."""
        entries = [self.manifest["index"], *self.manifest["files"]]
        return "-".join(f"{entry['crc32']:08x}" for entry in entries)

    def __len__(self) -> int:
        return self.documents

    def read(self, doc: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start, stop) of one document, a view of the mapped file."""
        file = self._file_of[doc]
        first = self.starts[doc] - self._file_starts[file]
        last = self.ends[doc] - self._file_starts[file]
        return self._maps[file][first + start : last if stop is None else min(first + stop, last)]


def _check(folder: Path, entries: Iterable[dict], verify: bool) -> None:
    """Size, and with `verify` the checksum, of every file; DataError names the first bad one."""
    jobs = [(folder / e["name"], e["bytes"], e["crc32"]) for e in entries]
    for path, size, _ in jobs:
        actual = path.stat().st_size if path.is_file() else None
        if actual is None:
            raise DataError(f"{path}: corrupt corpus, this file is missing")
        if actual != size:
            raise DataError(f"{path}: corrupt corpus, {actual} bytes instead of {size}")
    if not verify:
        return
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        for (path, _, crc), found in zip(jobs, pool.map(_crc32, [path for path, _, _ in jobs])):
            if found != crc:
                raise DataError(f"{path}: corrupt corpus, its checksum does not match the manifest")


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as stream:
        while block := stream.read(_CHUNK):
            crc = zlib.crc32(block, crc)
    return crc
