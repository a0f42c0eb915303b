"""`python -m data prepare` and `python -m data info`."""

import argparse
import sys
from pathlib import Path

from data.config import DataConfig, SourceConfig, TokenizerConfig
from data.corpus import Corpus, open_corpus
from data.errors import DataError
from data.prepare import prepare

_EXAMPLE = """example:
  python -m data prepare --source stdlib --tokenizer bpe --vocab-size 2048 --out .cache/data/stdlib
  python -m data prepare --source 'books/*.txt.gz' --source notes.jsonl --weight 3 --weight 1 --field body
  python -m data info .cache/data/stdlib"""


def _parser() -> argparse.ArgumentParser:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m data", description="Text to token shards.", epilog=_EXAMPLE, formatter_class=style
    )
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("prepare", help="text to shards", epilog=_EXAMPLE, formatter_class=style)
    make.add_argument(
        "--source",
        action="append",
        metavar="PATH",
        help="stdlib, a file, folder or glob (text, JSONL, Parquet; .gz .bz2 .xz), or hf:NAME[:CONFIG[:SPLIT]]; "
        "may be given several times (default: stdlib)",
    )
    make.add_argument(
        "--weight", action="append", type=float, metavar="W", help="share of each --source, in order (default: 1)"
    )
    make.add_argument(
        "--field", default="text", help="the text's field in JSONL, Parquet and hf: records (default: text)"
    )
    make.add_argument("--format", default="auto", help="auto, text, jsonl or parquet (default: by suffix)")
    make.add_argument("--limit", type=int, metavar="N", help="at most N documents of each source")
    make.add_argument(
        "--tokenizer", default="bytes", metavar="bytes|bpe|FILE", help="FILE is a tokenizer.json or its folder"
    )
    make.add_argument("--vocab-size", type=int, default=8192, metavar="N", help="ids of the bpe (default: 8192)")
    make.add_argument(
        "--val-fraction", type=float, default=0.02, metavar="F", help="documents held out (default: 0.02)"
    )
    make.add_argument(
        "--split-seed", type=int, default=0, metavar="N", help="seed of the split by document (default: 0)"
    )
    make.add_argument("--out", metavar="DIR", help="where to write (default: a folder below .cache/data)")
    show = commands.add_parser("info", help="check a prepared folder and show what is in it")
    show.add_argument("folder", metavar="DIR")
    return parser


def _config(args: argparse.Namespace) -> DataConfig:
    paths = args.source or ["stdlib"]
    weights = args.weight or [1.0] * len(paths)
    if len(weights) != len(paths):
        raise DataError(f"--weight was given {len(weights)} times for {len(paths)} sources")
    kind = args.tokenizer if args.tokenizer in ("bytes", "bpe") else "file"
    return DataConfig(
        sources=tuple(
            SourceConfig(path, args.field, weight, args.format, args.limit) for path, weight in zip(paths, weights)
        ),
        tokenizer=TokenizerConfig(kind, args.vocab_size, args.tokenizer if kind == "file" else None),
        val_fraction=args.val_fraction,
        split_seed=args.split_seed,
    )


def table(corpus: Corpus) -> str:
    """What a corpus holds: one line per source and side, with documents, tokens, bytes and bytes per token."""
    rows = [("", "documents", "tokens", "bytes", "bytes/token")]
    manifest = corpus.manifest
    sides = [(source["path"], source["train"]) for source in manifest["sources"]] + [("validation", manifest["val"])]
    for name, n in sides:
        ratio = f"{n['bytes'] / n['tokens']:.2f}"
        rows.append((name, f"{n['documents']:,}", f"{n['tokens']:,}", f"{n['bytes']:,}", ratio))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths))) for r in rows]
    for source in manifest["sources"]:
        if source["cut_bytes"]:
            lines.append(f"{source['path']}: cut into documents of about {source['cut_bytes']} bytes")
        if source["skipped"]:
            lines.append(f"{source['path']}: {len(source['skipped'])} files are not UTF-8 and were skipped")
    tok = manifest["tokenizer"]
    lines.append(f"tokenizer {tok['kind']}, {tok['vocab_size']} ids; fingerprint {corpus.fingerprint[:16]}")
    lines.append(str(corpus.dir))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0, 2 for bad input (one line on stderr), 130 when interrupted."""
    args = _parser().parse_args(argv)
    try:
        if args.command == "prepare":
            corpus = prepare(_config(args), out=Path(args.out) if args.out else None)
        else:
            corpus = open_corpus(args.folder)
    except DataError as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was kept", file=sys.stderr)
        return 130
    sys.stdout.write(table(corpus) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
