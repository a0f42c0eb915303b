"""Where documents come from: resolve a SourceConfig to files, fingerprint them, and read documents one by one."""

import glob
import hashlib
import itertools
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data.config import SourceConfig
from data.errors import DataError, nearest
from data.readers import (
    SUFFIXES,
    Record,
    Undecodable,
    blocks,
    cut_text,
    plain_suffix,
    read_jsonl,
    read_parquet,
    read_text,
)

# Fewer plain-text files than this are cut into documents of about 16 KiB, less where the text is short.
FEW_DOCUMENTS = 50
CUT_BYTES = 16384
MIN_CUT_BYTES = 1024
_STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class SourceFile(NamedTuple):
    """`name` is relative to the source's root and is what the fingerprint and the manifest know."""

    path: Path
    name: str
    size: int
    sha256: str


@dataclass
class Source:
    """A resolved source: what it reads and how.

    `skipped` fills, while it is read, with the files that are not UTF-8; where a text source has few files (so few that
    they are cut) such a file is an error instead.
    """

    config: SourceConfig
    format: str
    files: list[SourceFile]
    cut_bytes: int | None = None
    skipped: list[str] = field(default_factory=list)

    def identity(self) -> dict:
        """Plain JSON that changes whenever the documents change (for `hf:` sources: whenever the request changes)."""
        return {
            "path": self.config.path if self.config.path.startswith("hf:") else None,
            "format": self.format,
            "field": self.config.field if self.format != "text" else None,
            "limit": self.config.limit,
            "cut_bytes": self.cut_bytes,
            "files": [[f.name, f.size, f.sha256] for f in self.files],
        }

    def total_bytes(self) -> int | None:
        """Bytes on disk that a full pass reads; None where that is unknown."""
        return None if self.format == "hf" or self.config.limit else sum(f.size for f in self.files)

    def documents(self, advance: Callable[[int], object] = lambda n: None) -> Iterator[str]:
        """Every non-empty document in order; `advance` is told how many bytes of the source were passed."""
        self.skipped.clear()
        records = self._hf() if self.format == "hf" else itertools.chain.from_iterable(map(self._file, self.files))
        taken = 0
        for record in records:
            advance(record.passed)
            if not record.text:
                continue
            yield record.text
            taken += 1
            if taken == self.config.limit:
                return

    def _file(self, file: SourceFile) -> Iterator[Record]:
        try:
            if self.format == "jsonl":
                yield from read_jsonl(file.path, self.config.field)
            elif self.format == "parquet":
                yield from read_parquet(file.path, self.config.field)
            elif self.cut_bytes:
                yield from cut_text(file.path, self.cut_bytes)
            else:
                yield from read_text(file.path)
        except Undecodable as err:
            if self.cut_bytes or len(self.files) == 1:
                raise DataError(f"{file.path}: not UTF-8 text (byte {err.offset})") from err
            self.skipped.append(file.name)
        except OSError as err:
            raise DataError(f"{file.path}: cannot be read ({err.strerror or err})") from err

    def _hf(self) -> Iterator[Record]:
        name, config, split = _hf_parts(self.config.path)
        try:
            from datasets import load_dataset
        except ImportError as err:
            raise DataError(f"{self.config.path}: needs the package 'datasets' (pip install datasets)") from err
        rows = _one_line(self.config.path, lambda: iter(load_dataset(name, config, split=split, streaming=True)))
        end = object()
        while (row := _one_line(self.config.path, lambda: next(rows, end))) is not end:
            if not isinstance(row, dict) or self.config.field not in row:
                fields = list(row) if isinstance(row, dict) else []
                raise DataError(
                    f"{self.config.path}: no field {self.config.field!r}; {nearest(self.config.field, fields)}"
                )
            text = row[self.config.field]
            if text is not None and not isinstance(text, str):
                raise DataError(f"{self.config.path}: field {self.config.field!r} is {type(text).__name__}, not text")
            yield Record(text or "", len((text or "").encode("utf-8", "replace")))


def resolve(config: SourceConfig, hash_file: Callable[[Path], str] | None = None) -> Source:
    """Find and hash the files of a source. Raises DataError if there is nothing to read."""
    hash_file = hash_file or file_sha256
    if config.path.startswith("hf:"):
        name = _hf_parts(config.path)[0]
        local = Path(name)
        files = [(p, p.relative_to(local)) for p in sorted(local.rglob("*")) if p.is_file()] if local.is_dir() else []
        return Source(config, "hf", _hashed(files, hash_file))
    found, root = _find(config)
    kind = config.format if config.format != "auto" else _format_of(found, config.path)
    files = _hashed([(p, p.relative_to(root)) for p in found], hash_file)
    cut = _cut_size(found) if kind == "text" and len(found) < FEW_DOCUMENTS else None
    return Source(config, kind, files, cut)


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as err:
        raise DataError(f"{path}: cannot be read ({err.strerror or err})") from err


def _hashed(files: list[tuple[Path, Path]], hash_file: Callable[[Path], str]) -> list[SourceFile]:
    return [SourceFile(path, name.as_posix(), path.stat().st_size, hash_file(path)) for path, name in files]


def _find(config: SourceConfig) -> tuple[list[Path], Path]:
    """The files, and the folder their names are relative to."""
    if config.path == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        found = [p for p in _walk(root, _STDLIB_LEFT_OUT) if p.suffix == ".py"]
        if not found:
            raise DataError(f"stdlib: no Python source files below {root}; name a text file or folder instead")
        return found, root
    path = Path(config.path).expanduser()
    if path.is_file():
        return [path], path.parent
    if path.is_dir():
        everything = _walk(path, set())
        formats = {config.format} if config.format != "auto" else set(SUFFIXES.values())
        found = [p for p in everything if SUFFIXES.get(plain_suffix(p)) in formats]
        found = found or (everything if config.format != "auto" else [])
        if not found:
            raise DataError(f"{path}: no readable files in this folder; {_suffixes_seen(everything)}")
        return found, path
    if glob.has_magic(config.path):
        found = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
        if not found:
            raise DataError(f"{config.path}: this pattern matches no files")
        return found, Path(os.path.commonpath([p.parent for p in found]))
    raise DataError(f"{config.path}: no such file or folder{_nearby(path)}")


def _walk(root: Path, left_out: set[str]) -> list[Path]:
    """All visible files below root in a fixed order, links to folders not followed."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(s for s in subfolders if s not in left_out and not s.startswith("."))
        found += [Path(folder, n) for n in names if not n.startswith(".")]
    return sorted((p for p in found if p.is_file()), key=lambda p: p.relative_to(root).as_posix())


def _format_of(found: list[Path], what: str) -> str:
    kinds = {SUFFIXES.get(plain_suffix(p), "text") for p in found}
    if len(kinds) > 1:
        raise DataError(
            f"{what}: mixes {' and '.join(sorted(kinds))} files; use one source each, or say which by format"
        )
    return kinds.pop()


def _cut_size(found: list[Path]) -> int:
    """The size that makes at least FEW_DOCUMENTS documents of a short text, at most CUT_BYTES."""
    enough, total = FEW_DOCUMENTS * CUT_BYTES, 0
    for path in found:
        for block in blocks(path):
            total += len(block)
            if total >= enough:
                return CUT_BYTES
    return max(MIN_CUT_BYTES, total // FEW_DOCUMENTS)


def _suffixes_seen(files: list[Path]) -> str:
    seen = sorted({plain_suffix(p) or p.name for p in files})
    if not seen:
        return "it is empty"
    return f"it holds {', '.join(seen[:6])}, known are {', '.join(sorted(SUFFIXES))}; or give format=text"


def _nearby(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f" (nor is there a folder {parent})"
    names = ["stdlib", *(p.name for p in sorted(parent.iterdir())[:2000] if not p.name.startswith("."))]
    clause = nearest(path.name, names)
    return f"; {clause}" if clause.startswith("did") else ""


def _hf_parts(path: str) -> tuple[str, str | None, str]:
    parts = path.removeprefix("hf:").split(":")
    if not parts[0] or len(parts) > 3:
        raise DataError(f"{path}: a Hugging Face source is written hf:NAME[:CONFIG[:SPLIT]]")
    config = parts[1] if len(parts) > 1 and parts[1] else None
    return parts[0], config, parts[2] if len(parts) > 2 and parts[2] else "train"


def _one_line(what: str, call: Callable):
    """Run a call into `datasets`, whose failures come as many exception types and long texts."""
    try:
        return call()
    except Exception as err:
        text = " ".join(str(err).split())
        raise DataError(f"{what}: {type(err).__name__}: {text[:300]}") from err
