"""Text to a prepared corpus folder, once; later calls with the same content and settings find it by its fingerprint."""

import hashlib
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from data.config import DataConfig, TokenizerConfig
from data.corpus import FORMAT, VERSION, Corpus, open_corpus
from data.errors import DataError
from data.folders import building
from data.hashes import HashCache
from data.randomness import uniform
from data.shards import MANIFEST, ShardWriter, read_manifest, write_json
from data.sources import Source, resolve
from data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, train_bpe

# A BPE is trained on at most this many characters of the train split.
BPE_CHARS = 256 << 20
_BATCH_DOCUMENTS, _BATCH_CHARS = 512, 1 << 20
_SPLIT, _SPLIT_BLOCK = 3, 4096


def prepare(cfg: DataConfig, progress: bool = True, out: str | Path | None = None) -> Corpus:
    """The prepared corpus of `cfg`, made now unless a finished one is there.

    It lives in `out` or, without one, in `cfg.cache_dir` under a name with its fingerprint. A source that names a
    prepared folder is opened as it is. Raises DataError for bad input; nothing half-written is left behind.
    """
    if (ready := _prepared_source(cfg)) is not None:
        return ready
    hashes = HashCache(Path(cfg.cache_dir) / "hashes.json")
    sources = [resolve(source, hashes) for source in cfg.sources]
    given = _given_tokenizer(cfg.tokenizer)
    fingerprint = _fingerprint(cfg, sources, given)
    target = Path(out) if out else Path(cfg.cache_dir) / f"{_slug(cfg)}-{fingerprint[:12]}"
    corpus = _reuse(target, fingerprint)
    if corpus is None:
        try:
            with building(target, lambda folder: _is_whole(folder, fingerprint)) as temp:
                _write(temp, cfg, sources, given, fingerprint, progress)
        except OSError as err:
            raise DataError(f"{target}: cannot be written ({err.strerror or err})") from err
        corpus = open_corpus(target)
    return _with_weights(corpus, cfg)


def split(documents: Iterable[str], fraction: float, seed: int) -> Iterator[tuple[str, bool]]:
    """Each document with whether it is held out: a draw from (seed, its index) falls below `fraction`.

    As long as one side is empty, the document whose draw is nearest to the threshold is kept back; if the side stays
    empty it goes there. So two documents give one on each side; a lone one is for training.
    """
    held: tuple[float, str, bool] | None = None
    others, mixed = 0, False
    for text, drawn in zip(documents, _draws(seed)):
        side, gap = drawn < fraction, abs(drawn - fraction)
        if mixed:
            yield text, side
        elif held is None:
            held = (gap, text, side)
        elif side != held[2]:
            mixed = True
            yield held[1:]
            yield text, side
        else:
            others += 1
            released, held = (held, (gap, text, side)) if gap < held[0] else ((gap, text, side), held)
            yield released[1:]
    if held is not None and not mixed:
        yield held[1], (not held[2]) if others else False


def _draws(seed: int) -> Iterator[float]:
    blocks = (uniform(_SPLIT_BLOCK, seed, _SPLIT, block).tolist() for block in itertools.count())
    return itertools.chain.from_iterable(blocks)


def _given_tokenizer(cfg: TokenizerConfig) -> Tokenizer | None:
    """The tokenizer that exists before the text is read; None if it is to be trained."""
    if cfg.kind == "bytes":
        return ByteTokenizer()
    return load_tokenizer(cfg.path) if cfg.path else None


def _fingerprint(cfg: DataConfig, sources: list[Source], given: Tokenizer | None) -> str:
    identity = {
        "version": VERSION,
        "sources": [s.identity() for s in sources],
        "tokenizer": given.fingerprint if given else ["bpe", cfg.tokenizer.vocab_size, BPE_CHARS],
        "split": [cfg.val_fraction, cfg.split_seed],
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _slug(cfg: DataConfig) -> str:
    name = re.sub(r"[^A-Za-z0-9]+", "-", Path(cfg.sources[0].path).name.removeprefix("hf:")).strip("-")[:32] or "corpus"
    more = f"-and-{len(cfg.sources) - 1}" if len(cfg.sources) > 1 else ""
    kind = f"bpe{cfg.tokenizer.vocab_size}" if cfg.tokenizer.kind == "bpe" else cfg.tokenizer.kind
    return f"{name}{more}-{kind}"


def _is_whole(folder: Path, fingerprint: str) -> bool:
    try:
        return open_corpus(folder).fingerprint == fingerprint
    except DataError:
        return False


def _reuse(target: Path, fingerprint: str) -> Corpus | None:
    """The finished corpus at `target`; None if there is nothing, or only remains that may be replaced."""
    if target.is_file():
        raise DataError(f"{target}: is a file, not a folder for a prepared corpus")
    names = {p.name for p in target.iterdir()} if target.is_dir() else set()
    if not names:
        return None
    if any(n not in (MANIFEST, "tokenizer", "val") and not re.fullmatch(r"train-\d+", n) for n in names):
        raise DataError(f"{target}: exists and is not a prepared corpus; name a new folder")
    try:
        corpus = open_corpus(target)
    except DataError as err:
        print(f"{err}; preparing it again", file=sys.stderr)
        return None
    if corpus.fingerprint != fingerprint:
        raise DataError(f"{target}: holds another corpus ({corpus.fingerprint[:12]}); remove it or name a new folder")
    return corpus


def _with_weights(corpus: Corpus, cfg: DataConfig) -> Corpus:
    """Weights belong to a run, not to the prepared tokens: take those of `cfg`."""
    weights = [s.weight for s in cfg.sources]
    rows = [row | {"weight": weight} for row, weight in zip(corpus.manifest["sources"], weights)]
    train = [(shards, weight) for (shards, _), weight in zip(corpus.train, weights)]
    return replace(corpus, train=train, manifest=corpus.manifest | {"sources": rows})


def _prepared_source(cfg: DataConfig) -> Corpus | None:
    """The corpus, if the one source is itself a prepared folder. Settings that it cannot follow are refused."""
    for source in cfg.sources:
        folder = Path(source.path)
        try:
            if read_manifest(folder).get("format") != FORMAT:
                continue
        except DataError:
            continue
        if len(cfg.sources) > 1:
            raise DataError(
                f"{folder}: is a prepared corpus and cannot be mixed with other sources; name its text instead"
            )
        corpus = open_corpus(folder)
        made, asked = corpus.manifest["tokenizer"], cfg.tokenizer
        given = _given_tokenizer(asked)
        wrong_bpe = given is None and (made["kind"], made.get("asked")) != ("bpe", asked.vocab_size)
        if wrong_bpe or (asked.kind == "file" and given and given.fingerprint != made["fingerprint"]):
            raise DataError(f"{folder}: was prepared with the tokenizer {made['kind']!r}, not the one asked for")
        default, was = DataConfig(), corpus.manifest["split"]
        for name, key in (("val_fraction", "val_fraction"), ("split_seed", "seed")):
            if getattr(cfg, name) not in (getattr(default, name), was[key]):
                raise DataError(f"{folder}: was prepared with {name} {was[key]}, not {getattr(cfg, name)}")
        return corpus
    return None


def _bar(source: Source, what: str, progress: bool) -> tqdm:
    terminal = sys.stderr.isatty()
    return tqdm(
        desc=f"{what} {source.config.path}",
        total=source.total_bytes(),
        unit="B",
        unit_scale=True,
        disable=not progress,
        mininterval=0.2 if terminal else 10.0,
        file=sys.stderr,
    )


def _train_tokenizer(cfg: DataConfig, sources: list[Source], progress: bool) -> Tokenizer:
    def texts() -> Iterator[str]:
        left = BPE_CHARS
        for source in sources:
            with _bar(source, "reading for BPE", progress) as bar:
                for text, held_out in split(source.documents(bar.update), cfg.val_fraction, cfg.split_seed):
                    if held_out:
                        continue
                    yield text.encode("utf-8", "replace").decode()
                    left -= len(text)
                    if left <= 0:
                        return

    tokenizer = train_bpe(texts(), cfg.tokenizer.vocab_size, progress and sys.stderr.isatty())
    if tokenizer.vocab_size < cfg.tokenizer.vocab_size:
        print(f"the text gives a BPE of {tokenizer.vocab_size} ids, not {cfg.tokenizer.vocab_size}", file=sys.stderr)
    return tokenizer


def _write(
    folder: Path, cfg: DataConfig, sources: list[Source], given: Tokenizer | None, fingerprint: str, progress: bool
) -> None:
    """Fill `folder`: tokenizer, one train folder per source, the validation folder, the manifest last."""
    tokenizer = given or _train_tokenizer(cfg, sources, progress)
    tokenizer.save(folder / "tokenizer")
    rows = []
    with ShardWriter(folder / "val", tokenizer.vocab_size) as val:
        for i, source in enumerate(sources):
            before = _counts(val)
            with (
                _bar(source, "tokenizing", progress) as bar,
                ShardWriter(folder / f"train-{i}", tokenizer.vocab_size) as train,
            ):
                labelled = split(source.documents(bar.update), cfg.val_fraction, cfg.split_seed)
                _tokenize(labelled, tokenizer, train, val)
                if not train.documents:
                    why = f"; not UTF-8 and skipped: {', '.join(source.skipped[:3])}" if source.skipped else ""
                    raise DataError(f"{source.config.path}: no documents with text in it{why}")
                train.close()
            held_out = {key: value - before[key] for key, value in _counts(val).items()}
            rows.append(_source_row(source, _counts(train), held_out))
        if not val.documents:
            what = f"{sources[0].config.path}: the corpus is one document"
            raise DataError(f"{what}; training and validation need at least one each")
        val.close()
    write_json(folder / MANIFEST, _manifest(cfg, tokenizer, fingerprint, rows, _counts(val)))


def _manifest(cfg: DataConfig, tokenizer: Tokenizer, fingerprint: str, rows: list[dict], val: dict[str, int]) -> dict:
    return {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": fingerprint,
        "tokenizer": {
            "kind": cfg.tokenizer.kind,
            "asked": cfg.tokenizer.vocab_size if cfg.tokenizer.kind == "bpe" else None,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
            "fingerprint": tokenizer.fingerprint,
        },
        "split": {"val_fraction": cfg.val_fraction, "seed": cfg.split_seed},
        "train": {key: sum(row["train"][key] for row in rows) for key in ("documents", "tokens", "bytes")},
        "val": val,
        "sources": rows,
    }


def _tokenize(labelled: Iterator[tuple[str, bool]], tokenizer: Tokenizer, train: ShardWriter, val: ShardWriter) -> None:
    for batch in _batches(labelled):
        for (text, held_out), ids in zip(batch, tokenizer.encode_arrays([text for text, _ in batch])):
            if len(ids):
                size = len(text) if text.isascii() else len(text.encode("utf-8", "replace"))
                (val if held_out else train).add(ids, size)


def _batches(labelled: Iterator[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    batch, chars = [], 0
    for item in labelled:
        batch.append(item)
        chars += len(item[0])
        if len(batch) >= _BATCH_DOCUMENTS or chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _counts(writer: ShardWriter) -> dict[str, int]:
    return {"documents": writer.documents, "tokens": writer.tokens, "bytes": writer.bytes}


def _source_row(source: Source, train: dict[str, int], val: dict[str, int]) -> dict:
    return {
        "path": source.config.path,
        "format": source.format,
        "field": source.config.field,
        "weight": source.config.weight,
        "limit": source.config.limit,
        "cut_bytes": source.cut_bytes,
        "train": train,
        "val": val,
        "skipped": list(source.skipped),
        "files": [{"name": f.name, "size": f.size, "sha256": f.sha256} for f in source.files],
    }
