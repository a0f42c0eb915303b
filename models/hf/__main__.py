"""Command: ``python -m models.hf export RUN DIR`` and ``python -m models.hf import DIR RUN``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from models import zoo
from models.errors import guard
from models.hf.exchange import FORMATS, export_run, import_run
from models.types import count_params

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@guard
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m models.hf",
        description="Exchange checkpoints with Hugging Face.",
        epilog="example: python -m models.hf export runs/quickstart exported",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser(
        "export",
        help="a run to a folder that transformers loads",
        epilog="example: python -m models.hf export runs/quickstart out",
    )
    out.add_argument("run", type=Path, metavar="RUN")
    out.add_argument("folder", type=Path, metavar="DIR", help="a new folder")
    out.add_argument(
        "--format", dest="form", choices=FORMATS, default="auto", help="llama: native; loci: the registered class"
    )
    out.add_argument("--dtype", choices=DTYPES, help="of the weights; default as in the checkpoint")
    out.add_argument("--step", type=int, help="the checkpoint of this step instead of the newest")
    out.add_argument("--allow-foreign", action="store_true", help='permit parts of kind "package.module:Class"')
    into = commands.add_parser(
        "import",
        help="a checkpoint of the Llama family, or of flash-linear-attention (Gated DeltaNet, MoM), to a run",
        epilog="example: python -m models.hf import SmolLM2-135M runs/smollm2",
    )
    into.add_argument("folder", type=Path, metavar="DIR", help="with config.json, safetensors and tokenizer.json")
    into.add_argument("run", type=Path, metavar="RUN", help="a new run folder")
    into.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default float32)")
    args = parser.parse_args(argv)
    if args.command == "import":
        model = import_run(args.folder, args.run, DTYPES[args.dtype])
        print(f"{args.run}: {count_params(model):,} parameters in {model.cfg.n_layers} layers, from {args.folder}")
    else:
        if args.allow_foreign:
            zoo.allow_foreign()
        written = export_run(args.run, args.folder, args.form, args.step, DTYPES.get(args.dtype))
        print(f"{args.folder}: written as {written}")


if __name__ == "__main__":
    sys.exit(main())
