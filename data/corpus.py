"""A prepared corpus: a folder with a tokenizer, one train folder per source, a validation folder and a manifest."""

from dataclasses import dataclass
from pathlib import Path

from data.errors import DataError
from data.shards import Shards, read_manifest
from data.tokenizer import Tokenizer, load_tokenizer

FORMAT = "loci-lm corpus"
VERSION = 1


@dataclass(frozen=True)
class Corpus:
    """`train` holds the shards of each source with its weight; `val` the held-out documents of all sources, in order.

    `manifest` is plain JSON: fingerprint, sources with their file lists, tokenizer, split, and counts of documents,
    tokens and UTF-8 bytes.
    """

    dir: Path
    tokenizer: Tokenizer
    train: list[tuple[Shards, float]]
    val: Shards
    manifest: dict

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over the sources' content, the tokenizer, the split and the format."""
        return self.manifest["fingerprint"]

    @property
    def vocab_size(self) -> int:
        """Ids of the tokenizer."""
        return self.tokenizer.vocab_size

    def record(self) -> dict:
        """Where it is and what it is made of: plain JSON."""
        return {"dir": str(self.dir), "manifest": self.manifest}


def open_corpus(folder: str | Path, verify: bool = True) -> Corpus:
    """Open a prepared folder. `verify` also compares every byte with its checksum (about a second per gigabyte).

    Raises DataError, naming the file, for a folder that is missing, unfinished or corrupt.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such prepared folder; `python -m data prepare` makes one")
    manifest = read_manifest(folder)
    if manifest.get("format") != FORMAT:
        raise DataError(f"{folder}: its manifest is not that of a prepared corpus")
    if manifest.get("version") != VERSION:
        raise DataError(
            f"{folder}: prepared with format {manifest.get('version')}, this is format {VERSION}; prepare again"
        )
    tokenizer = load_tokenizer(folder / "tokenizer")
    if tokenizer.fingerprint != manifest["tokenizer"]["fingerprint"]:
        raise DataError(f"{folder / 'tokenizer'}: corrupt corpus, not the tokenizer that made these tokens")
    train = [
        (Shards(folder / f"train-{i}", verify), float(source["weight"])) for i, source in enumerate(manifest["sources"])
    ]
    return Corpus(folder, tokenizer, train, Shards(folder / "val", verify), manifest)
