"""What a corpus is made of, as frozen dataclasses; bad values raise DataError when the object is built."""

from dataclasses import dataclass, field

from data.errors import DataError, nearest

FORMATS = ("auto", "text", "jsonl", "parquet")
PACKINGS = ("documents", "stream")
TOKENIZERS = ("bytes", "bpe", "file")


def _choose(what: str, value: str, options: tuple[str, ...]) -> None:
    if value not in options:
        raise DataError(f"{what}: unknown value {value!r}; {nearest(str(value), options)}")


def _at_least(what: str, value: int, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise DataError(f"{what} must be an integer of at least {low}, got {value!r}")


@dataclass(frozen=True)
class SourceConfig:
    """One source of documents.

    `path` is "stdlib", a file, a directory, a glob, or "hf:NAME[:CONFIG[:SPLIT]]". `field` names the text in JSONL,
    Parquet and Hugging Face records. `weight` is the share of training rows, relative to the other sources. `limit`
    is the largest number of documents taken.
    """

    path: str = "stdlib"
    field: str = "text"
    weight: float = 1.0
    format: str = "auto"
    limit: int | None = None

    def __post_init__(self) -> None:
        _choose("source.format", self.format, FORMATS)
        if not self.path:
            raise DataError("source.path is empty")
        if not 0 < self.weight < float("inf"):
            raise DataError(f"source.weight must be a positive number, got {self.weight!r}")
        if self.limit is not None:
            _at_least("source.limit", self.limit, 2)


@dataclass(frozen=True)
class TokenizerConfig:
    """`bytes` (257 ids), `bpe` (byte-level, `vocab_size` ids, trained on the train split) or `file` (`path`)."""

    kind: str = "bytes"
    vocab_size: int = 8192
    path: str | None = None

    def __post_init__(self) -> None:
        _choose("tokenizer.kind", self.kind, TOKENIZERS)
        if self.kind == "bpe":
            _at_least("tokenizer.vocab_size", self.vocab_size, 257)
        if self.kind == "file" and not self.path:
            raise DataError("tokenizer.path is needed with tokenizer.kind 'file': a tokenizer.json or its folder")
        if self.kind != "file" and self.path:
            raise DataError(f"tokenizer.path is only read with tokenizer.kind 'file', not {self.kind!r}")


@dataclass(frozen=True)
class DataConfig:
    """Sources, tokenizer, split and packing of one corpus. `cache_dir` is where prepared folders are kept."""

    sources: tuple[SourceConfig, ...] = (SourceConfig(),)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    seq_len: int = 256
    packing: str = "documents"
    val_fraction: float = 0.02
    split_seed: int = 0
    cache_dir: str = ".cache/data"
    max_docs_per_row: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", tuple(self.sources))
        if not self.sources:
            raise DataError("data.sources is empty")
        _at_least("data.seq_len", self.seq_len, 1)
        _choose("data.packing", self.packing, PACKINGS)
        if not 0 < self.val_fraction < 1:
            raise DataError(f"data.val_fraction must lie between 0 and 1, got {self.val_fraction!r}")
        _at_least("data.split_seed", self.split_seed, 0)
        _at_least("data.max_docs_per_row", self.max_docs_per_row, 2)
