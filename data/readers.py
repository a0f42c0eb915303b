"""Readers of one file: text (whole or cut), JSON lines, Parquet; compressed files are read as they are."""

import bz2
import gzip
import itertools
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple, cast

from data.errors import DataError, nearest

_TEXT = (
    ".txt .text .md .markdown .rst .tex .py .pyi .c .h .cc .cpp .hpp .cu .js .ts .tsx .java .go .rs .rb .sh .pl .php "
    ".lua .jl .scala .kt .swift .hs .ml .sql .r .html .htm .xml .css .yaml .yml .toml .ini .cfg .tok .tokens .raw"
)
SUFFIXES = dict.fromkeys(_TEXT.split(), "text") | {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
DAMAGED = (EOFError, OSError, lzma.LZMAError, zlib.error)
_BLOCK = 1 << 20


class Record(NamedTuple):
    """One document and how many bytes of the file on disk lie between the previous one and its end."""

    text: str
    passed: int


class Undecodable(ValueError):
    """A text file that is not UTF-8; `offset` is the first bad byte."""

    def __init__(self, offset: int):
        super().__init__(offset)
        self.offset = offset


def plain_suffix(path: Path) -> str:
    """The suffix that tells the format: of `a.txt.gz` it is `.txt`, of `a.gz` it is `.txt` too."""
    if path.suffix.lower() in _OPENERS:
        return Path(path.stem).suffix.lower() or ".txt"
    return path.suffix.lower()


def open_stream(path: Path) -> IO[bytes]:
    """A byte stream of the file's content, decompressed. Raises DataError if it cannot be opened."""
    try:
        opener = _OPENERS.get(path.suffix.lower())
        return cast(IO[bytes], opener(path, "rb")) if opener else path.open("rb")
    except OSError as err:
        raise DataError(f"{path}: cannot be read ({err.strerror or err})") from err


def blocks(path: Path, size: int = _BLOCK) -> Iterator[bytes]:
    """The decompressed content of a file, `size` bytes at a time. Raises DataError if it is damaged."""
    with open_stream(path) as stream:
        try:
            while block := stream.read(size):
                yield block
        except DAMAGED as err:
            raise DataError(f"{path}: damaged or truncated ({err})") from err


def read_text(path: Path) -> Iterator[Record]:
    """One record with the whole text. Raises Undecodable if it is not UTF-8."""
    yield Record(_decode(b"".join(blocks(path)), 0), path.stat().st_size)


def cut_text(path: Path, cut_bytes: int) -> Iterator[Record]:
    """Records of cut_bytes/2 to cut_bytes bytes that, joined, are exactly the text (the last may be shorter).

    Raises Undecodable when it reaches a byte that is not UTF-8.
    """
    unreported = path.stat().st_size
    buffer, offset = b"", 0
    for block in itertools.chain(blocks(path), [b""]):
        buffer += block
        at, slack = 0, 2 * cut_bytes if block else cut_bytes
        while len(buffer) - at > slack:
            end = _cut_point(buffer, at, cut_bytes)
            passed = min(unreported, end - at)
            unreported -= passed
            yield Record(_decode(buffer[at:end], offset + at), passed)
            at = end
        buffer, offset = buffer[at:], offset + at
    yield Record(_decode(buffer, offset), unreported)


def _decode(raw: bytes, offset: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as err:
        raise Undecodable(offset + err.start) from err


def _cut_point(text: bytes, at: int, size: int) -> int:
    """End of a piece that starts at `at`: after the last blank line, else line end, else space, in [size/2, size]."""
    low, high = at + size // 2, at + size
    for mark in (b"\n\n", b"\n\r\n", b"\n", b" "):
        found = text.rfind(mark, low, high)
        if found >= 0:
            return found + len(mark)
    while text[high] & 0xC0 == 0x80 and high > low:  # not inside a UTF-8 character
        high -= 1
    return high


def read_jsonl(path: Path, field: str) -> Iterator[Record]:
    """One record per line: the text in `field` ("" for null). Anything wrong raises DataError with file and line."""
    with open_stream(path) as stream:
        raw = getattr(stream, "fileobj", None) or getattr(stream, "_fp", None) or stream
        before = 0
        lines = enumerate(stream, start=1)
        while True:
            try:
                number, line = next(lines, (0, b""))
            except DAMAGED as err:
                raise DataError(f"{path}: damaged or truncated ({err})") from err
            if not number:
                return
            if not line.strip():
                continue
            text = _json_field(path, number, line, field)
            now = raw.tell()
            yield Record(text, now - before)
            before = now


def _json_field(path: Path, number: int, line: bytes, field: str) -> str:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as err:
        raise DataError(f"{path}:{number}: not UTF-8 text (byte {err.start} of the line)") from err
    except ValueError as err:
        raise DataError(f"{path}:{number}: not valid JSON ({err})") from err
    if not isinstance(row, dict):
        raise DataError(f"{path}:{number}: a {type(row).__name__}, not an object with a field {field!r}")
    if field not in row:
        raise DataError(f"{path}:{number}: no field {field!r}; {nearest(field, row)}")
    text = row[field]
    if text is not None and not isinstance(text, str):
        raise DataError(f"{path}:{number}: field {field!r} is {type(text).__name__}, not text")
    return text or ""


def read_parquet(path: Path, field: str) -> Iterator[Record]:
    """One record per row: the text in column `field`. Raises DataError if the file or column cannot be read."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as err:
        raise DataError(f"{path}: Parquet needs the package 'pyarrow' (pip install pyarrow)") from err
    try:
        table = pq.ParquetFile(path)
        schema = table.schema_arrow
        if field not in schema.names:
            raise DataError(f"{path}: no column {field!r}; {nearest(field, schema.names)}")
        kind = schema.field(field).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise DataError(f"{path}: column {field!r} is {kind}, not text")
        share = path.stat().st_size // max(1, table.metadata.num_rows)
        for batch in table.iter_batches(batch_size=1024, columns=[field]):
            for text in batch.column(0).to_pylist():
                yield Record(text or "", share)
    except (pa.ArrowException, OSError) as err:
        raise DataError(f"{path}: not a readable Parquet file ({' '.join(str(err).split())[:200]})") from err
