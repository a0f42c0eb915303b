"""What a corpus is made of, as frozen dataclasses; bad values raise DataError when the object is built."""

from dataclasses import dataclass, field
from typing import Any

from data.errors import DataError, at_least, choose
from data.synthetic import Task, task_class

FORMATS = ("auto", "text", "jsonl", "parquet")
PACKINGS = ("documents", "stream")
TOKENIZERS = ("bytes", "bpe", "file")


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
        choose("source.format", self.format, FORMATS)
        if not self.path:
            raise DataError("source.path is empty")
        if not 0 < self.weight < float("inf"):
            raise DataError(f"source.weight must be a positive number, got {self.weight!r}")
        if self.limit is not None:
            at_least("source.limit", self.limit, 2)


@dataclass(frozen=True)
class TokenizerConfig:
    """`bytes` (257 ids), `bpe` (byte-level, `vocab_size` ids, trained on the train split) or `file` (`path`)."""

    kind: str = "bytes"
    vocab_size: int = 8192
    path: str | None = None

    def __post_init__(self) -> None:
        choose("tokenizer.kind", self.kind, TOKENIZERS)
        if self.kind == "bpe":
            at_least("tokenizer.vocab_size", self.vocab_size, 257)
        if self.kind == "file" and not self.path:
            raise DataError("tokenizer.path is needed with tokenizer.kind 'file': a tokenizer.json or its folder")
        if self.kind != "file" and self.path:
            raise DataError(f"tokenizer.path is only read with tokenizer.kind 'file', not {self.kind!r}")


@dataclass(frozen=True)
class DataConfig:
    """Sources, tokenizer, split and packing of one corpus. `cache_dir` is where prepared folders are kept.

    Or a `synthetic` task, {kind: ..., ...}: then `seq_len` is the length of its rows, `split_seed` that of its validation rows,
    and nothing else here is read.
    """

    sources: tuple[SourceConfig, ...] = (SourceConfig(),)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    seq_len: int = 256
    packing: str = "documents"
    val_fraction: float = 0.02
    split_seed: int = 0
    cache_dir: str = ".cache/data"
    max_docs_per_row: int = 32
    synthetic: Any = field(default=None, metadata={"kinds": task_class})

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", tuple(self.sources))
        if self.synthetic is not None:
            self._without_text()
        elif not self.sources:
            raise DataError("data.sources is empty")
        at_least("data.seq_len", self.seq_len, 1)
        choose("data.packing", self.packing, PACKINGS)
        if not 0 < self.val_fraction < 1:
            raise DataError(f"data.val_fraction must lie between 0 and 1, got {self.val_fraction!r}")
        at_least("data.split_seed", self.split_seed, 0)
        at_least("data.max_docs_per_row", self.max_docs_per_row, 2)

    def _without_text(self) -> None:
        """Raise DataError when the task does not fit, or a setting that it cannot follow was given."""
        if not isinstance(self.synthetic, Task):
            raise DataError(f"data.synthetic is not a task: {self.synthetic!r}")
        plain = (SourceConfig(),)
        if self.sources not in ((), plain):
            raise DataError("data.sources and data.synthetic exclude each other")
        object.__setattr__(self, "sources", ())
        for name in ("packing", "val_fraction", "max_docs_per_row"):
            if getattr(self, name) != getattr(DataConfig, name):
                raise DataError(f"data.{name} is not read with data.synthetic")
        if self.tokenizer != TokenizerConfig():
            raise DataError("data.tokenizer is not read with data.synthetic: its ids are the task's own")
        self.synthetic.check(self.seq_len)
