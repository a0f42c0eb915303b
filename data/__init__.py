"""Tokens in: text sources to prepared shards, and shards to deterministic batches."""

from data.config import DataConfig, SourceConfig, TokenizerConfig
from data.corpus import Corpus, open_corpus
from data.errors import DataError
from data.loader import Loader, iterate_once
from data.prepare import prepare
from data.shards import Shards
from data.stream import Stream
from data.synthetic.feed import Synthetic
from data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "ByteTokenizer",
    "Corpus",
    "DataConfig",
    "DataError",
    "FileTokenizer",
    "Loader",
    "Shards",
    "SourceConfig",
    "Stream",
    "Synthetic",
    "Tokenizer",
    "TokenizerConfig",
    "iterate_once",
    "load_tokenizer",
    "open_corpus",
    "prepare",
]
